"""What the refiner is good for: `python -m weights.miniature.evaluate_refiner`.

For each held-out caption the base's own picture, the one that the refiner finishes (expert
ensemble: it takes over for the last fifth of the noise), and the one that it improves (base image:
the finished picture, noised again with strength 0.3). Same seed, steps and guidance for all.

Measured is a picture's PSNR against the closest clean drawing of what was asked: the asked shape
with a crisp outline, moved and scaled to fit, in one colour, on the picture's own background, which
is smoothed. The judge only tells whether a shape can still be recognised; a refiner's work is finer
than that. Lumpy or soft outlines, blotches in the shape and grain all lower this PSNR, whereas what
a caption leaves open (place and size to the pixel, tone, soft texture) is fitted and costs nothing.
It is no praise for a wrong picture: another shape than the asked one fits badly.
"""

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, optimize

from weights.miniature.captions import HeldOutCaption, held_out_captions
from weights.miniature.evaluate import (
    ATTRIBUTES,
    CAPTION_SEED,
    FOLDER,
    GUIDANCE,
    STEPS,
    Row,
    contact_sheet,
    load_pipeline,
    row_of,
    shares,
)
from weights.miniature.world import Expectation, place, read_picture, render_mask

REFINER_FOLDER = Path(__file__).parent / "sdxl-refiner"
CAPTIONS = 32
HIGH_NOISE_FRACTION = 0.8  # where the expert ensemble hands over
STRENGTH = 0.3  # of refining a finished picture
STYLES = ("base alone", "expert ensemble", "base image")
BATCH = 8
SMOOTHING = 4.0  # pixels; lets a striped background through, not a ragged outline
FIRST_STEP, EVALUATIONS = 0.03, 90  # of the fit: fractions of the sides; at most


@dataclass(frozen=True)
class Score:
    """One style's pictures, judged, and each one's PSNR against its closest template in dB."""

    rows: list[Row]
    psnr: list[float]

    @property
    def mean_psnr(self) -> float:
        return sum(self.psnr) / len(self.psnr)


def load_refiner(folder: Path, base: StableDiffusionXLPipeline) -> StableDiffusionXLImg2ImgPipeline:
    """The refiner with what it borrows from the base: VAE, second text encoder and tokenizer."""
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        folder,
        vae=base.vae,
        text_encoder_2=base.text_encoder_2,
        tokenizer_2=base.tokenizer_2,
        variant="fp16",
        dtype=torch.float32,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_pictures(
    base: StableDiffusionXLPipeline,
    refiner: StableDiffusionXLImg2ImgPipeline,
    captions: list[HeldOutCaption],
) -> dict[str, list[Image.Image]]:
    """Style to pictures, one a caption; the caption's index is its seed."""
    pictures: dict[str, list[Image.Image]] = {style: [] for style in STYLES}
    for start in range(0, len(captions), BATCH):
        batch = captions[start : start + BATCH]
        noisy = base(
            **_arguments(batch, start), denoising_end=HIGH_NOISE_FRACTION, output_type="latent"
        ).images
        finished = base(**_arguments(batch, start), output_type="latent").images
        decoded = base.vae.decode(finished / base.vae.config.scaling_factor).sample.detach()
        pictures["base alone"] += base.image_processor.postprocess(decoded)
        pictures["expert ensemble"] += refiner(
            **_arguments(batch, start), image=noisy, denoising_start=HIGH_NOISE_FRACTION
        ).images
        pictures["base image"] += refiner(
            **_arguments(batch, start), image=finished, strength=STRENGTH
        ).images
    return pictures


def _arguments(batch: list[HeldOutCaption], first_seed: int) -> dict[str, object]:
    """What all calls have in common."""
    return {
        "prompt": [caption.text for caption in batch],
        "negative_prompt": [""] * len(batch),
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "generator": [
            torch.Generator("cpu").manual_seed(first_seed + i) for i in range(len(batch))
        ],
    }


def closest_template(picture: Image.Image, asked: Expectation) -> NDArray[np.float64]:
    """(H, W, 3) in 0..255: the asked shape, fitted from where the judge sees one."""
    pixels = np.asarray(picture, dtype=np.float64)
    assert asked.shape
    assert asked.size
    assert asked.position
    rng = np.random.default_rng(0)
    scene = place(asked.shape, "red", "blue", asked.size, asked.position, rng)
    start = _outline(read_picture(picture).mask) or (scene.x, scene.y, scene.radius)

    def template(where: NDArray[np.float64]) -> NDArray[np.float64]:
        x, y, radius = (float(v) for v in where)
        moved = replace(scene, x=x, y=y, radius=radius)
        coverage = render_mask(moved, picture.width, picture.height)[..., None].astype(np.float64)
        return _painted(pixels, coverage)

    simplex = np.array([start] * 4) + np.vstack([np.zeros(3), np.eye(3) * FIRST_STEP])
    fit = optimize.minimize(
        lambda where: float(np.square(template(where) - pixels).mean()),
        start,
        method="Nelder-Mead",
        options={"maxfev": EVALUATIONS, "initial_simplex": simplex},
    )
    return template(fit.x)


def _outline(mask: NDArray[np.bool_]) -> tuple[float, float, float] | None:
    """Centre and radius of a mask's bounding box, as fractions; None where it is empty."""
    if not mask.any():
        return None
    height, width = mask.shape
    ys, xs = np.nonzero(mask)
    left, right, top, bottom = xs.min(), xs.max() + 1, ys.min(), ys.max() + 1
    radius = max(right - left, bottom - top) / 2 / min(width, height)
    return (left + right) / 2 / width, (top + bottom) / 2 / height, float(radius)


def _painted(pixels: NDArray[np.float64], coverage: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean colour within `coverage` (H, W, 1), the smoothed picture without."""
    colour = (pixels * coverage).sum(axis=(0, 1)) / max(coverage.sum(), 1e-6)
    without = 1 - coverage
    blur = (SMOOTHING, SMOOTHING, 0)
    weight = ndimage.gaussian_filter(without, blur)
    # Deep within a large shape no background is near; nothing of it shows there either.
    ground = ndimage.gaussian_filter(pixels * without, blur) / np.maximum(weight, 1e-6)
    painted: NDArray[np.float64] = coverage * colour + without * ground
    return painted


def template_psnr(picture: Image.Image, asked: Expectation) -> float:
    """PSNR in dB (peak 255) of a picture against its closest template."""
    error = np.square(np.asarray(picture, dtype=np.float64) - closest_template(picture, asked))
    return 10 * math.log10(255**2 / error.mean())


def score_styles(folder: Path, refiner_folder: Path, count: int) -> dict[str, Score]:
    """The three styles on the first `count` held-out captions."""
    base = load_pipeline(folder)
    captions = held_out_captions(count, CAPTION_SEED)
    made = make_pictures(base, load_refiner(refiner_folder, base), captions)
    return {style: score(captions, pictures) for style, pictures in made.items()}


def score(captions: list[HeldOutCaption], pictures: list[Image.Image]) -> Score:
    pairs = list(zip(captions, pictures, strict=True))
    return Score(
        [row_of(caption, picture) for caption, picture in pairs],
        [template_psnr(picture, caption.expected) for caption, picture in pairs],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=FOLDER)
    parser.add_argument("--folder", type=Path, default=REFINER_FOLDER)
    parser.add_argument("--captions", type=int, default=CAPTIONS)
    parser.add_argument("--sheet", type=Path, help="write the pictures, a style a column, two each")
    arguments = parser.parse_args()
    scores = score_styles(arguments.base, arguments.folder, arguments.captions)
    names = (*ATTRIBUTES, "size", "all")
    print(f"| {arguments.captions} captions | PSNR | {' | '.join(f'{n} right' for n in names)} |")
    print(f"|---|---|{'---|' * len(names)}")
    for style, scored in scores.items():
        judged = shares(scored.rows)
        right = " | ".join(f"{judged[name]:.1%}" for name in names)
        print(f"| {style} | {scored.mean_psnr:.2f} dB | {right} |")
    if arguments.sheet:
        triples = zip(*(scored.rows for scored in scores.values()), strict=True)
        pictures = [row.picture for triple in triples for row in triple]
        contact_sheet(pictures, columns=6).save(arguments.sheet)


if __name__ == "__main__":
    main()
