"""Measure each mode on the miniature edition: `python -m tests.evals.mode`.

Every image goes through the engine. Colours are in 8-bit steps of sRGB, lengths in pixels, rates
in [0, 1].
"""

import contextlib
import itertools
import sys
from dataclasses import dataclass

import numpy as np
import torch

from tests.evals.cases import CASES, FEW, OUTPUTS, cases, difference
from tests.evals.harness import Harness, open_harness
from tests.evals.inpainting import (
    REPAINTED,
    SEAM_RATIO,
    hidden_content,
    inpainting,
    odd_sizes,
    soft_inpainting,
)
from tests.evals.outpainting import OUTPAINT_STEP, outpainting, outpainting_in_two_stages
from tests.helpers.engines import base_model
from tests.miniature.reference_pipelines import DISTINCT
from weights.miniature.world import Expectation, judge, read_picture

STRENGTHS = (0.2, 0.45, 0.65, 0.95)
BACKGROUND_KEPT, PROMPT_FOLLOWED = 0.9, 0.8  # thresholds

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


# The report


def _table(title: str, *rows: tuple[object, ...]) -> None:
    print(f"\n**{title}**\n")
    for i, row in enumerate(rows):
        cells = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row)
        print(f"| {' | '.join(cells)} |")
        if i == 0:
            print("|---" * len(row) + "|")


def _quietly() -> contextlib.redirect_stdout:
    """Keep the engine's log out of the tables."""
    return contextlib.redirect_stdout(sys.stderr)


def report_image_to_image(harness: Harness) -> None:
    with _quietly():
        img2img, grid = image_to_image(harness), few_steps(harness)
    _table(
        f"Image to image, {CASES * OUTPUTS} images",
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


def report_inpainting(harness: Harness) -> None:
    with _quietly():
        inpainted, hard = inpainting(harness), inpainting(harness, blur=0)
        odd, hidden, soft = odd_sizes(harness), hidden_content(harness), soft_inpainting(harness)
    _table(
        f"Inpainting, {CASES * OUTPUTS} images",
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


def report_outpainting(harness: Harness) -> None:
    with _quietly():
        outpainted, twice = outpainting(harness), outpainting_in_two_stages(harness)
    _table(
        f"Outpainting, {CASES * OUTPUTS} images in one stage, {FEW * OUTPUTS} in two",
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
        report_image_to_image(harness)
        report_inpainting(harness)
        report_outpainting(harness)


if __name__ == "__main__":
    main()
