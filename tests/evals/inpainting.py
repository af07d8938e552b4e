"""Measure inpainting: what changes under the mask, the seam around it, and what must not change."""

import collections
import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from generation.blending import feather
from generation.options import InpaintArea
from tests.evals.cases import (
    BLUR,
    CASES,
    FEW,
    OUTPUTS,
    SIDE,
    Array,
    cases,
    changed_pixels,
    difference,
)
from tests.evals.harness import Harness
from weights.miniature.world import judge, read_picture

REPAINTED = 0.8  # threshold
SEAM_RATIO = 1.5  # threshold
ODD_SIZES = ((200, 150), (333, 127))
GREYS = (64, 128, 192, 255)


def gradient(image: Image.Image) -> Array:
    """Return the gradient's magnitude (H, W) in steps per pixel, the mean of the channels.

    Of the image under a Gaussian of 1 pixel, which takes off the scenes' grain (standard
    deviation 1.5) and leaves an edge.
    """
    pixels = ndimage.gaussian_filter(np.asarray(image, dtype=np.float64), (1, 1, 0))
    down, across = np.gradient(pixels, axis=(0, 1))
    return np.hypot(down, across).mean(axis=-1)


def ground(image: Image.Image, distance: int = 5) -> NDArray[np.bool_]:
    """Return where (H, W) the judge sees no shape within `distance`; nowhere if it sees none.

    Nor within `distance` of the image's edge, where the decoder leaves a faint frame.
    """
    shape = read_picture(image).mask
    shape = np.asarray(Image.fromarray(shape).resize(image.size))
    away = ndimage.binary_dilation(shape, iterations=distance)
    edge = np.ones_like(away)
    edge[distance:-distance, distance:-distance] = False
    return np.asarray(~away & ~edge & shape.any())


def seam_band(mask: Image.Image, blur: int) -> NDArray[np.bool_]:
    """Return where (H, W) old and new meet: the feather, and 2 pixels on either side of it."""
    white = np.asarray(mask)
    inner = ndimage.binary_erosion(white == 255, iterations=2, border_value=1)
    outer = ndimage.binary_dilation(feather(white, blur) > 0, iterations=2)
    return np.asarray(outer & ~inner)


@dataclass(frozen=True)
class Inpainting:
    repainted: float  # rate of the new shape in its colour on the old background
    changed_outside: int  # pixels outside the feather that are not the source's bytes
    seams: dict[str, float]  # texture → gradient in the band around the mask, away from the shape
    grounds: dict[str, float]  # texture → gradient of backgrounds made from text alone, as far away
    source_seams: dict[str, float]  # texture → gradient in the sources' band, where no seam is

    def seam_ratio(self, texture: str) -> float:
        return self.seams[texture] / self.grounds[texture]

    def mean_seam_ratio(self) -> float:
        return float(np.mean([self.seam_ratio(texture) for texture in self.seams]))


def inpainting(harness: Harness, count: int = CASES, blur: int = BLUR) -> Inpainting:
    """Put another shape in another colour in the place of each case's shape, at full strength.

    The seam is held against images of the same prompts from text alone: their background is as
    smooth as the model makes one of that texture, and nothing was pasted into it. Textures are
    told apart because only on a plain one is every gradient in the band the seam's.
    """
    right, changed = [], 0
    seams, grounds, source_seams = (collections.defaultdict(list) for _ in range(3))
    for case in cases(count):
        source, mask, texture = case.source(), case.mask(), case.scene.texture
        untouched = feather(np.asarray(mask), blur) == 0
        band = seam_band(mask, blur)
        source_seams[texture] += [gradient(source)[band & ground(source)]]
        common = {"prompt": case.prompt, "num_outputs": OUTPUTS, "seed": case.seed}
        for image in harness.make(source, mask, prompt_strength=1.0, mask_blur=blur, **common):
            right.append(judge(image, case.expected).all_right)
            changed += changed_pixels(source, image, untouched)
            seams[texture] += [gradient(image)[band & ground(image)]]
        grounds[texture] += [gradient(p)[ground(p)] for p in harness.make(**common)]
    means = (
        {
            texture: float(np.mean([v.mean() for v in values if v.size]))
            for texture, values in d.items()
        }
        for d in (seams, grounds, source_seams)
    )
    return Inpainting(float(np.mean(right)), changed, *means)


@dataclass(frozen=True)
class OddSize:
    size: tuple[int, int]
    area: str
    changed_outside: int  # pixels outside the feather that are not the source's bytes
    changed_inside: float  # mean difference under the mask
    repainted: float  # rate


def odd_sizes(harness: Harness, count: int = FEW) -> list[OddSize]:
    """Inpaint images that the model works on at another size than theirs."""
    rows = []
    for size, area in itertools.product(ODD_SIZES, InpaintArea):
        right, changed, inside = [], 0, []
        for case in cases(count):
            source, mask = case.source(*size), case.mask(*size)
            untouched = feather(np.asarray(mask), BLUR) == 0
            for image in harness.make(
                source,
                mask,
                prompt=case.prompt,
                prompt_strength=1.0,
                inpaint_area=area,
                inpaint_padding=8,
                num_outputs=OUTPUTS,
                seed=case.seed,
            ):
                right.append(judge(image, case.expected).all_right)
                changed += changed_pixels(source, image, untouched)
                inside.append(difference(source, image)[np.asarray(mask) == 255].mean())
        rows.append(
            OddSize(size, str(area), changed, float(np.mean(inside)), float(np.mean(right)))
        )
    return rows


@dataclass(frozen=True)
class HiddenContent:
    size: tuple[int, int]
    area: str
    strength: float
    different: int  # pixels in which the images of two sources differ


def hidden_content(harness: Harness, count: int = 2, steps: int = 8) -> list[HiddenContent]:
    """Inpaint two sources that differ under the mask only: a scene, and the same with static."""
    rows = []
    sizes = ((SIDE, SIDE), *ODD_SIZES)
    grid = [*itertools.product((1.0,), sizes, InpaintArea)]
    grid.append((0.5, sizes[0], InpaintArea.WHOLE_PICTURE))
    for strength, size, area in grid:
        different = 0
        for case in cases(count):
            source, mask = case.source(*size), case.mask(*size)
            static = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
            other = Image.composite(Image.fromarray(static), source, mask)
            images = [
                harness.make(
                    image,
                    mask,
                    prompt=case.prompt,
                    prompt_strength=strength,
                    inpaint_area=area,
                    num_outputs=2,
                    num_inference_steps=steps,
                )
                for image in (source, other)
            ]
            for a, b in zip(*images, strict=True):
                different += int((np.asarray(a) != np.asarray(b)).any(axis=-1).sum())
        rows.append(HiddenContent(size, str(area), strength, different))
    return rows


def soft_inpainting(harness: Harness) -> dict[int, float]:
    """Return the mask's grey → the mean difference under it, at full strength."""
    changes = {}
    for grey in GREYS:
        far = []
        for case in cases(FEW):
            source, mask = case.source(), case.mask()
            soft = mask.point(lambda v, grey=grey: grey if v else 0)
            for image in harness.make(
                source,
                soft,
                prompt=case.prompt,
                prompt_strength=1.0,
                num_outputs=OUTPUTS,
                seed=case.seed,
            ):
                far.append(difference(image, source)[np.asarray(mask) == 255].mean())
        changes[grey] = float(np.mean(far))
    return changes
