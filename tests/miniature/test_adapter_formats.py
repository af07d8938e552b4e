"""Every format of trained weights, through the whole engine: equal to stock diffusers with it.

The files are written by diffusers and PEFT themselves, or built by hand as their trainers write
them. Latents before decoding are compared.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from tests.miniature.reference_pipelines import (
    COG_ARCHIVE,
    COG_MEMBERS,
    COG_WORDS,
    KOHYA_CONVOLUTIONS,
    KOHYA_TEXT,
    KOHYA_UNET,
    PARTS,
    READ,
    TOKENS,
    TOLERANCE,
    TYPED,
    File,
    assert_same,
    copy_of,
    draw,
    load_cog,
    load_words,
    lora_file,
    modules_of,
    pool_at_the_end,
    rows,
    weak,
    with_word,
)
from tests.trained_files import (
    WIDTH,
    cog_lora_tensors,
    gz_bytes,
    kohya_name,
    kohya_tensors,
    tar_bytes,
    zip_bytes,
)

# LoRAs that diffusers saved

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [
    *ATTENTION,
    *("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]


def train(model: nn.Module, **options: object) -> None:
    """Leave a LoRA in the model as a training does, but a random one; `options` are PEFT's."""
    model.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 4, **options}))
    randomise(model)


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand(parameter.shape, generator=generator)


def save_with_diffusers(pipeline, folder: Path, rename: bool, header: bool) -> File:
    """As diffusers' training scripts do at their end; PEFT's options go into the header."""
    layers = {}
    for part in PARTS:
        module = getattr(pipeline, part)
        if not hasattr(module, "peft_config"):
            continue
        state = get_peft_model_state_dict(module, adapter_name="default")
        layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(state) if rename else state
        if header:
            layers[f"{part}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
    StableDiffusionXLPipeline.save_lora_weights(folder, **layers)
    name = "pytorch_lora_weights.safetensors"
    return File(name, (folder / name).read_bytes())


UNET_ONLY = {"unet": {"target_modules": ATTENTION}}
ALL_PARTS = {
    "unet": {
        "target_modules": ATTENTION,
        "lora_alpha": 6,
        "rank_pattern": {"attn2.to_k": 2, "attn1.to_v": 3},
        "alpha_pattern": {"attn1.to_q": 1},
    },
    "text_encoder": {"target_modules": TEXT, "lora_alpha": 8},
    "text_encoder_2": {"target_modules": [*TEXT, "fc1"], "r": 3, "lora_alpha": 1},
}
DORA = {"unet": {"target_modules": ATTENTION, "use_dora": True, "lora_alpha": 6}}
SAVED = {  # options by part, whether diffusers renames, whether the header has the options
    "UNet": (UNET_ONLY, True, False),
    "UNet, PEFT names": (UNET_ONLY, False, False),
    "ranks": (
        {"unet": {"target_modules": ATTENTION, "rank_pattern": {"attn2.to_k": 2}}},
        *(True, False),
    ),
    "alpha": ({"unet": {"target_modules": ATTENTION, "lora_alpha": 10}}, True, True),
    "rank-stabilised": ({"unet": {"target_modules": ATTENTION, "use_rslora": True}}, True, True),
    "DoRA": (DORA, True, True),
    "all parts": (ALL_PARTS, True, True),
    "all parts, PEFT names": (ALL_PARTS, False, True),
}


@pytest.mark.parametrize(("options", "rename", "header"), SAVED.values(), ids=SAVED)
def test_saved_by_diffusers(
    stock, pristine, adapted, plain, tmp_path_factory, options, rename, header
):
    folder = tmp_path_factory.mktemp("lora")
    trained = copy_of(pristine)
    for part, peft_options in options.items():
        train(getattr(trained, part), **peft_options)
    file = save_with_diffusers(trained, folder, rename, header)
    stock.load_lora_weights(folder, adapter_name="x")
    stock.set_adapters("x", 0.7)
    assert_same(adapted(file, 0.7), draw(stock), plain())


def test_two_namings_in_one_file_of_diffusers(stock, adapted, plain, tmp_path_factory):
    """convert_state_dict_to_diffusers renames the attention's matrices alone.

    load_lora_weights tells the naming by the first tensor and drops those of the other, so the
    reference is the model that was saved.
    """
    train(stock.unet, target_modules=EVERYTHING)
    folder = tmp_path_factory.mktemp("lora")
    file = save_with_diffusers(stock, folder, rename=True, header=False)
    names = load_file(folder / file.name)
    for end in ("attn1.to_q.lora.down.weight", "proj_in.lora_A.weight"):
        assert any(name.endswith(end) for name in names)
    assert_same(adapted(file), draw(stock), plain())


def old_names() -> dict[str, Tensor]:
    """diffusers until 0.20: attention of the UNet and of both text encoders."""
    tensors = {f"unet.{key}": value for key, value in cog_lora_tensors().items()}
    generator = torch.Generator().manual_seed(1)
    for part in PARTS[1:]:
        for layer in range(3):
            for matrix in ("to_q", "to_k", "to_v", "to_out"):
                key = f"{part}.text_model.encoder.layers.{layer}.self_attn.{matrix}_lora"
                tensors[f"{key}.down.weight"] = torch.randn(4, WIDTH, generator=generator)
                tensors[f"{key}.up.weight"] = torch.randn(WIDTH, 4, generator=generator)
    return weak(tensors)


def test_diffusers_old_names(stock, adapted, plain):
    tensors = old_names()
    stock.load_lora_weights(tensors, adapter_name="x")
    stock.set_adapters("x", 0.8)
    assert_same(adapted(lora_file(tensors), 0.8), draw(stock), plain())


# PEFT's folder, packed

PEFT = {
    "alpha": {"lora_alpha": 8, "alpha_pattern": {"attn1.to_k": 2}, "rank_pattern": {"to_v": 2}},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 6},
    "DoRA": {"use_dora": True, "target_modules": EVERYTHING, "lora_alpha": 2},
}


@pytest.mark.parametrize(("scale", "pack"), [(1.0, zip_bytes), (-0.6, tar_bytes)])
@pytest.mark.parametrize("options", PEFT.values(), ids=PEFT)
def test_pefts_folder(stock, pristine, adapted, plain, tmp_path_factory, options, scale, pack):
    """Stock is PEFT itself: diffusers does not read its folder."""
    folder = tmp_path_factory.mktemp("peft")
    config = LoraConfig(**{"r": 4, "target_modules": ATTENTION, **options})
    trained = get_peft_model(copy.deepcopy(pristine.unet), config)
    randomise(trained)
    trained.save_pretrained(folder)
    members = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= members.keys()
    PeftModel.from_pretrained(stock.unet, folder)  # in place
    with rescale_adapter_scale(stock.unet, scale):
        expected = draw(stock)
    assert_same(adapted(File("adapter", pack(members)), scale), expected, plain())


# kohya

LOCON = KOHYA_UNET + KOHYA_CONVOLUTIONS
KOHYA = {  # modules, alpha, sgm names
    "UNet": (KOHYA_UNET, 2.0, True),
    "no alpha": (KOHYA_UNET, None, True),
    "all parts": (KOHYA_UNET + KOHYA_TEXT, 2.0, True),
    "all parts, diffusers names": (KOHYA_UNET + KOHYA_TEXT, 2.0, False),
    "LoCon": (LOCON, 3.0, True),
    "LoCon, diffusers names": (LOCON, 3.0, False),
}


@pytest.mark.parametrize(("modules", "alpha", "sgm"), KOHYA.values(), ids=KOHYA)
def test_kohya(stock, adapted, plain, modules, alpha, sgm):
    tensors = weak(kohya_tensors(modules, alpha=alpha, sgm=sgm))
    stock.load_lora_weights(tensors)
    assert_same(adapted(lora_file(tensors)), draw(stock), plain())


@pytest.mark.parametrize("scale", [0.35, -0.5, 2.0])
def test_kohya_at_any_scale(stock, adapted, plain, scale):
    tensors = weak(kohya_tensors(KOHYA_UNET + KOHYA_TEXT))
    stock.load_lora_weights(tensors, adapter_name="x")
    stock.set_adapters("x", scale)
    assert_same(adapted(lora_file(tensors), scale), draw(stock), plain())


def test_kohyas_dora(stock, adapted, plain):
    """diffusers leaves `dora_scale` out, but reads the same numbers under PEFT's names."""
    tensors = weak(kohya_tensors(LOCON, alpha=None))
    state = {}
    for module in LOCON:
        name = kohya_name(module, sgm=True)
        weight = stock.unet.get_submodule(module.removeprefix("unet.")).weight.detach()
        magnitude = 1.2 * weight.flatten(1).norm(dim=1)
        tensors[f"{name}.dora_scale"] = magnitude.view(-1, *(1,) * (weight.ndim - 1))
        state |= {
            f"{module}.lora_A.weight": tensors[f"{name}.lora_down.weight"],
            f"{module}.lora_B.weight": tensors[f"{name}.lora_up.weight"],
            f"{module}.lora_magnitude_vector": (
                magnitude if weight.ndim == 2 else magnitude.view(1, -1, 1, 1)
            ),
        }
    stock.load_lora_weights(state)
    assert_same(adapted(lora_file(tensors)), draw(stock), plain())


def test_lycoris_middle_matrices(stock, adapted, plain):
    """diffusers cannot read them: the convolutions are run one after another, as LyCORIS does."""
    tensors = {}
    generator = torch.Generator().manual_seed(4)
    for module in modules_of("conv1", "conv2"):
        convolution = stock.unet.get_submodule(module.removeprefix("unet."))
        out, in_ = convolution.weight.shape[:2]
        down, mid, up = (
            0.15 * torch.randn(shape, generator=generator)
            for shape in ((4, in_, 1, 1), (4, 4, 3, 3), (out, 4, 1, 1))
        )
        name = kohya_name(module, sgm=True)
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_mid.weight": mid,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(8.0),
        }
        convolution.register_forward_hook(_one_after_another(down, mid, up, 8 / 4))
    assert_same(adapted(lora_file(tensors)), draw(stock), plain())


def _one_after_another(down: Tensor, mid: Tensor, up: Tensor, factor: float) -> Callable:
    convolve = nn.functional.conv2d

    def hook(module, inputs, output):
        return output + factor * convolve(convolve(convolve(inputs[0], down), mid, padding=1), up)

    return hook


# cog-sdxl's archive


@pytest.fixture(scope="module")
def cog_latents(pristine):
    pipeline = copy_of(pristine)
    load_cog(pipeline, 0.8)
    return draw(pipeline, READ)


NESTED = "output/flux_train_replicate"  # replicate/flux-fine-tuner
PACKINGS = {
    "tar": COG_ARCHIVE.content,
    "tar.gz": gz_bytes(COG_ARCHIVE.content),
    "zip": zip_bytes(COG_MEMBERS),
    "in folders": tar_bytes(
        {f"{NESTED}/{name}": content for name, content in COG_MEMBERS.items()}
        | {f"{NESTED}/config.yaml": b"job: x", f"{NESTED}/captions/1.txt": b"a TOK"}
    ),
}


@pytest.mark.parametrize("content", PACKINGS.values(), ids=PACKINGS)
def test_cog_sdxls_archive(cog_latents, adapted, plain, content):
    made = adapted(File("trained_model.tar", content), 0.8, prompt=TYPED)
    assert_same(made, cog_latents, plain(TYPED))


def test_cog_sdxls_archive_that_asks_for_the_end_token(stock, cog_latents, adapted, plain):
    load_cog(stock, 0.8)
    pool_at_the_end(stock)
    expected = draw(stock, READ)
    assert (expected - cog_latents).abs().max() > 10 * TOLERANCE
    members = COG_MEMBERS | {"embeddings.pti": save(COG_WORDS, metadata={"pooling": "eos"})}
    made = adapted(File("trained_model.tar", tar_bytes(members)), 0.8, prompt=TYPED)
    assert_same(made, expected, plain(TYPED))


def test_a_word_in_the_negative_prompt(stock, adapted, plain):
    load_cog(stock, 0.8)
    expected = draw(stock, negative_prompt=READ)
    made = adapted(COG_ARCHIVE, 0.8, negative_prompt=TYPED)
    assert_same(made, expected, plain(negative_prompt=TYPED))
    assert_same(made, expected, draw(stock))  # it is not the LoRA alone


@pytest.mark.parametrize("kept", ["", "attn2."], ids=["whole", "partial"])
def test_cog_sdxls_full_fine_tuning(stock, adapted, plain, kept):
    generator = torch.Generator().manual_seed(2)
    state = {
        name: (value + 0.02 * torch.randn(value.shape, generator=generator)).half()
        for name, value in stock.unet.state_dict().items()
        if kept in name
    }
    stock.unet.load_state_dict(state, strict=False)
    load_words(stock, *COG_WORDS.values(), TOKENS)
    members = {**COG_MEMBERS, "unet.safetensors": save(state)}
    del members["lora.safetensors"]
    made = adapted(File("trained_model.tar", tar_bytes(members)), 0.3, prompt=TYPED)
    assert_same(made, draw(stock, READ), plain(TYPED))


# Textual inversions

FIRST, SECOND, ZEROS = rows(10), rows(11), torch.zeros(2, WIDTH)
BY_KOHYA = {"clip_l": FIRST, "clip_g": SECOND}
ONE_VECTOR = {"clip_l": FIRST[0].clone(), "clip_g": SECOND[:1].clone()}
TWO_WORDS = {
    "dog.safetensors": save(BY_KOHYA),
    "cat.safetensors": save({"clip_l": rows(12), "clip_g": rows(13)}),
}
# The file; the word; each encoder's vectors, where a missing one counts as zeros; whether the
# reference pools at the end token.
INVERSIONS = {
    "clip_l and clip_g": (File("my cat", save(BY_KOHYA)), "my cat", FIRST, SECOND, True),
    "one vector": (File("cat", save(ONE_VECTOR)), "cat", FIRST[:1], SECOND[:1], True),
    "first encoder": (File("cat", save({"clip_l": FIRST})), "cat", FIRST, ZEROS, True),
    "text_encoders_0 and _1": (
        *(File("my.safetensors", save(COG_WORDS)), "my", *COG_WORDS.values(), False),
    ),
    "A1111, second encoder": (
        *(File("learned_embeds_2.safetensors", save({"emb_params": SECOND})), "learned_embeds_2"),
        *(ZEROS, SECOND, True),
    ),
    "two words": (File("words.zip", zip_bytes(TWO_WORDS)), "dog", FIRST, SECOND, True),
}


@pytest.mark.parametrize(
    ("file", "word", "first", "second", "at_the_end"), INVERSIONS.values(), ids=INVERSIONS
)
def test_textual_inversion(stock, adapted, plain, file, word, first, second, at_the_end):
    tokens = TOKENS[: len(first)]
    load_words(stock, first, second, tokens)
    if at_the_end:
        pool_at_the_end(stock)
    typed = with_word(word)
    expected = draw(stock, with_word("".join(tokens)))
    assert_same(adapted(file, prompt=typed), expected, plain(typed))


def test_diffusers_two_files(stock, adapted, plain, tmp_path_factory):
    """textual_inversion_sdxl.py writes them, under the word itself: stock reads what was typed."""
    folder = tmp_path_factory.mktemp("words")
    for stem, vectors, number in (("embeds", FIRST, ""), ("embeds_2", SECOND, "_2")):
        save_file({"<toy>": vectors}, folder / f"learned_{stem}.safetensors")
        stock.load_textual_inversion(
            folder,
            weight_name=f"learned_{stem}.safetensors",
            text_encoder=getattr(stock, f"text_encoder{number}"),
            tokenizer=getattr(stock, f"tokenizer{number}"),
        )
    pool_at_the_end(stock)
    members = {path.name: path.read_bytes() for path in folder.iterdir()}
    typed = with_word("<toy>")
    made = adapted(File("words.zip", zip_bytes(members)), prompt=typed)
    assert_same(made, draw(stock, typed), plain(typed))


def test_onetrainers_bundle(stock, adapted, plain):
    """A word inside a LoRA's file."""
    tensors = weak(kohya_tensors(KOHYA_UNET))
    stock.load_lora_weights(tensors, adapter_name="x")
    stock.set_adapters("x", 0.5)
    load_words(stock, FIRST, SECOND, TOKENS)
    pool_at_the_end(stock)
    bundle = {f"bundle_emb.cat.{key}": vectors for key, vectors in BY_KOHYA.items()}
    made = adapted(lora_file(tensors | bundle), 0.5, prompt=with_word("cat"))
    assert_same(made, draw(stock, READ), plain(with_word("cat")))
