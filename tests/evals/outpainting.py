"""Measure outpainting: the step at the seam, and what must not change."""

import collections
from dataclasses import dataclass

import numpy as np
from PIL import Image

from generation.blending import feather
from generation.outpaint import margin_mask
from generation.sizes import Margins
from tests.evals.cases import BLUR, CASES, FEW, OUTPUTS, SIDE, Case, cases, changed_pixels
from tests.evals.harness import Harness
from weights.miniature.world import read_picture

OUTPAINT_STEP = 3.0  # threshold
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
            changed += changed_pixels(whole, image, interior)
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
