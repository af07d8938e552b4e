"""Trained weights in the shared modules: applied, and no trace after."""

import hashlib

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file

from generation import merging
from generation.adapters import Adapter, AdapterSlot, with_own_tokens
from generation.base_models import MINIATURE_SDXL
from tests.trained_files import cog_members, kohya_tensors, tar_bytes
from weights.formats.read import read_trained
from weights.formats.types import ModelShapes, Pooling
from weights.miniature.evaluate import FOLDER
from weights.trigger_words import replace_trigger_words

PARTS = ("unet", "text_encoder", "text_encoder_2")
PROMPT = "a large red circle on a blue background"


@pytest.fixture(scope="module")
def parts(engine):
    return engine._store.load(MINIATURE_SDXL).parts


@pytest.fixture(scope="module")
def slot(parts):
    return AdapterSlot(parts)


def fingerprint(parts) -> list[str]:
    """Of every parameter, and of where it lies."""
    found = []
    for part in PARTS:
        for name, tensor in parts[part].named_parameters():
            content = hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()
            found.append(f"{part}.{name} {tensor.data_ptr()} {content}")
    return [*found, str(parts["text_encoder_2"].text_model.eos_token_id)]


def read(path, parts):
    return read_trained(path, "loras", ModelShapes.of({part: parts[part] for part in PARTS}))


def draw(parts, prompt=PROMPT, **own) -> torch.Tensor:
    """Latents after four steps of a stock pipeline around the parts."""
    scheduler = load_scheduler()
    pipeline = StableDiffusionXLPipeline(**{**parts, **own}, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt,
        num_inference_steps=4,
        output_type="latent",
        generator=torch.Generator("cpu").manual_seed(3),
    ).images


def load_scheduler():
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler.from_pretrained(FOLDER / "scheduler")


@pytest.fixture
def everything(tmp_path, parts):
    """A kohya LoRA of all three parts, and a cog-sdxl archive with words."""
    kohya = tmp_path / "kohya.safetensors"
    modules = ModelShapes.of({part: parts[part] for part in PARTS}).modules()
    save_file(kohya_tensors(modules), kohya)
    archive = tmp_path / "trained_model.tar"
    archive.write_bytes(tar_bytes(cog_members()))
    return [Adapter(read(kohya, parts), 0.8), Adapter(read(archive, parts), -0.5)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("writes", [1, 7, 60, None])
def test_nothing_is_left_however_far_it_came(slot, parts, everything, monkeypatch, error, writes):
    before = fingerprint(parts)
    monkeypatch.setattr(merging, "TRANSIENT_BYTES", 1)  # every module by itself
    write, done = slot._write, []

    def interrupted(names, values):
        write(names, values)
        done.append(names)
        if len(done) == writes:
            raise error

    monkeypatch.setattr(slot, "_write", interrupted)

    def use():
        with torch.inference_mode(), slot.applied(with_own_tokens(everything)):
            assert fingerprint(parts) != before
            raise error

    with pytest.raises(error):
        use()
    assert writes is None or len(done) == writes
    assert fingerprint(parts) == before


def test_what_a_cancelled_take_back_left_is_taken_back_by_the_next(slot, parts, everything):
    before = fingerprint(parts)
    with torch.inference_mode():
        context = slot.applied(everything[:1])
        context.__enter__()  # and never left: as if cancelled inside its `finally`
        assert fingerprint(parts) != before
        with slot.applied([]):
            assert fingerprint(parts) == before


def test_new_words_are_read_and_forgotten(slot, parts, everything):
    archive = [everything[1]]
    (word, tokens), *_ = archive[0].weights.trigger_words.items()
    prompt = replace_trigger_words(f"a photo of {word}", archive[0].weights.trigger_words)
    assert prompt == f"a photo of {tokens}"
    rows = parts["text_encoder"].get_input_embeddings().weight.shape[0]
    with torch.inference_mode(), slot.applied(archive) as own:
        ids = own["tokenizer"](prompt).input_ids
        assert [i for i in ids if i >= rows] == [rows, rows + 1]
        with_word = draw(parts, prompt, **own)
    assert (with_word - draw(parts, prompt)).abs().max() > 0.01
    assert max(parts["tokenizer"](prompt).input_ids) < rows


def test_pooling_is_the_archives(slot, parts, everything):
    from dataclasses import replace

    archive = everything[1]
    prompt = replace_trigger_words("TOK on a blue background", archive.weights.trigger_words)
    pooled = {}
    for pooling in Pooling:
        changed = replace(archive, weights=replace(archive.weights, pooling=pooling))
        with torch.inference_mode(), slot.applied([changed]) as own:
            ids = own["tokenizer_2"](
                prompt, padding="max_length", max_length=77, return_tensors="pt"
            ).input_ids
            pooled[pooling] = parts["text_encoder_2"](ids).text_embeds
    assert (pooled[Pooling.ARGMAX] - pooled[Pooling.EOS]).abs().max() > 1e-3


def test_two_files_words_do_not_collide(everything):
    first, second = with_own_tokens([everything[1], everything[1]])
    assert set(first.weights.trigger_words) == set(second.weights.trigger_words)
    assert not set(first.weights.trigger_words.values()) & set(
        second.weights.trigger_words.values()
    )


@pytest.mark.parametrize(
    ("typed", "read_as"),
    [
        ("a photo of TOK", "a photo of <s0><s1>"),
        ("TOKYO, TOK.", "TOKYO, <s0><s1>."),
        ("tok", "tok"),
        ("TOKTOK (TOK:1.2) TOK_2", "TOKTOK (<s0><s1>:1.2) TOK_2"),
        ("TOK man, TOK", "<s2>, <s0><s1>"),
    ],
)
def test_trigger_words_are_whole_words(typed, read_as):
    words = {"TOK": "<s0><s1>", "TOK man": "<s2>"}
    assert replace_trigger_words(typed, words) == read_as
