"""Images upscaled to four times the side, by SwinIR or Real-ESRGAN.

arXiv:2108.10257 and arXiv:2107.10833; both published models were trained on degraded photos.

A large image goes through the model in overlapping tiles that are blended, so that memory is
bounded: from 1024x1024 to 4096x4096 the real SwinIR took 1.3 GB more on a CPU (docs/benchmarks.md;
4.3 GB were published for 512x512 in one piece, and it grows with the area). Of that, the result
takes 200 MB in float32 and 50 MB as an image. Padding is cropped again; cog-sdxl's Swin2SR leaves a
mirrored strip at the right and the bottom.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from preprocess.errors import BadImage
from preprocess.images import MAX_IMAGE_PIXELS
from preprocess.models import ready, release
from weights import cache
from weights.catalog import Edition
from weights.edition import Device

FACTOR = 4
SWINIR, REAL_ESRGAN = "swinir-x4", "real-esrgan-x4"  # in the catalog
WINDOW = 8  # pixels: SwinIR's attention windows; tiles begin at multiples of it
BORDER = 8  # mirrored pixels around an image, beyond which convolutions see black
TILE, OVERLAP = 256 + 2 * BORDER, 32  # pixels of the source, multiples of WINDOW

Array = NDArray[np.float32]
Run = Callable[[Array], Array]  # (H, W, 3) → (4 H, 4 W, 3), both in [0, 1]


class Upscaler:
    """One of the models in memory; use it in a `with` statement, or `close` it."""

    def __init__(self, edition: Edition, device: Device, name: str = SWINIR) -> None:
        """Load the edition's model of that name. Raises WeightsError if it cannot be downloaded."""
        self._device = device
        self._model = ready(_load(cache.ensure(name, edition)), device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model's memory; the upscaler cannot be used afterwards."""
        release(self._model, self._device)

    def upscale(self, image: Image.Image, factor: float) -> Image.Image:
        """Return the image `factor` times as wide and high, mode RGB.

        Args:
            image: mode RGB, of any size.
            factor: above 1, at most 4. The model always quadruples sides; for less, its result is
                scaled down (Lanczos).

        Raises:
            BadImage: if an image of four times the side has too many pixels.
        """
        assert 1 < factor <= FACTOR, f"factor {factor} is not in (1, {FACTOR}]"
        width, height = image.size
        pixels = width * height * FACTOR**2
        if pixels > MAX_IMAGE_PIXELS:
            raise BadImage(
                f"an image of {width}x{height} is too large to upscale: it would have {pixels}"
                f" pixels, and {MAX_IMAGE_PIXELS} are allowed; send a smaller one"
            )
        unit = np.asarray(image.convert("RGB")).astype(np.float32) / np.float32(255)
        with torch.inference_mode():
            large = enlarge(unit, self._run, TILE, OVERLAP)
        upscaled = Image.fromarray(_to_eight_bits(large))
        size = (round(width * factor), round(height * factor))
        if size == upscaled.size:
            return upscaled
        return upscaled.resize(size, Image.Resampling.LANCZOS)

    def _run(self, tile: Array) -> Array:
        pixels = torch.from_numpy(tile).permute(2, 0, 1)[None].to(self._device)
        large: Tensor = self._model(pixels)[0].permute(1, 2, 0)
        return large.float().cpu().numpy()


def enlarge(pixels: Array, run: Run, tile: int, overlap: int) -> Array:
    """Run the model over the whole image, tile by tile: (H, W, 3) → (4 H, 4 W, 3).

    In the outer quarter of an overlap, where a tile has the least context, its neighbor is used
    alone; in the half behind it, the two are blended.
    """
    height, width = pixels.shape[:2]
    padding = [(BORDER, BORDER + -side % WINDOW) for side in (height, width)]
    padded = np.pad(pixels, (*padding, (0, 0)), mode="symmetric")
    large = np.zeros((FACTOR * padded.shape[0], FACTOR * padded.shape[1], 3), np.float32)
    for top, rows in _tiles(padded.shape[0], tile, overlap):
        for left, columns in _tiles(padded.shape[1], tile, overlap):
            bottom, right = top + len(rows) // FACTOR, left + len(columns) // FACTOR
            drawn = run(np.ascontiguousarray(padded[top:bottom, left:right]))
            weights = (rows[:, None] * columns)[..., None]
            large[FACTOR * top : FACTOR * bottom, FACTOR * left : FACTOR * right] += drawn * weights
    inside = slice(FACTOR * BORDER, None)
    return large[inside, inside][: FACTOR * height, : FACTOR * width]


def _tiles(side: int, tile: int, overlap: int) -> list[tuple[int, Array]]:
    """Return each tile's first pixel and its weight at every upscaled pixel, along one axis.

    As few tiles as possible, of equal length: full ones would cover much of the last one twice.
    """
    count = max(1, math.ceil((side - overlap) / (tile - overlap)))
    length = math.ceil((side + (count - 1) * overlap) / count / WINDOW) * WINDOW
    starts = [min(k * (length - overlap), side - length) for k in range(count)]
    inside = (np.arange(FACTOR * length) + 0.5) / FACTOR  # pixels from the tile's edge
    rise = ((inside - overlap / 4) / (overlap / 2)).clip(0, 1).astype(np.float32)
    total = np.zeros(FACTOR * side, np.float32)
    hats: list[Array] = []
    for start in starts:
        hat = np.ones_like(rise) if start == 0 else rise
        hats.append(hat if start == starts[-1] else np.minimum(hat, rise[::-1]))
        total[FACTOR * start :][: len(hat)] += hats[-1]
    return [
        (start, hat / total[FACTOR * start :][: len(hat)])
        for start, hat in zip(starts, hats, strict=True)
    ]


def _to_eight_bits(pixels: Array) -> NDArray[np.uint8]:
    """Convert [0, 1] to 0..255, in place but for the result."""
    np.clip(pixels, 0, 1, out=pixels)
    pixels *= 255
    pixels += 0.5
    return pixels.astype(np.uint8)


def _load(folder: Path) -> nn.Module:
    """Load the one model file in the folder, whose tensors' names identify the architecture."""
    from spandrel import MAIN_REGISTRY, canonicalize_state_dict

    (path,) = (p for p in folder.iterdir() if p.suffix in (".safetensors", ".pth"))
    described = MAIN_REGISTRY.load(canonicalize_state_dict(_read(path)))
    assert described.scale == FACTOR, f"{path} upscales by {described.scale}"
    model: nn.Module = described.model
    return model


def _read(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file of the catalog, which has passed its hash."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    # A pickle; without weights_only it could run code.
    tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return tensors
