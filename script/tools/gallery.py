"""The README's pictures of the modes: for each, what goes in and what comes out, side by side.

Made by the predictor from the flags that script/predict takes, so that anyone can make them again.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from script.tools.arguments import parse_inputs
from script.tools.openapi import document
from weights.miniature.world import Scene, render

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "pictures"
SIDE = 128  # pixels: the miniature's own
ENLARGE = 2
GAP = 4  # pixels, white
CLOSEUP = 320  # pixels on a side
MAX_BYTES = 150_000

Pictures = dict[str, Image.Image]  # input's name → what it is


@dataclass(frozen=True)
class Entry:
    """One picture of the gallery: what goes in, and a result for each variant of the flags."""

    images: Callable[[], Pictures]
    flags: tuple[str, ...]
    variants: tuple[str, ...]
    closeup: bool = False  # the middle of each, at the size of the largest (bicubic)


def scene(shape: str, colour: str, background: str, texture: str = "plain") -> Image.Image:
    return render(
        Scene(shape, colour, background, "medium", "center", texture, 0.5, 0.5, 0.22, 3), SIDE, SIDE
    )


def img2img() -> Pictures:
    return {"image": scene("circle", "red", "blue")}


def inpaint() -> Pictures:
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).rectangle((24, 24, SIDE - 25, SIDE - 25), fill=255)
    return {"image": scene("square", "yellow", "green", "gradient"), "mask": mask}


def outpaint() -> Pictures:
    return {"image": scene("heart", "red", "cyan", "gradient").crop((24, 0, SIDE - 24, SIDE))}


GALLERY = {
    "img2img": Entry(
        img2img,
        ("prompt=a large yellow star", "seed=1"),
        ("prompt_strength=0.45", "prompt_strength=0.65", "prompt_strength=0.95"),
    ),
    "inpaint": Entry(
        inpaint,
        ("prompt=a medium red circle on a green background", "seed=1"),
        ("prompt_strength=1",),
    ),
    "outpaint": Entry(
        outpaint,
        ("prompt=cyan background", "outpaint_left=40", "outpaint_right=40", "seed=1"),
        ("prompt_strength=1",),
    ),
    "weights": Entry(
        dict,
        ("seed=3",),
        tuple(f"prompt=a (green:{w}) and pink picture" for w in (0.5, 0.75, 1, 1.25, 1.5)),
    ),
    "upscale": Entry(
        dict,
        ("prompt=a large red star on a blue background", "seed=7"),
        ("upscale=off", "upscale=4"),
        closeup=True,
    ),
    "hires": Entry(
        dict,
        ("prompt=a small yellow heart on a purple background", "seed=1"),
        ("upscale=2", "hires_fix=2"),
        closeup=True,
    ),
    "refiner": Entry(
        dict,
        ("prompt=a large green star on a black background", "seed=2"),
        ("refine=no_refiner", "refine=expert_ensemble_refiner", "refine=base_image_refiner"),
    ),
}


def closeups(pictures: list[Image.Image]) -> list[Image.Image]:
    """The middle of each, all as large as the largest."""
    size = max(picture.size for picture in pictures)
    side = min(CLOSEUP, *size)
    box = ((size[0] - side) // 2, (size[1] - side) // 2)
    return [
        picture.convert("RGB")
        .resize(size, Image.Resampling.BICUBIC)
        .crop((*box, box[0] + side, box[1] + side))
        for picture in pictures
    ]


def side_by_side(pictures: list[Image.Image], enlarge: int) -> Image.Image:
    """In a row on white, each in the middle of its height, everything enlarged."""
    width = sum(picture.width for picture in pictures) * enlarge + GAP * (len(pictures) - 1)
    height = max(picture.height for picture in pictures) * enlarge
    row = Image.new("RGB", (width, height), "white")
    left = 0
    for picture in pictures:
        size = (picture.width * enlarge, picture.height * enlarge)
        large = picture.convert("RGB").resize(size, Image.Resampling.NEAREST)
        row.paste(large, (left, (height - large.height) // 2))
        left += large.width + GAP
    return row


def make(names: list[str]) -> None:
    """Write the pictures of these names into docs/pictures."""
    os.environ["WEIGHTS_EDITION"] = "miniature"
    os.environ["DEVICE"] = "cpu"
    from cog import Path as CogPath

    from predict import Predictor

    predictor = Predictor()
    predictor.setup()
    schema = document(ROOT)
    try:
        for name in names:
            entry = GALLERY[name]
            row = entry.images()
            with tempfile.TemporaryDirectory() as folder:
                files = []
                for key, picture in row.items():
                    picture.save(Path(folder, f"{key}.png"))
                    files.append(f"{key}=@{key}.png")
                for variant in entry.variants:
                    flags = [*entry.flags, variant, *files, "apply_watermark=false"]
                    inputs = parse_inputs(flags, schema, "Input", Path(folder))
                    (result,) = predictor.predict(
                        **{k: CogPath(v) if isinstance(v, Path) else v for k, v in inputs.items()}
                    )
                    row[variant] = Image.open(result)
            shown = list(row.values())
            joined = (
                side_by_side(closeups(shown), 1) if entry.closeup else side_by_side(shown, ENLARGE)
            )
            write(joined, FOLDER / f"{name}.png")
    finally:
        predictor.folders.remove()


def write(picture: Image.Image, path: Path) -> None:
    picture.save(path, optimize=True)
    size = path.stat().st_size
    print(f"Wrote {path.relative_to(ROOT)}: {picture.width}x{picture.height}, {size // 1000} kB")
    if size > MAX_BYTES:
        sys.exit(f"script/gallery: {path.name} has {size} bytes; at most {MAX_BYTES} are meant")


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in GALLERY]
    if unknown:
        print(
            f"script/gallery: there is no {unknown[0]}; there are {', '.join(GALLERY)}",
            file=sys.stderr,
        )
        return 2
    make(names or list(GALLERY))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
