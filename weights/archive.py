"""The useful files of an archive that a stranger made, in a private folder, under our names.

tar, tar.gz and zip. Nothing in an archive decides where anything is written.
"""

import errno
import gzip
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO
from zipfile import BadZipFile, ZipFile, ZipInfo

from weights.errors import BadWeights, NotEnoughDisk
from weights.recognise import PICKLE_REFUSED, PICKLE_SUFFIXES, READABLE, Container, quote
from weights.tar_members import Readable, read_tar

MAX_MEMBERS = 1000
MAX_TOTAL_BYTES = 12_000_000_000  # SDXL's UNet in fp32 is 10.3 GB
MAX_LORA_BYTES = 4_000_000_000  # rank 256 on every layer in fp32 is 3.4 GB
MAX_TOKENS_BYTES = 1_000_000_000
MAX_JSON_BYTES = 1_000_000
# Trained weights hardly shrink, but matrices of zeros do: small archives may expand as they like.
MAX_RATIO = 200
FREE_BYTES = 64_000_000
CHUNK_BYTES = 1_000_000
MAX_READ_BYTES = 2_000_000

JSON_NAMES = ("special_params.json", "adapter_config.json")


@dataclass(frozen=True)
class Member:
    """One useful file of an archive."""

    name: str  # as the archive calls it; for messages and stems, never a path on disk
    path: Path  # where it is, inside the private folder


@dataclass
class _Unpacking:
    """What has been taken out so far, and where to."""

    subject: str
    folder: Path
    packed_bytes: int
    total_bytes: int = 0
    count: int = 0
    ignored: list[str] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)

    def count_bytes(self, n: int) -> None:
        """Add to the expanded size; refuse an archive that is a bomb."""
        self.total_bytes += n
        if self.total_bytes > MAX_TOTAL_BYTES:
            raise self.bad(f"holds more than {MAX_TOTAL_BYTES} bytes", "Pack only the weights")
        if self.total_bytes > FREE_BYTES and self.total_bytes > MAX_RATIO * self.packed_bytes:
            raise self.bad(
                f"expands to more than {MAX_RATIO} times its size",
                "Pack it again without compression, as tar",
            )

    def bad(self, fault: str, remedy: str) -> BadWeights:
        return BadWeights(f"{self.subject} {fault}. {remedy}.")


@contextmanager
def unpacked(path: Path, container: Container, name: str) -> Iterator[list[Member]]:
    """The useful members of an archive; their files are gone when the block is left.

    Every member is checked, also those that are left alone. Raises BadWeights, or NotEnoughDisk.
    """
    with tempfile.TemporaryDirectory(prefix="trained-weights-") as folder:
        unpacking = _Unpacking(f"{name} (an archive)", Path(folder), path.stat().st_size)
        try:
            if container is Container.ZIP:
                _unpack_zip(path, unpacking)
            else:
                _unpack_tar(path, container, unpacking)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise NotEnoughDisk(
                    f"{name} does not fit into {tempfile.gettempdir()}: free some room there, or"
                    " set TMPDIR to a folder with more"
                ) from error
            raise
        if not any(member.path.suffix == ".safetensors" for member in unpacking.members):
            raise _nothing_useful(unpacking)
        yield unpacking.members


def _unpack_tar(path: Path, container: Container, unpacking: _Unpacking) -> None:
    with path.open("rb") as raw:
        try:
            if container is Container.TAR:
                _take_tar(raw, unpacking)
            else:
                with gzip.GzipFile(fileobj=raw, mode="rb") as expanded:
                    _take_tar(expanded, unpacking)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise unpacking.bad(f"cannot be expanded ({error})", "Get it again") from error


def _take_tar(stream: Readable, unpacking: _Unpacking) -> None:
    for entry in read_tar(stream, unpacking.count_bytes, unpacking.subject):
        _check_name(entry.name, unpacking)
        if not (entry.is_file or entry.is_folder):
            raise _special(entry.name, unpacking)
        if entry.is_file:
            _take(entry, entry.name, entry.size, unpacking)


def _unpack_zip(path: Path, unpacking: _Unpacking) -> None:
    with path.open("rb") as raw:
        try:
            with ZipFile(_SmallReads(raw)) as archive:
                entries = archive.infolist()
                if any(PurePosixPath(entry.filename).name == "data.pkl" for entry in entries):
                    raise BadWeights(f"{unpacking.subject} is {PICKLE_REFUSED}.")
                for entry in entries:
                    _check_zip_entry(entry, unpacking)
                unpacking.count_bytes(sum(entry.file_size for entry in entries))
                for entry in entries:
                    if not entry.is_dir():
                        _take_zip_entry(archive, entry, unpacking)
        # NotImplementedError: a feature of zip that Python has not; RuntimeError: a password;
        # the others: zipfile's response to numbers that make no sense.
        except (
            BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError, ValueError,
            OverflowError, IndexError, struct.error, zipfile.LargeZipFile,
        ) as error:  # fmt: skip
            raise unpacking.bad(
                f"is no valid zip file ({str(error)[:200]})", "Pack it again"
            ) from error


def _check_zip_entry(entry: ZipInfo, unpacking: _Unpacking) -> None:
    _check_name(entry.filename, unpacking)
    mode = entry.external_attr >> 16  # unix file mode; 0 where the zip comes from elsewhere
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _special(entry.filename, unpacking)
    if entry.flag_bits & 0x41:
        raise unpacking.bad("is encrypted", "Pack it without a password")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise unpacking.bad("uses a rare zip compression", "Pack it with deflate, or as tar")


def _take_zip_entry(archive: ZipFile, entry: ZipInfo, unpacking: _Unpacking) -> None:
    if _limit(entry.filename) is None:
        unpacking.ignored.append(entry.filename)
        return
    with archive.open(entry) as stream:  # never gives more than the size it declared
        _take(stream, entry.filename, entry.file_size, unpacking)


def _check_name(name: str, unpacking: _Unpacking) -> None:
    """Count a member, and refuse the whole archive for a name that could lead out of a folder."""
    unpacking.count += 1
    if unpacking.count > MAX_MEMBERS:
        raise unpacking.bad(f"has more than {MAX_MEMBERS} members", "Pack only the weights")
    path = name.replace("\\", "/")
    if path.startswith("/") or path[1:2] == ":" or ".." in path.split("/") or "\0" in path:
        raise unpacking.bad(
            f"has a member that points outside of it, {quote(name)}", "Pack it with plain names"
        )


def _special(name: str, unpacking: _Unpacking) -> BadWeights:
    return unpacking.bad(
        f"has a member that is not a regular file, {quote(name)}",
        "Pack it without links, devices and sparse files",
    )


def _limit(name: str) -> int | None:
    """How large a member may be, in bytes; None for one that is left alone."""
    path = PurePosixPath(name.replace("\\", "/"))
    if any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
        return None
    if path.name in JSON_NAMES:
        return MAX_JSON_BYTES
    if path.suffix.lower() == ".pti":
        return MAX_TOKENS_BYTES
    if path.suffix.lower() == ".safetensors":
        return MAX_TOTAL_BYTES if "unet" in path.name else MAX_LORA_BYTES
    return None


def _take(stream: Readable, name: str, size: int, unpacking: _Unpacking) -> None:
    limit = _limit(name)
    if limit is None:
        unpacking.ignored.append(name)
        return
    if size > limit:
        raise unpacking.bad(
            f"has a member {quote(name)} of {size} bytes; {limit} are allowed",
            "Save the weights in float16",
        )
    base = PurePosixPath(name.replace("\\", "/")).name
    if any(
        PurePosixPath(other.name.replace("\\", "/")).name == base for other in unpacking.members
    ):
        raise unpacking.bad(f"has two members called {quote(base)}", "Pack the one that you mean")
    suffix = ".json" if base.endswith(".json") else ".safetensors"  # a .pti is safetensors too
    path = unpacking.folder / f"{len(unpacking.members)}{suffix}"
    with path.open("xb") as file:
        while chunk := stream.read(CHUNK_BYTES):
            file.write(chunk)
    if path.stat().st_size != size:
        raise unpacking.bad(f"is cut short in {quote(name)}", "Get it again")
    unpacking.members.append(Member(name, path))


def _nothing_useful(unpacking: _Unpacking) -> BadWeights:
    names = [*unpacking.ignored, *(member.name for member in unpacking.members)]
    pickles = [name for name in names if name.lower().endswith(PICKLE_SUFFIXES)]
    if pickles:
        return BadWeights(f"{unpacking.subject}: {quote(pickles[0])} is {PICKLE_REFUSED}.")
    shown = ", ".join(quote(name) for name in names[:8]) or "nothing at all"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return unpacking.bad(f"has no safetensors file in it, but {shown}{more}", READABLE)


class _SmallReads:
    """A file that refuses to hand out much at once: zipfile reads a whole directory in one go."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, n: int = -1) -> bytes:
        if n > MAX_READ_BYTES:
            raise BadZipFile("its list of members is too long")
        return self._file.read(MAX_READ_BYTES if n < 0 else n)
