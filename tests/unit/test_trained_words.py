"""Textual inversions of every layout, their trigger words and placeholder tokens."""

import pytest
import torch
from safetensors.torch import save, save_file

from tests.helpers.trained_files import (
    ATTN1,
    NAME,
    WIDTH,
    cog_embeddings,
    kohya_tensors,
    miniature_shapes,
    read,
    sdxl_shapes,
    tar_bytes,
    zip_bytes,
)
from weights.errors import BadWeights
from weights.formats.types import ModelShapes, Pooling

TWO = torch.arange(2.0 * WIDTH).reshape(2, WIDTH)


def read_as(folder, name, tensors, shapes=None):
    save_file({key: rows.clone() for key, rows in tensors.items()}, folder / name)
    return read(folder / name, shapes)


def test_the_exchange_format_is_called_by_its_file(tmp_path):
    weights = read_as(tmp_path, "my cat.safetensors", {"clip_l": TWO, "clip_g": TWO + 1})
    assert weights.trigger_words == {"my cat": "<s0><s1>"}
    (words,) = weights.embeddings
    assert words.placeholder_tokens == ("<s0>", "<s1>")
    assert torch.equal(words.vectors["text_encoder"], TWO)
    assert torch.equal(words.vectors["text_encoder_2"], TWO + 1)
    assert weights.pooling is Pooling.EOS
    assert weights.description == (
        "textual inversion, 2 vectors for both text encoders; trigger words 'my cat'"
    )


def test_cog_sdxls_file_alone_is_pooled_its_way(tmp_path):
    save_file(cog_embeddings(3), tmp_path / "embeddings.safetensors")
    weights = read(tmp_path / "embeddings.safetensors")
    assert weights.pooling is Pooling.ARGMAX
    assert weights.trigger_words == {"embeddings": "<s0><s1><s2>"}


@pytest.mark.parametrize(("width", "encoder"), [(768, "text_encoder"), (1280, "text_encoder_2")])
@pytest.mark.parametrize("key", ["<cat-toy>", "emb_params", "string_to_param.*", "*"])
def test_a_lone_tensor_is_placed_by_its_width(tmp_path, key, width, encoder):
    rows = torch.ones(3, width)
    weights = read_as(tmp_path, "toy.safetensors", {key: rows}, sdxl_shapes())
    assert torch.equal(weights.embeddings[0].vectors[encoder], rows)
    named = {"<cat-toy>": "<s0><s1><s2>"} if key == "<cat-toy>" else {}
    assert weights.trigger_words == {**named, "toy": "<s0><s1><s2>"}
    assert f"3 vectors for {encoder} only" in weights.description


def test_one_vector_may_come_flat(tmp_path):
    weights = read_as(tmp_path, "learned_embeds_2.safetensors", {"<toy>": torch.ones(WIDTH)})
    assert weights.embeddings[0].vectors["text_encoder_2"].shape == (1, WIDTH)


def test_diffusers_two_files_become_one_word(tmp_path):
    path = tmp_path / "x.zip"
    path.write_bytes(
        zip_bytes(
            {
                "learned_embeds.safetensors": save({"<toy>": TWO}),
                "learned_embeds_2.safetensors": save({"<toy>": TWO + 1}),
            }
        )
    )
    weights = read(path)
    assert weights.trigger_words == {"<toy>": "<s0><s1>"}
    assert torch.equal(weights.embeddings[0].vectors["text_encoder"], TWO)
    assert torch.equal(weights.embeddings[0].vectors["text_encoder_2"], TWO + 1)


def bundle(*words, rows=TWO):
    return {
        f"bundle_emb.{word}.{key}": rows.clone() for word in words for key in ("clip_l", "clip_g")
    }


def test_a_lora_may_bring_words(tmp_path):
    tensors = kohya_tensors([f"unet.{ATTN1}.to_q"]) | bundle("cat", "v1.5 dog")
    weights = read_as(tmp_path, "x.safetensors", tensors)
    assert weights.trigger_words == {"cat": "<s0><s1>", "v1.5 dog": "<s2><s3>"}
    assert [words.placeholder_tokens for words in weights.embeddings] == [
        ("<s0>", "<s1>"),
        ("<s2>", "<s3>"),
    ]
    assert len(weights.lora) == 1


def test_several_words_in_one_archive_have_their_own_tokens(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(
        tar_bytes(
            {
                "b.safetensors": save({"clip_l": TWO[:1].clone(), "clip_g": TWO[:1].clone()}),
                "a.safetensors": save({"clip_l": TWO.clone(), "clip_g": TWO.clone()}),
            }
        )
    )
    assert read(path).trigger_words == {"a": "<s0><s1>", "b": "<s2>"}


def test_a_model_with_one_encoder_takes_its_words(tmp_path):
    shapes = ModelShapes(
        {k: v for k, v in miniature_shapes().parameters.items() if "text_encoder_2" not in k}
    )
    weights = read_as(tmp_path, "x.safetensors", {"emb_params": TWO}, shapes)
    assert weights.embeddings[0].vectors.keys() == {"text_encoder"}


UNFIT = {
    "other width": ({"clip_l": torch.ones(2, 768), "clip_g": TWO}, "width 768 for text_encoder"),
    "one encoder's width": ({"x": torch.ones(2, 1024)}, "be for Stable Diffusion 2"),
    "which encoder": ({"x": TWO}, "does not say which text encoder"),
    "other counts": ({"clip_l": TWO, "clip_g": TWO[:1]}, "2 and 1 vectors"),
    "twice one encoder": ({"clip_l": TWO, "text_encoders_0": TWO}, "twice for one encoder"),
    "outputs": ({"clip_l": TWO, "clip_g": TWO, "clip_g_out": TWO}, "an output embedding"),
    "76 vectors": ({"clip_l": torch.ones(76, WIDTH)}, "1 to 75 rows"),
    "three dimensions": ({"clip_l": TWO[None]}, "1 to 75 rows"),
    "scalar": ({"clip_l": torch.tensor(1.0)}, "1 to 75 rows"),
    "integers": ({"clip_l": TWO.long()}, "of type I64"),
    "nan": ({"clip_l": TWO * torch.nan}, "not finite"),
    "no rows": ({"clip_l": TWO[:0]}, "is empty"),
    "two nameless": ({"string_to_param.a": TWO, "string_to_param.b": TWO}, "2 words in an old"),
    "bundle without a word": ({"bundle_emb.clip_l": TWO}, "an unknown name"),
    "bundle of one more": ({"bundle_emb.a.t5": TWO}, "an unknown name"),
    "bundled bell": (bundle("a\u0007"), "nobody can type"),
    "bundled space": (bundle(" "), "nobody can type"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "fault"), UNFIT.values(), ids=UNFIT)
def test_words_that_do_not_fit_are_refused(tmp_path, tensors, fault):
    with pytest.raises(BadWeights) as caught:
        read_as(tmp_path, "x.safetensors", tensors)
    assert str(caught.value).startswith(NAME)
    assert fault in str(caught.value)
    assert str(caught.value).endswith(".")


def test_two_words_of_one_name_are_refused(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(
        tar_bytes(
            {
                "a.safetensors": save({"clip_l": TWO.clone(), "clip_g": TWO.clone()}),
                "b.safetensors": save(bundle("a")),
            }
        )
    )
    with pytest.raises(BadWeights, match="two textual inversions called 'a'"):
        read(path)
