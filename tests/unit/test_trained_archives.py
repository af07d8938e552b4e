"""Archives: what is taken out of them, what is refused, and that nothing stays on the disk."""

import errno
import io
import json
import struct
import tarfile
import tempfile
import zipfile

import pytest
import torch
from safetensors.torch import save

from tests.trained_files import (
    NAME,
    cog_embeddings,
    cog_lora_tensors,
    cog_members,
    gz_bytes,
    model_parts,
    read,
    small_lora,
    tar_bytes,
    tar_info,
    zip_bytes,
)
from weights import archive, trained
from weights.errors import BadWeights, NotEnoughDisk
from weights.trained import Pooling

LORA = small_lora()


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


def test_a_full_fine_tuning_brings_a_unet(read_bytes):
    state = {key: value.half() for key, value in model_parts()["unet"].state_dict().items()}
    members = cog_members() | {"unet.safetensors": save(state)}
    del members["lora.safetensors"]
    weights = read_bytes(tar_bytes(members))
    assert weights.unet.keys() == state.keys()
    assert not weights.lora
    assert torch.equal(weights.unet["conv_in.weight"], state["conv_in.weight"])


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
    key = next(iter(matrices)).removesuffix(".processor.to_q_lora.down.weight")
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


def gnu_sparse():
    content = bytearray(tar_bytes({"lora.safetensors": LORA}, tarfile.GNU_FORMAT))
    content[156:157] = b"S"
    return with_checksum(content)


def with_checksum(content):
    """Mend the first header of a tar after a change to it."""
    content = bytearray(content)
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    return bytes(content)


def with_size(field):
    content = bytearray(tar_bytes({"lora.safetensors": LORA}, tarfile.GNU_FORMAT))
    content[124:136] = field
    return with_checksum(content)


def with_pax(name="lora.safetensors", **headers):
    fields = {key.replace("__", "."): value for key, value in headers.items()}
    info = tar_info(name, size=len(LORA), pax_headers=fields)
    return tar_bytes([(info, LORA)])


def bad_pax():
    content = bytearray(with_pax(comment="x" * 50))
    at = content.index(b" comment=")
    content[at - 2 : at] = b"99"
    return bytes(content)


def encrypted():
    content = bytearray(zip_bytes({"lora.safetensors": LORA}))
    content[6] |= 1
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


def zip_link(kind):
    info = zipfile.ZipInfo("lora.safetensors")
    info.external_attr = (kind | 0o777) << 16
    info.create_system = 3
    return zip_bytes([(info, b"/etc/passwd")])


def false_zip_size():
    """A directory that says a member is 1 GB long, which deflate could well make it."""
    content = bytearray(zip_bytes({"lora.safetensors": LORA}))
    at = content.rindex(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", 1_000_000_000)
    return bytes(content)


def links(kind):
    lora = tar_info("lora.safetensors", size=len(LORA))
    return tar_bytes([(lora, LORA), (tar_info("x", kind, linkname="/etc"), b"")])


def named(name):
    return tar_bytes([(tar_info("lora.safetensors", size=len(LORA)), LORA), (tar_info(name), b"")])


def special(content):
    return tar_bytes(cog_members() | {"special_params.json": content})


HOSTILE = {
    "absolute": (named("/etc/passwd"), "points outside of it, '/etc/passwd'"),
    "parent": (named("a/../../x"), "points outside of it"),
    "backslashes": (named("..\\..\\x"), "points outside of it"),
    "drive": (named("C:\\x"), "points outside of it"),
    "zip absolute": (zip_bytes({"/x": b"", "l.safetensors": LORA}), "points outside of it"),
    "zip parent": (zip_bytes({"../x": b"", "l.safetensors": LORA}), "points outside of it"),
    "pax name": (with_pax(path="../../lora.safetensors"), "points outside of it"),
    "symbolic link": (links(tarfile.SYMTYPE), "not a regular file, 'x'"),
    "hard link": (links(tarfile.LNKTYPE), "not a regular file"),
    "pipe": (links(tarfile.FIFOTYPE), "not a regular file"),
    "character device": (links(tarfile.CHRTYPE), "not a regular file"),
    "block device": (links(tarfile.BLKTYPE), "not a regular file"),
    "unknown kind": (links(b"Z"), "not a regular file"),
    "zip link": (zip_link(0o120000), "not a regular file"),
    "zip device": (zip_link(0o020000), "not a regular file"),
    "sparse, GNU": (gnu_sparse(), "not a regular file"),
    "sparse, pax": (with_pax(GNU__sparse__major="1"), "not a regular file"),
    "twice": (
        tar_bytes([("a.safetensors", LORA), ("a.safetensors", LORA)]),
        "two members called 'a.safetensors'",
    ),
    "twice in folders": (
        zip_bytes({"1/lora.safetensors": LORA, "2/lora.safetensors": LORA}),
        "two members called 'lora.safetensors'",
    ),
    "two LoRAs": (
        tar_bytes({"a.safetensors": LORA, "b.safetensors": LORA}),
        "is the second LoRA or UNet",
    ),
    "1001 members": (
        tar_bytes({f"{i}.txt": b"" for i in range(1001)}),
        "more than 1000 members",
    ),
    "zip of 1001": (zip_bytes({f"{i}.txt": b"" for i in range(1001)}), "more than 1000 members"),
    "encrypted": (encrypted(), "is encrypted"),
    "lzma": (zip_bytes({"l.safetensors": LORA}, zipfile.ZIP_LZMA), "a rare zip compression"),
    "false zip size": (false_zip_size(), "expands to more than 200 times its size"),
    "zip cut short": (zip_bytes(cog_members())[:-9], "no valid zip file"),
    "zip start only": (b"PK\x03\x04" + bytes(99), "no valid zip file"),
    "zip, wrong bytes": (
        zip_bytes({"l.safetensors": LORA}, zipfile.ZIP_STORED).replace(LORA[:64], LORA[64:128]),
        "no valid zip file",
    ),
    "tar cut short": (tar_bytes(cog_members())[:3000], "cut short"),
    "tar cut in a header": (tar_bytes({"a.txt": b"a", "b.txt": b""})[:1124], "cut short"),
    "gz cut short": (gz_bytes(tar_bytes(cog_members()))[:-500], "cannot be expanded"),
    "gz of something else": (gz_bytes(LORA * 2), "is no readable tar"),
    "gz noise": (b"\x1f\x8b\x08" + bytes(range(200)), "cannot be expanded"),
    "huge member": (with_size(b"77777777777\0"), "has a member"),
    "member of 2**70": (with_size(b"\x80" + (1 << 70).to_bytes(11, "big")), "has a member"),
    "negative size": (with_size(b"\xff" * 11 + b"\xf0"), "negative size"),
    "pax size": (with_pax(size="9" * 30), "has a member"),
    "pax size text": (with_pax(size="-5"), "unreadable size"),
    "long pax header": (with_pax(comment="x" * 200_000), "outsized extended headers"),
    "long name": (
        tar_bytes({"x" * 200_000: b""}, tarfile.GNU_FORMAT),
        "outsized extended headers",
    ),
    "damaged pax header": (bad_pax(), "damaged pax header"),
    "only a pickle": (tar_bytes({"model.bin": b"x"}), "'model.bin' is a pickle"),
    "nothing useful": (tar_bytes({"a.txt": b"x", "b": b""}), "but 'a.txt', 'b'"),
    "archive in archive": (tar_bytes({"a.tar": tar_bytes(cog_members())}), "but 'a.tar'"),
    "only hidden": (tar_bytes({"._lora.safetensors": LORA}), "has no safetensors file"),
    "empty zip": (zip_bytes({}), "but nothing at all"),
    "a bad member": (tar_bytes({"l.safetensors": LORA[:-8]}), "its member 'l.safetensors'"),
    "params no JSON": (special(b"{"), "no valid JSON"),
    "params bytes": (special(b"\xff\xff"), "no valid JSON"),
    "params deep": (special(b"[" * 100_000), "no valid JSON"),
    "params list": (special(b"[1]"), "is not a JSON object"),
    "params number": (special(b'{"TOK": 1}'), "a value that is no text"),
    "params empty word": (special(b'{" ": "<s0>"}'), "nobody can type"),
    "params control": (special(b'{"a\\u0007": "<s0>"}'), "nobody can type"),
    "params long": (special(b'{"%s": "<s0>"}' % (b"a" * 101)), "nobody can type"),
    "params other tokens": (special(b'{"TOK": "<s0><s7>"}'), "stands for '<s0><s7>'"),
    "params no tokens": (special(b'{"TOK": "a cat"}'), "stands for 'a cat'"),
    "params too large": (special(b" " * 1_000_001), "1000000 are allowed"),
    "no params": (
        tar_bytes({"l.safetensors": LORA, "embeddings.pti": save(cog_embeddings())}),
        "no special_params.json says which word",
    ),
    "params without tokens": (
        tar_bytes({"l.safetensors": LORA, "special_params.json": b'{"TOK": "<s0>"}'}),
        "there are vectors only for nothing",
    ),
}


@pytest.mark.parametrize(("content", "fault"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_archive_is_refused_and_named(read_bytes, tmp_path, content, fault):
    with pytest.raises(BadWeights) as caught:
        read_bytes(content)
    message = str(caught.value)
    assert message.startswith(NAME)
    assert fault in message
    assert message.endswith(".")
    assert str(tmp_path) not in message


def test_bombs_are_stopped_early(read_bytes, monkeypatch):
    monkeypatch.setattr(archive, "FREE_BYTES", 100_000)
    zeros = bytes(3_000_000)
    for content in (gz_bytes(tar_bytes({"x.txt": zeros})), zip_bytes({"l.safetensors": zeros})):
        with pytest.raises(BadWeights, match="expands to more than 200 times its size"):
            read_bytes(content)
    monkeypatch.setattr(archive, "MAX_TOTAL_BYTES", 500_000)
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

    monkeypatch.setattr(trained, "open_safe", cancel)
    with pytest.raises(Cancelled):
        read_bytes(pack(cog_members()))


def test_members_are_written_under_our_names(read_bytes, temporary, monkeypatch):
    seen = []
    original = trained.open_safe

    def spy(path, subject):
        seen.append(path)
        return original(path, subject)

    monkeypatch.setattr(trained, "open_safe", spy)
    read_bytes(tar_bytes({f"a/$(x)/{name}": data for name, data in cog_members().items()}))
    assert {path.name for path in seen} == {"0.safetensors", "1.safetensors"}
    assert {path.parent.parent for path in seen} == {temporary}


def test_a_full_disk_says_so(read_bytes, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(archive, "_take", fail)
    with pytest.raises(NotEnoughDisk, match=f"{NAME} does not fit into .*TMPDIR"):
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
