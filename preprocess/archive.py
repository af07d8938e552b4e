"""A training's archive of photos → picture and text files, in a folder that is gone afterwards."""

import re
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath

from preprocess.errors import BadArchive, BadCaptions, BadPicture, DiskFull
from preprocess.images import read_size
from preprocess.picture_formats import begins_like_photo, picture_suffixes
from weights.formats.archive import (
    ArchiveError,
    Container,
    Limits,
    Member,
    find_archive,
    read_members,
)
from weights.formats.detect import describe
from weights.messages import disk_full_raises, quote

MIN_PICTURES = 2  # from one, a model learns the picture and not what it shows
MAX_PICTURES = 2000
MAX_MEMBERS = 10_000  # for each picture a text and both of their doubles from a Mac, and folders
MAX_ARCHIVE_BYTES = 5_000_000_000
MAX_EXPANDED_BYTES = 6_000_000_000
MAX_RATIO = 200  # of expanded to packed bytes; photos hardly shrink, but drawings do
FREE_BYTES = 200_000_000  # may be expanded whatever the ratio
MAX_PICTURE_BYTES = 200_000_000  # 64 million pixels of RGB, uncompressed
MAX_TEXT_BYTES = 10_000_000
MIN_SIDE = 64  # pixels

TEXT_SUFFIXES = (".csv", ".txt")
_NOT_SENT_BY_PEOPLE = ("__macosx", "@eadir", "thumbs.db", "desktop.ini")
_REMEDY = "send a zip, tar or tar.gz of pictures"


class Filetype(StrEnum):
    """Which archives are taken; whatever is asked for, the content tells which one it is."""

    INFER = "infer"
    ZIP = "zip"
    TAR = "tar"  # tar.gz too


@dataclass(frozen=True)
class Photo:
    """One picture of an archive; its pixels are for `preprocess.images.read_image`."""

    name: str  # inside the archive, "cats/1.jpg": for people, never a path on disk
    label: str  # for messages: the input and the name
    path: Path
    size: tuple[int, int]  # width and height in pixels, upright, by its header


@dataclass(frozen=True)
class TextFile:
    """A .csv or .txt file of an archive."""

    name: str
    label: str
    path: Path


@dataclass(frozen=True)
class PhotoArchive:
    """What an archive holds for a training."""

    label: str  # the input's name, for messages
    photos: tuple[Photo, ...]  # by their names, as people count: 2 before 10
    texts: tuple[TextFile, ...]


@dataclass
class _Unpacking:
    label: str
    folder: Path
    pictures: dict[str, Path] = field(default_factory=dict)  # name → file
    texts: dict[str, Path] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    def bad(self, fault: str, remedy: str) -> BadArchive:
        return BadArchive(f"{self.label} {fault}; {remedy[:1].lower()}{remedy[1:]}")

    def label_of(self, name: str) -> str:
        return f"{self.label}: {quote(name)}"


def check_filetype(path: Path, filetype: str, label: str) -> None:
    """Refuse an archive that is not what is said of it; raises BadArchive."""
    container = _find_container(path, label)
    if filetype != Filetype.INFER and (container is Container.ZIP) != (filetype == Filetype.ZIP):
        raise BadArchive(
            f"{label} is a {'zip' if container is Container.ZIP else 'tar'} archive, and"
            f" {label}_filetype is {filetype}; set that to infer"
        )


@contextmanager
def unpacked(path: Path, label: str, folder: Path) -> Iterator[PhotoArchive]:
    """The photos and texts of an archive, as files under our own names in a new folder inside
    `folder`; they are gone when the block is left, however it is left.

    Raises:
        BadArchive, BadPicture, BadCaptions, DiskFull: see `preprocess.errors`.
    """

    def disk_full() -> DiskFull:
        return DiskFull(
            f"{label} does not fit into {folder}: the disk is full; free some room there, or send"
            " fewer or smaller pictures"
        )

    container = _find_container(path, label)
    limits = Limits(
        MAX_MEMBERS, MAX_EXPANDED_BYTES, MAX_RATIO, FREE_BYTES, "Send fewer or smaller pictures"
    )
    with disk_full_raises(disk_full):
        private = tempfile.TemporaryDirectory(prefix="photos-", dir=folder)
    with private as name:
        unpacking = _Unpacking(label, Path(name))
        with disk_full_raises(disk_full):
            try:
                for member in read_members(path, container, limits):
                    _take(member, unpacking)
            except ArchiveError as error:
                raise unpacking.bad(error.fault, error.remedy) from error
        yield _look_through(unpacking)


def _find_container(path: Path, label: str) -> Container:
    if not path.is_file():
        what = "a folder" if path.is_dir() else "missing: its file does not exist"
        raise BadArchive(f"{label} is {what}; {_REMEDY}")
    size = path.stat().st_size
    if size > MAX_ARCHIVE_BYTES:
        raise BadArchive(
            f"{label} has {size} bytes; at most {MAX_ARCHIVE_BYTES} are read:"
            " send fewer or smaller pictures"
        )
    with path.open("rb") as file:
        start = file.read(512)
    container = find_archive(start)
    if container is None:
        what = describe(start) or ("a file of an unknown kind" if start else "an empty file")
        raise BadArchive(f"{label} is {what}, not an archive; {_REMEDY}")
    return container


def _take(member: Member, unpacking: _Unpacking) -> None:
    """Keep a member that is a picture or a text; leave others alone."""
    name = _plain_name(member.name)
    if _is_clutter(name):
        return
    suffix = PurePosixPath(name).suffix.lower()
    promised = suffix in TEXT_SUFFIXES or suffix in picture_suffixes()
    limit = MAX_TEXT_BYTES if suffix in TEXT_SUFFIXES else MAX_PICTURE_BYTES
    if not promised:
        _check_no_captions(name, unpacking)
    if member.size > limit:
        if not promised:
            unpacking.ignored.append(name)
            return
        raise unpacking.bad(
            f"holds {quote(name)} of {member.size} bytes; {limit} are allowed",
            "Send a smaller version",
        )
    if name in unpacking.pictures or name in unpacking.texts:
        raise unpacking.bad(f"holds {quote(name)} twice", "Pack it anew, with the one you mean")
    path = unpacking.folder / str(len(unpacking.pictures) + len(unpacking.texts))
    member.save(path)
    if suffix in TEXT_SUFFIXES:
        unpacking.texts[name] = path
    elif promised or _is_photo(path):
        unpacking.pictures[name] = path
        if len(unpacking.pictures) > MAX_PICTURES:
            raise unpacking.bad(f"holds more than {MAX_PICTURES} pictures", "Send fewer")
    else:
        unpacking.ignored.append(name)
        path.unlink()


def _plain_name(name: str) -> str:
    """A member's name with / between folders, without ./ and in Unicode's composed form."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace").replace("\\", "/")
    parts = [part for part in text.split("/") if part != "."]
    return unicodedata.normalize("NFC", "/".join(parts))


def _is_clutter(name: str) -> bool:
    """Folders, hidden files, and what systems leave beside pictures."""
    parts = name.lower().split("/")
    return not parts[-1] or any(p.startswith(".") or p in _NOT_SENT_BY_PEOPLE for p in parts)


def _is_photo(path: Path) -> bool:
    with path.open("rb") as file:
        return begins_like_photo(file.read(64))


def _check_no_captions(name: str, unpacking: _Unpacking) -> None:
    base = PurePosixPath(name).name.lower()
    if "caption" in base or base == "metadata.jsonl":
        raise BadCaptions(
            f"{unpacking.label_of(name)} seems to hold captions in a format that is not read; send"
            " them as caption.csv with the columns caption and image_file, or as a .txt beside"
            " each picture"
        )


def _look_through(unpacking: _Unpacking) -> PhotoArchive:
    """Check that there are enough pictures, and every one's header."""
    ignored = sorted(unpacking.ignored, key=natural_order)
    if not unpacking.pictures:
        others = sorted([*ignored, *unpacking.texts], key=natural_order)
        raise unpacking.bad(f"holds no picture, but {_list(others)}", _REMEDY)
    if ignored:
        print(f"{unpacking.label}: ignored, as neither a picture nor captions: {_list(ignored)}")
    names = sorted(unpacking.pictures, key=natural_order)
    photos = [_photo(name, unpacking) for name in names]
    if len(photos) < MIN_PICTURES:
        raise unpacking.bad(
            f"holds one picture, {quote(names[0])}; at least {MIN_PICTURES} are needed",
            "Send more, 10 to 20 are a good number",
        )
    texts = [
        TextFile(name, unpacking.label_of(name), unpacking.texts[name])
        for name in sorted(unpacking.texts, key=natural_order)
    ]
    return PhotoArchive(unpacking.label, tuple(photos), tuple(texts))


def _photo(name: str, unpacking: _Unpacking) -> Photo:
    path, label = unpacking.pictures[name], unpacking.label_of(name)
    width, height = read_size(path, label)
    if min(width, height) < MIN_SIDE:
        raise BadPicture(
            f"{label} is {width}x{height} pixels; each side needs at least {MIN_SIDE}:"
            " send a larger version, or leave it out"
        )
    return Photo(name, label, path, (width, height))


def natural_order(name: str) -> tuple[object, str]:
    """A key that sorts names as people count, folder by folder: 2 before 10."""
    return tuple(_counted(part) for part in name.split("/")), name


def _counted(part: str) -> tuple[tuple[str, int, str], ...]:
    """Texts, each with the number behind it; without its zeros, the longer number is larger."""
    pieces = re.split("([0-9]+)", part.casefold())
    numbers = [*(piece.lstrip("0") for piece in pieces[1::2]), ""]
    return tuple((text, len(n), n) for text, n in zip(pieces[::2], numbers, strict=True))


def _list(names: list[str]) -> str:
    """The first names, quoted; how many more there are."""
    shown = ", ".join(quote(name) for name in names[:8]) or "nothing at all"
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
