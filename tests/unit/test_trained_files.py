"""Hostile and mistaken files: each is refused before anything in it is used, and named."""

import pytest
import torch
from safetensors.torch import save

from tests.helpers.hostile_files import CONTAINERS, HEADERS
from tests.helpers.trained_files import (
    NAME,
    WIDTH,
    miniature_shapes,
    read,
    small_lora,
)
from weights.errors import BadWeights
from weights.formats import safetensors_checks
from weights.formats.read import read_trained


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
    length = safetensors_checks.MAX_HEADER_BYTES + 8
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little") + b"{")
        file.truncate(8 + length)
    with pytest.raises(BadWeights, match="a header of 16000008 bytes"):
        read(path)


def test_too_many_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_checks, "MAX_TENSORS", 3)
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
