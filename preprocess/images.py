"""Pictures that users send: the only reader of them. Files to upright 8-bit sRGB, masks to grey."""

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

from preprocess.errors import BadPicture
from preprocess.picture_formats import REMEDY, describe_unknown, readable_formats

MAX_IMAGE_PIXELS = 64_000_000  # a 48-megapixel phone photo fits

# How stored pixels are turned for EXIF's Orientation (tag 274 of TIFF 6.0), as in Pillow's
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
    """A picture as it was sent, upright."""

    rgb: Image.Image  # mode RGB, sRGB; what is transparent shows white
    alpha: Image.Image | None  # mode L, 255 = opaque; None where everything is opaque


@dataclass(frozen=True)
class _Decoded:
    colour: Image.Image  # upright; mode L, RGB or CMYK
    alpha: Image.Image | None  # mode L, 255 = opaque
    profile: bytes | None  # ICC, that `colour` was sent with


def read_image(path: Path, name: str) -> SourceImage:
    """Read the first frame of a picture, upright, its colours converted to sRGB.

    Args:
        path: a file of any name; it is closed and may be deleted afterwards.
        name: of the input, for messages.

    Raises:
        BadPicture: if there is no picture, it cannot be decoded, or has too many pixels.
    """
    decoded = _decode(path, name)
    rgb = _to_srgb(decoded, name)
    if decoded.alpha is None:
        return SourceImage(rgb, None)
    # Rounds to the nearest value; what lies under full transparency becomes exactly white.
    white = Image.new("RGB", rgb.size, "white")
    return SourceImage(Image.composite(rgb, white, decoded.alpha), decoded.alpha)


def read_mask(path: Path, name: str) -> Image.Image:
    """Read a mask: mode L, white = repaint, black = keep; transparent counts as black.

    Luminance (ITU-R BT.601) of the values as stored: a mask has no colours to manage.

    Raises:
        BadPicture: as `read_image`.
    """
    decoded = _decode(path, name)
    colour = decoded.colour.convert("RGB") if decoded.colour.mode == "CMYK" else decoded.colour
    luminance = colour.convert("L")
    if decoded.alpha is None:
        return luminance
    return Image.composite(luminance, Image.new("L", luminance.size, 0), decoded.alpha)


def read_size(path: Path, name: str) -> tuple[int, int]:
    """Width and height in pixels, upright, by a picture's header; few formats decode more for it.

    Raises:
        BadPicture: if there is no picture, or it has too many pixels.
    """
    with _opened(path, name) as image:
        width, height = image.size
        # Pillow turns TIFF itself, and says so beforehand.
        sideways = image.format != "TIFF" and _turn(image) in _SIDEWAYS
        return (height, width) if sideways else (width, height)


def _decode(path: Path, name: str) -> _Decoded:
    """The first frame, upright, in few modes.

    Raises:
        BadPicture: as `read_image`.
    """
    with _opened(path, name) as image:
        _scale_colour_key(image)
        image.load()
        upright = _upright(image)
        colour, alpha = _split(upright)
        if alpha is not None and alpha.getextrema() == (255, 255):
            alpha = None
        # What was LAB is already sRGB.
        profile = None if upright.mode == "LAB" else upright.info.get("icc_profile")
        return _Decoded(colour, alpha, profile)


@contextmanager
def _opened(path: Path, name: str) -> Iterator[Image.Image]:
    """A picture whose header is read; what its decoder raises in the block becomes BadPicture."""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "missing: its file does not exist"
        raise BadPicture(f"{name} is {what}; {REMEDY}")
    with path.open("rb") as file, _decoding_errors(name):
        # A file object, not a path: Pillow would map the file into memory, and name it in errors.
        try:
            image = Image.open(file, formats=readable_formats())
        except UnidentifiedImageError as error:
            file.seek(0)
            raise BadPicture(describe_unknown(file.read(64), path.stat().st_size, name)) from error
        _check_size(image.size, name)
        with image:
            yield image


@contextmanager
def _decoding_errors(name: str) -> Iterator[None]:
    """Whatever a decoder raises becomes BadPicture; Pillow's warnings are kept quiet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Pillow's own limit is higher than ours; it also holds for pictures inside an icon.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except BadPicture:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        claimed = re.search(r"\d+", str(error))
        raise BadPicture(_too_many_pixels(claimed[0] if claimed else "more", name)) from error
    # Decoders let anything out: OSError, SyntaxError, struct.error, IndexError, MemoryError ...
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise BadPicture(
            f"{name} is a damaged picture: {why}; "
            "send the whole file, or save it anew as PNG or JPEG"
        ) from error


def _check_size(size: tuple[int, int], name: str) -> None:
    """Before decoding: a few bytes can claim to be a picture that fills the memory."""
    width, height = size
    if width * height > MAX_IMAGE_PIXELS:
        raise BadPicture(_too_many_pixels(f"{width}x{height} = {width * height}", name))


def _too_many_pixels(count: str, name: str) -> str:
    return f"{name} has {count} pixels; at most {MAX_IMAGE_PIXELS} are read: send a smaller version"


def _scale_colour_key(image: Image.Image) -> None:
    """Bring a PNG's transparent colour to 8 bits.

    The file gives it in its own bit depth (PNG, third edition, 11.3.1.1); Pillow brings the pixels
    to 8 bits and leaves the key (13.0.0).
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
    """A copy in memory, turned as its EXIF data say."""
    turn = _turn(image)
    return image.copy() if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How EXIF data say that a picture is to be turned; damaged ones say nothing."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # of a metadata parser: as varied as the decoders'
        return None


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colour (mode L, RGB or CMYK) and alpha (mode L) of a picture in any of Pillow's modes."""
    mode, key = image.mode, image.info.get("transparency")
    if mode in ("I", "F") or mode.startswith("I;16"):
        alpha = None if key is None else Image.fromarray(_other_than(image, key))
        return _to_eight_bits(image), alpha
    if mode in ("RGBa", "La"):  # premultiplied
        image = image.convert(mode.upper())
    if image.mode == "LA" or (mode in ("1", "L") and key is not None):
        colour, alpha = image.convert("LA").split()
        return colour, alpha
    if image.mode in ("RGBA", "PA") or (mode in ("P", "RGB") and key is not None):
        image = image.convert("RGBA")
        return image.convert("RGB"), image.getchannel("A")
    if mode in ("1", "L"):
        return image.convert("L"), None
    return (image if mode == "CMYK" else image.convert("RGB")), None


def _other_than(image: Image.Image, key: object) -> np.ndarray:
    """Alpha (H, W): 0 where a pixel has the key's value, else 255."""
    return np.where(np.asarray(image) == key, 0, 255).astype(np.uint8)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits to mode L.

    16-bit values are divided by 257. Modes I and F do not say their range: it is the smallest of
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
    """Mode RGB, by the picture's own colour profile; a profile that is of no use is ignored."""
    if decoded.profile is None:
        return decoded.colour.convert("RGB")
    try:
        return _convert_profile(decoded.colour, decoded.profile)
    except (OSError, TypeError, ValueError, ImageCms.PyCMSError) as error:
        print(f"{name}: its colour profile is ignored, as it cannot be used ({error})")
        return decoded.colour.convert("RGB")


def _convert_profile(colour: Image.Image, profile: bytes) -> Image.Image:
    """Relative colorimetric with black-point compensation, as photo editors do it.

    Raises:
        OSError, TypeError, ValueError, PyCMSError: if the profile is damaged or does not fit.
    """
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    # A grey picture may carry the RGB profile of the editor that saved it.
    if colour.mode == "L" and source.profile.xcolor_space.strip() == "RGB":
        colour = colour.convert("RGB")
    converted = ImageCms.profileToProfile(
        colour,
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
