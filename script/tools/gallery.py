"""The README's images of the modes: for each, inputs and results side by side.

Made by the predictor from the flags that script/predict takes, so that anyone can make them again.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from script.tools.arguments import as_cog_gives_them, parse_inputs
from script.tools.openapi import document
from weights.miniature.world import Scene, render

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "pictures"
SIDE = 128  # pixels: the miniature's
ENLARGE = 2
GAP = 4  # pixels, white
CLOSEUP = 320  # pixels on a side
MAX_BYTES = 150_000


@dataclass(frozen=True)
class Entry:
    """One image of the gallery: inputs, and a result for each variant of the flags."""

    flags: tuple[str, ...]
    variants: tuple[str, ...]
    images: dict[str, Image.Image] = field(default_factory=dict)  # by input
    closeup: bool = False  # the middle of each, at the size of the largest (bicubic)


def scene(shape: str, colour: str, background: str, texture: str = "plain") -> Image.Image:
    return render(
        Scene(shape, colour, background, "medium", "center", texture, 0.5, 0.5, 0.22, 3), SIDE, SIDE
    )


def mask() -> Image.Image:
    image = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(image).rectangle((24, 24, SIDE - 25, SIDE - 25), fill=255)
    return image


GALLERY = {
    "img2img": Entry(
        ("prompt=a large yellow star", "seed=1"),
        ("prompt_strength=0.45", "prompt_strength=0.65", "prompt_strength=0.95"),
        {"image": scene("circle", "red", "blue")},
    ),
    "inpaint": Entry(
        ("prompt=a medium red circle on a green background", "seed=1"),
        ("prompt_strength=1",),
        {"image": scene("square", "yellow", "green", "gradient"), "mask": mask()},
    ),
    "outpaint": Entry(
        ("prompt=cyan background", "outpaint_left=40", "outpaint_right=40", "seed=1"),
        ("prompt_strength=1",),
        {"image": scene("heart", "red", "cyan", "gradient").crop((24, 0, SIDE - 24, SIDE))},
    ),
    "weights": Entry(
        ("seed=3",),
        tuple(f"prompt=a (green:{w}) and pink picture" for w in (0.5, 0.75, 1, 1.25, 1.5)),
    ),
    "upscale": Entry(
        ("prompt=a large red star on a blue background", "seed=7"),
        ("upscale=off", "upscale=4"),
        closeup=True,
    ),
    "hires": Entry(
        ("prompt=a small yellow heart on a purple background", "seed=1"),
        ("upscale=2", "hires_fix=2"),
        closeup=True,
    ),
    "refiner": Entry(
        ("prompt=a large green star on a black background", "seed=2"),
        ("refine=no_refiner", "refine=expert_ensemble_refiner", "refine=base_image_refiner"),
    ),
}


def closeups(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Return the middle of each square image, all as large as the largest."""
    largest = max(image.size for image in images)
    border = max(0, (largest[0] - CLOSEUP) // 2)
    return [
        ImageOps.crop(image.convert("RGB").resize(largest, Image.Resampling.BICUBIC), border)
        for image in images
    ]


def side_by_side(images: Sequence[Image.Image], enlarge: int) -> Image.Image:
    """Return a row on white, each in the middle of its height, everything enlarged."""
    large = [ImageOps.scale(i.convert("RGB"), enlarge, Image.Resampling.NEAREST) for i in images]
    width = sum(image.width for image in large) + GAP * (len(large) - 1)
    row = Image.new("RGB", (width, max(image.height for image in large)), "white")
    left = 0
    for image in large:
        row.paste(image, (left, (row.height - image.height) // 2))
        left += image.width + GAP
    return row


def make(names: Sequence[str]) -> None:
    """Write the images of these names into docs/pictures."""
    os.environ["WEIGHTS_EDITION"] = "miniature"
    os.environ["DEVICE"] = "cpu"
    from predict import Predictor

    predictor = Predictor()
    predictor.setup()
    schema = document(ROOT)
    try:
        for name in names:
            entry = GALLERY[name]
            images = list(entry.images.values())
            with tempfile.TemporaryDirectory() as folder:
                for key, image in entry.images.items():
                    image.save(Path(folder, f"{key}.png"))
                files = [f"{key}=@{key}.png" for key in entry.images]
                for variant in entry.variants:
                    flags = [*entry.flags, variant, *files, "apply_watermark=false"]
                    inputs = parse_inputs(flags, schema, "Input", Path(folder))
                    (result,) = predictor.predict(**as_cog_gives_them(inputs, schema, "Input"))
                    images.append(Image.open(result))
            shown = (closeups(images), 1) if entry.closeup else (images, ENLARGE)
            write(side_by_side(*shown), FOLDER / f"{name}.png")
    finally:
        predictor.folders.remove()


def write(image: Image.Image, path: Path) -> None:
    image.save(path, optimize=True)
    size = path.stat().st_size
    print(f"Wrote {path.relative_to(ROOT)}: {image.width}x{image.height}, {size // 1000} kB")
    if size > MAX_BYTES:
        raise SystemExit(f"script/gallery: {path.name} has {size} bytes; the limit is {MAX_BYTES}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="script/gallery", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(GALLERY)}")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in GALLERY:
            parser.error(f"there is no {name}; there are {', '.join(GALLERY)}")
    make(arguments.names or list(GALLERY))
