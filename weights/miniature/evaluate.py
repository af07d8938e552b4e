"""The miniature's report card: `python -m weights.miniature.evaluate`.

Pictures of held-out captions, one seed each, judged from their pixels; and the VAE's PSNR.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from weights.miniature.captions import HeldOutCaption, held_out_captions
from weights.miniature.train_vae import reconstruction_psnr
from weights.miniature.world import Reading, judge, read_picture

FOLDER = Path(__file__).parent / "sdxl-base"
CAPTIONS, CAPTION_SEED = 64, 2026
STEPS, GUIDANCE = 20, 7.5
ATTRIBUTES = {"background": 0.95, "colour": 0.92, "shape": 0.90, "position": 0.90}  # at least
MIN_PSNR = 28.0  # dB


@dataclass(frozen=True)
class Row:
    """One caption's image and how it was judged."""

    caption: HeldOutCaption
    picture: Image.Image
    seen: Reading
    right: dict[str, bool]


def load_pipeline(folder: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder, variant="fp16", dtype=torch.float32, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def judge_captions(
    pipeline: DiffusionPipeline,
    captions: list[HeldOutCaption],
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> list[Row]:
    """Generate an image per caption by the pipeline's own scheduler, with its index as seed."""
    rows: list[Row] = []
    for start in range(0, len(captions), 8):
        batch = captions[start : start + 8]
        generators = [torch.Generator("cpu").manual_seed(start + i) for i in range(len(batch))]
        pictures = pipeline(
            [c.text for c in batch],
            negative_prompt=[""] * len(batch),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
        ).images
        rows += [row_of(c, picture) for c, picture in zip(batch, pictures, strict=True)]
    return rows


def row_of(caption: HeldOutCaption, picture: Image.Image) -> Row:
    verdict = judge(picture, caption.expected)
    right = {name: getattr(verdict, name) for name in (*ATTRIBUTES, "size")}
    return Row(caption, picture, read_picture(picture), right)


def shares(rows: list[Row]) -> dict[str, float]:
    """Return the share of rows in which each attribute is right, and in which all are."""
    names = (*ATTRIBUTES, "size")
    result = {name: sum(row.right[name] for row in rows) / len(rows) for name in names}
    return result | {"all": sum(all(row.right.values()) for row in rows) / len(rows)}


def contact_sheet(pictures: list[Image.Image], columns: int) -> Image.Image:
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--captions", type=int, default=CAPTIONS)
    parser.add_argument("--sheet", type=Path, help="write all images side by side into this file")
    arguments = parser.parse_args()
    pipeline = load_pipeline(arguments.folder)
    rows = judge_captions(pipeline, held_out_captions(arguments.captions, CAPTION_SEED))
    for row in rows:
        if not all(row.right.values()):
            wrong = [f"{n} {getattr(row.seen, n)}" for n, right in row.right.items() if not right]
            print(f"{row.caption.text!r}: {', '.join(wrong)}")
    print("\n| measured | result | threshold |\n|---|---|---|")
    for name, share in shares(rows).items():
        threshold = f"≥ {ATTRIBUTES[name]:.0%}" if name in ATTRIBUTES else ""
        print(f"| {name} right, of {len(rows)} captions | {share:.1%} | {threshold} |")
    psnr = reconstruction_psnr(pipeline.vae, count=256, seed=12345)
    print(f"| VAE PSNR on held-out images | {psnr:.1f} dB | ≥ {MIN_PSNR:.0f} dB |")
    if arguments.sheet:
        contact_sheet([row.picture for row in rows], columns=8).save(arguments.sheet)


if __name__ == "__main__":
    main()
