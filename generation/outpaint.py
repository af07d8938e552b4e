"""Outpainting: extend an image step by step, and inpaint each new margin."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from generation.blending import Mask, fill
from generation.sizes import Margins

FILL_PIXELS = 4_000_000  # of a canvas; larger ones are filled at a reduced size


def margin_mask(size: tuple[int, int], margins: Margins) -> Mask:
    """Return the mask (H, W) of the margins of an extended image of `size` (width, height)."""
    mask = np.full((size[1], size[0]), 255, np.uint8)
    mask[margins.top : size[1] - margins.bottom, margins.left : size[0] - margins.right] = 0
    return mask


def extend(image: Image.Image, margins: Margins) -> Image.Image:
    """Return the image, unchanged, on a canvas whose margins continue its colours."""
    width = image.width + margins.left + margins.right
    height = image.height + margins.top + margins.bottom
    # The continuation is smooth: a reduced copy of a large image gives the same.
    step = max(1, math.ceil(math.sqrt(width * height / FILL_PIXELS)))
    small = np.asarray(image.reduce(step), dtype=np.float32)
    pad = [
        (-(-before // step), -(-after // step))
        for before, after in ((margins.top, margins.bottom), (margins.left, margins.right))
    ]
    known = np.pad(np.ones(small.shape[:2], np.float32), pad)
    filled = fill(np.pad(small, (*pad, (0, 0))), known).round().clip(0, 255).astype(np.uint8)
    start = (pad[1][0] * step - margins.left, pad[0][0] * step - margins.top)
    canvas = Image.fromarray(filled)
    if step > 1:
        canvas = canvas.resize((canvas.width * step, canvas.height * step))
    canvas = canvas.crop((*start, start[0] + width, start[1] + height))
    canvas.paste(image, (margins.left, margins.top))
    return canvas
