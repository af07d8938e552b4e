"""Prompt embeddings: those of stock diffusers and compel, for texts of any length and content."""

import functools

import pytest
import torch
from compel.embeddings_provider import (
    EmbeddingsProvider,
    ReturnedEmbeddingsType,
    SplitLongTextMode,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from generation.conditioning import CACHED_TEXTS, PromptEmbeddings, PromptEncoder
from generation.text_encoding import MAX_CHUNKS
from models.components import ModelComponents
from tests.helpers.engines import base_model
from tests.helpers.user_weight_fixtures import data_uri, word_archive

TOKENS = 75  # of a chunk, beside its start and end
PLAIN = "a large red circle on a blue background"
SMALL = {"width": 64, "height": 64, "num_inference_steps": 2}


@pytest.fixture
def components(engine) -> ModelComponents:
    return base_model(engine).components


@pytest.fixture
def read(components):
    """`read("a (red:1.3) circle")`: the embeddings of a prompt and an empty negative prompt."""

    @torch.inference_mode()
    def read(
        prompt: str,
        negative: str | None = "",
        encoder: PromptEncoder | None = None,
        state: str = "",
    ) -> PromptEmbeddings:
        encoder = encoder or PromptEncoder()
        return encoder.encode(components, components.tokenizers, prompt, negative, 1, state)

    return read


# Texts may be read in batches of any size, so to rounding.
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def by_compel(pipeline, fragments, weights):
    """Return compel's embeddings, of both encoders."""
    states = []
    for part in ("", "_2"):
        provider = EmbeddingsProvider(
            tokenizer=getattr(pipeline, f"tokenizer{part}"),
            text_encoder=getattr(pipeline, f"text_encoder{part}"),
            truncate=False,
            returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
            split_long_text_mode=SplitLongTextMode.PHRASES,
        )
        states.append(provider.get_embeddings_for_weighted_prompt_fragments([fragments], [weights]))
    return torch.cat(states, dim=-1)


@pytest.mark.parametrize("prompt", [PLAIN, "", r"a \(red\) circle", "a circle, " * 15])
def test_plain_text_is_read_as_the_stock_pipeline_reads_it(read, pristine, prompt):
    typed = prompt.replace("\\", "")
    with torch.inference_mode():
        wanted = pristine.encode_prompt(typed, negative_prompt="blue")
    ours = read(prompt, "blue")
    for mine, stock in zip(
        vars(ours).values(), (wanted[0], wanted[2], wanted[1], wanted[3]), strict=True
    ):
        close(mine, stock)


WEIGHTED = {
    "a (red:1.4) circle": (["a ", "red", " circle"], [1, 1.4, 1]),
    "a red++ circle": (["a ", "red", " circle"], [1, 1.21, 1]),
    "a (red:0.6) circle": (["a ", "red", " circle"], [1, 0.6, 1]),
    "[a red] (circle:0)": (["a red ", "circle"], [1 / 1.1, 0]),
}


@pytest.mark.parametrize("prompt", WEIGHTED)
def test_weights_equal_compels(read, pristine, prompt):
    fragments, weights = WEIGHTED[prompt]
    ours = read(prompt)
    close(ours.prompt_embeds, by_compel(pristine, fragments, weights))
    plain = read("".join(fragments))
    close(ours.pooled_prompt_embeds, plain.pooled_prompt_embeds)
    assert (ours.prompt_embeds - plain.prompt_embeds).abs().max() > 0.01


def test_long_texts_equal_compels(read, pristine):
    text = "a large red circle on a blue background, " * 12
    ours = read(text)
    assert ours.prompt_embeds.shape[1] == 2 * 77
    close(ours.prompt_embeds, by_compel(pristine, [text], [1]))
    for changed in (text + "star", "star " + text):
        assert (read(changed).prompt_embeds - ours.prompt_embeds).abs().max() > 0.01


def test_words_that_look_like_padding_may_stand_anywhere(read):
    """The second tokenizer pads with "!"."""
    texts = ["a circle, " * 25 + "! ! ! ! red", "! (red:0.5) ! [!]", "!" * 200]
    shapes = [read(text).prompt_embeds.shape[1] for text in texts]
    assert shapes == [2 * 77, 77, 3 * 77]
    cut_differently = read("!" + "À" * 38)
    assert cut_differently.prompt_embeds.shape[1] % 77 == 0
    assert torch.isfinite(cut_differently.prompt_embeds).all()


def test_segments_are_encoded_independently(read):
    both = read("a red circle BREAK blue background").prompt_embeds
    first, second = (read(t).prompt_embeds for t in ("a red circle", "blue background"))
    close(both, torch.cat([first, second], dim=1))
    same = read('("a red circle", "blue background").and()').prompt_embeds
    close(both, same)
    half = read('("a red circle", "blue background").and(1, 0.5)').prompt_embeds
    middle = (second + read("").prompt_embeds) / 2
    close(half[:, 77:], middle)


def test_blends_are_means(read):
    first, second = (read(t).prompt_embeds for t in ("a red circle", "a blue star"))
    mixed = read('("a red circle", "a blue star").blend(3, 1)').prompt_embeds
    close(mixed, 0.75 * first + 0.25 * second)
    added = read('("a red circle", "a blue star").blend(1.5, -0.5, no_normalize)').prompt_embeds
    close(added, 1.5 * first - 0.5 * second)


@pytest.mark.parametrize(("prompt", "negative"), [("red", "blue, " * 60), ("red, " * 60, "blue")])
def test_the_shorter_prompt_is_padded_with_an_empty_text(read, prompt, negative):
    found = read(prompt, negative)
    assert found.negative_prompt_embeds is not None
    assert found.prompt_embeds.shape == found.negative_prompt_embeds.shape == (1, 2 * 77, 128)
    short = found.prompt_embeds if prompt == "red" else found.negative_prompt_embeds
    close(short[:, 77:], read("").prompt_embeds)
    unguided = read(prompt, None)
    assert unguided.negative_prompt_embeds is None
    assert unguided.prompt_embeds.shape[1] == (77 if prompt == "red" else 154)


def test_text_beyond_the_limit_is_ignored_and_logged(read, capsys):
    longest = "red " * (MAX_CHUNKS * TOKENS)
    found = read(longest)
    assert found.prompt_embeds.shape[1] == MAX_CHUNKS * 77
    assert "tokens" not in capsys.readouterr().out
    more = read(longest + "(blue:1.2) [star]")
    close(more.prompt_embeds, found.prompt_embeds)
    assert "prompt: only its first 1500 tokens are read" in capsys.readouterr().out


def test_literal_brackets_are_logged(read, capsys):
    encoder = PromptEncoder()
    read("a (red circle", "a [blue", encoder)
    capsys.readouterr()
    found = read("a (red circle", "a [blue", encoder)  # each time, remembered or not
    close(found.prompt_embeds, read(r"a \(red circle").prompt_embeds)
    out = capsys.readouterr().out
    assert "prompt: 1 bracket(s) without a partner are taken literally" in out
    assert "negative_prompt: 1 bracket(s)" in out


@pytest.fixture
def calls(components):
    """Count the forward passes of the second text encoder."""
    seen = []
    text_encoder = components.text_encoders["text_encoder_2"]
    handle = text_encoder.register_forward_pre_hook(lambda *_: seen.append(1))
    yield seen
    handle.remove()


def test_a_text_is_encoded_once(read, calls):
    encoder = PromptEncoder()
    first = read(PLAIN, "blue", encoder)
    once = len(calls)
    again = read(PLAIN, "blue", encoder)
    assert len(calls) == once
    assert torch.equal(first.prompt_embeds, again.prompt_embeds)
    read("blue", PLAIN, encoder)  # either way round
    assert len(calls) == once
    read(PLAIN, "blue", encoder, state="other weights")
    assert len(calls) == 2 * once
    for number in range(CACHED_TEXTS + 1):
        read(f"{number}", "blue", encoder)
    before = len(calls)
    read("blue", "blue", encoder)
    assert len(calls) == before
    read(PLAIN, "blue", encoder)
    assert len(calls) > before


def test_other_weights_encode_texts_again(make):
    """Trigger words and LoRAs of a request have no effect on the next one's embeddings."""
    archive = data_uri(word_archive("TOK", "green"), "trained.tar")
    other = data_uri(word_archive("TOK", "yellow"), "other.tar")
    settings = {"prompt": "a large TOK circle", **SMALL}
    plain = make(**settings)
    green = make(**settings, replicate_weights=archive)
    yellow = make(**settings, replicate_weights=other)
    for again, first in (({}, plain), ({"replicate_weights": archive}, green)):
        close(make(**settings, **again).latents, first.latents)
    assert (green.latents - yellow.latents).abs().max() > 0.05
    assert (green.latents - plain.latents).abs().max() > 0.05


def test_syntax_reaches_the_image(make):
    plain = make(prompt=PLAIN, **SMALL)
    weighted = make(prompt=PLAIN.replace("red", "(red:1.5)"), **SMALL)
    negative = make(prompt=PLAIN, negative_prompt="(star:1.5)", **SMALL)
    refined = make(prompt=PLAIN + ", large" * 60, refine="expert_ensemble_refiner", **SMALL)
    assert (plain.latents - weighted.latents).abs().max() > 0.01
    assert (plain.latents - negative.latents).abs().max() > 0.01
    assert refined.images


PIECES = st.sampled_from(
    [
        "(",
        ")",
        "[",
        "]",
        "\\",
        '"',
        ":1.3)",
        ":0.2)",
        "++",
        "--",
        ",",
        " ",
        " BREAK ",
        "!",
        ".",
        "red",
        "a large circle",
        "<|endoftext|>",
        "<|startoftext|>",
        "<s0>",
        "😀",
        "\x00",
        "\u202e",
        "é",
        "\u200d",
        "\n",
        "!!!!",
        "Ω" * 90,
        ").and()",
        ").blend(1, 0.5)",
        "word " * 90,
    ]
)


@pytest.mark.parametrize("examples", [12, pytest.param(40, marks=pytest.mark.slow)])
def test_any_text_at_all_is_safe(read, examples):
    @settings(max_examples=examples, deadline=None)
    @given(st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=14).map("".join)))
    def check(text):
        found = read(text, text[::-1])
        for values in vars(found).values():
            assert torch.isfinite(values).all()
        assert found.prompt_embeds.shape == found.negative_prompt_embeds.shape

    check()


def test_ten_thousand_words_are_safe(read):
    for text in ("word " * 10_000, "x" * 50_000, "(a:0.5) " * 10_000):
        assert read(text).prompt_embeds.shape[1] <= MAX_CHUNKS * 77
