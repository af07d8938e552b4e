"""Images with known content."""

import numpy as np
from PIL import Image, ImageDraw


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Return an RGB image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def circle(size: tuple[int, int], diameter: float) -> Image.Image:
    """Return an RGB image of a white disc in the middle of black."""
    image = Image.new("RGB", size)
    x, y, r = size[0] / 2, size[1] / 2, diameter / 2
    ImageDraw.Draw(image).ellipse((x - r, y - r, x + r - 1, y + r - 1), fill="white")
    return image
