"""Captions of a training's images: a table or texts beside them, matched by the images' names.

A table is the archive's one .csv file, with the columns caption and image_file; a text is photo.txt
or photo.jpg.txt beside photo.jpg. The table wins over texts.
"""

import csv
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import PurePosixPath

from preprocess.archive import PhotoArchive, TextFile
from preprocess.errors import BadCaptions
from weights.messages import quote, quote_list
from weights.trigger_words import MAX_TRIGGER_CHARACTERS, can_be_typed, has_trigger_word

MAX_CAPTION_CHARACTERS = 2000  # a text encoder reads 75 tokens, some 300 characters

# Column names in any case; of several, the first in this order. The second ones are those of the
# image folders of Hugging Face.
CAPTION_COLUMNS = ("caption", "text")
IMAGE_COLUMNS = ("image_file", "file_name", "filename", "image", "file")
_DELIMITERS = ",;\t"  # Excel writes ; where the comma is a decimal point
_NO_CAPTIONS = ("readme", "license", "licence")  # texts that come along with images
_COLUMNS_REMEDY = 'begin it with the line "caption,image_file"'


def read_captions(archive: PhotoArchive) -> dict[str, str | None]:
    """Return each photo's name → its caption; None for one to caption automatically.

    White space becomes single spaces, and an empty caption None.

    Raises:
        BadCaptions: if captions are unreadable, too long, ambiguous, or match no photo.
    """
    images = _ImageNames(photo.name for photo in archive.photos)
    tables = [text for text in archive.texts if text.name.lower().endswith(".csv")]
    if len(tables) > 1:
        raise BadCaptions(
            f"{archive.label} holds {len(tables)} .csv files, {quote(tables[0].name)} and"
            f" {quote(tables[1].name)}; send one table of captions"
        )
    found = _from_texts([text for text in archive.texts if text not in tables], images)
    if tables:
        found |= _from_table(tables[0], images)
    captions = {photo.name: found.get(photo.name) for photo in archive.photos}
    missing = [name for name, caption in captions.items() if caption is None]
    if 0 < len(missing) < len(captions):
        print(
            f"{archive.label}: {len(missing)} of {len(captions)} images have no caption,"
            f" {quote_list(missing)}: captioned automatically"
        )
    return captions


def check_trigger_word(
    captions: Mapping[str, str | None], trigger_word: str, caption_prefix: str
) -> None:
    """Raise BadCaptions unless the trigger word is in the captions, as a whole word, case as typed.

    At least one of the captions that were sent must contain it. Automatic ones get it from the
    prefix alone.
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
            f" {_remedy(trigger_word, [caption_prefix])}"
        )
    lacking = [text for text in written if not has_trigger_word(text, trigger_word)]
    if written and len(lacking) == len(written):
        raise BadCaptions(
            f"none of the {len(written)} captions holds the trigger word {quote(trigger_word)};"
            f" {_remedy(trigger_word, written)}"
        )
    if lacking:
        print(f"{len(lacking)} of {len(written)} captions lack {quote(trigger_word)}: as meant?")


def _remedy(trigger_word: str, texts: Iterable[str]) -> str:
    """Return the remedy for a missing trigger word."""
    lower = trigger_word.lower()
    if any(has_trigger_word(text.lower(), lower) for text in texts):
        return "write it in the same case as token_string"
    return f'write it as a word of its own, as in "a photo of {trigger_word}", or set token_string'


def _from_table(table: TextFile, images: "_ImageNames") -> dict[str, str]:
    """Return photo name → caption, by the rows of a table."""
    folder = _folder(table.name)
    captions: dict[str, str] = {}
    for line, written, caption in _rows(table):
        where = f"{table.label}, line {line}"
        entry = unicodedata.normalize("NFC", written.replace("\\", "/")).removeprefix("./")
        name = _only(images.find(entry, folder), written, where)
        if name in captions:
            raise BadCaptions(f"{where} has a second caption for {quote(name)}; leave one")
        captions[name] = _clean(caption, where)
    if not captions:
        raise BadCaptions(f"{table.label} has no rows; write one for each image")
    return _not_empty(captions)


def _from_texts(texts: Sequence[TextFile], images: "_ImageNames") -> dict[str, str]:
    """Return photo name → caption, by the texts beside photos."""
    captions: dict[str, str] = {}
    for text in texts:
        stem = PurePosixPath(text.name).name[: -len(".txt")]
        found = images.find_beside(stem, _folder(text.name))
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
            f"{where} has a caption for {quote(written)}, and there is no such image;"
            " correct the name, or leave it out"
        )
    if len(found) > 1:
        raise BadCaptions(
            f"{where} has a caption for {quote(written)}, which may mean {quote(found[0])} or"
            f" {quote(found[1])}; write the folder and the ending too"
        )
    return found[0]


def _rows(table: TextFile) -> Iterator[tuple[int, str, str]]:
    """Yield line number, image and caption of every row that is not empty."""
    text = _decode(table)
    delimiter = max(_DELIMITERS, key=text.partition("\n")[0].count)
    reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [cell.strip().lower() for cell in next(reader, [])]
        image_column = _column(header, IMAGE_COLUMNS, table)
        caption_column = _column(header, CAPTION_COLUMNS, table)
        for row in reader:
            cells = [*row, *[""] * len(header)]
            image, caption = cells[image_column].strip(), cells[caption_column]
            if not any(cell.strip() for cell in row):
                continue
            where = f"{table.label}, line {reader.line_num}"
            if any(cell.strip() for cell in row[len(header) :]):
                raise BadCaptions(
                    f"{where} has {len(row)} cells, and the first line {len(header)};"
                    ' put a caption with commas into quotes ("...")'
                )
            if not image:
                raise BadCaptions(f"{where} names no image; write its file name")
            yield reader.line_num, image, caption
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
    """Decode UTF-8, with or without a mark, or UTF-16 with one (Windows' Notepad and Excel)."""
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


def _folder(name: str) -> str:
    """Return the folder of a name with its final slash; empty at the top."""
    return name[: name.rfind("/") + 1]


class _ImageNames:
    """Finds images by what people write for their names."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = [(name, str(PurePosixPath(name).with_suffix(""))) for name in names]
        self._folders = {f.casefold() for name, _ in self._names for f in name.split("/")[:-1]}

    def find(self, written: str, folder: str) -> list[str]:
        """Return the images that a table in this folder may mean, by a path from anywhere.

        The part of a path that names no folder of the archive, as on somebody's disk, is ignored.
        """
        path = PurePosixPath(written)
        is_known = path.parent.name.casefold() in self._folders
        return self._find(
            [folder + written, written], [written] if is_known else [written, path.name]
        )

    def find_beside(self, written: str, folder: str) -> list[str]:
        """Return the images of that name, with or without its suffix, in the folder itself."""
        return self._find([folder + written], [])

    def _find(self, paths: Sequence[str], ends: Sequence[str]) -> list[str]:
        """Return the images that have the first of these paths, or ends of paths, with matches.

        The same case wins over any case, a whole path over its end, with its suffix over without.
        """
        for case in (str, str.casefold):
            for start, texts in (("\0", paths), ("/", ends)):  # of the part that is compared
                for form in (0, 1):  # with the suffix, without
                    for text in texts:
                        end = start + case(text)
                        names = self._names
                        if found := [n[0] for n in names if (start + case(n[form])).endswith(end)]:
                            return found
        return []
