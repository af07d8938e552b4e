"""Aspect-ratio buckets, and images scaled and cropped to them.

An image goes to the bucket nearest in aspect ratio, is scaled until it covers it, and is cropped on
one axis. SDXL's time ids carry what was done (arXiv:2307.01952, 2.2). Sizes are (width, height),
points (x, y), both in pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

Size = tuple[int, int]
Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom
Upscale = Callable[[Image.Image], Image.Image]  # mode RGB, by any factor


@dataclass(frozen=True)
class BucketRules:
    """Which buckets there are."""

    resolution: int  # pixels; its square is the largest area
    step: int  # pixels; every side is a multiple: of the VAE's factor times the UNet's
    min_side: int
    max_side: int


@dataclass(frozen=True)
class Crop:
    """An image as a model trains on it."""

    image: Image.Image  # mode RGB
    mask: Image.Image  # mode L, 255 = full loss weight
    original_size: Size  # of the whole image, before it was scaled
    crop_top_left: tuple[int, int]  # (top, left), pixels of the scaled image


def make_buckets(rules: BucketRules) -> tuple[Size, ...]:
    """Return the square, and for each length of one side the longest other one of that area.

    As make_bucket_resolutions of kohya-ss/sd-scripts (library/model_util.py), but without the sizes
    that it shortens to the longest side: they have less area than the others.
    """
    area, step = rules.resolution**2, rules.step
    square = rules.resolution // step * step
    assert square > 0, f"resolution {rules.resolution} is below the step {step}"
    buckets = {(square, square)}
    for width in range(math.ceil(rules.min_side / step) * step, rules.max_side + 1, step):
        height = area // width // step * step
        if rules.min_side <= height <= rules.max_side:
            buckets |= {(width, height), (height, width)}
    return tuple(sorted(buckets))


def choose_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """Return the bucket nearest in the logarithm of its aspect ratio; of equal ones the largest."""

    def distance(bucket: Size) -> tuple[float, int]:
        smaller, larger = sorted((size[0] * bucket[1], size[1] * bucket[0]))
        return larger / smaller, -bucket[0] * bucket[1]

    return min(sorted(buckets), key=distance)


def is_short(size: Size, bucket: Size) -> bool:
    """Return whether an image has to be enlarged to cover the bucket."""
    return size[0] < bucket[0] or size[1] < bucket[1]


def center_of_mass(mask: Image.Image) -> Point:
    """Return the center of a mask's weights (mode L); of a black mask, the image's center."""
    weights = np.asarray(mask)  # (H, W), 0..255
    columns, rows = weights.sum(0, dtype=np.float64), weights.sum(1, dtype=np.float64)
    total = columns.sum()
    if total == 0:
        return mask.width / 2, mask.height / 2
    x = columns @ (np.arange(len(columns)) + 0.5) / total  # a pixel's center is half a pixel in
    y = rows @ (np.arange(len(rows)) + 0.5) / total
    return float(x), float(y)


def crop(
    image: Image.Image, mask: Image.Image, bucket: Size, center: Point, upscale: Upscale | None
) -> Crop:
    """Scale an image and its mask until they cover the bucket, and crop them around `center`.

    Nothing is cut off on one of the two axes, and on the other as little as possible.

    Args:
        image: mode RGB.
        mask: mode L, of the same size.
        bucket: the size of the result.
        center: in pixels of `image`; near an edge, the crop ends at the edge.
        upscale: a model for an image that `is_short`, of which it gets the cropped part; without
            one, resampling enlarges it. `original_size` is that of the upscaled image, so that the
            model does not learn a sharp image as a small one.
    """
    assert image.size == mask.size, f"a mask of {mask.size} on an image of {image.size}"
    width, height = image.size
    scale = max(bucket[0] / width, bucket[1] / height)
    scaled = tuple(max(b, round(s * scale)) for b, s in zip(bucket, image.size, strict=True))
    left, top = (
        min(max(round(c * whole / side - b / 2), 0), whole - b)
        for c, whole, side, b in zip(center, scaled, image.size, bucket, strict=True)
    )
    x, y = width / scaled[0], height / scaled[1]  # pixels of the image to one of the scaled image
    right, bottom = min((left + bucket[0]) * x, width), min((top + bucket[1]) * y, height)
    box = (left * x, top * y, right, bottom)
    source, source_box, original_size = image, box, image.size
    if upscale is not None and is_short(image.size, bucket):
        source, source_box, original_size = _upscaled(image, box, upscale)
    return Crop(
        source.resize(bucket, Image.Resampling.LANCZOS, source_box),
        mask.resize(bucket, Image.Resampling.BILINEAR, box),  # no overshoot at a mask's edges
        original_size,
        (top, left),
    )


def _upscaled(image: Image.Image, box: Box, upscale: Upscale) -> tuple[Image.Image, Box, Size]:
    """Return the pixels around the box upscaled, the box in them, and the image's new size."""
    left, top = math.floor(box[0]), math.floor(box[1])
    part = image.crop((left, top, math.ceil(box[2]), math.ceil(box[3])))
    large = upscale(part)
    x, y = large.width / part.width, large.height / part.height
    inner = (
        (box[0] - left) * x,
        (box[1] - top) * y,
        min((box[2] - left) * x, large.width),
        min((box[3] - top) * y, large.height),
    )
    return large, inner, (round(image.width * x), round(image.height * y))
