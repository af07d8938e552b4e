"""Whatever a file holds, it is read or refused with BadWeights: never another exception."""

import json
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from tests.helpers.trained_files import (
    ATTN2,
    WIDTH,
    entry,
    gz_bytes,
    kohya_name,
    raw_safetensors,
    read,
    small_lora,
    tar_bytes,
    zip_bytes,
)
from weights.errors import BadWeights
from weights.formats.types import TrainedWeights

FUZZ = settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
WORDS = save({"text_encoders_0": torch.ones(1, WIDTH), "text_encoders_1": torch.ones(1, WIDTH)})
MEMBERS = {
    "lora.safetensors": small_lora(),
    "embeddings.pti": WORDS,
    "special_params.json": b'{"TOK": "<s0>"}',
}
VALID = {
    "lora": small_lora(),
    "words": WORDS,
    "tar": tar_bytes(MEMBERS),
    "pax": tar_bytes({"ü" * 80 + "/" + name: data for name, data in MEMBERS.items()}),
    "gz": gz_bytes(tar_bytes(MEMBERS)),
    "zip": zip_bytes(MEMBERS),
}


def read_or_refuse(folder, content):
    path = folder / "x.safetensors"
    path.write_bytes(content)
    with suppress(BadWeights):
        assert isinstance(read(path), TrainedWeights)


def test_the_seeds_are_valid(tmp_path):
    for content in VALID.values():
        (tmp_path / "x").write_bytes(content)
        assert read(tmp_path / "x")


@FUZZ
@given(start=st.sampled_from([b"", b"PK\x03\x04", b"\x1f\x8b\x08", b"\x40\0\0\0\0\0\0\0{"]),
       rest=st.binary(max_size=2000))  # fmt: skip
def test_noise(tmp_path, start, rest):
    read_or_refuse(tmp_path, start + rest)


@pytest.mark.parametrize("seed", VALID)
@FUZZ
@given(data=st.data())
def test_valid_files_with_bytes_changed(tmp_path, seed, data):
    content = bytearray(VALID[seed])
    # Headers stand at the start; a zip's directory at the end.
    places = st.one_of(
        st.integers(0, min(2000, len(content) - 1)),
        st.integers(max(0, len(content) - 400), len(content) - 1),
        st.integers(0, len(content) - 1),
    )
    for place in data.draw(st.lists(places, max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    read_or_refuse(tmp_path, bytes(content[:cut]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
NAME_K = kohya_name(f"unet.{ATTN2}.to_k", True)
KEYS = st.sampled_from(
    [
        *(f"{NAME_K}.{end}" for end in ("lora_down.weight", "lora_up.weight", "lora_mid.weight")),
        *(f"{NAME_K}.{end}" for end in ("alpha", "dora_scale", "hada_w1_a")),
        f"unet.{ATTN2}.to_k.lora_A.weight", f"unet.{ATTN2}.to_k.lora_magnitude_vector",
        "clip_l", "clip_g", "text_encoders_0", "text_encoders_1", "emb_params", "<toy>",
        "bundle_emb.a.clip_l", "bundle_emb.a.clip_g", "bundle_emb.", "conv_in.bias", "",
    ]
)  # fmt: skip


@FUZZ
@given(
    header=st.dictionaries(
        KEYS | st.text(max_size=8) | st.just("__metadata__"),
        JSON
        | st.fixed_dictionaries(
            {"dtype": st.sampled_from(["F32", "U8", "X"]), "shape": JSON, "data_offsets": JSON}
        )
        | st.just(entry()),
        max_size=4,
    ),
    data=st.binary(max_size=16),
)
def test_headers_of_any_json(tmp_path, header, data):
    read_or_refuse(tmp_path, raw_safetensors(json.dumps(header).encode(), data))


SHAPES = st.lists(st.sampled_from([0, 1, 2, 4, WIDTH, 2 * WIDTH]), max_size=5)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64])


@FUZZ
@given(
    tensors=st.dictionaries(KEYS, st.tuples(SHAPES, DTYPES), min_size=1, max_size=6),
    metadata=st.none()
    | st.dictionaries(st.sampled_from(["lora_adapter_metadata", "pooling"]), JSON.map(json.dumps)),
)
def test_known_names_of_any_shape(tmp_path, tensors, metadata):
    content = {
        key: torch.ones([min(side, 8) if len(shape) > 3 else side for side in shape], dtype=dtype)
        for key, (shape, dtype) in tensors.items()
    }
    read_or_refuse(tmp_path, save(content, metadata=metadata))


@FUZZ
@given(special=JSON, config=JSON)
def test_archives_with_any_json(tmp_path, special, config):
    members = MEMBERS | {
        "special_params.json": json.dumps(special).encode(),
        "adapter_config.json": json.dumps(config).encode(),
    }
    read_or_refuse(tmp_path, tar_bytes(members))
