"""Train the UNet and text encoders: `python -m weights.miniature.train_unet --out FOLDER`.

Needs the trained `vae/` in the folder. Latents are cached once, captions are worded anew each
step, both text encoders learn along with the UNet. v-prediction with equal weights
(arXiv:2202.00512), 11 % of captions dropped for guidance, an exponential moving average of the
weights. About an hour on two CPU cores, minutes on a GPU. `--start-from` continues from a folder.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from weights.miniature.architecture import (
    MAX_TOKENS,
    SCHEDULER_CONFIG,
    build_text_encoders,
    build_unet,
    load_tokenizers,
    write_tokenizers,
)
from weights.miniature.captions import describe, training_scene
from weights.miniature.train_vae import LATENT_NOISE, to_unit
from weights.miniature.world import Scene, render

# (width, height) in pixels and the share of pictures: mostly native, some of equal area.
BUCKETS = (((128, 128), 0.76), ((160, 104), 0.12), ((104, 160), 0.12))

MODEL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.42.1",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@dataclass(frozen=True)
class UnetRecipe:
    steps: int = 9000
    batch: int = 32
    learning_rate: float = 1e-3
    pictures: int = 20000
    empty_captions: float = 0.06  # share of captions replaced by ""
    zeroed_captions: float = (
        0.05  # share of embeddings replaced by zeros, as SDXL's own training does
    )
    ema_decay: float = 0.998
    checkpoint_every: int = 1000
    seed: int = 0


class TextToNoise(nn.Module):
    """UNet and text encoders as one module: captions and noisy latents to predicted noise."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        ids: tuple[Tensor, Tensor],
        keep: Tensor,
        time_ids: Tensor,
    ) -> Tensor:
        """`latents` (B, 4, h, w), `ids` 2 x (B, 77), `time_ids` (B, 6); `keep` (B,): 0 zeroes."""
        first = self.text_encoder(ids[0], output_hidden_states=True).hidden_states[-2]
        second = self.text_encoder_2(ids[1], output_hidden_states=True)
        embeds = torch.cat([first, second.hidden_states[-2]], dim=-1) * keep[:, None, None]
        added = {"text_embeds": second.text_embeds * keep[:, None], "time_ids": time_ids}
        noise: Tensor = self.unet(latents, timesteps, embeds, added_cond_kwargs=added).sample
        return noise


@dataclass(frozen=True)
class Bucket:
    size: tuple[int, int]  # (width, height) in pixels
    scenes: list[Scene]
    latents: Tensor  # (N, 4, height/8, width/8), scaled means


@torch.no_grad()
def cache_latents(vae: AutoencoderKL, recipe: UnetRecipe) -> list[Bucket]:
    rng = np.random.default_rng(recipe.seed + 1)
    buckets = []
    for size, share in BUCKETS:
        scenes = [training_scene(rng) for _ in range(round(recipe.pictures * share))]
        latents = []
        for start in range(0, len(scenes), 64):
            pixels = np.stack([np.asarray(render(s, *size)) for s in scenes[start : start + 64]])
            batch = to_unit(torch.from_numpy(pixels).permute(0, 3, 1, 2)).to(vae.device)
            latents.append(vae.encode(batch).latent_dist.mean * vae.config.scaling_factor)
        buckets.append(Bucket(size, scenes, torch.cat(latents)))
        print(f"cached {len(scenes)} latents of {size[0]}x{size[1]} px", flush=True)
    return buckets


def _tokens(
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer], texts: list[str]
) -> tuple[Tensor, Tensor]:
    first, second = (
        t(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
        for t in tokenizers
    )
    return first.input_ids, second.input_ids


def _batches(
    buckets: list[Bucket], recipe: UnetRecipe, rng: np.random.Generator
) -> Iterator[tuple[Bucket, Tensor, list[str], Tensor]]:
    """Endless (bucket, latents, captions, keep), some captions dropped as the recipe says."""
    shares = [share for _, share in BUCKETS]
    while True:
        bucket = buckets[int(rng.choice(len(buckets), p=shares))]
        chosen = rng.integers(len(bucket.scenes), size=recipe.batch)
        texts = [
            "" if rng.random() < recipe.empty_captions else describe(bucket.scenes[i], rng)
            for i in chosen
        ]
        keep = torch.from_numpy(rng.random(recipe.batch) >= recipe.zeroed_captions).float()
        clean = bucket.latents[torch.from_numpy(chosen).to(bucket.latents.device)]
        yield bucket, clean + LATENT_NOISE * torch.randn_like(clean), texts, keep


def train(model: TextToNoise, out: Path, recipe: UnetRecipe, device: torch.device) -> TextToNoise:
    """Train in place and return the averaged copy; it is also written to `out` every so often."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    tokenizers = load_tokenizers(out)
    vae = AutoencoderKL.from_pretrained(out / "vae", variant="fp16", dtype=torch.float32)
    buckets = cache_latents(vae.to(device), recipe)
    noising = DDPMScheduler.from_config(SCHEDULER_CONFIG)
    model.to(device).train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.08
    )
    batches, recent, started = _batches(buckets, recipe, rng), [], time.monotonic()
    for step in range(1, recipe.steps + 1):
        bucket, clean, texts, keep = next(batches)
        width, height = bucket.size
        ids = _tokens(tokenizers, texts)
        time_ids = (
            torch.tensor([[height, width, 0, 0, height, width]]).repeat(recipe.batch, 1).float()
        )
        timesteps = _timesteps(recipe.batch).to(device)
        noise = torch.randn_like(clean)
        noisy = noising.add_noise(clean, noise, timesteps)
        text = (ids[0].to(device), ids[1].to(device))
        predicted = model(noisy, timesteps, text, keep.to(device), time_ids.to(device))
        loss = (predicted - noising.get_velocity(clean, noise, timesteps)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        _update_average(average, model, min(recipe.ema_decay, step / (step + 20)))
        recent.append(loss.detach())
        if step % 100 == 0:
            mean = torch.stack(recent).mean().item()
            print(f"step {step} loss {mean:.4f} {time.monotonic() - started:.0f} s", flush=True)
            recent = []
        if step % recipe.checkpoint_every == 0 or step == recipe.steps:
            save(average, out)
    return average


def _timesteps(count: int) -> Tensor:
    """Half uniform, half logit-normal (arXiv:2403.03206): shapes are decided in the middle."""
    middle = torch.sigmoid(torch.randn(count // 2)) * 1000
    return torch.cat([torch.randint(0, 1000, (count - count // 2,)), middle.long()])


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def save(model: TextToNoise, out: Path) -> None:
    """Write everything but the VAE and the tokenizers in the hub's layout, as fp16 safetensors."""
    half = copy.deepcopy(model).half()
    half.unet.save_pretrained(out / "unet", variant="fp16")
    half.text_encoder.save_pretrained(out / "text_encoder", variant="fp16")
    half.text_encoder_2.save_pretrained(out / "text_encoder_2", variant="fp16")
    (out / "scheduler").mkdir(exist_ok=True)
    (out / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(SCHEDULER_CONFIG, indent=2) + "\n"
    )
    (out / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")


def load(folder: Path) -> TextToNoise:
    options = {"variant": "fp16", "dtype": torch.float32}
    return TextToNoise(
        UNet2DConditionModel.from_pretrained(folder / "unet", **options),
        CLIPTextModel.from_pretrained(folder / "text_encoder", **options),
        CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", **options),
    )


def _fresh(out: Path, seed: int) -> TextToNoise:
    rng = np.random.default_rng(seed)
    write_tokenizers([describe(training_scene(rng), rng) for _ in range(20000)], out)
    torch.manual_seed(seed)
    return TextToNoise(build_unet(), *build_text_encoders(len(load_tokenizers(out)[0])))


def main() -> None:
    defaults = UnetRecipe()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="model folder that holds vae/")
    parser.add_argument("--start-from", type=Path, help="a trained folder to continue from")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--pictures", type=int, default=defaults.pictures)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    recipe = UnetRecipe(
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        pictures=arguments.pictures,
        seed=arguments.seed,
    )
    print(json.dumps(asdict(recipe)), flush=True)
    start = arguments.start_from
    model = load(start) if start else _fresh(arguments.out, recipe.seed)
    train(model, arguments.out, recipe, torch.device(arguments.device))


if __name__ == "__main__":
    main()
