"""Read an untrusted tar, tar.gz or zip member by member; nothing is ever extracted by its name.

For trained weights (`weights.formats.trained_archive`) and photos (`preprocess.archive`):

    with path.open("rb") as file:
        container = find_archive(file.read(512))        # None: not an archive
    try:
        for member in read_members(path, container, limits):
            if wanted(member.name, member.size):
                member.save(folder / str(n))            # under a name of yours
    except ArchiveError as error:
        raise BadArchive(f"{label} {error.fault}. {error.remedy}.") from error

Every member is checked and counts towards the limits, wanted or not.
"""

import gzip
import io
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import IO, Self
from zipfile import BadZipFile, ZipFile, ZipInfo

from weights.messages import quote

CHUNK_BYTES = 1_000_000
MAX_ZIP_DIRECTORY_BYTES = 4_000_000  # 10,000 members with long names
MAX_TAR_HEADER_BYTES = 100_000  # of one member, extended headers (pax, GNU long names) included
_TAR_BUFFER_BYTES = 65_536
_OUTSIZED_HEADER = ("has outsized extended headers", "Pack it again as tar")
_NEGATIVE_SIZE = ("has a member of negative size", "Pack it again as tar")

# NotImplementedError: a feature of zip that Python lacks; RuntimeError: a password; the others:
# zipfile's response to numbers that make no sense.
_ZIP_ERRORS = (
    *(BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError, ValueError),
    *(OverflowError, IndexError, struct.error, zipfile.LargeZipFile),
)
# RecursionError: extended headers that follow extended headers; ValueError: numbers in them.
_TAR_ERRORS = (tarfile.TarError, ValueError, RecursionError)
_END = (tarfile.EOFHeaderError, tarfile.EmptyHeaderError)  # type: ignore[attr-defined]
_EXTENDED_HEADERS = {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE}
_EXTENDED_HEADERS |= {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}


class ArchiveError(Exception):
    """An archive is damaged, unsafe or too large. The caller words the message."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(f"{fault}. {remedy}.")
        self.fault = fault  # "is encrypted", to follow the archive's label
        self.remedy = remedy  # "Pack it without a password"


class Container(Enum):
    """How the members of an archive are packed."""

    TAR = auto()
    TAR_GZ = auto()
    ZIP = auto()


@dataclass(frozen=True)
class Limits:
    """How much an archive may hold, all members counted."""

    members: int
    total_bytes: int  # expanded
    ratio: int  # of expanded to packed bytes
    free_bytes: int  # may be expanded whatever the ratio
    remedy: str  # for an archive that holds too much: "Send fewer photos"


@dataclass(frozen=True)
class Member:
    """One regular file of an archive; `save` works until the next member is asked for."""

    name: str  # as in the archive: for messages and suffixes, never as a path on disk
    size: int  # bytes, as declared; no more than these are ever read
    _content: AbstractContextManager[IO[bytes]]
    _container: Container

    def save(self, path: Path) -> None:
        """Write the content to the new file `path`. Raises ArchiveError if it is damaged."""
        with _faults(self._container), self._content as stream, path.open("xb") as file:
            shutil.copyfileobj(stream, file, CHUNK_BYTES)
        if path.stat().st_size != self.size:
            raise ArchiveError(f"is cut short in {quote(self.name)}", "Get it again")


def find_archive(start: bytes) -> Container | None:
    """Return which archive begins with `start`, its first 512 bytes; None for any other file."""
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return Container.ZIP
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return Container.TAR_GZ if start[:2] == b"\x1f\x8b" else None
    return Container.TAR


def read_members(path: Path, container: Container, limits: Limits) -> Iterator[Member]:
    """Yield every regular file of an archive in its order. Raises ArchiveError."""
    with path.open("rb") as raw, _faults(container):
        tally = _Tally(limits, packed_bytes=path.stat().st_size)
        if container is Container.ZIP:
            yield from _read_zip(raw, tally)
        elif container is Container.TAR:
            yield from _read_tar(raw, tally)
        else:
            with gzip.GzipFile(fileobj=raw, mode="rb") as expanded:
                yield from _read_tar(expanded, tally)


@contextmanager
def _faults(container: Container) -> Iterator[None]:
    """Raise ArchiveError for the errors of Python's readers."""
    errors = _ZIP_ERRORS if container is Container.ZIP else _TAR_ERRORS
    try:
        yield
    except errors as error:
        detail = str(error)[:200]
        if container is Container.ZIP:
            raise ArchiveError(f"is no valid zip file ({detail})", "Pack it again") from error
        if "unexpected end" in detail or "truncated" in detail:
            raise ArchiveError(f"is cut short ({detail})", "Get it again") from error
        if "invalid offset" in detail:  # of Pythons with later fixes
            raise ArchiveError(*_NEGATIVE_SIZE) from error
        remedy = "Get it again, or pack it as tar"
        raise ArchiveError(f"is no readable tar ({detail})", remedy) from error


@dataclass
class _Tally:
    """Counts what is read. Refuses bombs, and names that lead out of a folder."""

    limits: Limits
    packed_bytes: int
    total_bytes: int = 0
    members: int = 0

    def count_bytes(self, n: int) -> None:
        self.total_bytes += n
        limits = self.limits
        if self.total_bytes > limits.total_bytes:
            raise ArchiveError(f"holds more than {limits.total_bytes} bytes", limits.remedy)
        bounded = self.total_bytes > limits.free_bytes
        if bounded and self.total_bytes > limits.ratio * self.packed_bytes:
            fault = f"expands to more than {limits.ratio} times its size"
            raise ArchiveError(fault, "Pack it again without compression, as tar")

    def count_member(self, name: str, regular: bool) -> None:
        self.members += 1
        if self.members > self.limits.members:
            raise ArchiveError(f"has more than {self.limits.members} members", self.limits.remedy)
        path = name.replace("\\", "/")
        if path.startswith("/") or path[1:2] == ":" or ".." in path.split("/") or "\0" in path:
            fault = f"has a member that points outside of it, {quote(name)}"
            raise ArchiveError(fault, "Pack it with plain names")
        if not regular:
            fault = f"has a member that is not a regular file, {quote(name)}"
            raise ArchiveError(fault, "Pack it without links, devices and sparse files")


class _TarMember(tarfile.TarInfo):
    """A header that is refused where tarfile would trust it, or take it for the archive's end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0:
            raise ArchiveError(*_NEGATIVE_SIZE)
        if info.type in _EXTENDED_HEADERS and info.size > MAX_TAR_HEADER_BYTES:
            raise ArchiveError(*_OUTSIZED_HEADER)
        return info

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except _TAR_ERRORS as error:
            if isinstance(error, _END):  # a block of zeros, or no more bytes
                raise
            with _faults(Container.TAR):  # tarfile would end here, without a word
                raise


class _TarStream(io.RawIOBase):
    """The bytes of a tar, counted; between members, as few as headers need."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile, tally: _Tally) -> None:
        self._stream = stream
        self._tally = tally
        self._header_left: int | None = None

    def readable(self) -> bool:
        return True

    def expect(self, header: bool) -> None:
        """Limit what is read next, if it is a header; the readers' buffers may be filled too."""
        self._header_left = MAX_TAR_HEADER_BYTES + 2 * _TAR_BUFFER_BYTES if header else None

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        try:
            data = self._stream.read(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ArchiveError(f"cannot be expanded ({error})", "Get it again") from error
        self._tally.count_bytes(len(data))
        if self._header_left is not None:
            self._header_left -= len(data)
            if self._header_left < 0:
                raise ArchiveError(*_OUTSIZED_HEADER)
        buffer[: len(data)] = data
        return len(data)


def _read_tar(raw: IO[bytes] | gzip.GzipFile, tally: _Tally) -> Iterator[Member]:
    stream = _TarStream(raw, tally)
    stream.expect(header=True)
    with tarfile.open(
        fileobj=io.BufferedReader(stream, _TAR_BUFFER_BYTES),
        mode="r|",
        tarinfo=_TarMember,
        encoding="utf-8",
        errors="surrogateescape",
    ) as archive:
        for info in archive:
            if info.size < 0:  # by a pax header, which replaces the field that was checked
                raise ArchiveError(*_NEGATIVE_SIZE)
            # Some Pythons read extended headers without `_TarMember.frombuf`.
            if len(info.name) + sum(map(len, info.pax_headers.values())) > MAX_TAR_HEADER_BYTES:
                raise ArchiveError(*_OUTSIZED_HEADER)
            sparse = info.issparse() or "GNU.sparse.major" in info.pax_headers
            tally.count_member(info.name, (info.isfile() or info.isdir()) and not sparse)
            if content := archive.extractfile(info):  # None for a folder
                stream.expect(header=False)
                yield Member(info.name, info.size, nullcontext(content), Container.TAR)
                while content.read(CHUNK_BYTES):  # else tarfile would skip it as part of a header
                    pass
                stream.expect(header=True)


def _read_zip(raw: IO[bytes], tally: _Tally) -> Iterator[Member]:
    with ZipFile(_SmallReads(raw)) as archive:
        entries = archive.infolist()
        for entry in entries:
            _check_zip_entry(entry, tally)
        tally.count_bytes(sum(entry.file_size for entry in entries))
        for entry in entries:
            if not entry.is_dir():
                name = _zip_name(entry)
                yield Member(name, entry.file_size, _opened(archive, entry), Container.ZIP)


def _zip_name(entry: ZipInfo) -> str:
    """macOS writes names in UTF-8 and does not say so; zipfile then reads them as code page 437."""
    if entry.flag_bits & 0x800:
        return entry.filename
    try:
        return entry.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return entry.filename


@contextmanager
def _opened(archive: ZipFile, entry: ZipInfo) -> Iterator[IO[bytes]]:
    with archive.open(entry) as stream:  # zipfile never reads more than the size it declares
        yield stream


def _check_zip_entry(entry: ZipInfo, tally: _Tally) -> None:
    mode = entry.external_attr >> 16  # unix file mode; 0 where the zip comes from elsewhere
    tally.count_member(_zip_name(entry), stat.S_IFMT(mode) in (0, stat.S_IFREG, stat.S_IFDIR))
    if entry.flag_bits & 0x41:
        raise ArchiveError("is encrypted", "Pack it without a password")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ArchiveError("uses a rare zip compression", "Pack it with deflate, or as tar")


class _SmallReads:
    """A file that refuses to return much at once: zipfile reads a whole directory in one go."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, n: int = -1) -> bytes:
        if n > MAX_ZIP_DIRECTORY_BYTES:
            raise BadZipFile("its list of members is too long")
        return self._file.read(n if n >= 0 else MAX_ZIP_DIRECTORY_BYTES)
