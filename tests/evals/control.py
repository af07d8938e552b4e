"""Measure how well images follow their control maps: `python -m tests.evals.control`.

Every image goes through the engine. Maps come from scenes whose shape, place and size are known;
the prompt names the shape, and colours other than the scene's. What is measured is the image alone:
its edges, or where the judge of the picture world sees the shape. Rates are in [0, 1].
`--grid FILE` also writes an image with a row for each control type: source, map and results.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from generation.controlnets import ControlRequest
from tests.evals.cases import SIDE
from tests.evals.control_measures import (
    Case,
    Measure,
    colour_measure,
    edge_agreement,
    edge_measure,
    edges,
    limbs_measure,
    overlap,
    region_measure,
)
from tests.evals.harness import Harness, open_harness
from tests.evals.model import grid
from weights.miniature.controls import MAPS, STRAIGHT, Subject, random_pose
from weights.miniature.world import (
    COLOURS,
    SHAPES,
    SIZES,
    place,
    read_picture,
)

SEEDS = 16
COLOURS_KEPT = 0.8  # threshold: images in the prompt's colours
TWICE = 2.0  # threshold: how many times the uncontrolled image's score
CONTRAST = 100  # 8-bit steps in some channel, so that a shape has edges for Canny
SCALE = 1.0
HALVES = 0.5  # threshold: either half of an image under two controls, each of which has one half
FEW_STEPS = ("sdxl-turbo", "sdxl-lcm", "sd15-lcm", "lcm-dreamshaper", "sd-turbo")
FEW_STEPS_THRESHOLD = 0.5  # threshold of their edges
MODES = ("image to image", "inpainting")


@dataclass(frozen=True)
class ControlType:
    """A control type, the map that it takes, and its threshold."""

    name: str  # of generation.controlnets
    map: str | None  # of weights.miniature.controls; None: annotated from the scene's image
    measure: Measure
    threshold: float
    doubles: bool = True  # whether the threshold is also TWICE the score without control
    posed: bool = False
    shapes: tuple[str, ...] = tuple(SHAPES)
    has_colours: bool = False  # the map has the colours, so the prompt names the same


CONTROL_TYPES = (
    ControlType("edge_canny", None, edge_measure, 0.6),
    ControlType("lineart", "lineart", region_measure, 0.6),
    ControlType("mlsd", "mlsd", region_measure, 0.6, shapes=STRAIGHT),
    ControlType("soft_edge_hed", "soft_edge", region_measure, 0.6),
    ControlType("scribble", "scribble", region_measure, 0.6),
    ControlType("depth_midas", "depth", region_measure, 0.6),
    ControlType("normal_bae", "normal", region_measure, 0.6),
    ControlType("segmentation", "segmentation", region_measure, 0.6),
    ControlType("openpose", "openpose", limbs_measure, 0.6, posed=True, doubles=False),
    ControlType("tile", "tile", colour_measure, 0.8, doubles=False, has_colours=True),
)
OF_SD = ("edge_canny", "depth_midas", "scribble", "segmentation")
ROWS = (
    *(("sdxl", control_type) for control_type in CONTROL_TYPES),
    *(
        (model, control_type)
        for model in ("sd15", "sd21")
        for control_type in CONTROL_TYPES
        if control_type.name in OF_SD
    ),
)


def cases(control_type: ControlType, count: int = SEEDS) -> list[Case]:
    """Return plain scenes of the type's shapes, of any place and size; the same at each call."""
    rng = np.random.default_rng(11)
    made = []
    for seed in range(count):
        shape = control_type.shapes[seed % len(control_type.shapes)]
        colour, background = _colours(rng)
        size = str(rng.choice(list(SIZES)[1:]))
        spot = str(rng.choice(["center", "left", "top", "bottom right", "top left"]))
        scene = replace(place(shape, colour, background, size, spot, rng), texture="plain")
        posed = random_pose(rng) if control_type.posed else None
        if not control_type.has_colours:
            colour, background = _colours(rng)
        made.append(Case(Subject(scene, posed), colour, background, seed))
    return made


def _colours(rng: np.random.Generator) -> tuple[str, str]:
    while True:
        pair = [str(name) for name in rng.choice(list(COLOURS), 2, replace=False)]
        values = np.array([COLOURS[name] for name in pair])
        if np.abs(values[0] - values[1]).max() >= CONTRAST:
            return pair[0], pair[1]


@dataclass(frozen=True)
class Found:
    """The scores of a control type."""

    score: float  # with control
    without: float  # the same prompts and seeds, uncontrolled
    colours: float  # rate
    shown: list[Image.Image]  # source, map and result of the first cases


@functools.cache
def _uncontrolled(harness: Harness, settings: tuple[tuple[str, object], ...]) -> Image.Image:
    """Return the image of the same prompt and seed; many control types have the same cases."""
    (image,) = harness.make(**dict(settings))
    return image


def measure(
    harness: Harness,
    folder: Path,
    model: str,
    control_type: ControlType,
    count: int = SEEDS,
    **changes: object,
) -> Found:
    """Measure the cases of a control type with and without control; `folder` is for its images."""
    scores, plain, colours, shown = [], [], [], []
    for case in cases(control_type, count):
        source = folder / f"{control_type.name}-{case.seed}.png"
        image = case.subject.picture(SIDE, SIDE)
        if control_type.map is not None:
            image_of_map = Image.fromarray(MAPS[control_type.map][0](case.subject, SIDE, SIDE))
            image_of_map.save(source)
        else:
            image.save(source)
        settings = {"model": model, "prompt": case.prompt, "seed": case.seed, **changes}
        control = ControlRequest(
            control_type.name, source, SCALE, 0, 1, is_map=control_type.map is not None
        )
        control_map, controlled = harness.make(
            controls=(control,), return_control_maps=True, **settings
        )
        uncontrolled = _uncontrolled(harness, tuple(settings.items()))
        scores.append(control_type.measure(case, control_map, controlled))
        plain.append(control_type.measure(case, control_map, uncontrolled))
        seen = read_picture(controlled)
        colours.append((seen.colour, seen.background) == (case.colour, case.background))
        shown += [image, control_map, controlled]
    return Found(float(np.mean(scores)), float(np.mean(plain)), float(np.mean(colours)), shown)


def measure_mode(
    harness: Harness,
    folder: Path,
    mode: str,
    control_type: ControlType,
    count: int = SEEDS,
    **changes: object,
) -> tuple[float, float]:
    """Return the score, and that without control, where the shape is drawn into a plain image."""
    scores: tuple[list[float], list[float]] = ([], [])
    for case in cases(control_type, count):
        photo = case.subject.picture(SIDE, SIDE)
        photo.save(folder / "photo.png")
        control = ControlRequest(control_type.name, folder / "photo.png", SCALE, 0, 1, is_map=False)
        plain = Image.new("RGB", (SIDE, SIDE), COLOURS[case.background])
        mask = Image.new("L", (SIDE, SIDE))
        mask.paste(255, (8, 8, SIDE - 8, SIDE - 8))
        for found, controls in (
            (scores[0], (control,)),
            (scores[1], ()),
        ):
            image = harness.make(
                plain,
                mask if mode == "inpainting" else None,
                prompt=case.prompt,
                seed=case.seed,
                prompt_strength=0.95 if mode == "image to image" else 1.0,
                controls=controls,
                **changes,
            )[-1]
            found.append(control_type.measure(case, _edges_of(photo), image))
    return float(np.mean(scores[0])), float(np.mean(scores[1]))


def _edges_of(image: Image.Image) -> Image.Image:
    return Image.fromarray(edges(image).astype(np.uint8) * 255)


@dataclass(frozen=True)
class Halves:
    """An image whose left half has an edge map, and whose right half has a segment map."""

    edges: float  # F1 of the left half
    segments: float  # overlap in the right half
    without: tuple[float, float]  # the same, uncontrolled


def measure_halves(
    harness: Harness, folder: Path, model: str, count: int = SEEDS, **changes: object
) -> Halves:
    """Measure two controls at once, each black where the other one is not."""
    rows = []
    half = SIDE // 2
    shapes = ("circle", "square", "diamond", "cross")  # with as much on the left as on the right
    control_type = replace(CONTROL_TYPES[0], shapes=shapes)
    for case in cases(control_type, count):
        scene = replace(case.subject.scene, x=0.5)
        case = replace(case, subject=Subject(scene))
        left, right = (
            MAPS["canny"][0](case.subject, SIDE, SIDE).copy(),
            MAPS["segmentation"][0](case.subject, SIDE, SIDE).copy(),
        )
        left[:, half:] = 0
        right[:, :half] = 0
        controls = []
        for name, pixels in (("edge_canny", left), ("segmentation", right)):
            Image.fromarray(pixels).save(folder / f"{name}.png")
            controls.append(ControlRequest(name, folder / f"{name}.png", SCALE, 0, 1, is_map=True))
        settings = {"model": model, "prompt": case.prompt, "seed": case.seed, **changes}
        (both,) = harness.make(controls=tuple(controls), **settings)
        (plain,) = harness.make(**settings)
        scores = []
        for image in (both, plain):
            found = edges(image)[:, :half]
            region = read_picture(image).mask[:, half:]
            agreement = edge_agreement(found, left[:, :half, 0] > 127)
            scores += [agreement, overlap(region, case.mask[:, half:])]
        rows.append(scores)
    mean = np.mean(rows, axis=0)
    return Halves(float(mean[0]), float(mean[1]), (float(mean[2]), float(mean[3])))


def meets(control_type: ControlType, found: Found) -> bool:
    doubled = not control_type.doubles or found.score >= TWICE * found.without
    return found.score >= control_type.threshold and doubled and found.colours >= COLOURS_KEPT


def report(harness: Harness, folder: Path, grid_file: Path | None, count: int) -> bool:
    """Print the table; return whether every threshold is met."""
    quiet = contextlib.redirect_stdout(sys.stderr)  # the engine logs seeds
    print(f"**Images that follow a control, {count} seeds each**\n")
    headings = (
        "model",
        "control type",
        "measured",
        "controlled",
        "without",
        "threshold",
        "prompt's colours",
    )
    print(f"| {' | '.join(headings)} |\n{'|---' * len(headings)}|")
    rows: dict[str, list[Image.Image]] = {}
    good = True
    for model, control_type in ROWS:
        with quiet:
            found = measure(harness, folder, model, control_type, count)
        rows[f"{model} {control_type.name}"] = found.shown[:9]
        name = control_type.measure.__name__.removesuffix("_measure")
        threshold = f"≥ {control_type.threshold:g}" + (
            f", ≥ {TWICE:g} x" if control_type.doubles else ""
        )
        good &= meets(control_type, found)
        mark = "" if meets(control_type, found) else " (missed)"
        cells = (
            model,
            control_type.name,
            name,
            f"{found.score:.2f}",
            f"{found.without:.2f}",
            threshold + mark,
        )
        print(f"| {' | '.join(cells)} | {found.colours:.0%} |", flush=True)
    print("\n**`edge_canny` with models of few steps**\n")
    print("| model | edges, controlled | without | prompt's colours |\n|---|---|---|---|")
    for model in FEW_STEPS:
        with quiet:
            found = measure(harness, folder, model, CONTROL_TYPES[0], count)
        print(f"| {model} | {found.score:.2f} | {found.without:.2f} | {found.colours:.0%} |")
    print("\n**`edge_canny` in other modes, drawn into a plain image**\n")
    print("| mode | edges, controlled | without |\n|---|---|---|")
    for mode in MODES:
        with quiet:
            score, without = measure_mode(harness, folder, mode, CONTROL_TYPES[0], count)
        print(f"| {mode} | {score:.2f} | {without:.2f} |", flush=True)
    print("\n**Two controls: edges on the left, segments on the right**\n")
    print("| model | edges left | segments right | without | threshold |\n|---|---|---|---|---|")
    for model in ("sdxl", "sd15"):
        with quiet:
            halves = measure_halves(harness, folder, model, count)
        plain = " and ".join(f"{score:.2f}" for score in halves.without)
        both = f"{halves.edges:.2f} | {halves.segments:.2f}"
        print(f"| {model} | {both} | {plain} | ≥ {HALVES:g} each |", flush=True)
        good &= min(halves.edges, halves.segments) >= HALVES
    if grid_file is not None:
        grid(rows, label=170).save(grid_file, optimize=True)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=Path, help="where to write the image of all control types")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/controls"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True, parents=True)
    with open_harness() as harness:
        if not report(harness, arguments.folder, arguments.grid, arguments.seeds):
            sys.exit(1)


if __name__ == "__main__":
    main()
