"""A tar's members one after the other, out of a stream that cannot be rewound.

tarfile reads extended headers of any length into memory and follows sparse maps; this reads the
header blocks with tarfile's parser and the rest by itself. POSIX.1-2001 pax and GNU long names.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from tarfile import (
    AREGTYPE,
    BLOCKSIZE,
    DIRTYPE,
    GNUTYPE_LONGLINK,
    GNUTYPE_LONGNAME,
    NUL,
    REGTYPE,
    XGLTYPE,
    XHDTYPE,
    HeaderError,
    TarInfo,
)
from typing import Protocol

MAX_EXTENDED_HEADER_BYTES = 100_000
_PIECE_BYTES = 1_000_000

# What is wrong with an archive and its remedy → the error to raise.
Complaint = Callable[[str, str], Exception]


class Readable(Protocol):
    """A binary stream, as far as it is used here."""

    def read(self, n: int, /) -> bytes:
        """Up to `n` further bytes; empty at the end."""


@dataclass
class TarEntry:
    """One member; readable until the next one is asked for."""

    name: str
    size: int  # bytes
    is_file: bool
    is_folder: bool
    _read: Callable[[int], bytes] = field(repr=False)
    _left: int = 0

    def read(self, n: int, /) -> bytes:
        """Up to `n` further bytes of the content; empty at its end."""
        piece = self._read(min(n, self._left)) if self._left else b""
        self._left -= len(piece)
        return piece


def read_tar(
    stream: Readable, count_bytes: Callable[[int], None], bad: Complaint
) -> Iterator[TarEntry]:
    """Every member but the extended headers, which are applied to the one that they describe.

    `count_bytes` hears of every byte read and may stop it. Raises what `bad` makes of a fault.
    """

    def read(n: int) -> bytes:
        count_bytes(n)
        data = stream.read(n)
        if len(data) != n:
            raise bad("is cut short", "Get it again")
        return data

    extended: dict[str, str] = {}
    extended_headers = 0
    while True:
        block = stream.read(BLOCKSIZE)
        count_bytes(len(block))
        if not block or block.count(NUL) == BLOCKSIZE:
            return
        header = _parse(block, bad)
        if header.type in (XHDTYPE, XGLTYPE, GNUTYPE_LONGNAME, GNUTYPE_LONGLINK):
            extended_headers += 1
            if header.size > MAX_EXTENDED_HEADER_BYTES or extended_headers > 4:
                raise bad("has outsized extended headers", "Pack it again as tar")
            extended |= _parse_extended(header, read(_padded(header.size)), bad)
            continue
        entry = _entry(header, extended, read, bad)
        yield entry
        _skip(entry, read)
        extended, extended_headers = {}, 0


def _parse(block: bytes, bad: Complaint) -> TarInfo:
    try:
        header = TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (HeaderError, ValueError) as error:
        detail = "is no readable tar" if len(block) == BLOCKSIZE else "is cut short"
        raise bad(f"{detail} ({error})", "Get it again, or pack it as tar") from error
    if header.size < 0:
        raise bad("has a member of negative size", "Pack it again as tar")
    return header


def _parse_extended(header: TarInfo, data: bytes, bad: Complaint) -> dict[str, str]:
    data = data[: header.size]
    if header.type == GNUTYPE_LONGNAME:
        return {"path": data.rstrip(NUL).decode("utf-8", "surrogateescape")}
    if header.type == GNUTYPE_LONGLINK:
        return {}  # links are refused wherever they lead
    fields: dict[str, str] = {}
    try:
        while data:
            digits, _, _ = data.partition(b" ")
            length = int(digits)
            if not len(digits) + 2 <= length <= len(data):
                raise ValueError("a record's length")
            record, data = data[len(digits) + 1 : length - 1], data[length:]
            key, _, value = record.decode("utf-8", "surrogateescape").partition("=")
            fields[key] = value
    except ValueError as error:
        raise bad(f"has a damaged pax header ({error})", "Get it again") from error
    # A global header (git archive writes one) describes no single member: nothing in it is ours.
    return {} if header.type == XGLTYPE else fields


def _entry(
    header: TarInfo, extended: dict[str, str], read: Callable[[int], bytes], bad: Complaint
) -> TarEntry:
    size = header.size
    if "size" in extended:
        if not (extended["size"].isascii() and extended["size"].isdigit()):
            raise bad("has a member of unreadable size", "Pack it again as tar")
        size = int(extended["size"][:20])
    if header.type == DIRTYPE:
        size = 0  # a quota, if anything: no content follows
    name = extended.get("path", header.name)
    sparse = any(key.startswith("GNU.sparse.") for key in extended)
    is_file = header.type in (REGTYPE, AREGTYPE) and not sparse
    return TarEntry(name, size, is_file, header.type == DIRTYPE, read, size)


def _skip(entry: TarEntry, read: Callable[[int], bytes]) -> None:
    while entry.read(_PIECE_BYTES):
        pass
    read(_padded(entry.size) - entry.size)


def _padded(size: int) -> int:
    return -(-size // BLOCKSIZE) * BLOCKSIZE
