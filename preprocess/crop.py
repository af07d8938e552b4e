"""Photos of any shape → few sizes that a model trains on, cut around what matters in them.

A photo goes to the size, a bucket, that is nearest to it in aspect, is scaled until it covers it,
and what juts out on one axis is cut off. What was done is told to the model in SDXL's time ids
(arXiv:2307.01952, 2.2). Sizes are (width, height), points (x, y), both in pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

Size = tuple[int, int]
Point = tuple[float, float]
Enlarge = Callable[[Image.Image], Image.Image]  # mode RGB → the same picture, larger


@dataclass(frozen=True)
class BucketRules:
    """Which sizes there are."""

    resolution: int  # pixels; its square is the largest area
    step: int  # pixels; every side is a multiple: of the VAE's factor times what the UNet halves
    min_side: int
    max_side: int


@dataclass(frozen=True)
class Crop:
    """A photo as a model trains on it, and what SDXL is told about it."""

    image: Image.Image  # mode RGB
    mask: Image.Image  # mode L, 255 = counts fully
    original_size: Size  # of the whole photo, before it was scaled
    crop_top_left: tuple[int, int]  # (top, left), pixels of the scaled photo

    @property
    def target_size(self) -> Size:
        """The bucket."""
        return self.image.size

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """Heights first, as SDXL wants them: original size, top left corner, target size."""
        return (*self.original_size[::-1], *self.crop_top_left, *self.target_size[::-1])


def make_buckets(rules: BucketRules) -> tuple[Size, ...]:
    """The square, and for each length of one side the longest other one that the area allows.

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


def square_bucket(resolution: int) -> tuple[Size, ...]:
    """The only size of cog-sdxl (preprocess.py): a square."""
    return ((resolution, resolution),)


def choose_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The nearest in aspect, by its logarithm: a photo and the same on its side fare alike.

    Of equally near ones the larger.
    """

    def distance(bucket: Size) -> tuple[float, int]:
        smaller, larger = sorted((size[0] * bucket[1], size[1] * bucket[0]))
        return larger / smaller, -bucket[0] * bucket[1]

    return min(sorted(buckets), key=distance)


def is_short(size: Size, bucket: Size) -> bool:
    """Whether a photo has to be enlarged to cover the bucket: either side is shorter."""
    return size[0] < bucket[0] or size[1] < bucket[1]


def centre_of_image(size: Size) -> Point:
    """Where to cut without regard to what is shown."""
    return size[0] / 2, size[1] / 2


def centre_of_mass(mask: Image.Image) -> Point:
    """Where to cut around what a mask counts (mode L); a mask of nothing has the image's centre."""
    weights = np.asarray(mask)  # (H, W), 0..255
    columns, rows = weights.sum(0, dtype=np.float64), weights.sum(1, dtype=np.float64)
    total = columns.sum()
    if total == 0:
        return centre_of_image(mask.size)
    x = columns @ (np.arange(len(columns)) + 0.5) / total  # a pixel's centre is half a pixel in
    y = rows @ (np.arange(len(rows)) + 0.5) / total
    return float(x), float(y)


def crop(
    image: Image.Image, mask: Image.Image, bucket: Size, centre: Point, enlarge: Enlarge | None
) -> Crop:
    """Scale a photo and its mask until they cover the bucket, and cut it out around `centre`.

    Nothing is cut on one of the two axes, and on the other as little as possible.

    Args:
        image: mode RGB.
        mask: mode L, of the same size.
        bucket: the size to come out with.
        centre: in pixels of `image`; where it is too near to an edge, the cut ends at the edge.
        enlarge: a model for a photo that `is_short`: it gets what is cut out of it, and may enlarge
            it by any factor. Without one, short photos are enlarged by the resampling alone. What
            it enlarged counts as enlarged in `original_size`: the model shall not learn a sharp
            picture as a small one.
    """
    assert image.size == mask.size, f"a mask of {mask.size} on a picture of {image.size}"
    width, height = image.size
    scale = max(bucket[0] / width, bucket[1] / height)
    scaled = tuple(max(b, round(s * scale)) for b, s in zip(bucket, image.size, strict=True))
    left, top = (
        min(max(round(c * whole / own - b / 2), 0), whole - b)
        for c, whole, own, b in zip(centre, scaled, image.size, bucket, strict=True)
    )
    x, y = width / scaled[0], height / scaled[1]  # pixels of the photo to one of the scaled one
    box = (
        left * x, top * y, min((left + bucket[0]) * x, width), min((top + bucket[1]) * y, height)
    )  # fmt: skip
    original = image.size
    cut = image
    cut_box = box
    if enlarge is not None and is_short(image.size, bucket):
        cut, cut_box, original = _enlarged(image, box, enlarge)
    return Crop(
        cut.resize(bucket, Image.Resampling.LANCZOS, cut_box),
        mask.resize(bucket, Image.Resampling.BILINEAR, box),  # no overshoot at a mask's edges
        original,
        (top, left),
    )


Box = tuple[float, float, float, float]


def _enlarged(image: Image.Image, box: Box, enlarge: Enlarge) -> tuple[Image.Image, Box, Size]:
    """The pixels around the box, larger; the box in them; the size of a photo so enlarged."""
    outer = (
        math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    )  # fmt: skip
    part = image.crop(outer)
    larger = enlarge(part)
    x, y = larger.width / part.width, larger.height / part.height
    inner = (
        (box[0] - outer[0]) * x, (box[1] - outer[1]) * y,
        min((box[2] - outer[0]) * x, larger.width), min((box[3] - outer[1]) * y, larger.height),
    )  # fmt: skip
    return larger, inner, (round(image.width * x), round(image.height * y))
