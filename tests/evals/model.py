"""Measure the images of each model of the miniature edition: `python -m tests.evals.model`.

Every image goes through the engine, with the model's default settings unless a row says otherwise.
`--grid FILE` also writes an image with a row for each model and a column for each mode.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from generation.base_models import BASE_MODELS, BaseModelSpec, GuidanceMode
from tests.evals.cases import SIDE, cases
from tests.evals.harness import Harness, open_harness
from weights.catalog import Edition
from weights.miniature.captions import held_out_captions
from weights.miniature.evaluate import (
    ATTRIBUTES,
    CAPTION_SEED,
    CAPTIONS,
    Row,
    row_of,
    shares,
)
from weights.miniature.world import judge

MODELS = BASE_MODELS[Edition.MINIATURE]
TEACHERS = {
    "sdxl-turbo": "sdxl",
    "sd-turbo": "sd21",
    "sdxl-lcm": "sdxl",
    "sd15-lcm": "sd15",
    "lcm-dreamshaper": "sd15",
}
# Their shares of captions right in all, with their default settings, as the report prints them.
SCORES = {"sdxl": 0.906, "sd15": 0.922, "sd21": 0.922}
TURBO, LCM = 0.85, 0.9  # thresholds: shares of the teacher's score
CLEARLY = 0.15  # threshold: by how much the plain model's score in so few steps is below LCM's
IMAGE_CASES = 16


def generate(harness: Harness, model: str, count: int = CAPTIONS, **changes: object) -> list[Row]:
    """Generate an image for each of `count` held-out captions, the caption's index as its seed."""
    rows = []
    for seed, caption in enumerate(held_out_captions(CAPTIONS, CAPTION_SEED)[:count]):
        settings = {"model": model, "prompt": caption.text, "seed": seed, **changes}
        rows += [row_of(caption, image) for image in harness.make(**settings)]
    return rows


@dataclass(frozen=True)
class Images:
    """Images, and the share of them that shows what the request describes."""

    right: float
    images: list[Image.Image]


def image_to_image(
    harness: Harness, model: str, count: int = IMAGE_CASES, steps: int | None = None
) -> Images:
    """Change nearly all of a scene: another shape in another colour.

    `steps` are of a model of many; others make as many as they can.
    """
    return _changed(harness, model, count, 0.95, steps, masked=False)


def inpainting(
    harness: Harness, model: str, count: int = IMAGE_CASES, steps: int | None = None
) -> Images:
    """Repaint a scene's shape as another one in another colour; its background stays."""
    return _changed(harness, model, count, 1.0, steps, masked=True)


def _changed(
    harness: Harness, model: str, count: int, strength: float, steps: int | None, masked: bool
) -> Images:
    few = MODELS[model].steps
    right, images = [], []
    for case in cases(count):
        (image,) = harness.make(
            case.source(),
            case.mask() if masked else None,
            model=model,
            prompt=case.prompt,
            seed=case.seed,
            prompt_strength=strength,
            num_inference_steps=few[1] if few else steps,
        )
        right.append(judge(image, case.expected).all_right)
        images.append(image)
    return Images(float(np.mean(right)), images)


def grid(rows: dict[str, list[Image.Image]], side: int = 96, label: int = 120) -> Image.Image:
    """Return a sheet of rows of images, each with its name in front, in 256 colours."""
    width = label + max(len(row) for row in rows.values()) * side
    sheet = Image.new("RGB", (width, len(rows) * side), "white")
    write = ImageDraw.Draw(sheet)
    for y, (name, images) in enumerate(rows.items()):
        write.text((4, (y + 0.5) * side), name, "black", ImageFont.load_default(14), anchor="lm")
        for x, image in enumerate(images):
            small = image.resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(small, (label + x * side, y * side))
    return sheet.quantize(256, dither=Image.Dither.NONE)


def _row(name: str, how: str, found: dict[str, float], *more: str) -> None:
    cells = [f"{found[key]:.1%}" for key in (*ATTRIBUTES, "size", "all")]
    print(f"| {name} | {how} | {' | '.join([*cells, *more])} |", flush=True)


def _how(spec: BaseModelSpec) -> str:
    guided = spec.guidance is not GuidanceMode.NONE and spec.guidance_scale > 1
    steps = f"{spec.num_inference_steps} step{'s' if spec.num_inference_steps > 1 else ''}"
    return f"{steps}, {f'guidance {spec.guidance_scale:g}' if guided else 'no guidance'}"


def report(harness: Harness, grid_file: Path | None) -> None:
    quiet = contextlib.redirect_stdout(sys.stderr)  # the engine logs seeds
    headings = (
        "model",
        "steps and guidance",
        *ATTRIBUTES,
        "size",
        "all",
        "of the teacher's all",
        "threshold",
    )
    print(f"\n**Images of {CAPTIONS} held-out captions: shares that are right**\n")
    print(f"| {' | '.join(headings)} |\n{'|---' * len(headings)}|")
    scores: dict[str, float] = {}
    rows: dict[str, list[Image.Image]] = {}
    for name, spec in sorted(MODELS.items(), key=lambda item: item[0] in TEACHERS):
        with quiet:
            drawn = generate(harness, name)
        rows[name] = [row.picture for row in drawn[:3]]
        found = shares(drawn)
        scores[name] = found["all"]
        teacher = TEACHERS.get(name)
        shown = ("", ", ".join(f"{key} ≥ {threshold:.0%}" for key, threshold in ATTRIBUTES.items()))
        if teacher is not None:
            threshold = TURBO if spec.guidance is GuidanceMode.NONE else LCM
            shown = (f"{found['all'] / scores[teacher]:.1%}", f"≥ {threshold:.0%}")
        _row(name, _how(spec), found, *shown)
    for name in ("sdxl", "sd15"):
        with quiet:
            found = shares(generate(harness, name, scheduler="K_EULER", num_inference_steps=4))
        threshold = f"{CLEARLY:.0%} of all below {name}-lcm"
        _row(
            name,
            "4 steps, Euler, guidance 7.5",
            found,
            f"{found['all'] / scores[name]:.1%}",
            threshold,
        )
    print(f"\n**Of {IMAGE_CASES} images, another shape in another colour**\n")
    print("| model | image to image | inpainting |\n|---|---|---|")
    for name in MODELS:
        with quiet:
            changed, inpainted = image_to_image(harness, name), inpainting(harness, name)
        print(f"| {name} | {changed.right:.1%} | {inpainted.right:.1%} |", flush=True)
        rows[name] += [*changed.images[:3], *inpainted.images[:3]]
    if grid_file is not None:
        sources = [case.source() for case in cases(3)]
        covered = [case.mask() for case in cases(3)]
        white = Image.new("RGB", (SIDE, SIDE), "white")
        masked = [Image.composite(white, *pair) for pair in zip(sources, covered, strict=True)]
        sent = {"(inputs)": [*[white] * 3, *sources, *masked]}
        grid(sent | {name: rows[name] for name in MODELS}).save(grid_file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=Path, help="where to write the image of all models")
    arguments = parser.parse_args()
    with open_harness() as harness:
        report(harness, arguments.grid)


if __name__ == "__main__":
    main()
