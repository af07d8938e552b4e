"""Measure each mode on the miniature edition: `python -m tests.evals.mode`.

Every image goes through the engine. Colours are in 8-bit steps of sRGB, lengths in pixels, rates
in [0, 1].
"""

import collections
import contextlib
import itertools
import sys
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from generation.base_models import MINIATURE_SDXL
from generation.blending import feather
from generation.options import InpaintArea
from generation.outpaint import margin_mask
from generation.sizes import Margins
from tests.evals.harness import Harness, open_harness
from tests.helpers.engines import base_model
from tests.helpers.request import REQUEST
from tests.miniature.reference_pipelines import DISTINCT
from weights.miniature.world import (
    COLOURS,
    SHAPES,
    TEXTURES,
    Expectation,
    Scene,
    judge,
    place,
    read_picture,
    render,
    render_mask,
)

SIDE = MINIATURE_SDXL.native_size
CASES, FEW = 16, 4
OUTPUTS = 2  # images of each case
BLUR = REQUEST.mask_blur
ODD_SIZES = ((200, 150), (333, 127))

STRENGTHS = (0.2, 0.45, 0.65, 0.95)
BACKGROUND_KEPT, PROMPT_FOLLOWED, REPAINTED = 0.9, 0.8, 0.8  # thresholds
SEAM_RATIO = 1.5  # threshold
OUTPAINT_STEP = 3.0  # threshold
GREYS = (64, 128, 192, 255)

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


# Image to image


@dataclass(frozen=True)
class ImageToImage:
    distances: dict[float, float]  # strength → mean difference between image and source
    background_kept: dict[float, float]  # strength → rate
    followed: dict[float, float]  # strength → rate of the prompt's shape in its colour


def image_to_image(harness: Harness, count: int = CASES) -> ImageToImage:
    """Measure each strength on each case; the prompt names a shape and its colour alone."""
    distances, kept, followed = {}, {}, {}
    for strength in STRENGTHS:
        far, same, new = [], [], []
        for case in cases(count):
            source = case.source()
            prompt = f"a large {case.colour} {case.shape}"
            expected = Expectation(shape=case.shape, colour=case.colour)
            for image in harness.make(
                source,
                prompt=prompt,
                prompt_strength=strength,
                num_outputs=OUTPUTS,
                seed=case.seed,
            ):
                far.append(difference(image, source).mean())
                same.append(read_picture(image).background == case.scene.background)
                new.append(judge(image, expected).all_right)
        distances[strength] = float(np.mean(far))
        kept[strength], followed[strength] = float(np.mean(same)), float(np.mean(new))
    return ImageToImage(distances, kept, followed)


# Few steps at low strength


@dataclass(frozen=True)
class FewSteps:
    mode: str
    scheduler: str
    steps: int
    strength: float
    forward_passes: int  # of the UNet
    finite: bool  # what the VAE decoded
    size: tuple[int, int]


GRID_SIZE = (72, 64)


def few_steps(harness: Harness) -> list[FewSteps]:
    """Measure requests whose schedule has less than one step left to run."""
    components = base_model(harness.engine).components
    case = cases(1)[0]
    source, mask = case.source(*GRID_SIZE), case.mask(*GRID_SIZE)
    seen: list[FewSteps] = []
    forward_passes: list[None] = []
    finite: list[bool] = []
    hooks = [
        components.unet.register_forward_hook(lambda *_: forward_passes.append(None)),
        components.vae.decoder.register_forward_hook(
            lambda module, args, output: finite.append(bool(torch.isfinite(output).all()))
        ),
    ]
    try:
        for scheduler, steps, strength, mode in itertools.product(
            DISTINCT, (1, 3), (0.0, 1.0), ("img2img", "inpaint")
        ):
            if mode == "inpaint" and (steps > 1 or strength > 0):
                continue  # the schedule is the same one
            forward_passes.clear()
            finite.clear()
            (image,) = harness.make(
                source,
                mask if mode == "inpaint" else None,
                width=GRID_SIZE[0],
                height=GRID_SIZE[1],
                scheduler=scheduler,
                num_inference_steps=steps,
                prompt_strength=strength,
            )
            seen.append(
                FewSteps(
                    mode, scheduler, steps, strength, len(forward_passes), all(finite), image.size
                )
            )
    finally:
        for hook in hooks:
            hook.remove()
    return seen


# Inpainting


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
            changed += _changed(source, image, untouched)
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


def _changed(source: Image.Image, image: Image.Image, untouched: NDArray[np.bool_]) -> int:
    assert image.size == source.size
    different = (np.asarray(source) != np.asarray(image)).any(axis=-1)
    return int((different & untouched).sum())


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
                changed += _changed(source, image, untouched)
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


def hidden_content(harness: Harness, count: int = 2) -> list[HiddenContent]:
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
                    num_inference_steps=8,
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


# Outpainting

STRIP = 4  # pixels: the width of what is averaged on either side of a seam
# What is kept of an image of SIDE x SIDE: left, top, right, bottom; of sides that are multiples
# of 8 and not.
CROPS = ((20, 0, 108, 128), (0, 20, 128, 108), (24, 19, 107, 110), (0, 0, 101, 128))


@dataclass(frozen=True)
class Outpainting:
    steps: dict[str, float]  # texture → step of the mean colour across the seam
    true_steps: dict[str, float]  # the same in the images of the scenes, which textures make
    changed_inside: int  # pixels of the source deeper than the feather that are not its bytes
    background_kept: float  # rate

    def mean_step(self) -> float:
        return float(np.mean(list(self.steps.values())))


def outpainting(harness: Harness, count: int = CASES) -> Outpainting:
    """Extend cropped scenes to their size, prompted with the background or the whole scene.

    The step compares the STRIP pixels outside the source's edge with the STRIP pixels inside it
    that lie behind the feather, along the whole edge: the absolute difference of the mean colours,
    averaged over channels, edges and images.
    """
    jobs = []
    for k, case in enumerate(cases(count, size="small")):
        full = k // len(CROPS) % 2 == 1
        jobs.append((case, case.source(), CROPS[k % len(CROPS)], full))
    return _outpainted(harness, jobs)


def outpainting_in_two_stages(harness: Harness, count: int = FEW) -> Outpainting:
    """Extend scenes' middles by half their width on either side, more than a stage adds."""
    box = (SIDE // 2, 0, SIDE * 3 // 2, SIDE)
    return _outpainted(
        harness, [(case, case.source(2 * SIDE, SIDE), box, False) for case in cases(count)]
    )


Box = tuple[int, int, int, int]


def _outpainted(harness: Harness, jobs: list[tuple[Case, Image.Image, Box, bool]]) -> Outpainting:
    """Outpaint jobs: a case, an image, the part that is kept, whether to prompt for all."""
    steps, true_steps = collections.defaultdict(list), collections.defaultdict(list)
    kept, changed = [], 0
    for case, whole, box, full in jobs:
        margins = Margins(box[0], box[1], whole.width - box[2], whole.height - box[3])
        interior = feather(margin_mask(whole.size, margins), BLUR) == 0
        ground = f"{case.scene.background} background"
        subject = f"a {case.scene.size} {case.scene.colour} {case.scene.shape}"
        for image in harness.make(
            whole.crop(box),
            prompt=f"{subject} on a {ground}" if full else ground,
            prompt_strength=1.0,
            outpaint=margins,
            num_outputs=OUTPUTS,
            seed=case.seed,
        ):
            steps[case.scene.texture].append(_edge_step(image, box))
            changed += _changed(whole, image, interior)
            kept.append(read_picture(image).background == case.scene.background)
        true_steps[case.scene.texture].append(_edge_step(whole, box))
    means = ({t: float(np.mean(v)) for t, v in d.items()} for d in (steps, true_steps))
    return Outpainting(*means, changed, float(np.mean(kept)))


def _edge_step(image: Image.Image, box: Box) -> float:
    pixels, kept = (np.asarray(p, dtype=np.float64) for p in (image, image.crop(box)))
    left, top, right, bottom = box
    inside = slice(BLUR, BLUR + STRIP)
    pairs = (
        (pixels[top:bottom, max(left - STRIP, 0) : left], kept[:, inside]),
        (pixels[top:bottom, right : right + STRIP], kept[:, ::-1][:, inside]),
        (pixels[max(top - STRIP, 0) : top, left:right], kept[inside]),
        (pixels[bottom : bottom + STRIP, left:right], kept[::-1][inside]),
    )
    steps = [np.abs(a.mean((0, 1)) - b.mean((0, 1))).mean() for a, b in pairs if a.size]
    return float(np.mean(steps))


# The report


def _table(title: str, *rows: tuple[object, ...]) -> None:
    print(f"\n**{title}**\n")
    for i, row in enumerate(rows):
        cells = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row)
        print(f"| {' | '.join(cells)} |")
        if i == 0:
            print("|---" * len(row) + "|")


def report(harness: Harness) -> None:
    quiet = contextlib.redirect_stdout(sys.stderr)  # the engine logs seeds
    with quiet:
        img2img, grid, inpainted = image_to_image(harness), few_steps(harness), inpainting(harness)
        hard = inpainting(harness, blur=0)
        odd, hidden, soft = odd_sizes(harness), hidden_content(harness), soft_inpainting(harness)
        outpainted, twice = outpainting(harness), outpainting_in_two_stages(harness)
    images = CASES * OUTPUTS
    _table(
        f"Image to image, {images} images",
        ("prompt_strength", "distance to source", "background kept", "prompt followed"),
        *(
            (s, img2img.distances[s], img2img.background_kept[s], img2img.followed[s])
            for s in STRENGTHS
        ),
        ("threshold", "growing", f"≥ {BACKGROUND_KEPT} at 0.45", f"≥ {PROMPT_FOLLOWED} at 0.95"),
    )
    _table(
        "Few steps at low strength",
        ("requests", "fewest UNet forward passes", "with finite latents", "of the right size"),
        (
            len(grid),
            min(g.forward_passes for g in grid),
            sum(g.finite for g in grid),
            sum(g.size == GRID_SIZE for g in grid),
        ),
    )
    _table(
        f"Inpainting, {images} images",
        ("measured", "result", "threshold"),
        ("shape, colour and background right", inpainted.repainted, f"≥ {REPAINTED}"),
        ("pixels changed outside the feather", inpainted.changed_outside, 0),
        ("seam / ground, mean of the textures", inpainted.mean_seam_ratio(), f"≤ {SEAM_RATIO}"),
        ("seam / ground, plain", inpainted.seam_ratio("plain"), f"≤ {SEAM_RATIO}"),
        ("seam / ground, plain, with mask_blur=0", hard.seam_ratio("plain"), "a seam: above"),
    )
    _table(
        "Its seams: gradient, steps per pixel",
        ("texture", "at the seam", "same place in the source", "ground from text", "seam / ground"),
        *(
            (t, s, inpainted.source_seams[t], inpainted.grounds[t], inpainted.seam_ratio(t))
            for t, s in inpainted.seams.items()
        ),
    )
    _table(
        "Inpainting at sizes that are not the model's",
        ("size", "area", "changed outside", "difference inside", "right"),
        *((o.size, o.area, o.changed_outside, o.changed_inside, o.repainted) for o in odd),
    )
    _table(
        "Two sources that differ under the mask only",
        ("size", "area", "prompt_strength", "pixels that differ (threshold: 0 at 1.0)"),
        *((h.size, h.area, h.strength, h.different) for h in hidden),
    )
    _table("Soft inpainting", ("grey", "difference under it (threshold: growing)"), *soft.items())
    _table(
        f"Outpainting, {images} images in one stage, {FEW * OUTPUTS} in two",
        ("stages", "step at the seam", "threshold", "changed inside", "background kept"),
        *(
            (n, o.mean_step(), f"≤ {OUTPAINT_STEP}", o.changed_inside, o.background_kept)
            for n, o in ((1, outpainted), (2, twice))
        ),
    )
    _table(
        "Its steps",
        ("stages", "texture", "at the seam", "in the image of the scene"),
        *(
            (n, t, step, o.true_steps[t])
            for n, o in ((1, outpainted), (2, twice))
            for t, step in o.steps.items()
        ),
    )


def main() -> None:
    with open_harness() as harness:
        report(harness)


if __name__ == "__main__":
    main()
