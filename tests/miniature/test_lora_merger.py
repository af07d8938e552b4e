"""Adapters merged into shared networks, and taken back without a trace."""

import hashlib
from dataclasses import replace

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import save_file

from generation import delta_merge
from generation.adapters import Adapter, with_unique_placeholder_tokens
from generation.lora import LoraMerger
from models.components import ModelComponents
from tests.helpers.engines import base_model
from tests.helpers.trained_files import cog_members, kohya_tensors, tar_bytes
from tests.miniature.pipeline_components import to_pipeline
from weights.formats.read import read_trained
from weights.formats.types import ModelShapes, Pooling
from weights.miniature.evaluate import FOLDER
from weights.trigger_words import replace_trigger_words

PROMPT = "a large red circle on a blue background"


@pytest.fixture(scope="module")
def components(engine) -> ModelComponents:
    return base_model(engine).components


@pytest.fixture(scope="module")
def merger(components) -> LoraMerger:
    return LoraMerger(components)


def fingerprint(components) -> list[str]:
    """Return a line for every parameter: its name, address and hash."""
    found = []
    for part, network in components.adaptable().items():
        for name, tensor in network.named_parameters():
            content = hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()
            found.append(f"{part}.{name} {tensor.data_ptr()} {content}")
    return [*found, str(components.text_encoders["text_encoder_2"].text_model.eos_token_id)]


def read(path, components):
    return read_trained(path, "loras", ModelShapes.of(components.adaptable()))


def draw(components, prompt=PROMPT, tokenizers=None) -> torch.Tensor:
    """Return latents after four steps of a stock pipeline of the components."""
    scheduler = EulerDiscreteScheduler.from_pretrained(FOLDER / "scheduler")
    pipeline = StableDiffusionXLPipeline(**to_pipeline(components, tokenizers), scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt,
        num_inference_steps=4,
        output_type="latent",
        generator=torch.Generator("cpu").manual_seed(3),
    ).images


@pytest.fixture
def adapters(tmp_path, components):
    """A kohya LoRA of all three networks, and a cog-sdxl archive with new tokens."""
    kohya = tmp_path / "kohya.safetensors"
    modules = ModelShapes.of(components.adaptable()).modules()
    save_file(kohya_tensors(modules), kohya)
    archive = tmp_path / "trained_model.tar"
    archive.write_bytes(tar_bytes(cog_members()))
    return [Adapter(read(kohya, components), 0.8), Adapter(read(archive, components), -0.5)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("writes", [1, 7, 60, None])
def test_weights_are_restored_wherever_merging_fails(
    merger, components, adapters, monkeypatch, error, writes
):
    before = fingerprint(components)
    monkeypatch.setattr(delta_merge, "MAX_TRANSIENT_BYTES", 1)  # every module by itself
    write, done = merger._write, []

    def interrupted(names, values):
        write(names, values)
        done.append(names)
        if len(done) == writes:
            raise error

    monkeypatch.setattr(merger, "_write", interrupted)

    def use():
        with torch.inference_mode(), merger.applied(with_unique_placeholder_tokens(adapters)):
            assert fingerprint(components) != before
            raise error

    with pytest.raises(error):
        use()
    assert writes is None or len(done) == writes
    assert fingerprint(components) == before


def test_the_next_request_restores_what_a_cancelled_one_could_not(merger, components, adapters):
    before = fingerprint(components)
    with torch.inference_mode():
        context = merger.applied(adapters[:1])
        context.__enter__()  # and never left: as if cancelled inside its `finally`
        assert fingerprint(components) != before
        with merger.applied([]):
            assert fingerprint(components) == before


def test_new_tokens_are_known_only_while_applied(merger, components, adapters):
    archive = [adapters[1]]
    (word, tokens), *_ = archive[0].weights.trigger_words.items()
    prompt = replace_trigger_words(f"a photo of {word}", archive[0].weights.trigger_words)
    assert prompt == f"a photo of {tokens}"
    rows = components.text_encoders["text_encoder"].get_input_embeddings().weight.shape[0]
    with torch.inference_mode(), merger.applied(archive) as tokenizers:
        ids = tokenizers["text_encoder"](prompt).input_ids
        assert [i for i in ids if i >= rows] == [rows, rows + 1]
        with_word = draw(components, prompt, tokenizers)
    assert (with_word - draw(components, prompt)).abs().max() > 0.01
    assert max(components.tokenizers["text_encoder"](prompt).input_ids) < rows


def test_the_archive_decides_where_texts_are_pooled(merger, components, adapters):
    archive = adapters[1]
    prompt = replace_trigger_words("TOK on a blue background", archive.weights.trigger_words)
    pooled = {}
    for pooling in Pooling:
        changed = replace(archive, weights=replace(archive.weights, pooling=pooling))
        with torch.inference_mode(), merger.applied([changed]) as tokenizers:
            ids = tokenizers["text_encoder_2"](
                prompt, padding="max_length", max_length=77, return_tensors="pt"
            ).input_ids
            pooled[pooling] = components.text_encoders["text_encoder_2"](ids).text_embeds
    assert (pooled[Pooling.ARGMAX] - pooled[Pooling.EOS]).abs().max() > 1e-3


def test_placeholder_tokens_of_two_files_do_not_collide(adapters):
    first, second = with_unique_placeholder_tokens([adapters[1], adapters[1]])
    assert set(first.weights.trigger_words) == set(second.weights.trigger_words)
    assert not set(first.weights.trigger_words.values()) & set(
        second.weights.trigger_words.values()
    )


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("a photo of TOK", "a photo of <s0><s1>"),
        ("TOKYO, TOK.", "TOKYO, <s0><s1>."),
        ("tok", "tok"),
        ("TOKTOK (TOK:1.2) TOK_2", "TOKTOK (<s0><s1>:1.2) TOK_2"),
        ("TOK man, TOK", "<s2>, <s0><s1>"),
    ],
)
def test_trigger_words_are_whole_words(typed, expected):
    words = {"TOK": "<s0><s1>", "TOK man": "<s2>"}
    assert replace_trigger_words(typed, words) == expected
