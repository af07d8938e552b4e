"""What cog-sdxl's preprocessing does wrong, and what ours does: one row for each bug.

The numbers are those of our list of its bugs; cog-sdxl at c79cb3c. Faces, enlarging and the models
themselves have tests of their own.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from preprocess.archive import unpacked
from preprocess.captions import check_trigger_word, read_captions
from preprocess.crop import center_of_mass, crop
from preprocess.errors import PreprocessError
from preprocess.images import read_image
from tests.helpers.archives import gz_bytes, tar_bytes, zip_bytes
from tests.helpers.image_corpus import encode, orientation
from tests.helpers.photos import LABEL, photo, photos
from weights.trigger_words import replace_trigger_words

TOK = {"TOK": "<s0><s1>"}


class Seen(NamedTuple):
    """What comes out of an archive."""

    names: list[str]
    captions: dict[str, str | None]
    pictures: list[Image.Image]
    alphas: list[Image.Image | None]


@pytest.fixture
def see(tmp_path):
    """What comes out of an archive; or the beginning of the error, and nothing left behind."""

    def look(content: bytes, file_name: str = "photos") -> Seen | str:
        path = tmp_path / file_name
        path.write_bytes(content)
        folder = tmp_path / "unpacked"
        folder.mkdir(exist_ok=True)
        try:
            with unpacked(path, LABEL, folder) as found:
                read = [read_image(p.path, p.label) for p in found.photos]
                return Seen(
                    [p.name for p in found.photos],
                    read_captions(found),
                    [r.rgb for r in read],
                    [r.alpha for r in read],
                )
        except PreprocessError as error:
            return str(error)
        finally:
            assert list(folder.iterdir()) == []

    return look


def names(content, file_name="photos"):
    return lambda see: see(content, file_name).names


def captions(content):
    return lambda see: see(content).captions


def refusal(content):
    """The message, which is all there is, up to its remedy."""
    return lambda see: see(content).partition(";")[0].removeprefix(f"{LABEL}: ")


def told_size(see):
    """The time ids of a photo of 200 x 100 in a bucket of 128 x 96."""
    picture, mask = Image.new("RGB", (200, 100)), Image.new("L", (200, 100), 255)
    taken = crop(picture, mask, (128, 96), (0, 0), None)
    return (
        taken.image.size,
        (*taken.original_size[::-1], *taken.crop_top_left, *taken.image.size[::-1]),
    )


def lit_corner(see):
    """Where the white corner of a photo is that a phone took on its side."""
    lying = Image.new("RGB", (160, 80))
    lying.paste((255, 255, 255), (0, 0, 80, 40))
    content = encode(lying, "JPEG", exif=orientation(6))  # to be turned a quarter clockwise
    picture = see(zip_bytes({"a.jpg": content, "b.jpg": photo()})).pictures[0]
    return (picture.size, center_of_mass(picture.convert("L"))[0] > 40)


def transparent(see):
    """The colour and the alpha of what is transparent."""
    seen = see(zip_bytes({"a.png": photo((9, 9, 9, 0), kind="PNG", mode="RGBA"), "b.jpg": photo()}))
    return (seen.pictures[0].getpixel((0, 0)), seen.alphas[0].getextrema())


def sixteen_bit(see):
    grey = Image.fromarray(np.full((80, 96), 32_896, np.uint16))
    seen = see(zip_bytes({"a.png": encode(grey, "PNG"), "b.jpg": photo()}))
    return seen.pictures[0].getpixel((0, 0))


def trigger_check(given, prefix, word="TOK"):
    def check(see):
        try:
            check_trigger_word(dict(enumerate(given)), word, prefix)
        except PreprocessError as error:
            return str(error).partition("'")[0].strip()
        return "taken"

    return check


AB = photos("a.jpg", "b.jpg")
ROWS = b"caption,image_file\nTOK two,b.jpg\nTOK one,a.jpg"
BUGS = [
    # (bug, what the peer does, what is looked at, what ours gives)
    ("B1", "tells 768x768 whatever it trains on", told_size,
     ((128, 96), (100, 200, 0, 0, 96, 128))),
    ("B5", "pairs captions with photos by their position", captions(zip_bytes(
        photos("a.jpg", "z.jpg", "b.jpg") | {"caption.csv": ROWS})),
     {"a.jpg": "TOK one", "b.jpg": "TOK two", "z.jpg": None}),
    ("B5", "pairs photo 10 with the row of photo 2", captions(zip_bytes(
        photos("m (1).jpg", "m (2).jpg", "m (10).jpg")
        | {"caption.csv": b"caption,image_file\n1,m (1).jpg\n2,m (2).jpg\n10,m (10).jpg"})),
     {"m (1).jpg": "1", "m (2).jpg": "2", "m (10).jpg": "10"}),
    ("B5", "never looks whether a row's file exists", refusal(zip_bytes(
        AB | {"caption.csv": b"caption,image_file\nTOK,c.jpg\nTOK,d.jpg"})),
     "'caption.csv', line 2 has a caption for 'c.jpg', and there is no such image"),
    ("B5", "takes the last of two tables", refusal(zip_bytes(
        AB | {"caption.csv": ROWS, "old/caption.csv": ROWS})),
     "input_images holds 2 .csv files, 'caption.csv' and 'old/caption.csv'"),
    ("B6", "unpacks WebP and AVIF and forgets them", names(zip_bytes(
        {"a.webp": photo(kind="WEBP"), "b.avif": photo(kind="AVIF"), "c.heic": photo(kind="HEIF")}
    )), ["a.webp", "b.avif", "c.heic"]),
    ("#9", "finds no upper-case endings, in its forerunner lora-training", names(zip_bytes(
        photos("A.JPEG", "B.JPG", "C.Jpg"))), ["A.JPEG", "B.JPG", "C.Jpg"]),
    ("B6", "ignores texts beside photos", captions(zip_bytes(AB | {"b.txt": b"TOK"})),
     {"a.jpg": None, "b.jpg": "TOK"}),
    ("B8", "replaces TOK inside of words", lambda see: replace_trigger_words(
        "TOK in Tokyo, TOKYO and token", TOK), "<s0><s1> in Tokyo, TOKYO and token"),
    ("B9", "trains a word that no caption holds", trigger_check(["a toy"], ""),
     "none of the 1 captions holds the trigger word"),
    ("B9", "leaves TOK in the prefix of another word", trigger_check([None], "a TOK", "CAT"),
     "caption_prefix"),
    ("B10", "fails on the doubles in a Mac's tar", names(tar_bytes(
        AB | {"._a.jpg": b"\0\5\x16\7", "x/__MACOSX/c.jpg": b""})), ["a.jpg", "b.jpg"]),
    ("B11", "keeps one of two photos of the same name", names(zip_bytes(
        photos("x/a.jpg", "y/a.jpg"))), ["x/a.jpg", "y/a.jpg"]),
    ("B12", "wants .tar in a tar's name", names(tar_bytes(AB), "data"), ["a.jpg", "b.jpg"]),
    ("B12", "refuses a .tgz", names(gz_bytes(tar_bytes(AB)), "a.tgz"), ["a.jpg", "b.jpg"]),
    ("B12", "believes a name that lies", names(zip_bytes(AB), "a.tar"), ["a.jpg", "b.jpg"]),
    ("B13", "trains photos from phones on their side", lit_corner, ((80, 160), True)),
    ("B13", "trains what lies hidden under transparency", transparent, ((255, 255, 255), (0, 0))),
    ("B13", "makes 16-bit pictures white", sixteen_bit, (128, 128, 128)),
    ("1.2", "unpacks a text named .jpg, and fails without its name", refusal(zip_bytes(
        AB | {"c.jpg": b"x"})),
     "'c.jpg' is not an image that can be read (1 bytes, of an unknown kind)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("look", "ours"), [row[2:] for row in BUGS], ids=[f"{bug}: {peer}" for bug, peer, *_ in BUGS]
)
def test_what_the_peer_does_and_what_ours_does(see, look, ours):
    assert look(see) == ours


def test_nothing_was_written_beside_the_folder(see, tmp_path):
    see(zip_bytes(AB))
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "unpacked"}
    assert not any(Path(name).exists() for name in ("temp", "temp_in"))  # the peer's
