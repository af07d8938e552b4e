"""Formats of trained weights with new tokens, through the whole engine: equal to stock diffusers.

cog-sdxl's archives and textual inversions; latents before decoding are compared.
"""

import pytest
import torch
from safetensors.torch import save, save_file

from tests.helpers.trained_files import (
    WIDTH,
    gz_bytes,
    kohya_tensors,
    tar_bytes,
    zip_bytes,
)
from tests.miniature.reference_pipelines import (
    COG_ARCHIVE,
    COG_MEMBERS,
    COG_WORDS,
    KOHYA_UNET,
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
    pool_at_the_end,
    rows,
    weak,
    with_word,
)

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
