"""Trained weights as files: read back by our reader to the same deltas, and by other programs."""

import errno
import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import load, load_file, save

from tests.helpers.archives import tar_members
from tests.helpers.trained_files import (
    change,
    matrices,
    miniature_shapes,
    model_parts,
    read,
    sdxl_shapes,
)
from tests.unit.test_training_config import MINIATURE_SDXL, plan
from training import export
from training.config import LoraFormat, Method
from training.errors import DiskFull
from training.loop import Trained
from training.progress import History
from weights.formats import write as formats
from weights.formats.types import LoraDelta, Pooling, TokenVectors, TrainedWeights
from weights.formats.write import (
    cog_sdxl_lora,
    hashes,
    kohya_lora,
    write_safetensors,
)

ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
RANK, ALPHA = 4, 2.0


class Model:
    """As much of a TrainableModel as an export asks for."""

    spec, prediction_type = MINIATURE_SDXL, "v_prediction"

    @property
    def components(self):
        return self

    def adaptable(self):
        return model_parts()


def attention_modules(shapes=None) -> dict[str, tuple[int, ...]]:
    modules = (shapes or miniature_shapes()).modules()
    return {m: s for m, s in modules.items() if ".attn" in m and m.endswith(ATTENTION)}


def trained_weights(modules, dora: bool = False) -> TrainedWeights:
    deltas = {}
    for seed, (module, shape) in enumerate(modules.items()):
        down, up = matrices(shape, RANK, seed)
        magnitude = torch.rand(shape[0], 1) + 0.5 if dora else None
        deltas[module] = LoraDelta(down, up, ALPHA, magnitude)
    vectors = {f"text_encoder{k}": torch.randn(2, 64) for k in ("", "_2")}
    return TrainedWeights(
        deltas,
        {},
        False,
        (TokenVectors(("<s0>", "<s1>"), vectors),),
        {"TOK": "<s0><s1>"},
        Pooling.EOS,
        "",
    )


def write(folder, weights: TrainedWeights, **settings):
    made = plan(spec=MINIATURE_SDXL, seed=0, **settings)
    return export.write(Trained(weights, made, History()), Model(), 8, folder)


def same(one: TrainedWeights, other: TrainedWeights) -> None:
    assert one.lora.keys() == other.lora.keys()
    for module, delta in one.lora.items():
        torch.testing.assert_close(change(delta), change(other.lora[module]))
        first, second = delta.dora_scale, other.lora[module].dora_scale
        assert (first is None) == (second is None)
        assert first is None or torch.equal(first, second)
    (ours,), (theirs,) = one.embeddings, other.embeddings
    assert ours.placeholder_tokens == theirs.placeholder_tokens
    for part, vectors in ours.vectors.items():
        assert torch.equal(vectors, theirs.vectors[part])
    assert one.trigger_words == other.trigger_words
    assert one.pooling == other.pooling


def test_the_archive_is_cog_sdxl_s(tmp_path):
    weights = trained_weights(attention_modules())
    files = write(tmp_path, weights)
    assert files.archive == tmp_path / "trained_model.tar"
    assert [p.name for p in tmp_path.iterdir()] == ["trained_model.tar"]
    assert files.exchange == ()
    members = tar_members(files.archive)
    assert list(members) == ["lora.safetensors", "embeddings.pti", "special_params.json"]
    lora = load(members["lora.safetensors"])
    processors = model_parts()["unet"].attn_processors
    matrices_ = [f"to_{x}_lora.{y}.weight" for x in ("q", "k", "v", "out") for y in ("down", "up")]
    assert lora.keys() == {f"{name}.{m}" for name in processors for m in matrices_}
    assert {t.shape[0] for k, t in lora.items() if k.endswith("down.weight")} == {RANK}
    embeddings = load(members["embeddings.pti"])
    assert {k: tuple(t.shape) for k, t in embeddings.items()} == {
        "text_encoders_0": (2, 64),
        "text_encoders_1": (2, 64),
    }
    assert json.loads(members["special_params.json"]) == {"TOK": "<s0><s1>"}
    same(read(files.archive), weights)  # alpha is within `up`, pooling in the header


def test_sdxl_s_archive_has_the_1120_tensors_that_its_loader_asks_for():
    modules = attention_modules(sdxl_shapes())
    few = {m: modules[m] for m in list(modules)[:3]}
    deltas = trained_weights(few)
    tensors = cog_sdxl_lora(deltas, sdxl_shapes())
    assert len(tensors) == 1120
    counts = {
        block: sum(name.startswith(block) for name in tensors)
        for block in ("down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1")
    }
    assert list(counts.values()) == [64, 320, 160, 480, 96]
    name = "up_blocks.0.attentions.2.transformer_blocks.9.attn2.processor.to_k_lora"
    assert tuple(tensors[f"{name}.down.weight"].shape) == (RANK, 2048)
    assert not tensors[f"{name}.up.weight"].any()  # untrained
    scale = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight"
    first = next(iter(deltas.lora.values()))
    torch.testing.assert_close(tensors[scale], first.up * ALPHA / RANK)


def test_ranks_are_filled_up_to_one():
    modules = attention_modules()
    weights = trained_weights(modules)
    module = next(iter(modules))
    small = LoraDelta(*matrices(modules[module], 2), 1.0, None)
    weights = replace(weights, lora={**weights.lora, module: small})
    tensors = cog_sdxl_lora(weights, miniature_shapes())
    assert {t.shape[0] for k, t in tensors.items() if "down.weight" in k} == {RANK}
    name = module.removeprefix("unet.").replace(".attn1.", ".attn1.processor.")
    up, down = tensors[f"{name}_lora.up.weight"], tensors[f"{name}_lora.down.weight"]
    torch.testing.assert_close((up @ down).double(), change(small))


def test_a_word_alone_comes_with_a_lora_without_effect(tmp_path):
    weights = trained_weights({})
    archive = read(write(tmp_path, weights, method=Method.TEXTUAL_INVERSION).archive)
    assert len(archive.lora) == len(attention_modules())
    assert not any(delta.up.any() for delta in archive.lora.values())
    same(replace(archive, lora={}), weights)


def test_a_whole_unet(tmp_path):
    unet = model_parts()["unet"]
    parameters = {f"unet.{k}": v.detach() + 0.25 for k, v in unet.named_parameters()}
    weights = replace(trained_weights({}), parameters=parameters)
    files = write(tmp_path, weights, method=Method.FULL)
    assert next(iter(tar_members(files.archive))) == "unet.safetensors"
    archive = read(files.archive)
    assert archive.parameters.keys() == parameters.keys()
    assert all(torch.equal(archive.parameters[k], v.half()) for k, v in parameters.items())
    same(replace(archive, parameters={}), replace(weights, parameters={}))


def text_modules() -> dict[str, tuple[int, ...]]:
    modules = miniature_shapes().modules()
    return {m: s for m, s in modules.items() if ".self_attn." in m}


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "DoRA"])
def test_an_archive_with_kohya_s_names_holds_everything(tmp_path, dora):
    weights = trained_weights(attention_modules() | text_modules(), dora)
    settings = {"lora_format": LoraFormat.KOHYA, "use_dora": dora, "train_text_encoder": True}
    same(read(write(tmp_path, weights, **settings).archive), weights)


def test_exchange_files(tmp_path):
    weights = trained_weights(attention_modules())
    settings = {"lora_rank": RANK, "lora_alpha": ALPHA, "token_string": "my-cat"}
    files = write(tmp_path, weights, exchange_files=True, **settings)
    word, lora = files.exchange
    assert (word.name, lora.name) == ("my-cat.safetensors", "my-cat_lora.safetensors")
    for module, delta in read(lora).lora.items():
        assert torch.equal(delta.down, weights.lora[module].down)
        assert torch.equal(delta.up, weights.lora[module].up)
        assert delta.alpha == ALPHA  # not folded away
    assert read(lora).description.startswith("kohya LoRA (sgm names)")
    vectors = read(word)
    assert vectors.trigger_words == {"my-cat": "<s0><s1>"}
    assert vectors.pooling is Pooling.EOS
    with safe_open(word, "pt") as file:
        assert set(file.keys()) == {"clip_l", "clip_g"}
        assert file.metadata()["modelspec.architecture"].endswith("/textual-inversion")
    with safe_open(lora, "pt") as file:
        header = file.metadata()
    assert header["ss_network_dim"] == str(RANK)
    assert header["ss_network_alpha"] == str(ALPHA)
    assert header["ss_network_module"] == "networks.lora"
    assert header["ss_base_model_version"] == "miniature"
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert header["modelspec.prediction_type"] == "v"
    assert len(header["sshs_legacy_hash"]) == 8


def test_kohya_s_hashes():
    """As library/train_util.py takes them: of what safetensors' own writer makes."""
    tensors = {"b": torch.randn(700, 700), "a": torch.randn(3).half()}
    made = hashes(tensors, {"ss_v2": "False", "pooling": "eos"})
    theirs = io.BytesIO(save(tensors, {"ss_v2": "False"}))
    size = int.from_bytes(theirs.read(8), "little")
    theirs.seek(8 + size)
    assert made["sshs_model_hash"] == hashlib.sha256(theirs.read()).hexdigest()
    theirs.seek(0x100000)
    assert made["sshs_legacy_hash"] == hashlib.sha256(theirs.read(0x10000)).hexdigest()[:8]


def test_the_same_weights_are_the_same_bytes(tmp_path):
    weights = trained_weights(attention_modules())
    one, other = (write(tmp_path / k, weights, exchange_files=True) for k in "ab")
    for first, second in zip(
        (one.archive, *one.exchange), (other.archive, *other.exchange), strict=True
    ):
        assert first.read_bytes() == second.read_bytes()


def test_safetensors_reads_what_we_write(tmp_path):
    tensors = {
        "odd": torch.randn(3).half(),
        "wide": torch.randn(2, 5),
        "transposed": torch.randn(4, 3).T,
        "scalar": torch.tensor(2.0),
        "brain": torch.randn(1).bfloat16(),
    }
    write_safetensors(tmp_path / "x", tensors, {"ü": "é"})
    found = load_file(tmp_path / "x")
    assert all(torch.equal(found[k], v) for k, v in tensors.items())
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"ü": "é"}


def test_diffusers_reads_kohya_s_names():
    weights = trained_weights(attention_modules() | text_modules())
    tensors = kohya_lora(weights, miniature_shapes())
    unet = model_parts()["unet"]
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=unet.config)
    assert len(state) == 2 * len(weights.lora)
    assert set(alphas.values()) == {ALPHA}


def test_diffusers_reads_the_archive_s_lora():
    """With "unet." before each name, which is how cog-sdxl's files are loaded elsewhere."""
    weights = trained_weights(attention_modules())
    tensors = cog_sdxl_lora(weights, miniature_shapes())
    peft = convert_unet_state_dict_to_peft({f"unet.{k}": v for k, v in tensors.items()})
    for module, delta in weights.lora.items():
        up, down = peft[f"{module}.lora_B.weight"], peft[f"{module}.lora_A.weight"]
        torch.testing.assert_close((up @ down).double(), change(delta), atol=1e-5, rtol=1e-5)


def test_a_full_disk_names_the_folder_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(path: Path, *_: object) -> None:
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(formats, "write_safetensors", fail)
    with pytest.raises(DiskFull, match=r"do not fit into .*: the disk is full; free some room"):
        write(tmp_path, trained_weights(attention_modules()))
    assert list(tmp_path.iterdir()) == []
