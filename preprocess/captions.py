"""Captions of a training's photos: a table or texts beside them, matched by the photos' names.

A table is the archive's one .csv file, with the columns caption and image_file; a text is photo.txt
or photo.jpg.txt beside photo.jpg. Where a photo has both, the table counts.
"""

import csv
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum, auto
from io import StringIO
from pathlib import PurePosixPath

from preprocess.archive import PhotoArchive, TextFile
from preprocess.errors import BadCaptions
from weights.messages import quote
from weights.trigger_words import MAX_TRIGGER_CHARACTERS, can_be_typed, has_trigger_word

MAX_CAPTION_CHARACTERS = 2000  # a text encoder reads 75 tokens, some 300 characters

# Column names in any case; where a table has several, the first of these counts. The second ones
# are those of Hugging Face's image folders.
CAPTION_COLUMNS = ("caption", "text")
PICTURE_COLUMNS = ("image_file", "file_name", "filename", "image", "file")
_DELIMITERS = ",;\t"  # the second is what Excel writes where the comma is a decimal point
_NO_CAPTIONS = ("readme", "license", "licence")  # texts that come along with pictures
_COLUMNS_REMEDY = 'begin it with the line "caption,image_file"'


def read_captions(archive: PhotoArchive, automatic: bool) -> dict[str, str | None]:
    """Every photo's name → its caption; None for one that is to be captioned automatically.

    White space is made single spaces, and an empty caption is none.

    Args:
        automatic: whether photos may lack a caption; without it every one needs its own.

    Raises:
        BadCaptions: if captions are unreadable, too long, ambiguous, or for no photo.
    """
    pictures = _Pictures(photo.name for photo in archive.photos)
    tables = [text for text in archive.texts if text.name.lower().endswith(".csv")]
    beside = [text for text in archive.texts if text not in tables]
    if len(tables) > 1:
        raise BadCaptions(
            f"{archive.label} holds {len(tables)} .csv files, {quote(tables[0].name)} and"
            f" {quote(tables[1].name)}; send one table of captions"
        )
    found = _from_texts(beside, pictures)
    if tables:
        found |= _from_table(tables[0], pictures)
    captions = {photo.name: found.get(photo.name) for photo in archive.photos}
    _check_missing(captions, archive.label, automatic)
    return captions


def check_trigger_word(
    captions: Mapping[str, str | None], trigger_word: str, caption_prefix: str
) -> None:
    """Whether the trigger word is where a training can learn it, as a whole word, case as typed.

    Captions that people wrote stay as they are: one of them at least has to hold it. Automatic ones
    get it from the prefix alone.

    Raises:
        BadCaptions: if not; the messages call the two by their inputs' names.
    """
    if not can_be_typed(trigger_word) or trigger_word != trigger_word.strip():
        raise BadCaptions(
            f"token_string {quote(trigger_word)} is no word to type; choose 1 to"
            f" {MAX_TRIGGER_CHARACTERS} printable characters without spaces around them"
        )
    written = [caption for caption in captions.values() if caption is not None]
    if len(written) < len(captions) and not has_trigger_word(caption_prefix, trigger_word):
        raise BadCaptions(
            f"caption_prefix {quote(caption_prefix)} lacks the trigger word {quote(trigger_word)},"
            f" which {len(captions) - len(written)} automatic captions get from it alone;"
            f" {_say(trigger_word, [caption_prefix])}"
        )
    lacking = [text for text in written if not has_trigger_word(text, trigger_word)]
    if written and len(lacking) == len(written):
        raise BadCaptions(
            f"none of the {len(written)} captions holds the trigger word {quote(trigger_word)};"
            f" {_say(trigger_word, written)}"
        )
    if lacking:
        print(f"{len(lacking)} of {len(written)} captions lack {quote(trigger_word)}: as meant?")


def _say(trigger_word: str, texts: Iterable[str]) -> str:
    """The remedy for a trigger word that is missing."""
    lower = trigger_word.lower()
    if any(has_trigger_word(text.lower(), lower) for text in texts):
        return "write it in the same case as token_string"
    return f'write it as a word of its own, as in "a photo of {trigger_word}", or set token_string'


def _from_table(table: TextFile, pictures: "_Pictures") -> dict[str, str]:
    """Photo name → caption, by the rows of a table."""
    folder = _folder(table.name)
    captions: dict[str, str] = {}
    for line, written, caption in _rows(table):
        where = f"{table.label}, line {line}"
        entry = unicodedata.normalize("NFC", written.replace("\\", "/")).removeprefix("./")
        name = _only(pictures.find(entry, folder), written, where)
        if name in captions:
            raise BadCaptions(f"{where} has a second caption for {quote(name)}; leave one")
        captions[name] = _clean(caption, where)
    if not captions:
        raise BadCaptions(f"{table.label} has no rows; write one for each picture")
    return _not_empty(captions)


def _from_texts(texts: Sequence[TextFile], pictures: "_Pictures") -> dict[str, str]:
    """Photo name → caption, by the texts beside photos."""
    captions: dict[str, str] = {}
    for text in texts:
        stem = PurePosixPath(text.name).name[: -len(".txt")]
        found = pictures.find_beside(stem, _folder(text.name))
        if not found and stem.lower().startswith(_NO_CAPTIONS):
            continue
        name = _only(found, stem, text.label)
        if name in captions:
            raise BadCaptions(f"{text.label} is a second caption for {quote(name)}; leave one")
        captions[name] = _clean(_decode(text), text.label)
    return _not_empty(captions)


def _not_empty(captions: Mapping[str, str]) -> dict[str, str]:
    return {name: caption for name, caption in captions.items() if caption}


def _only(found: Sequence[str], written: str, where: str) -> str:
    if not found:
        raise BadCaptions(
            f"{where} has a caption for {quote(written)}, and there is no such picture;"
            " correct the name, or leave it out"
        )
    if len(found) > 1:
        raise BadCaptions(
            f"{where} has a caption for {quote(written)}, which may mean {quote(found[0])} or"
            f" {quote(found[1])}; write the folder and the ending too"
        )
    return found[0]


def _rows(table: TextFile) -> Iterator[tuple[int, str, str]]:
    """Line number, picture and caption of every row that is not empty."""
    text = _decode(table)
    delimiter = max(_DELIMITERS, key=text.partition("\n")[0].count)
    reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [cell.strip().lower() for cell in next(reader, [])]
        picture_column = _column(header, PICTURE_COLUMNS, table)
        caption_column = _column(header, CAPTION_COLUMNS, table)
        for row in reader:
            cells = [*row, *[""] * len(header)]
            picture, caption = cells[picture_column].strip(), cells[caption_column]
            if not any(cell.strip() for cell in row):
                continue
            where = f"{table.label}, line {reader.line_num}"
            if any(cell.strip() for cell in row[len(header) :]):
                raise BadCaptions(
                    f"{where} has {len(row)} cells, and the first line {len(header)};"
                    ' put a caption with commas into quotes ("...")'
                )
            if not picture:
                raise BadCaptions(f"{where} names no picture; write its file name")
            yield reader.line_num, picture, caption
    except csv.Error as error:
        raise BadCaptions(
            f"{table.label} is no valid table: {error} in line {reader.line_num}; save it as CSV"
        ) from error


def _column(header: Sequence[str], wanted: Sequence[str], table: TextFile) -> int:
    for name in wanted:
        if header.count(name) == 1:
            return header.index(name)
    shown = ", ".join(quote(cell) for cell in header[:8]) or "none"
    raise BadCaptions(
        f"{table.label} needs one column {wanted[0]}, and has {shown}; {_COLUMNS_REMEDY}"
    )


def _decode(text: TextFile) -> str:
    """UTF-8, with or without a mark, or UTF-16 with one (Windows' Notepad and Excel)."""
    content = text.path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        decoded = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise BadCaptions(
            f"{text.label} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    if "\0" in decoded:
        raise BadCaptions(f"{text.label} is not text, it has zero bytes; save it as UTF-8 text")
    return decoded


def _clean(caption: str, where: str) -> str:
    text = unicodedata.normalize("NFC", " ".join(caption.split()))
    if len(text) > MAX_CAPTION_CHARACTERS:
        raise BadCaptions(
            f"{where} has a caption of {len(text)} characters; at most {MAX_CAPTION_CHARACTERS}"
            " are allowed, of which a model reads some 300: shorten it"
        )
    return text


def _check_missing(captions: Mapping[str, str | None], label: str, automatic: bool) -> None:
    missing = [name for name, caption in captions.items() if caption is None]
    if not missing or (automatic and len(missing) == len(captions)):
        return
    shown = ", ".join(quote(name) for name in missing[:8]) + (", ..." if len(missing) > 8 else "")
    told = f"{label}: {len(missing)} of {len(captions)} pictures have no caption, {shown}"
    if not automatic:
        raise BadCaptions(f"{told}; write them, or allow automatic captions")
    print(f"{told}: captioned automatically")


def _folder(name: str) -> str:
    """The folder of a name with its final slash; empty at the top."""
    return name[: name.rfind("/") + 1]


class _Pictures:
    """The photos' names, found by what people write for them.

    What is written more exactly counts sooner: the case as it is before any case, the whole path
    before its end alone, with the ending before without. Folders that no photo is in, of somebody's
    disk, do not count.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._named: dict[tuple[bool, _Way, str], list[str]] = defaultdict(list)
        self._folders: set[str] = set()
        for name in names:
            self._folders |= set(name.casefold().split("/")[:-1])
            for way, key in _ways_to_write(name):
                self._named[False, way, key].append(name)
                self._named[True, way, key.casefold()].append(name)

    def find(self, written: str, folder: str) -> Sequence[str]:
        """The photos that a table in this folder may mean, by a path from anywhere."""
        whole = (folder + written, written)
        path = PurePosixPath(written)
        end = (written,) if path.parent.name.casefold() in self._folders else (written, path.name)
        return self._first(
            (_Way.WHOLE, whole), (_Way.NO_ENDING, whole), (_Way.END, end), (_Way.BARE_END, end)
        )

    def find_beside(self, written: str, folder: str) -> Sequence[str]:
        """The photos of that name, with or without its ending, in the folder itself."""
        whole = (folder + written,)
        return self._first((_Way.WHOLE, whole), (_Way.NO_ENDING, whole))

    def _first(self, *tries: tuple["_Way", tuple[str, ...]]) -> Sequence[str]:
        for any_case in (False, True):
            for way, keys in tries:
                for key in keys:
                    folded = key.casefold() if any_case else key
                    if found := self._named.get((any_case, way, folded)):
                        return found
        return ()


class _Way(Enum):
    """How much of a photo's name is written."""

    WHOLE = auto()  # cats/1.jpg
    NO_ENDING = auto()  # cats/1
    END = auto()  # 1.jpg
    BARE_END = auto()  # 1


def _ways_to_write(name: str) -> Iterator[tuple[_Way, str]]:
    bare = str(PurePosixPath(name).with_suffix(""))
    for way, end_way, text in ((_Way.WHOLE, _Way.END, name), (_Way.NO_ENDING, _Way.BARE_END, bare)):
        yield way, text
        folders = text.split("/")
        for k in range(len(folders)):
            yield end_way, "/".join(folders[k:])
