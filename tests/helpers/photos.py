"""Photos of a training, and archives of them, made in code."""

import functools
import struct

from PIL import Image

from tests.helpers.archives import zip_bytes
from tests.helpers.image_corpus import encode, png_chunk

LABEL = "input_images"  # the input's name, which every message has to begin with
SIZE = (96, 80)


@functools.cache
def photo(colour=(180, 80, 40), size=SIZE, kind="JPEG", mode="RGB") -> bytes:
    return encode(Image.new(mode, size, colour), kind)


def photos(*names: str) -> dict[str, bytes]:
    """A photo for each name; no two are the same."""
    return {name: photo((180, 8 * k, 40)) for k, name in enumerate(names)}


def zipped(*names: str, **texts: str | bytes) -> bytes:
    """A zip of photos, and of texts by name: caption_csv is caption.csv."""
    more = {
        name.replace("__", "/").replace("_csv", ".csv").replace("_txt", ".txt"): (
            text.encode() if isinstance(text, str) else text
        )
        for name, text in texts.items()
    }
    return zip_bytes(photos(*names) | more)


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG, which says how large it is, and nothing of its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"")
