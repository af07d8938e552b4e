"""Hostile and mistaken files: each is refused before anything in it is used, and named."""

import io
import json
import pickle

import pytest
import torch
from safetensors.torch import save

from tests.trained_files import (
    NAME,
    WIDTH,
    entry,
    miniature_shapes,
    raw_safetensors,
    read,
    small_lora,
)
from weights import safe_file
from weights.errors import BadWeights
from weights.trained import read_trained


def torch_file(legacy=False):
    stream = io.BytesIO()
    torch.save({"x": torch.ones(2)}, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


class Trap:
    """A pickle that would give the test away."""

    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


TWO = bytes(8)  # the bytes of entry()
HEADERS = {
    "length past the end": ((999).to_bytes(8, "little") + b"{}", "is cut short"),
    "length of 2**63": ((1 << 63).to_bytes(8, "little") + b"{}", "is cut short"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "neither safetensors, tar nor zip"),
    "no JSON": (raw_safetensors(b"{broken"), "no valid safetensors"),
    "no UTF-8": (raw_safetensors(b'{"\xff\xfe": 1}'), "no valid safetensors"),
    "nested": (raw_safetensors(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "nested too deep"),
    "huge number": (raw_safetensors(b'{"a":' + b"9" * 5000 + b"}"), "no valid safetensors"),
    "no tensors": (raw_safetensors({}), "holds no tensors"),
    "only metadata": (raw_safetensors({"__metadata__": {"a": "b"}}), "holds no tensors"),
    "metadata numbers": (raw_safetensors({"__metadata__": {"a": 1}, "x": entry()}, TWO), "texts"),
    "metadata list": (raw_safetensors({"__metadata__": [], "x": entry()}, TWO), "texts"),
    "repeated name": (
        raw_safetensors(b'{"x":%b,"x":%b}' % ((json.dumps(entry()).encode(),) * 2), TWO),
        "stands twice",
    ),
    "repeated field": (
        raw_safetensors(b'{"x":{"dtype":"F32","dtype":"F16","shape":[2]}}', TWO),
        "stands twice",
    ),
    "tensor null": (raw_safetensors({"x": None}), "is not described by"),
    "tensor list": (raw_safetensors({"x": [1]}), "is not described by"),
    "field missing": (raw_safetensors({"x": {"dtype": "F32", "shape": [2]}}, TWO), "not described"),
    "field too many": (raw_safetensors({"x": {**entry(), "code": "x"}}, TWO), "not described"),
    "unknown type": (raw_safetensors({"x": entry(dtype="O")}, TWO), "unknown type 'O'"),
    "type no text": (raw_safetensors({"x": entry(dtype=[1])}, TWO), "unknown type"),
    "negative side": (raw_safetensors({"x": entry(shape=[-2])}, TWO), "impossible shape"),
    "side no integer": (raw_safetensors({"x": entry(shape=[2.0])}, TWO), "impossible shape"),
    "side a truth": (raw_safetensors({"x": entry(shape=[True, 2])}, TWO), "impossible shape"),
    "side of 2**64": (raw_safetensors({"x": entry(shape=[2**64, 0])}, TWO), "impossible shape"),
    "shape a text": (raw_safetensors({"x": entry(shape="22")}, TWO), "impossible shape"),
    "nine dimensions": (raw_safetensors({"x": entry(shape=[1] * 8 + [2])}, TWO), "impossible sha"),
    "overflowing": (raw_safetensors({"x": entry(shape=[2**62, 4])}, TWO), "has 8 bytes, and needs"),
    "reversed": (raw_safetensors({"x": entry(offsets=[8, 0])}, TWO), "impossible offsets"),
    "negative offset": (raw_safetensors({"x": entry(offsets=[-8, 0])}, TWO), "impossible offsets"),
    "three offsets": (raw_safetensors({"x": entry(offsets=[0, 8, 8])}, TWO), "impossible offsets"),
    "past the end": (raw_safetensors({"x": entry()}, bytes(4)), "cut short"),
    "starts late": (raw_safetensors({"x": entry(offsets=[8, 16])}, bytes(16)), "leaves a gap"),
    "overlap": (
        raw_safetensors({"x": entry(), "y": entry(offsets=[4, 12])}, bytes(12)),
        "overlaps another",
    ),
    "twice the same": (raw_safetensors({"x": entry(), "y": entry()}, TWO), "overlaps another"),
    "hole": (
        raw_safetensors({"x": entry(), "y": entry(offsets=[12, 20])}, bytes(20)),
        "leaves a gap",
    ),
    "more behind": (raw_safetensors({"x": entry()}, bytes(9)), "followed by other bytes"),
    "wrong count": (raw_safetensors({"x": entry(shape=[3])}, TWO), "has 8 bytes, and needs 12"),
    "surrogate": (raw_safetensors(b'{"\\ud800": 1}'), "is not described by"),
}  # fmt: skip
CONTAINERS = {
    "empty": (b"", "is empty"),
    "zeros": (bytes(2048), "neither safetensors, tar nor zip"),
    "noise": (bytes(range(256)) * 4, "neither safetensors, tar nor zip"),
    "torch zip": (torch_file(), "a pickle, which can run code"),
    "torch legacy": (torch_file(legacy=True), "a pickle, which can run code"),
    "pickle 0": (pickle.dumps(Trap(), protocol=0), "a pickle, which can run code"),
    "pickle 4": (pickle.dumps(Trap(), protocol=4), "a pickle, which can run code"),
    "list pickle 0": (pickle.dumps([Trap()], protocol=0), "a pickle, which can run code"),
    "web page": (b"\n<!DOCTYPE html><html>log in</html>", "a web page"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "a git LFS pointer"),
    "JSON": (b'{"error": "not found"}', "a JSON text"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG picture"),
    "photo": (b"\xff\xd8\xff\xe0" + bytes(99), "a JPEG picture"),
    "bzip2": (b"BZh91AY" + bytes(99), "a bzip2 archive"),
    "xz": (b"\xfd7zXZ\0" + bytes(99), "an xz archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(99), "a 7z archive"),
    "rar": (b"Rar!\x1a\x07" + bytes(99), "a RAR archive"),
    "gguf": (b"GGUF" + bytes(99), "a GGUF model"),
}


@pytest.mark.parametrize(
    ("content", "fault"), [*HEADERS.values(), *CONTAINERS.values()], ids=[*HEADERS, *CONTAINERS]
)
def test_a_hostile_file_is_refused_and_named(tmp_path, content, fault):
    path = tmp_path / "secret.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadWeights) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(NAME)
    assert fault in message
    assert message.endswith(".")
    assert "secret" not in message
    assert len(message) < 700


@pytest.mark.parametrize("suffix", [".pt", ".PTH", ".bin", ".ckpt", ".pkl", ".pickle"])
def test_a_pickles_name_is_enough(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(small_lora())
    with pytest.raises(BadWeights, match="can run code"):
        read(path)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(BadWeights, match=f"{NAME} is a folder"):
        read(tmp_path)


def test_a_missing_file_is_the_callers_mistake(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_trained(tmp_path / "x.safetensors", NAME, miniature_shapes())


def test_a_long_header_is_refused_before_it_is_parsed(tmp_path):
    path = tmp_path / "x.safetensors"
    length = safe_file.MAX_HEADER_BYTES + 8
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little") + b"{")
        file.truncate(8 + length)
    with pytest.raises(BadWeights, match="a header of 16000008 bytes"):
        read(path)


def test_too_many_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_file, "MAX_TENSORS", 3)
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({str(i): torch.ones(1) for i in range(4)}))
    with pytest.raises(BadWeights, match="4 tensors; 3 are allowed"):
        read(path)


@pytest.mark.parametrize("length", [0x8B1F, 0x0280, 0x088B1F])
def test_a_headers_length_may_look_like_another_format(tmp_path, length):
    """Its bytes come first in the file, and may be gzip's or pickle's signature."""
    content = save({"clip_l": torch.ones(1, WIDTH), "clip_g": torch.ones(1, WIDTH)})
    old = int.from_bytes(content[:8], "little")
    path = tmp_path / "x.safetensors"
    header = content[8 : 8 + old].ljust(length)
    assert len(header) == length
    path.write_bytes(length.to_bytes(8, "little") + header + content[8 + old :])
    assert read(path).embeddings
