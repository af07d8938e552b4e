"""Blend an inpainted part into an image: feathered masks, fills and tone.

Masks are uint8 arrays (H, W), 255 = repaint.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Mask = NDArray[np.uint8]
Pixels = NDArray[np.float32]  # (H, W, 3), 0..255

TONE_CELL = 8  # pixels over which a difference in tone is averaged
MAX_TONE_OFFSET = 24.0  # of 255: more than this is another content, not another tone


def feather(mask: Mask, pixels: int) -> Mask:
    """Grow the mask outwards by `pixels`, fading from its own value to 0.

    The maximum over half the distance, then a triangular average over the other half: nothing
    under the mask falls below its own value, and nothing further away than `pixels` is touched.
    """
    if pixels == 0 or not mask.any():
        return mask
    left, top, right, bottom = used_box(mask)
    near = np.s_[max(0, top - pixels) : bottom + pixels, max(0, left - pixels) : right + pixels]
    grow = -(-pixels // 2)
    fade = pixels - grow
    grown = ndimage.maximum_filter(mask[near], size=2 * grow + 1, mode="nearest")
    grown = grown.astype(np.float32)
    for radius in (fade // 2, fade - fade // 2):
        if radius:
            grown = ndimage.uniform_filter(grown, size=2 * radius + 1, mode="nearest")
    # Rounded down, so that float dust of the average outside its reach is nothing.
    feathered = mask.copy()
    feathered[near] = np.maximum(mask[near], (grown + 0.01).astype(np.uint8))
    return feathered


def fill(pixels: Pixels, weight: NDArray[np.float32]) -> Pixels:
    """Continue `pixels` (H, W, C) smoothly to where `weight` (H, W) is 0.

    Push-pull interpolation (Gortler et al., The Lumigraph, SIGGRAPH 1996, section 3.4): averages
    over ever larger cells, each level filling the gaps of the finer one. Where no weight is
    anywhere, 0.
    """
    if weight.size == 1:
        return pixels * (weight > 0)[..., None]
    coarse, total = _cell_means(pixels, weight, 2)
    coarse = fill(coarse, np.minimum(total, 1))
    smooth = _spread(coarse, weight.shape, 2, Image.Resampling.BILINEAR)
    filled: Pixels = weight[..., None] * pixels + (1 - weight[..., None]) * smooth
    return filled


def _cell_means(
    pixels: Pixels, weight: NDArray[np.float32], side: int
) -> tuple[Pixels, NDArray[np.float32]]:
    """Weighted means of cells of `side` x `side` pixels, and each cell's sum of weights."""
    pad = [(0, -length % side) for length in weight.shape]
    weighted = np.pad(pixels * weight[..., None], (*pad, (0, 0)))
    padded = np.pad(weight, pad)
    cells = (padded.shape[0] // side, side, padded.shape[1] // side, side)
    total = padded.reshape(cells).sum(axis=(1, 3))
    means = weighted.reshape(*cells, -1).sum(axis=(1, 3)) / np.maximum(total, 1e-6)[..., None]
    return means.astype(np.float32), total.astype(np.float32)


def _spread(cells: Pixels, shape: tuple[int, ...], side: int, smooth: Image.Resampling) -> Pixels:
    """One value per cell of `side` x `side` pixels to one per pixel of `shape` (H, W)."""
    size = (cells.shape[1] * side, cells.shape[0] * side)
    channels = [
        np.asarray(Image.fromarray(np.ascontiguousarray(cells[..., c])).resize(size, smooth))
        for c in range(cells.shape[-1])
    ]
    return np.stack(channels, axis=-1)[: shape[0], : shape[1]]


def tone_offset(difference: Pixels, blend: Mask) -> Pixels:
    """What to add to a result so that its tone meets the source's along the seam.

    In the feather both are known. Their `difference` there, averaged over cells and continued
    smoothly into the mask, is the offset: a membrane, as in Poisson image editing (Pérez et al.,
    SIGGRAPH 2003), of the low frequencies only. Without a feather, 0.
    """
    share = blend / np.float32(255)
    overlap = 4 * share * (1 - share)
    # Content that differs says nothing about tone.
    overlap = overlap * np.exp(-np.square(np.abs(difference).max(axis=-1) / MAX_TONE_OFFSET))
    if not (overlap > 0.01).any():
        return np.zeros_like(difference)
    means, total = _cell_means(difference, overlap, TONE_CELL)
    field = fill(means, np.minimum(total / TONE_CELL, 1)).clip(-MAX_TONE_OFFSET, MAX_TONE_OFFSET)
    return _spread(field, blend.shape, TONE_CELL, Image.Resampling.BICUBIC)


def used_box(mask: Mask) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the pixels that are not 0, of which there is at least one."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
