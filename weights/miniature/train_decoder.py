"""Fine-tune the VAE's decoder on what the UNet draws: `... -m weights.miniature.train_decoder`.

A decoder that has seen encoded pictures only renders every unevenness of drawn latents as a lump.
Here it learns from pairs: a scene's picture, and latents that the trained UNet drew of it under
guidance, starting from the scene's own latents with half of the noise levels on top (SDEdit,
arXiv:2108.01073), so that the two still agree about where everything is. Half of each batch are
encoded pictures, so that reconstruction stays. The encoder, and with it the latent space, does not
change. About eight minutes on one CPU core.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLImg2ImgPipeline
from torch import Tensor

from weights.miniature import command
from weights.miniature.captions import describe
from weights.miniature.evaluate import GUIDANCE, STEPS
from weights.miniature.train_vae import (
    LATENT_NOISE,
    reconstruction_psnr,
    render_pictures,
    to_unit,
)
from weights.miniature.world import Scene

STRENGTHS = (0.3, 0.4, 0.5)


@dataclass(frozen=True)
class DecoderRecipe:
    steps: int = 1500
    batch: int = 16
    crop: int = 8  # latents
    learning_rate: float = 1e-3
    pictures: int = 1500
    seed: int = 0


@torch.inference_mode()
def draw_latents(
    pipeline: StableDiffusionXLImg2ImgPipeline, clean: Tensor, scenes: list[Scene], seed: int
) -> Tensor:
    """(N, 4, h, w) of what the UNet makes of the scenes' own `clean` latents, both scaled."""
    rng = np.random.default_rng(seed)
    drawn = []
    for number, start in enumerate(range(0, len(scenes), 32)):
        texts = [describe(scene, rng) for scene in scenes[start : start + 32]]
        latents = pipeline(
            texts,
            negative_prompt=[""] * len(texts),
            image=clean[start : start + 32],
            strength=STRENGTHS[number % len(STRENGTHS)],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator("cpu").manual_seed(seed + start),
            output_type="latent",
        ).images
        drawn.append(latents.clone())
    return torch.cat(drawn)


def train(folder: Path, recipe: DecoderRecipe, device: torch.device) -> AutoencoderKL:
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        folder, variant="fp16", dtype=torch.float32, add_watermarker=False
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    vae: AutoencoderKL = pipeline.vae
    pictures, scenes = render_pictures(recipe.pictures, recipe.seed + 100)
    with torch.no_grad():
        batches = [to_unit(part).to(device) for part in torch.split(pictures, 64)]
        means = torch.cat([vae.encode(batch).latent_dist.mean for batch in batches])
    encoded = means * vae.config.scaling_factor
    started = time.monotonic()
    drawn = draw_latents(pipeline, encoded, scenes, recipe.seed)
    print(f"drew {len(drawn)} pictures' latents, {time.monotonic() - started:.0f} s", flush=True)

    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
    )
    for step in range(recipe.steps):
        chosen = torch.from_numpy(rng.integers(len(scenes), size=recipe.batch))
        half = torch.arange(recipe.batch)[:, None, None, None] < recipe.batch // 2
        noisy = encoded[chosen] + LATENT_NOISE * torch.randn(recipe.batch, *encoded.shape[1:])
        latents, wanted = _crops(
            torch.where(half, noisy, drawn[chosen]), pictures[chosen], scenes, chosen, recipe, rng
        )
        error = vae.decode(latents.to(device) / vae.config.scaling_factor).sample - wanted.to(
            device
        )
        loss = error.square().mean() + 0.2 * error.abs().mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == recipe.steps - 1:
            one = [10 * math.log10(4 / e.square().mean().item()) for e in error.chunk(2)]
            elapsed = time.monotonic() - started
            print(f"step {step} encoded {one[0]:.1f} dB drawn {one[1]:.1f} dB {elapsed:.0f} s")
    return vae.eval()


def _crops(
    latents: Tensor,
    pictures: Tensor,
    scenes: list[Scene],
    chosen: Tensor,
    recipe: DecoderRecipe,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """(B, 4, crop, crop) latents and their (B, 3, 8 crop, 8 crop) pixels in [-1, 1], at the shapes.

    Each crop is seen with all it needs: the decoder's own reach goes beyond it at the borders only.
    """
    side, limit = latents.shape[-1], latents.shape[-1] - recipe.crop
    cut_latents, cut_pixels = [], []
    for k, i in enumerate(chosen.tolist()):
        where = (scenes[i].x, scenes[i].y)
        left, top = (
            int(np.clip(round(c * side - recipe.crop / 2 + rng.uniform(-2, 2)), 0, limit))
            for c in where
        )
        cut_latents.append(latents[k, :, top : top + recipe.crop, left : left + recipe.crop])
        rows, columns = (slice(8 * at, 8 * (at + recipe.crop)) for at in (top, left))
        cut_pixels.append(pictures[k, :, rows, columns])
    return torch.stack(cut_latents), to_unit(torch.stack(cut_pixels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="a trained model, changed")
    arguments, recipe, device = command.parse(parser, DecoderRecipe())
    print(json.dumps(asdict(recipe)), flush=True)
    vae = train(arguments.folder, recipe, device)
    print(f"held-out PSNR {reconstruction_psnr(vae, count=256, seed=12345):.2f} dB", flush=True)
    vae.register_to_config(_name_or_path="")
    vae.half().save_pretrained(arguments.folder / "vae", variant="fp16")


if __name__ == "__main__":
    main()
