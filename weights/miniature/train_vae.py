"""Train the miniature VAE: `python -m weights.miniature.train_vae --out FOLDER`.

Reconstruction on 64x64 crops around the shapes (the network is convolutional, so it carries over to
whole pictures), L2 + 0.2 L1, with a fixed small latent noise in place of a learned variance. A KL
term on whole pictures was four times slower and stuck at 20 dB. About 15 minutes on two CPU cores.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from weights.miniature import command
from weights.miniature.architecture import NATIVE_SIZE, build_vae
from weights.miniature.captions import training_scene
from weights.miniature.world import Scene, random_scene, render

LATENT_NOISE = 0.05  # standard deviation of a latent sample, in units of the latents' own spread


@dataclass(frozen=True)
class VaeRecipe:
    steps: int = 3000
    batch: int = 16
    crop: int = 64  # pixels
    learning_rate: float = 2e-3
    pictures: int = 5000
    seed: int = 0


def render_pictures(count: int, seed: int) -> tuple[Tensor, list[Scene]]:
    """(N, 3, H, W) uint8 pictures of the native size and their scenes."""
    rng = np.random.default_rng(seed)
    scenes = [training_scene(rng) for _ in range(count)]
    pixels = np.stack([np.asarray(render(s, NATIVE_SIZE, NATIVE_SIZE)) for s in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), scenes


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 0..255 to float [-1, 1]."""
    return pixels.float() / 127.5 - 1


def _crops(
    pictures: Tensor, scenes: list[Scene], recipe: VaeRecipe, rng: np.random.Generator
) -> Tensor:
    """(B, 3, crop, crop) in [-1, 1]: most windows hold a part of a shape's outline."""
    crops = []
    for i in rng.integers(len(scenes), size=recipe.batch):
        scene, limit = scenes[i], NATIVE_SIZE - recipe.crop
        angle, r = rng.uniform(0, 2 * math.pi), scene.radius * rng.uniform(0, 1.2)
        x = (scene.x + r * math.cos(angle)) * NATIVE_SIZE - recipe.crop / 2
        y = (scene.y + r * math.sin(angle)) * NATIVE_SIZE - recipe.crop / 2
        left, top = int(np.clip(x, 0, limit)), int(np.clip(y, 0, limit))
        crops.append(pictures[i, :, top : top + recipe.crop, left : left + recipe.crop])
    return to_unit(torch.stack(crops))


def _encode_with_noise(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    mean = vae.encode(pixels).latent_dist.mean
    spread = mean.detach().std()
    return mean, mean + LATENT_NOISE * spread * torch.randn_like(mean)


def train(recipe: VaeRecipe, device: torch.device) -> AutoencoderKL:
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    pictures, scenes = render_pictures(recipe.pictures, recipe.seed)
    vae = build_vae().to(device).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
    )
    started = time.monotonic()
    for step in range(recipe.steps):
        pixels = _crops(pictures, scenes, recipe, rng).to(device)
        mean, latents = _encode_with_noise(vae, pixels)
        error = vae.decode(latents).sample - pixels
        # The last term only keeps the latents' scale from drifting; it is too weak to shape them.
        loss = error.square().mean() + 0.2 * error.abs().mean() + 1e-5 * mean.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == recipe.steps - 1:
            psnr = 10 * math.log10(4 / error.square().mean().item())
            elapsed = time.monotonic() - started
            print(
                f"step {step} loss {loss.item():.4f} psnr {psnr:.1f} dB {elapsed:.0f} s", flush=True
            )
    return _finish(vae.eval(), pictures[:512], device)


@torch.no_grad()
def _finish(vae: AutoencoderKL, pictures: Tensor, device: torch.device) -> AutoencoderKL:
    """Set scaling factor (one over the latents' spread) and variance (the fixed noise)."""
    means = [vae.encode(to_unit(p).to(device)).latent_dist.mean for p in torch.split(pictures, 64)]
    spread = torch.cat(means).std().item()
    assert vae.quant_conv is not None
    vae.quant_conv.weight[4:] = 0
    vae.quant_conv.bias[4:] = 2 * math.log(LATENT_NOISE * spread)
    vae.register_to_config(scaling_factor=round(1 / spread, 5))
    return vae


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, count: int, seed: int) -> float:
    """Mean PSNR in dB (peak 255) over scenes drawn with another seed than training's."""
    rng = np.random.default_rng(seed)
    pixels = [np.asarray(render(random_scene(rng), NATIVE_SIZE, NATIVE_SIZE)) for _ in range(count)]
    pictures = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(vae.device)
    values: list[float] = []
    for batch in torch.split(pictures, 32):
        decoded = vae.decode(vae.encode(to_unit(batch)).latent_dist.mean).sample.clamp(-1, 1)
        error = ((decoded - to_unit(batch)) * 127.5).square().mean(dim=(1, 2, 3))
        values += (10 * torch.log10(255**2 / error)).tolist()
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="model folder; vae/ is written in it"
    )
    arguments, recipe, device = command.parse(parser, VaeRecipe())
    print(json.dumps(asdict(recipe)), flush=True)
    vae = train(recipe, device)
    psnr = reconstruction_psnr(vae, count=256, seed=12345)
    print(f"held-out PSNR {psnr:.2f} dB, scaling factor {vae.config.scaling_factor}", flush=True)
    vae.half().save_pretrained(arguments.out / "vae", variant="fp16")


if __name__ == "__main__":
    main()
