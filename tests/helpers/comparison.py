"""Comparison of images from computations that are equal but for rounding.

A CPU's kernels choose the order in which they sum by the batch's size, the number of threads, the
shape, where memory lies and the instruction set. Latents then differ by about 1e-6, and a pixel
whose value lies on a rounding edge by one step of 255. Bytes are the same only where the very same
computation runs twice.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

Pixels = Image.Image | np.ndarray


def max_difference(first: Pixels, second: Pixels) -> int:
    """Return the largest difference of two images' values, in steps of 255."""
    one, other = (np.asarray(image, dtype=int) for image in (first, second))
    assert one.shape == other.shape, (one.shape, other.shape)
    return int(np.abs(one - other).max())


def nearly_equal(first: Sequence[Pixels], second: Sequence[Pixels]) -> bool:
    """Return whether two lists have equal images, up to one step of 255."""
    return len(first) == len(second) and all(
        np.shape(a) == np.shape(b) and max_difference(a, b) <= 1
        for a, b in zip(first, second, strict=True)
    )
