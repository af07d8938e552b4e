"""Hostile and mistaken files, each with what its refusal has to say: tests of the reader and of the
server share them."""

import io
import json
import pickle
import struct
import tarfile
import zipfile

import pytest
import torch
from safetensors.torch import save

from tests.helpers.trained_files import (
    ATTN2,
    cog_embeddings,
    cog_members,
    entry,
    gz_bytes,
    kohya_name,
    kohya_tensors,
    raw_safetensors,
    small_lora,
    tar_bytes,
    tar_info,
    zip_bytes,
)

LORA = small_lora()


def torch_file(legacy=False):
    stream = io.BytesIO()
    torch.save({"x": torch.ones(2)}, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


class Trap:
    """A pickle that would give the test away."""

    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


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


def nested_headers():
    """Extended headers that describe extended headers, 2,000 of them."""
    (header,) = [with_pax(comment="x")[:1024]]
    return header * 2000 + tar_bytes({"lora.safetensors": LORA})


def sparse_map():
    """A sparse file of format 1.0, whose content begins with a map of a million pieces."""
    numbers = b"1000000\n" + b"0\n" * 2_000_000
    fields = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    info = tar_info("lora.safetensors", size=len(numbers), pax_headers=fields)
    return tar_bytes([(info, numbers)])


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
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG image"),
    "photo": (b"\xff\xd8\xff\xe0" + bytes(99), "a JPEG image"),
    "bzip2": (b"BZh91AY" + bytes(99), "a bzip2 archive"),
    "xz": (b"\xfd7zXZ\0" + bytes(99), "an xz archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(99), "a 7z archive"),
    "rar": (b"Rar!\x1a\x07" + bytes(99), "a RAR archive"),
    "gguf": (b"GGUF" + bytes(99), "a GGUF model"),
}
ARCHIVES = {
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
        "is the second LoRA, UNet or checkpoint",
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
    "pax size text": (with_pax(size="-5"), "negative size"),
    "nested pax headers": (nested_headers(), "outsized extended headers"),
    "sparse, large map": (sparse_map(), "outsized extended headers"),
    "long pax header": (with_pax(comment="x" * 200_000), "outsized extended headers"),
    "long name": (
        tar_bytes({"x" * 200_000: b""}, tarfile.GNU_FORMAT),
        "outsized extended headers",
    ),
    "only a pickle": (tar_bytes({"model.bin": b"x"}), "holds 'model.bin', a pickle"),
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

TO_K = kohya_name(f"unet.{ATTN2}.to_k", sgm=True)
UNFIT = {
    "NaN": (save({k: v * torch.nan for k, v in kohya_tensors(["unet.conv_in"]).items()}), "finite"),
    "LoHa": (
        save({f"{TO_K}.hada_w1_{side}": torch.ones(4, 8) for side in "ab"}),
        "a LoHa (LyCORIS) adapter",
    ),
    "LoKr": (
        save({f"{TO_K}.lokr_w{n}": torch.ones(4, 8) for n in (1, 2)}),
        "a LoKr (LyCORIS) adapter",
    ),
    "LoRA of Stable Diffusion 1.5": (
        save(
            {
                "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
                f".lora_{side}.weight": torch.ones(shape)
                for side, shape in (("down", (4, 768)), ("up", (320, 4)))
            }
        ),
        "it seems to be for Stable Diffusion 1.5",
    ),
    "LoRA of FLUX": (
        save({"lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": torch.ones(8, 4)}),
        "FLUX",
    ),
}
