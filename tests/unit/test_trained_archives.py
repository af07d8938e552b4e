"""Archives: what is taken out of them, what is refused, and that nothing stays on the disk."""

import errno
import io
import json
import tarfile
import tempfile
import zipfile

import pytest
import torch
from safetensors.torch import save

from tests.helpers.hostile_files import ARCHIVES, LORA, with_checksum
from tests.helpers.trained_files import (
    NAME,
    cog_embeddings,
    cog_lora_tensors,
    cog_members,
    gz_bytes,
    model_parts,
    read,
    tar_bytes,
    zip_bytes,
)
from weights.errors import BadWeights, DiskFull
from weights.formats import read as reader
from weights.formats import trained_archive
from weights.formats.types import Pooling


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def read_bytes(tmp_path, temporary):
    def read_content(content):
        path = tmp_path / "download"
        path.write_bytes(content)
        return read(path)

    return read_content


PACKERS = {
    "tar": tar_bytes,
    "tar, GNU": lambda members: tar_bytes(members, tarfile.GNU_FORMAT),
    "tar.gz": lambda members: gz_bytes(tar_bytes(members)),
    "zip": zip_bytes,
    "zip, stored": lambda members: zip_bytes(members, zipfile.ZIP_STORED),
}


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
@pytest.mark.parametrize("folder", ["", "./", "trained_model/", "a/" * 60, "ü/"])
def test_cog_sdxls_archive_in_every_packing(read_bytes, pack, folder):
    weights = read_bytes(pack({folder + name: data for name, data in cog_members().items()}))
    assert weights.trigger_words == {"TOK": "<s0><s1>"}
    assert weights.pooling is Pooling.ARGMAX
    (words,) = weights.embeddings
    assert words.placeholder_tokens == ("<s0>", "<s1>")
    assert torch.equal(words.vectors["text_encoder"], cog_embeddings()["text_encoders_0"])
    assert torch.equal(words.vectors["text_encoder_2"], cog_embeddings()["text_encoders_1"])
    assert len(weights.lora) == len(cog_lora_tensors()) // 2
    assert weights.description == (
        f"cog-sdxl LoRA, rank 4, {len(weights.lora)} modules; textual inversion, 2 vectors for both"
        " text encoders; trigger words 'TOK'"
    )


@pytest.fixture(scope="module")
def unet_state():
    """Made before `temporary`, in which torch's import would leave a folder."""
    return {key: value.half() for key, value in model_parts()["unet"].state_dict().items()}


def test_a_full_fine_tuning_brings_a_unet(unet_state, read_bytes):
    members = cog_members() | {"unet.safetensors": save(unet_state)}
    del members["lora.safetensors"]
    weights = read_bytes(tar_bytes(members))
    assert weights.parameters.keys() == {f"unet.{key}" for key in unet_state}
    assert not weights.checkpoint
    assert not weights.lora
    assert torch.equal(weights.parameters["unet.conv_in.weight"], unet_state["conv_in.weight"])


def test_a_lone_safetensors_file_is_taken_from_any_folder(read_bytes):
    weights = read_bytes(
        tar_bytes(
            {
                "output/flux_train_replicate/lora.safetensors": LORA,
                "output/flux_train_replicate/config.yaml": b"job: extension",
                "output/flux_train_replicate/captions/1.txt": b"a photo",
                "output/flux_train_replicate/optimizer.pt": b"\x80\x02",
            }
        )
    )
    assert len(weights.lora) == 2
    assert weights.pooling is Pooling.EOS


def test_what_a_mac_adds_is_left_alone(read_bytes):
    extra = {"__MACOSX/._lora.safetensors": b"junk", "._lora.safetensors": b"junk"}
    assert read_bytes(tar_bytes(cog_members() | extra)).lora


def test_a_header_may_name_the_pooling(read_bytes):
    members = cog_members()
    members["embeddings.pti"] = save(cog_embeddings(), metadata={"pooling": "eos"})
    assert read_bytes(tar_bytes(members)).pooling is Pooling.EOS
    members["embeddings.pti"] = save(cog_embeddings(), metadata={"pooling": "first"})
    with pytest.raises(BadWeights, match="pooling 'first'; there are argmax and eos"):
        read_bytes(tar_bytes(members))


def test_pefts_own_folder_brings_its_alpha(read_bytes):
    matrices = cog_lora_tensors()
    end = ".processor.to_q_lora.down.weight"
    key = next(name for name in matrices if name.endswith(end)).removesuffix(end)
    state = {
        f"base_model.model.{key}.to_q.lora_{new}.weight": matrices[
            f"{key}.processor.to_q_lora.{old}.weight"
        ]
        for new, old in (("A", "down"), ("B", "up"))
    }
    config = json.dumps({"r": 4, "lora_alpha": 32}).encode()
    weights = read_bytes(
        zip_bytes({"adapter_model.safetensors": save(state), "adapter_config.json": config})
    )
    assert [delta.alpha for delta in weights.lora.values()] == [32.0]
    assert weights.description.startswith("PEFT LoRA")


@pytest.mark.parametrize(("content", "fault"), ARCHIVES.values(), ids=ARCHIVES)
def test_a_hostile_archive_is_refused_and_named(read_bytes, tmp_path, content, fault):
    with pytest.raises(BadWeights) as caught:
        read_bytes(content)
    message = str(caught.value)
    assert message.startswith(NAME)
    assert fault in message
    assert message.endswith(".")
    assert str(tmp_path) not in message


def test_bombs_are_stopped_early(read_bytes, monkeypatch):
    monkeypatch.setattr(trained_archive, "FREE_BYTES", 100_000)
    zeros = bytes(3_000_000)
    for content in (gz_bytes(tar_bytes({"x.txt": zeros})), zip_bytes({"l.safetensors": zeros})):
        with pytest.raises(BadWeights, match="expands to more than 200 times its size"):
            read_bytes(content)
    monkeypatch.setattr(trained_archive, "MAX_TOTAL_BYTES", 500_000)
    with pytest.raises(BadWeights, match="holds more than 500000 bytes"):
        read_bytes(tar_bytes({"x.txt": zeros}))


def test_zeros_may_be_small(read_bytes):
    """Training words alone leaves the LoRA's up matrices at zero."""
    tensors = {key: value * 0 for key, value in cog_lora_tensors().items()}
    members = cog_members() | {"lora.safetensors": save(tensors)}
    assert read_bytes(gz_bytes(tar_bytes(members))).lora


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
def test_a_cancelled_request_leaves_nothing(read_bytes, temporary, monkeypatch, pack):
    class Cancelled(BaseException):
        pass

    def cancel(*_):
        assert len(list(temporary.glob("*/*"))) == 3
        raise Cancelled

    monkeypatch.setattr(reader, "open_safetensors", cancel)
    with pytest.raises(Cancelled):
        read_bytes(pack(cog_members()))


def test_members_are_written_under_our_names(read_bytes, temporary, monkeypatch):
    seen = []
    original = reader.open_safetensors

    def spy(path, subject):
        seen.append(path)
        return original(path, subject)

    monkeypatch.setattr(reader, "open_safetensors", spy)
    read_bytes(tar_bytes({f"a/$(x)/{name}": data for name, data in cog_members().items()}))
    assert {path.name for path in seen} == {"0.safetensors", "1.safetensors"}
    assert {path.parent.parent for path in seen} == {temporary}


def test_a_full_disk_says_so(read_bytes, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trained_archive, "_take", fail)
    with pytest.raises(DiskFull, match=f"{NAME} does not fit into .*TMPDIR"):
        read_bytes(tar_bytes(cog_members()))


def test_a_tar_need_not_say_that_it_is_one(read_bytes):
    """The format before POSIX has no "ustar" in its header."""
    content = bytearray(tar_bytes({"lora.safetensors": LORA}, tarfile.USTAR_FORMAT))
    content[257:512] = bytes(255)
    assert read_bytes(with_checksum(content)).lora


def test_a_zip_behind_a_safetensors_file_is_not_looked_at(read_bytes):
    stream = io.BytesIO(LORA)
    with zipfile.ZipFile(stream, "a") as added:
        added.writestr("lora.safetensors", LORA)
    with pytest.raises(BadWeights, match="followed by other bytes"):
        read_bytes(stream.getvalue())
