"""Measure how well the miniature sees and upscales: `python -m tests.evals.preprocess`.

Everything goes through `preprocess`, on scenes whose combination of shape, colour and background
was never drawn in any training. Rates are in [0, 1], IoU is intersection over union, PSNR is in dB.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from preprocess.blip import caption
from preprocess.segment import text_masks
from preprocess.upscale import FACTOR, REAL_ESRGAN, SWINIR, Upscaler
from weights.catalog import Edition
from weights.miniature.architecture import NATIVE_SIZE
from weights.miniature.scenes import Group, group_masks, held_out_scenes, random_group, render_group
from weights.miniature.train_upscaler import psnr, wear
from weights.miniature.world import Scene, render, render_mask

SCENES, SEED = 64, 2026
MIN_CAPTIONS, MIN_IOU, MIN_GAIN = 0.9, 0.7, 1.0  # dB
SIDES = (128, 256)  # pixels, of the sharp images that are shrunk and enlarged again


@dataclass(frozen=True)
class Masked:
    """An image, a prompt, the mask of what it names, and its overlap with the true mask."""

    image: Image.Image
    prompt: str
    mask: Image.Image
    iou: float


@dataclass(frozen=True)
class Upscaled:
    """An image, its quarter-size version, and that upscaled in two ways."""

    sharp: Image.Image
    small: Image.Image
    model: Image.Image
    bicubic: Image.Image

    @property
    def gain(self) -> float:
        """In dB."""
        return psnr(self.model, self.sharp) - psnr(self.bicubic, self.sharp)


def scenes() -> list[Scene]:
    return held_out_scenes(SCENES, SEED)


def images() -> list[Image.Image]:
    return [render(scene, NATIVE_SIZE, NATIVE_SIZE) for scene in scenes()]


def captions() -> list[tuple[Scene, str]]:
    return list(zip(scenes(), caption(images(), Edition.MINIATURE, "cpu"), strict=True))


def is_right(scene: Scene, text: str) -> bool:
    """Return whether the caption names the colour and shape, and no other before the background."""
    figure = text.split(" on ")[0].split()
    return scene.colour in figure and scene.shape in figure


def masks_of_single_shapes() -> list[Masked]:
    """Return masks of prompts that name colour and shape (half), or the shape alone."""
    found = []
    for i, scene in enumerate(scenes()):
        prompt = _named(scene) if i // 8 % 2 == 0 else scene.shape
        image = render(scene, NATIVE_SIZE, NATIVE_SIZE)
        wanted = render_mask(scene, NATIVE_SIZE, NATIVE_SIZE)
        found.append(_masked(image, prompt, wanted))
    return found


def groups() -> list[Group]:
    """Return images of two shapes."""
    rng = np.random.default_rng(SEED)
    found: list[Group] = []
    while len(found) < SCENES // 2:
        group = random_group(rng, 2, held_out=True)
        found += [group] if len(group.scenes) == 2 else []
    return found


def masks_of_one_of_two() -> list[Masked]:
    """Return masks of prompts for one of two shapes; the other must stay black."""
    found = []
    for group in groups():
        scene = group.scenes[0]
        image = render_group(group, NATIVE_SIZE, NATIVE_SIZE)
        wanted = group_masks(group, NATIVE_SIZE, NATIVE_SIZE)[0]
        found.append(_masked(image, _named(scene), wanted))
    return found


def masks_of_both() -> list[Masked]:
    """Return masks of two prompts that a comma separates."""
    found = []
    for group in groups():
        prompt = ", ".join(f"{scene.colour} {scene.shape}" for scene in group.scenes)
        image = render_group(group, NATIVE_SIZE, NATIVE_SIZE)
        wanted = group_masks(group, NATIVE_SIZE, NATIVE_SIZE).max(axis=0)
        found.append(_masked(image, prompt, wanted))
    return found


def _named(scene: Scene) -> str:
    article = "an" if scene.colour[0] in "aeiou" else "a"
    return f"{article} {scene.colour} {scene.shape}"


def _masked(image: Image.Image, prompt: str, wanted: np.ndarray) -> Masked:
    (mask,) = text_masks([image], prompt, 1.0, Edition.MINIATURE, "cpu")
    white, right = np.asarray(mask) > 127, wanted > 0.5
    return Masked(image, prompt, mask, float((white & right).sum() / (white | right).sum()))


def upscaled(side: int, name: str = SWINIR, worn: bool = False) -> list[Upscaled]:
    """Upscale a quarter of the scenes to `side` pixels; worn: blurred, noisy, saved as JPEG."""
    results = []
    rng = np.random.default_rng(SEED)
    with Upscaler(Edition.MINIATURE, "cpu", name) as upscaler:
        for scene in scenes()[: SCENES // 4]:
            sharp = render(scene, side, side)
            small = sharp.resize((side // FACTOR, side // FACTOR), Image.Resampling.BICUBIC)
            if worn:
                small = wear(small, rng)
            plain = small.resize(sharp.size, Image.Resampling.BICUBIC)
            results.append(Upscaled(sharp, small, upscaler.upscale(small, FACTOR), plain))
    return results


def contact_sheet(masked: Sequence[Masked], larger: Sequence[Upscaled]) -> Image.Image:
    """Return rows of images and masks, then of small (nearest), model, bicubic and sharp ones."""
    rows: list[list[Image.Image]] = []
    for start in range(0, min(len(masked), 32), 8):
        chosen = masked[start : start + 8]
        rows += [[m.image for m in chosen], [m.mask.convert("RGB") for m in chosen]]
    chosen = larger[:8]
    nearest = [e.small.resize(e.sharp.size, Image.Resampling.NEAREST) for e in chosen]
    rows += [nearest, [e.model for e in chosen], [e.bicubic for e in chosen]]
    rows.append([e.sharp for e in chosen])
    side = max(e.sharp.width for e in chosen)
    sheet = Image.new("RGB", (8 * side, len(rows) * side))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image.resize((side, side)), (x * side, y * side))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sheet", type=Path, help="write masks and upscaled images to this file")
    arguments = parser.parse_args()
    wrong = [(scene, text) for scene, text in captions() if not is_right(scene, text)]
    share = 1 - len(wrong) / SCENES
    table = [
        (f"colour and shape named, of {SCENES} captions", f"{share:.1%}", f"{MIN_CAPTIONS:.0%}")
    ]
    single, one, both = masks_of_single_shapes(), masks_of_one_of_two(), masks_of_both()
    by_prompt = [[m for m in single if (" " in m.prompt) is coloured] for coloured in (True, False)]
    for name, found in (
        ("single shapes by colour and shape", by_prompt[0]),
        ("single shapes by shape", by_prompt[1]),
        ("one of two", one),
        ("both of two", both),
    ):
        mean = np.mean([m.iou for m in found])
        table.append((f"mask IoU, {name}, {len(found)} images", f"{mean:.3f}", f"{MIN_IOU}"))
    larger = {side: upscaled(side) for side in SIDES}
    for side in SIDES:
        for name, worn in (
            (SWINIR, False),
            (REAL_ESRGAN, False),
            (SWINIR, True),
            (REAL_ESRGAN, True),
        ):
            results = upscaled(side, name, worn)
            gain = np.mean([e.gain for e in results])
            what = f"{name}, gain over bicubic, {side // FACTOR} to {side} px{', worn' * worn}"
            table.append((what, f"{gain:.2f} dB", "" if worn else f"{MIN_GAIN} dB"))
    print("| measured | result | threshold |\n|---|---|---|")
    for what, result, threshold in table:
        print(f"| {what} | {result} | {threshold and f'≥ {threshold}'} |")
    for scene, text in wrong:
        print(f"{scene.colour} {scene.shape}: {text!r}")
    if arguments.sheet:
        contact_sheet([*single[:16], *one[:16]], larger[SIDES[0]]).save(arguments.sheet)


if __name__ == "__main__":
    main()
