"""The members of an archive that a stranger made: tar, tar.gz and zip, read and never extracted.

Nothing in an archive decides where anything is written. What is wanted of it, and in which words it
is refused, is up to the caller: the weights that people bring, and the photos of a training.
"""

import errno
import gzip
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from zipfile import BadZipFile, ZipFile, ZipInfo

from weights.recognise import Container, quote
from weights.tar_members import Complaint, Readable, read_tar

CHUNK_BYTES = 1_000_000
MAX_READ_BYTES = 4_000_000  # 10,000 members with long names

# NotImplementedError: a feature of zip that Python has not; RuntimeError: a password; the others:
# zipfile's response to numbers that make no sense.
_ZIP_ERRORS = (
    BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError, ValueError,
    OverflowError, IndexError, struct.error, zipfile.LargeZipFile,
)  # fmt: skip
_GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)


@dataclass(frozen=True)
class Limits:
    """How much an archive may hold, every member counted, also those that nobody wants."""

    members: int
    total_bytes: int  # expanded
    ratio: int  # of expanded to packed bytes
    free_bytes: int  # may be expanded whatever the ratio
    less: str  # the remedy for one that holds too much


@dataclass(frozen=True)
class OpenMember:
    """One regular file of an archive; readable until the next one is asked for."""

    name: str  # as the archive calls it; for messages, never a path on disk
    size: int  # bytes, as declared; no more than these are ever read
    _open: Callable[[], AbstractContextManager[Readable]]
    _bad: Complaint

    def save(self, path: Path) -> None:
        """Write the content to a file that does not exist yet."""
        with self._open() as stream, path.open("xb") as file:
            while chunk := stream.read(CHUNK_BYTES):
                file.write(chunk)
        if path.stat().st_size != self.size:
            raise self._bad(f"is cut short in {quote(self.name)}", "Get it again")


@dataclass
class _Tally:
    """What has been read so far; refuses an archive that is a bomb, or leads out of its folder."""

    limits: Limits
    packed_bytes: int
    bad: Complaint
    total_bytes: int = 0
    members: int = 0

    def count_bytes(self, n: int) -> None:
        self.total_bytes += n
        limits = self.limits
        if self.total_bytes > limits.total_bytes:
            raise self.bad(f"holds more than {limits.total_bytes} bytes", limits.less)
        bounded = self.total_bytes > limits.free_bytes
        if bounded and self.total_bytes > limits.ratio * self.packed_bytes:
            raise self.bad(
                f"expands to more than {limits.ratio} times its size",
                "Pack it again without compression, as tar",
            )

    def count_member(self, name: str, regular: bool) -> None:
        """Refuse the whole archive for one name that could lead out of a folder."""
        self.members += 1
        if self.members > self.limits.members:
            raise self.bad(f"has more than {self.limits.members} members", self.limits.less)
        path = name.replace("\\", "/")
        if path.startswith("/") or path[1:2] == ":" or ".." in path.split("/") or "\0" in path:
            raise self.bad(
                f"has a member that points outside of it, {quote(name)}", "Pack it with plain names"
            )
        if not regular:
            raise self.bad(
                f"has a member that is not a regular file, {quote(name)}",
                "Pack it without links, devices and sparse files",
            )


@contextmanager
def disk_full_is(error: Callable[[], Exception]) -> Iterator[None]:
    """Raise this error where writing finds the disk full."""
    try:
        yield
    except OSError as found:
        if found.errno == errno.ENOSPC:
            raise error() from found
        raise


def read_members(
    path: Path,
    container: Container,
    limits: Limits,
    bad: Complaint,
    check_zip: Callable[[list[str]], None],
) -> Iterator[OpenMember]:
    """Every regular file of the archive, in its order; a zip's list is checked before the first.

    Raises what `bad` makes of a fault and its remedy. `check_zip` hears a zip's names first of all.
    """
    with path.open("rb") as raw:
        tally = _Tally(limits, path.stat().st_size, bad)
        match container:
            case Container.ZIP:
                yield from _read_zip(raw, tally, check_zip)
            case Container.TAR:
                yield from _read_tar(raw, tally)
            case Container.TAR_GZ:
                with gzip.GzipFile(fileobj=raw, mode="rb") as expanded:
                    yield from _read_tar(_Guarded(expanded, _gzip_faults, bad), tally)
            case _:
                raise AssertionError(f"{container} is no archive")


def _read_tar(stream: Readable, tally: _Tally) -> Iterator[OpenMember]:
    for entry in read_tar(stream, tally.count_bytes, tally.bad):
        tally.count_member(entry.name, regular=entry.is_file or entry.is_folder)
        if entry.is_file:
            yield OpenMember(entry.name, entry.size, _already_open(entry), tally.bad)


def _already_open(stream: Readable) -> Callable[[], AbstractContextManager[Readable]]:
    return lambda: nullcontext(stream)


def _read_zip(
    raw: IO[bytes], tally: _Tally, check_zip: Callable[[list[str]], None]
) -> Iterator[OpenMember]:
    with _zip_faults(tally.bad):
        archive = ZipFile(_SmallReads(raw))
    with archive:
        entries = archive.infolist()
        check_zip([entry.filename for entry in entries])
        for entry in entries:
            _check_zip_entry(entry, tally)
        tally.count_bytes(sum(entry.file_size for entry in entries))
        for entry in entries:
            if not entry.is_dir():
                yield _zip_member(archive, entry, tally.bad)


def _zip_member(archive: ZipFile, entry: ZipInfo, bad: Complaint) -> OpenMember:
    @contextmanager
    def opened() -> Iterator[Readable]:
        with _zip_faults(bad):
            stream = archive.open(entry)  # never gives more than the size it declared
        with stream:
            yield _Guarded(stream, _zip_faults, bad)

    return OpenMember(_zip_name(entry), entry.file_size, opened, bad)


def _zip_name(entry: ZipInfo) -> str:
    """macOS writes names in UTF-8 and does not say so; zipfile then reads them as code page 437."""
    if entry.flag_bits & 0x800:
        return entry.filename
    try:
        return entry.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return entry.filename


def _check_zip_entry(entry: ZipInfo, tally: _Tally) -> None:
    mode = entry.external_attr >> 16  # unix file mode; 0 where the zip comes from elsewhere
    regular = stat.S_IFMT(mode) in (0, stat.S_IFREG, stat.S_IFDIR)
    tally.count_member(_zip_name(entry), regular)
    if entry.flag_bits & 0x41:
        raise tally.bad("is encrypted", "Pack it without a password")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise tally.bad("uses a rare zip compression", "Pack it with deflate, or as tar")


@contextmanager
def _zip_faults(bad: Complaint) -> Iterator[None]:
    try:
        yield
    except _ZIP_ERRORS as error:
        raise bad(f"is no valid zip file ({str(error)[:200]})", "Pack it again") from error


@contextmanager
def _gzip_faults(bad: Complaint) -> Iterator[None]:
    try:
        yield
    except _GZIP_ERRORS as error:
        raise bad(f"cannot be expanded ({error})", "Get it again") from error


@dataclass
class _Guarded:
    """A stream whose decoder's errors become ours."""

    stream: Readable
    faults: Callable[[Complaint], AbstractContextManager[None]]
    bad: Complaint

    def read(self, n: int, /) -> bytes:
        with self.faults(self.bad):
            return self.stream.read(n)


class _SmallReads:
    """A file that refuses to hand out much at once: zipfile reads a whole directory in one go."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, n: int = -1) -> bytes:
        if n > MAX_READ_BYTES:
            raise BadZipFile("its list of members is too long")
        return self._file.read(MAX_READ_BYTES if n < 0 else n)
