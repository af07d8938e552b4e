"""A training's archive → image and text files, in a folder that is removed afterwards."""

import re
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath

from preprocess.errors import BadArchive, BadCaptions, BadImage, DiskFull
from preprocess.image_formats import begins_like_photo, image_suffixes
from preprocess.images import read_size
from weights.formats.archive import (
    ArchiveError,
    Container,
    Limits,
    Member,
    find_archive,
    read_members,
)
from weights.formats.detect import describe
from weights.messages import disk_full_raises, quote, quote_list

MIN_IMAGES = 2  # from one, a model learns the image and not its subject
MAX_IMAGES = 2000
MAX_ARCHIVE_BYTES = 5_000_000_000
MAX_IMAGE_BYTES = 200_000_000  # 64 million pixels of RGB, uncompressed
MAX_TEXT_BYTES = 10_000_000
MIN_SIDE = 64  # pixels
LIMITS = Limits(
    members=10_000,  # for each image a text, the doubles that a Mac adds for both, and folders
    total_bytes=6_000_000_000,
    ratio=200,  # photos hardly shrink, but drawings do
    free_bytes=200_000_000,
    remedy="Send fewer or smaller images",
)

TEXT_SUFFIXES = (".csv", ".txt")
_CLUTTER = ("__macosx", "@eadir", "thumbs.db", "desktop.ini")  # that systems add
_REMEDY = "send a zip, tar or tar.gz of images"


class Filetype(StrEnum):
    """Which archives to accept; their content tells which one they are."""

    INFER = "infer"
    ZIP = "zip"
    TAR = "tar"  # tar.gz too


@dataclass(frozen=True)
class Photo:
    """One image of an archive; `preprocess.images.read_image` reads its pixels."""

    name: str  # inside the archive, "cats/1.jpg": for messages, never a path on disk
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
    """The content of a training's archive."""

    label: str  # the input's name, for messages
    photos: tuple[Photo, ...]  # in natural order of their names: 2 before 10
    texts: tuple[TextFile, ...]


@dataclass
class _Files:
    """The files taken out of an archive so far."""

    label: str
    folder: Path
    images: dict[str, Path] = field(default_factory=dict)  # name → file
    texts: dict[str, Path] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    def bad(self, fault: str, remedy: str) -> BadArchive:
        return BadArchive(f"{self.label} {fault}; {remedy[:1].lower()}{remedy[1:]}")

    def label_of(self, name: str) -> str:
        return f"{self.label}: {quote(name)}"


def check_filetype(path: Path, filetype: str, label: str) -> None:
    """Raise BadArchive for an archive that is not of this `Filetype`."""
    container = _find_container(path, label)
    if filetype != Filetype.INFER and (container is Container.ZIP) != (filetype == Filetype.ZIP):
        raise BadArchive(
            f"{label} is a {'zip' if container is Container.ZIP else 'tar'} archive, and"
            f" {label}_filetype is {filetype}; set that to infer"
        )


@contextmanager
def unpacked(path: Path, label: str, folder: Path) -> Iterator[PhotoArchive]:
    """Unpack images and texts into a new folder inside `folder`, and remove it on exit.

    Raises:
        BadArchive, BadImage, BadCaptions, DiskFull: see `preprocess.errors`.
    """

    def disk_full() -> DiskFull:
        return DiskFull(
            f"{label} does not fit into {folder}: the disk is full; free some room there, or send"
            " fewer or smaller images"
        )

    container = _find_container(path, label)
    with disk_full_raises(disk_full):
        unpacking = tempfile.TemporaryDirectory(prefix="photos-", dir=folder)
    with unpacking as name:
        files = _Files(label, Path(name))
        try:
            with disk_full_raises(disk_full):
                for member in read_members(path, container, LIMITS):
                    _take(member, files)
        except ArchiveError as error:
            raise files.bad(error.fault, error.remedy) from error
        yield _check_content(files)


def _find_container(path: Path, label: str) -> Container:
    if not path.is_file():
        what = "a folder" if path.is_dir() else "missing: its file does not exist"
        raise BadArchive(f"{label} is {what}; {_REMEDY}")
    size = path.stat().st_size
    if size > MAX_ARCHIVE_BYTES:
        raise BadArchive(
            f"{label} has {size} bytes; at most {MAX_ARCHIVE_BYTES} are read:"
            " send fewer or smaller images"
        )
    with path.open("rb") as file:
        start = file.read(512)
    container = find_archive(start)
    if container is None:
        what = describe(start) or ("a file of an unknown kind" if start else "an empty file")
        raise BadArchive(f"{label} is {what}, not an archive; {_REMEDY}")
    return container


def _take(member: Member, files: _Files) -> None:
    """Save a member that is an image or a text; ignore others."""
    name = _plain_name(member.name)
    parts = name.lower().split("/")
    if not parts[-1] or any(part.startswith(".") or part in _CLUTTER for part in parts):
        return
    suffix = PurePosixPath(name).suffix.lower()
    is_text = suffix in TEXT_SUFFIXES
    is_expected = is_text or suffix in image_suffixes()
    limit = MAX_TEXT_BYTES if is_text else MAX_IMAGE_BYTES
    if not is_expected:
        _check_no_captions(name, files)
    if member.size > limit:
        if not is_expected:
            files.ignored.append(name)
            return
        raise files.bad(
            f"holds {quote(name)} of {member.size} bytes; {limit} are allowed",
            "Send a smaller version",
        )
    if name in files.images or name in files.texts:
        raise files.bad(f"holds {quote(name)} twice", "Pack it again, with the one you mean")
    path = files.folder / str(len(files.images) + len(files.texts))
    member.save(path)
    if is_text:
        files.texts[name] = path
    elif is_expected or _is_photo(path):
        files.images[name] = path
        if len(files.images) > MAX_IMAGES:
            raise files.bad(f"holds more than {MAX_IMAGES} images", "Send fewer")
    else:
        files.ignored.append(name)
        path.unlink()


def _plain_name(name: str) -> str:
    """Return a member's name with / between folders, without ./ and in composed Unicode."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace").replace("\\", "/")
    parts = [part for part in text.split("/") if part != "."]
    return unicodedata.normalize("NFC", "/".join(parts))


def _is_photo(path: Path) -> bool:
    with path.open("rb") as file:
        return begins_like_photo(file.read(64))


def _check_no_captions(name: str, files: _Files) -> None:
    base = PurePosixPath(name).name.lower()
    if "caption" in base or base == "metadata.jsonl":
        raise BadCaptions(
            f"{files.label_of(name)} seems to hold captions in a format that is not read; send them"
            " as caption.csv with the columns caption and image_file, or as a .txt beside each"
            " image"
        )


def _check_content(files: _Files) -> PhotoArchive:
    """Check that there are enough images, and the header of each."""
    ignored = sorted(files.ignored, key=natural_order)
    if not files.images:
        others = sorted([*ignored, *files.texts], key=natural_order)
        raise files.bad(f"holds no image, but {quote_list(others)}", _REMEDY)
    if ignored:
        print(f"{files.label}: ignored, as neither an image nor captions: {quote_list(ignored)}")
    names = sorted(files.images, key=natural_order)
    photos = tuple(_photo(name, files) for name in names)
    if len(photos) < MIN_IMAGES:
        raise files.bad(
            f"holds one image, {quote(names[0])}; at least {MIN_IMAGES} are needed",
            "Send more, 10 to 20 are a good number",
        )
    texts = tuple(
        TextFile(name, files.label_of(name), files.texts[name])
        for name in sorted(files.texts, key=natural_order)
    )
    return PhotoArchive(files.label, photos, texts)


def _photo(name: str, files: _Files) -> Photo:
    path, label = files.images[name], files.label_of(name)
    width, height = read_size(path, label)
    if min(width, height) < MIN_SIDE:
        raise BadImage(
            f"{label} is {width}x{height} pixels; each side needs at least {MIN_SIDE}:"
            " send a larger version, or leave it out"
        )
    return Photo(name, label, path, (width, height))


def natural_order(name: str) -> tuple[object, str]:
    """Return a key that sorts names by their numbers, folder by folder: 2 before 10."""
    return tuple(_text_and_numbers(part) for part in name.split("/")), name


def _text_and_numbers(part: str) -> tuple[tuple[str, int, str], ...]:
    """Split into texts, each with the number behind it, by its length and its digits."""
    pieces = re.split("([0-9]+)", part.casefold())
    numbers = [*(piece.lstrip("0") for piece in pieces[1::2]), ""]
    return tuple((text, len(n), n) for text, n in zip(pieces[::2], numbers, strict=True))
