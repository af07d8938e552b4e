"""Scenes of the picture world to change, and how results compare with them."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from generation.base_models import MINIATURE_SDXL
from tests.helpers.request import REQUEST
from weights.miniature.world import (
    COLOURS,
    SHAPES,
    TEXTURES,
    Expectation,
    Scene,
    place,
    render,
    render_mask,
)

SIDE = MINIATURE_SDXL.native_size
CASES, FEW = 16, 4
OUTPUTS = 2  # images of each case
BLUR = REQUEST.mask_blur

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """A scene, and another shape in another colour to put in its place."""

    scene: Scene
    shape: str
    colour: str
    seed: int  # of the first image

    @property
    def prompt(self) -> str:
        scene = self.scene
        ground = f"{scene.texture} {scene.background} background"
        return f"a {scene.size} {self.colour} {self.shape} on a {ground}"

    @property
    def expected(self) -> Expectation:
        return Expectation(self.shape, self.colour, self.scene.background)

    def source(self, width: int = SIDE, height: int = SIDE) -> Image.Image:
        return render(self.scene, width, height)

    def mask(self, width: int = SIDE, height: int = SIDE) -> Image.Image:
        """Return the box of the scene's shape and a tenth of the shorter side around it, white."""
        ys, xs = np.nonzero(render_mask(self.scene, width, height))
        reach = round(min(width, height) * 0.1)
        mask = np.zeros((height, width), np.uint8)
        mask[max(ys.min() - reach, 0) : ys.max() + reach + 1][
            :, max(xs.min() - reach, 0) : xs.max() + reach + 1
        ] = 255
        return Image.fromarray(mask)


def cases(count: int = CASES, size: str | None = None) -> list[Case]:
    """Return scenes of every shape and texture in random colours; the same at each call.

    All of `size`; or large and medium ones, each shape in both.
    """
    rng = np.random.default_rng(7)
    shapes, made = list(SHAPES), []
    for k in range(count):
        colour, background, new = (str(c) for c in rng.choice(list(COLOURS), 3, replace=False))
        sized = size or ("large", "medium")[(k + k // len(shapes)) % 2]
        scene = place(shapes[k % len(shapes)], colour, background, sized, "center", rng)
        scene = replace(scene, texture=TEXTURES[(k + k // len(TEXTURES)) % len(TEXTURES)])
        made.append(Case(scene, shapes[(k + 3) % len(shapes)], new, seed=100 * k))
    return made


def difference(a: Image.Image, b: Image.Image) -> Array:
    """Return the absolute difference (H, W), the mean of the channels."""
    pixels = (np.asarray(image, dtype=np.float64) for image in (a, b))
    return np.abs(np.subtract(*pixels)).mean(axis=-1)


def changed_pixels(source: Image.Image, image: Image.Image, untouched: NDArray[np.bool_]) -> int:
    """Count the pixels that differ where nothing may change."""
    assert image.size == source.size
    different = (np.asarray(source) != np.asarray(image)).any(axis=-1)
    return int((different & untouched).sum())
