"""Sizes of images in pixels: aspect ratios, the nearest valid size, outpainting margins."""

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from enum import StrEnum

from generation.base_models import BaseModelSpec
from generation.errors import InvalidRequest
from inputs import option
from preprocess.images import MAX_IMAGE_PIXELS

Size = tuple[int, int]  # (width, height)

SIDE_MULTIPLE = 8  # pixels per latent
# xinsir's promax model was trained to extend by 6 to 30 % a side (ControlNetPlus); the same holds
# for seeing enough of the image to continue it.
OUTPAINT_SHARE_PER_STEP = 0.3


class AspectRatio(StrEnum):
    """Width to height."""

    SQUARE = "1:1"
    LANDSCAPE_3_2 = "3:2"
    PORTRAIT_2_3 = "2:3"
    LANDSCAPE_4_3 = "4:3"
    PORTRAIT_3_4 = "3:4"
    LANDSCAPE_16_9 = "16:9"
    PORTRAIT_9_16 = "9:16"


# Of one megapixel, close to the ratio and among the sizes that SDXL was trained at
# (arXiv:2307.01952, appendix I); other models' are these, scaled to their area.
_SIZES = {
    AspectRatio.SQUARE: (1024, 1024),
    AspectRatio.LANDSCAPE_3_2: (1216, 832),
    AspectRatio.PORTRAIT_2_3: (832, 1216),
    AspectRatio.LANDSCAPE_4_3: (1152, 896),
    AspectRatio.PORTRAIT_3_4: (896, 1152),
    AspectRatio.LANDSCAPE_16_9: (1344, 768),
    AspectRatio.PORTRAIT_9_16: (768, 1344),
}


@dataclass(frozen=True)
class Margins:
    """Pixels to add on each side of an image."""

    left: int = option(0, "Pixels to add on the left of the image.", ge=0, le=4096)
    top: int = option(0, "Pixels to add above the image.", ge=0, le=4096)
    right: int = option(0, "Pixels to add on the right of the image.", ge=0, le=4096)
    bottom: int = option(0, "Pixels to add below the image.", ge=0, le=4096)


NO_MARGINS = Margins()


def size_of_ratio(ratio: AspectRatio, spec: BaseModelSpec) -> Size:
    """Return the model's size for the ratio, at the area it was trained at."""
    scale = spec.native_size / 1024
    width, height = _SIZES[ratio]
    return nearest_valid_size(width * scale, height * scale, spec)


def size_of_aspect(width: float, height: float, spec: BaseModelSpec) -> Size:
    """Return the valid size of this aspect ratio with the area the model was trained at."""
    scale = spec.native_size / math.sqrt(width * height)
    return nearest_valid_size(width * scale, height * scale, spec)


def valid_size(
    width: int | None, height: int | None, image: Size | None, spec: BaseModelSpec
) -> Size:
    """Return the size that is asked for, with an open side from the image or the model.

    Raises InvalidRequest if the model cannot generate it.
    """
    if image is None:
        wanted = (width or spec.native_size, height or spec.native_size)
    else:
        aspect = image[0] / image[1]
        wanted = (
            width or round_to_multiple((height or 0) * aspect),
            height or round_to_multiple((width or 0) / aspect),
        )
    nearest = nearest_valid_size(*wanted, spec)
    if nearest == wanted:
        return nearest
    raise InvalidRequest(
        f"an image of width={wanted[0]} height={wanted[1]} is not possible with {spec.name}: each"
        f" side must be a multiple of {SIDE_MULTIPLE} from {spec.min_side} to {spec.max_side} and"
        f" the area at most {spec.max_pixels} pixels; the nearest valid size is"
        f" width={nearest[0]} height={nearest[1]}"
    )


def nearest_valid_size(width: float, height: float, spec: BaseModelSpec) -> Size:
    """Return the valid size closest to the given one; the same one if it is valid."""

    def side(length: float) -> int:
        return min(max(round_to_multiple(length), spec.min_side), spec.max_side)

    w, h = side(width), side(height)
    if w * h > spec.max_pixels:
        shrink = math.sqrt(spec.max_pixels / (w * h))
        w = max(math.floor(w * shrink / SIDE_MULTIPLE) * SIDE_MULTIPLE, spec.min_side)
        h = max(math.floor(h * shrink / SIDE_MULTIPLE) * SIDE_MULTIPLE, spec.min_side)
    return w, h


def round_to_multiple(length: float) -> int:
    """Return the multiple of SIDE_MULTIPLE nearest to the length."""
    return math.floor(length / SIDE_MULTIPLE + 0.5) * SIDE_MULTIPLE


def outpainted_size(image: Size, margins: Margins) -> Size:
    """Return the size of the image with its margins.

    Raises InvalidRequest for a margin beyond the image's side, and for too large a result.
    """
    for name, margin, side in (
        ("left", margins.left, image[0]),
        ("right", margins.right, image[0]),
        ("top", margins.top, image[1]),
        ("bottom", margins.bottom, image[1]),
    ):
        if not 0 <= margin <= side:
            raise InvalidRequest(
                f"outpaint_{name} is {margin}; it must be from 0 to {side}, the side of the image:"
                " extend further in a second request"
            )
    width, height = extended_size(image, margins)
    if width * height > MAX_IMAGE_PIXELS:
        raise InvalidRequest(
            f"the extended image would be {width}x{height}; it may have at most {MAX_IMAGE_PIXELS}"
            " pixels: extend by less or send a smaller image"
        )
    return width, height


def extended_size(size: Size, margins: Margins) -> Size:
    """Return the size with the margins added."""
    return size[0] + margins.left + margins.right, size[1] + margins.top + margins.bottom


def outpaint_steps(size: Size, margins: Margins) -> Iterator[Margins]:
    """Yield the margins in even parts, each at most about 30 % of the side it is added to."""
    width, height = (side * OUTPAINT_SHARE_PER_STEP for side in size)
    count = max(
        1,
        *(math.ceil(margin / width) for margin in (margins.left, margins.right)),
        *(math.ceil(margin / height) for margin in (margins.top, margins.bottom)),
    )
    for k in range(count):
        part = Margins(*(m * (k + 1) // count - m * k // count for m in astuple(margins)))
        if part != NO_MARGINS:  # a side of a few pixels takes more steps than it has pixels to add
            yield part
