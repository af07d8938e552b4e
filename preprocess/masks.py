"""Masks of how much each pixel counts in a training: mode L, 255 = fully, 0 = not at all."""

from collections.abc import Sequence

from PIL import Image, ImageChops


def combine(size: tuple[int, int], masks: Sequence[Image.Image | None]) -> Image.Image:
    """The product of the masks: what every one of them counts; None counts everything.

    Where nothing is left, nothing is put in its place: how little a pixel may count is up to the
    loss.

    Args:
        size: width and height in pixels, of every mask.
        masks: mode L: a picture's alpha, the mask of a text, of faces.
    """
    product = Image.new("L", size, 255)
    for mask in masks:
        if mask is not None:
            assert (mask.mode, mask.size) == ("L", size), f"a mask {mask.mode} {mask.size}"
            product = ImageChops.multiply(product, mask)
    return product
