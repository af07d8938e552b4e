"""Which files are images: the formats that are tried, their suffixes, and what other files are."""

import functools

from PIL import Image

# All of Pillow's raster formats that a magic number tells apart. AVIF before HEIF: both claim the
# brand mif1, and only AVIF's plugin gives way. TGA has no magic number and comes last. Not here:
# EPS, which runs Ghostscript; WMF, MPEG and the stubs, which decode nothing; scientific formats.
_FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "AVIF", "HEIF", "TIFF", "BMP", "JPEG2000", "ICO", "ICNS"),
    *("CUR", "DIB", "PPM", "PSD", "QOI", "DDS", "PCX", "DCX", "SGI", "SUN", "XBM", "XPM", "MSP"),
    *("BLP", "FTEX", "FLI", "GBR", "PIXAR", "TGA"),
)
# By strong magic numbers; not TIFF, which a camera's raw files claim to be.
_PHOTO_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "AVIF", "HEIF")
REMEDY = "send a PNG, JPEG, WebP, GIF, AVIF, HEIC, TIFF or BMP file"
_OTHER_CONTENT = {  # beginnings, in lower case, of what is sent by mistake
    b"%pdf": "a PDF document",
    b"%!ps": "a PostScript document",
    b"pk\x03\x04": "a ZIP archive",
    b"<svg": "an SVG drawing",
    b"<?xml": "an XML or SVG document",
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"\x1a\x45\xdf\xa3": "a video",
    b"{": "JSON",
}


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Return what `Image.open` may try; registers HEIF at the first call, as its import is slow."""
    from pillow_heif import register_heif_opener

    register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
    return _FORMATS


def describe_unknown(beginning: bytes, size: int, name: str) -> str:
    """Return the message about a file that no decoder reads, without its content."""
    if size == 0:
        return f"{name} is an empty file (0 bytes); {REMEDY}"
    start = beginning.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    found = (what for magic, what in _OTHER_CONTENT.items() if start.startswith(magic))
    damaged = (
        f"{kind} with a damaged beginning or no pixels"
        for kind in _FORMATS
        if _claims(kind, beginning)
    )
    what = next(found, next(damaged, "of an unknown kind"))
    return f"{name} is not an image that can be read ({size} bytes, {what}); {REMEDY}"


def _claims(kind: str, beginning: bytes) -> bool:
    """Return whether the magic number is of this format."""
    accept = Image.OPEN[kind][1]
    return accept is not None and bool(accept(beginning[:16].ljust(16, b"\0")))


def begins_like_photo(beginning: bytes) -> bool:
    """Return whether a file's first 64 bytes are of a format that photos are shared in."""
    readable_formats()
    Image.init()
    return any(_claims(kind, beginning) for kind in _PHOTO_FORMATS)


def image_suffixes() -> frozenset[str]:
    """Return the suffixes of the formats that are read, in lower case, with their dot."""
    readable_formats()
    return frozenset(
        suffix for suffix, kind in Image.registered_extensions().items() if kind in _FORMATS
    )
