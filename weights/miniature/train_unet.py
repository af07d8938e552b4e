"""Train the UNet and text encoders: `python -m weights.miniature.train_unet --out FOLDER`.

Needs the trained `vae/` in the folder. Latents are cached once, captions are worded anew each
step, both text encoders learn along with the UNet. v-prediction with equal weights
(arXiv:2202.00512), captions dropped for guidance, an exponential moving average of the
weights. About an hour on two CPU cores, minutes on a GPU. `--start-from` continues from a folder.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from weights.miniature import command
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

EMPTY_UNTIL = 700  # timestep

Draw = Callable[[Scene, int, int], Image.Image]  # scene, width and height in pixels
Model = TypeVar("Model", bound=nn.Module)

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
    empty_captions: float = 0.06  # share of captions replaced by "", at the least
    empty_captions_without_noise: float = 0.6  # falls to none at EMPTY_UNTIL, see `drop_captions`
    zeroed_captions: float = (
        0.05  # share of embeddings replaced by zeros, as SDXL's own training does
    )
    shape_weight: float = 4.0  # of the loss where the shape is; see `shape_weights`
    ema_decay: float = 0.998
    checkpoint_every: int = 1000
    seed: int = 0


class FitRecipe(Protocol):
    """What `fit` reads of a recipe."""

    @property
    def steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def ema_decay(self) -> float: ...
    @property
    def checkpoint_every(self) -> int: ...


class CaptionedRecipe(Protocol):
    """What drawing captioned pictures reads of a recipe."""

    @property
    def batch(self) -> int: ...
    @property
    def pictures(self) -> int: ...
    @property
    def empty_captions(self) -> float: ...
    @property
    def empty_captions_without_noise(self) -> float: ...
    @property
    def zeroed_captions(self) -> float: ...
    @property
    def seed(self) -> int: ...


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


@dataclass(frozen=True)
class Batch:
    size: tuple[int, int]  # (width, height) in pixels
    scenes: list[Scene]
    clean: Tensor  # (B, 4, height/8, width/8)
    texts: list[str]
    keep: Tensor  # (B,), 0 where the embeddings are to be zeroed


@torch.no_grad()
def cache_latents(vae: AutoencoderKL, recipe: CaptionedRecipe, draw: Draw) -> list[Bucket]:
    rng = np.random.default_rng(recipe.seed + 1)
    buckets = []
    for size, share in BUCKETS:
        scenes = [training_scene(rng) for _ in range(round(recipe.pictures * share))]
        latents = []
        for start in range(0, len(scenes), 64):
            pixels = np.stack([np.asarray(draw(s, *size)) for s in scenes[start : start + 64]])
            batch = to_unit(torch.from_numpy(pixels).permute(0, 3, 1, 2)).to(vae.device)
            latents.append(vae.encode(batch).latent_dist.mean * vae.config.scaling_factor)
        buckets.append(Bucket(size, scenes, torch.cat(latents)))
        print(f"cached {len(scenes)} latents of {size[0]}x{size[1]} px", flush=True)
    return buckets


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """(B, 77) ids, padded and cut as the pipelines do it."""
    batch = tokenizer(
        texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    )
    ids: Tensor = batch.input_ids
    return ids


def draw_batches(
    buckets: list[Bucket], recipe: CaptionedRecipe, rng: np.random.Generator
) -> Iterator[Batch]:
    """Endless batches, each caption worded anew."""
    shares = [share for _, share in BUCKETS]
    while True:
        bucket = buckets[int(rng.choice(len(buckets), p=shares))]
        chosen = rng.integers(len(bucket.scenes), size=recipe.batch)
        scenes = [bucket.scenes[i] for i in chosen]
        texts = [describe(scene, rng) for scene in scenes]
        keep = torch.from_numpy(rng.random(recipe.batch) >= recipe.zeroed_captions).float()
        clean = bucket.latents[torch.from_numpy(chosen).to(bucket.latents.device)]
        clean = clean + LATENT_NOISE * torch.randn_like(clean)
        yield Batch(bucket.size, scenes, clean, texts, keep)


def drop_captions(
    texts: list[str], timesteps: Tensor, recipe: CaptionedRecipe, rng: np.random.Generator
) -> list[str]:
    """Replace captions by "", the less noise the more.

    Once a shape shows through the noise, a model needs no caption to draw it. Where it has
    practised that too little, its unguided half is blurred and guidance overdraws what the two
    halves differ in: stars grow thin, squares hollow. docs/log.md has the measurement.
    """
    shares = [
        max(recipe.empty_captions, recipe.empty_captions_without_noise * (1 - t / EMPTY_UNTIL))
        for t in timesteps.tolist()
    ]
    return ["" if rng.random() < share else text for text, share in zip(texts, shares, strict=True)]


def shape_weights(batch: Batch, weight: float) -> Tensor:
    """(B, 1, height/8, width/8) with mean 1: a cell near the shape counts `weight` times another.

    A texture cannot be foreseen and makes most of the error; a shape's outline can and makes
    little of it.
    """
    height, width = batch.clean.shape[-2:]
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    side = min(height, width)
    weights = []
    for scene in batch.scenes:
        dx, dy = xs + 0.5 - scene.x * width, ys + 0.5 - scene.y * height
        near = torch.maximum(dx.abs(), dy.abs()) <= scene.radius * side + 1.0
        cells = torch.where(near, weight, 1.0)
        weights.append(cells / cells.mean())
    return torch.stack(weights)[:, None].to(batch.clean.device)


def fit(
    model: Model,
    recipe: FitRecipe,
    loss_of: Callable[[Model], Tensor],
    checkpoint: Callable[[Model], None],
    seconds: float = math.inf,
) -> Model:
    """Train in place on `loss_of`, which draws its own batch, and return the averaged copy.

    It ends after the recipe's steps or after `seconds`, whichever are over first. The copy also
    goes to `checkpoint` every so often.
    """
    model.train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        learning, lr=recipe.learning_rate, betas=(0.9, 0.99), fused=learning[0].is_cuda
    )
    recent, started, step, done = [], time.monotonic(), 0, 0.0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * one_cycle(done)
        step += 1
        loss = loss_of(model)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        _update_average(average, model, min(recipe.ema_decay, step / (step + 20)))
        recent.append(loss.detach().clone())
        if step % 100 == 0:
            mean = torch.stack(recent).mean().item()
            print(f"step {step} loss {mean:.4f} {time.monotonic() - started:.0f} s", flush=True)
            recent = []
        done = max(step / recipe.steps, (time.monotonic() - started) / seconds)
        if step % recipe.checkpoint_every == 0 or done >= 1:
            checkpoint(average)
    return average


def one_cycle(done: float, rise: float = 0.08) -> float:
    """The share of the highest learning rate after a share of the steps (arXiv:1708.07120)."""
    if done < rise:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * done / rise)) / 2
    return (1 + math.cos(math.pi * (done - rise) / (1 - rise))) / 2


def train(model: TextToNoise, out: Path, recipe: UnetRecipe, device: torch.device) -> TextToNoise:
    """Train in place and return the averaged copy; it is also written to `out` every so often."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    tokenizers = load_tokenizers(out)
    vae = AutoencoderKL.from_pretrained(out / "vae", variant="fp16", dtype=torch.float32)
    batches = draw_batches(cache_latents(vae.to(device), recipe, render), recipe, rng)
    noising = DDPMScheduler.from_config(SCHEDULER_CONFIG)

    def loss_of(model: TextToNoise) -> Tensor:
        batch = next(batches)
        width, height = batch.size
        time_ids = torch.tensor([[height, width, 0, 0, height, width]]).repeat(recipe.batch, 1)
        timesteps = noise_levels(recipe.batch).to(device)
        noise = torch.randn_like(batch.clean)
        noisy = noising.add_noise(batch.clean, noise, timesteps)
        texts = drop_captions(batch.texts, timesteps, recipe, rng)
        first, second = (tokens(t, texts).to(device) for t in tokenizers)
        ids, keep = (first, second), batch.keep.to(device)
        predicted: Tensor = model(noisy, timesteps, ids, keep, time_ids.float().to(device))
        wanted: Tensor = noising.get_velocity(batch.clean, noise, timesteps)
        weights = shape_weights(batch, recipe.shape_weight)
        return ((predicted - wanted).square() * weights).mean()

    return fit(model.to(device), recipe, loss_of, lambda average: save(average, out))


def noise_levels(count: int) -> Tensor:
    """Half uniform, half logit-normal (arXiv:2403.03206): shapes are decided in the middle."""
    middle = torch.sigmoid(torch.randn(count // 2)) * 1000
    return torch.cat([torch.randint(0, 1000, (count - count // 2,)), middle.long()])


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def save(model: TextToNoise, out: Path) -> None:
    """Write everything but the VAE and the tokenizers in the hub's layout, as fp16 safetensors."""
    half = copy.deepcopy(model).half()
    half.unet.register_to_config(_name_or_path="")  # else it names the folder it started from
    half.unet.save_pretrained(out / "unet", variant="fp16")
    half.text_encoder.save_pretrained(out / "text_encoder", variant="fp16")
    half.text_encoder_2.save_pretrained(out / "text_encoder_2", variant="fp16")
    write_scheduler(out)
    (out / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")


def write_scheduler(out: Path) -> None:
    (out / "scheduler").mkdir(exist_ok=True)
    (out / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(SCHEDULER_CONFIG, indent=2) + "\n"
    )


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="model folder that holds vae/")
    parser.add_argument("--start-from", type=Path, help="a trained folder to continue from")
    parser.add_argument(
        "--keep-text-encoders", action="store_true", help="train the UNet alone: others share them"
    )
    arguments, recipe, device = command.parse(parser, UnetRecipe())
    print(json.dumps(asdict(recipe)), flush=True)
    start = arguments.start_from
    model = load(start) if start else _fresh(arguments.out, recipe.seed)
    if arguments.keep_text_encoders:
        model.text_encoder.requires_grad_(False)
        model.text_encoder_2.requires_grad_(False)
    train(model, arguments.out, recipe, device)


if __name__ == "__main__":
    main()
