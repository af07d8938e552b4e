"""The only reader of users' images: files → upright 8-bit sRGB, masks → 8-bit grey."""

import functools
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from preprocess.errors import BadImage
from preprocess.image_formats import REMEDY, describe_unknown, readable_formats

MAX_IMAGE_PIXELS = 64_000_000  # a 48-megapixel phone photo fits

# How stored pixels are rotated for EXIF's Orientation (tag 274 of TIFF 6.0), as in Pillow's
# ImageOps.exif_transpose, which fails on an EXIF block that is damaged elsewhere.
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = tuple(_TURNS[orientation] for orientation in (5, 6, 7, 8))


@dataclass(frozen=True)
class SourceImage:
    """An image as it was sent, upright."""

    rgb: Image.Image  # mode RGB, sRGB; transparent pixels over white
    alpha: Image.Image | None  # mode L, 255 = opaque; None where everything is opaque


@dataclass(frozen=True)
class _Decoded:
    color: Image.Image  # upright; mode L, RGB or CMYK
    alpha: Image.Image | None  # mode L, 255 = opaque
    profile: bytes | None  # ICC, that `color` was sent with


def read_image(path: Path, name: str) -> SourceImage:
    """Read the first frame of an image, upright, converted to sRGB.

    Args:
        path: a file of any name; it may be deleted afterwards.
        name: of the input, for messages.

    Raises:
        BadImage: if there is no image, it cannot be decoded, or has too many pixels.
    """
    decoded = _decode(path, name)
    rgb = _to_srgb(decoded, name)
    if decoded.alpha is None:
        return SourceImage(rgb, None)
    # Rounds to the nearest value; fully transparent pixels become exactly white.
    white = Image.new("RGB", rgb.size, "white")
    return SourceImage(Image.composite(rgb, white, decoded.alpha), decoded.alpha)


def read_mask(path: Path, name: str) -> Image.Image:
    """Read a mask: mode L, white = repaint, black = keep; transparent pixels are black.

    Luminance (ITU-R BT.601) of the values as stored: a mask has no colors to manage.

    Raises:
        BadImage: as `read_image`.
    """
    decoded = _decode(path, name)
    color = decoded.color.convert("RGB") if decoded.color.mode == "CMYK" else decoded.color
    luminance = color.convert("L")
    if decoded.alpha is None:
        return luminance
    return Image.composite(luminance, Image.new("L", luminance.size, 0), decoded.alpha)


def read_size(path: Path, name: str) -> tuple[int, int]:
    """Return width and height in pixels, upright, by the header; few formats decode more for it.

    Raises:
        BadImage: if there is no image, or it has too many pixels.
    """
    with _opened(path, name) as image:
        width, height = image.size
        # Pillow rotates TIFF itself, and reports the rotated size.
        sideways = image.format != "TIFF" and _turn(image) in _SIDEWAYS
        return (height, width) if sideways else (width, height)


def _decode(path: Path, name: str) -> _Decoded:
    """Return the first frame, upright, in few modes. Raises BadImage."""
    with _opened(path, name) as image:
        _scale_color_key(image)
        image.load()
        upright = _upright(image)
        color, alpha = _split(upright)
        if alpha is not None and alpha.getextrema() == (255, 255):
            alpha = None
        # What was LAB is already sRGB.
        profile = None if upright.mode == "LAB" else upright.info.get("icc_profile")
        return _Decoded(color, alpha, profile)


@contextmanager
def _opened(path: Path, name: str) -> Iterator[Image.Image]:
    """Open an image and read its header; its decoder's errors in the block become BadImage."""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "missing: its file does not exist"
        raise BadImage(f"{name} is {what}; {REMEDY}")
    with path.open("rb") as file, _decoding_errors(name):
        # A file object, not a path: Pillow would map the file into memory, and name it in errors.
        try:
            image = Image.open(file, formats=readable_formats())
        except UnidentifiedImageError as error:
            file.seek(0)
            raise BadImage(describe_unknown(file.read(64), path.stat().st_size, name)) from error
        _check_size(image.size, name)
        with image:
            yield image


@contextmanager
def _decoding_errors(name: str) -> Iterator[None]:
    """Raise BadImage for a decoder's errors, and ignore Pillow's warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Pillow's own limit is higher than ours; it also holds for images inside an icon.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        claimed = re.search(r"\d+", str(error))
        raise BadImage(_too_many_pixels(claimed[0] if claimed else "more", name)) from error
    # Decoders let anything out: OSError, SyntaxError, struct.error, IndexError, MemoryError ...
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise BadImage(
            f"{name} is a damaged image: {why}; "
            "send the whole file, or save it again as PNG or JPEG"
        ) from error


def _check_size(size: tuple[int, int], name: str) -> None:
    """Check the size before decoding, as few bytes can decode to more than fits into memory."""
    width, height = size
    if width * height > MAX_IMAGE_PIXELS:
        raise BadImage(_too_many_pixels(f"{width}x{height} = {width * height}", name))


def _too_many_pixels(count: str, name: str) -> str:
    return f"{name} has {count} pixels; at most {MAX_IMAGE_PIXELS} are read: send a smaller version"


def _scale_color_key(image: Image.Image) -> None:
    """Scale a PNG's transparent color to 8 bits.

    The file has it in its own bit depth (PNG, third edition, 11.3.1.1); Pillow scales the pixels to
    8 bits and not the key (13.0.0).
    """
    key, tiles = image.info.get("transparency"), getattr(image, "tile", [])
    if image.format != "PNG" or key is None or not tiles:
        return
    match tiles[0].args:
        case "L;2":
            image.info["transparency"] = key * 85
        case "L;4":
            image.info["transparency"] = key * 17
        case "RGB;16B":
            image.info["transparency"] = tuple(value >> 8 for value in key)


def _upright(image: Image.Image) -> Image.Image:
    """Return a copy in memory, rotated by its EXIF orientation."""
    turn = _turn(image)
    return image.copy() if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the rotation of the EXIF orientation; None if it is damaged."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # of a metadata parser: as varied as the decoders'
        return None


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return color (mode L, RGB or CMYK) and alpha (mode L) of an image in any mode."""
    mode, key = image.mode, image.info.get("transparency")
    if mode in ("I", "F") or mode.startswith("I;16"):
        alpha = None if key is None else Image.fromarray(_other_than(image, key))
        return _to_eight_bits(image), alpha
    if mode in ("RGBa", "La"):  # premultiplied
        image = image.convert(mode.upper())
    if image.mode == "LA" or (mode in ("1", "L") and key is not None):
        color, alpha = image.convert("LA").split()
        return color, alpha
    if image.mode in ("RGBA", "PA") or (mode in ("P", "RGB") and key is not None):
        image = image.convert("RGBA")
        return image.convert("RGB"), image.getchannel("A")
    if mode in ("1", "L"):
        return image.convert("L"), None
    return (image if mode == "CMYK" else image.convert("RGB")), None


def _other_than(image: Image.Image, key: object) -> np.ndarray:
    """Return alpha (H, W): 0 where a pixel has the key's value, else 255."""
    return np.where(np.asarray(image) == key, 0, 255).astype(np.uint8)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert grey of more than 8 bits to mode L.

    16-bit values are divided by 257. The range of modes I and F is not known: it is the smallest of
    0..1 (F only), 0..255 (F only) and 0..65535 that holds every value, else minimum..maximum. NaN
    becomes black, infinities the ends.
    """
    values = np.asarray(image)
    if values.dtype.kind == "u":
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    tops = (65535.0,) if image.mode == "I" else (1.0, 255.0, 65535.0)
    top = next((top for top in tops if low >= 0 and high <= top), None)
    start, span = (low, (high - low) or 1.0) if top is None else (0.0, top)
    scaled = (values.astype(np.float64) - start) * (255 / span)
    scaled = np.nan_to_num(scaled, nan=0, posinf=255, neginf=0)
    return Image.fromarray((scaled.clip(0, 255) + 0.5).astype(np.uint8))


def _to_srgb(decoded: _Decoded, name: str) -> Image.Image:
    """Convert to mode RGB by the image's color profile; an unusable profile is ignored."""
    if decoded.profile is None:
        return decoded.color.convert("RGB")
    try:
        return _convert_profile(decoded.color, decoded.profile)
    except (OSError, TypeError, ValueError, ImageCms.PyCMSError) as error:
        print(f"{name}: its color profile is ignored, as it cannot be used ({error})")
        return decoded.color.convert("RGB")


def _convert_profile(color: Image.Image, profile: bytes) -> Image.Image:
    """Convert relative colorimetric with black-point compensation, as photo editors do.

    Raises OSError, TypeError, ValueError or PyCMSError for a damaged or unsuitable profile.
    """
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    # A grey image may have the RGB profile of the editor that saved it.
    if color.mode == "L" and source.profile.xcolor_space.strip() == "RGB":
        color = color.convert("RGB")
    converted = ImageCms.profileToProfile(
        color,
        source,
        _srgb(),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if converted is None:
        raise ValueError("no conversion")
    return converted


@functools.cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
