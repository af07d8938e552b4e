"""Train the refiner's UNet: `python -m weights.miniature.train_refiner --base FOLDER --out FOLDER`.

The base's VAE, second text encoder and second tokenizer serve it, frozen, as in the full edition.
Only the least noisy timesteps are learnt, the range a refiner is asked for: the expert ensemble
hands over at t = 200, and refining a finished picture with strength 0.3 starts at t = 300.

The aesthetic score means something: clean renders carry diffusers' default score for the prompt,
and a quarter of the pictures are degraded and carry its default for the negative prompt
(StableDiffusionXLImg2ImgPipeline.__call__). So guidance pushes towards clean pictures.
"""

import argparse
import copy
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy import ndimage
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from weights.miniature import command
from weights.miniature.architecture import SCHEDULER_CONFIG, build_refiner_unet
from weights.miniature.train_unet import (
    Batch,
    UnetRecipe,
    cache_latents,
    draw_batches,
    drop_captions,
    fit,
    shape_weights,
    tokens,
    write_scheduler,
)
from weights.miniature.world import Scene, render

NOISIEST = 400  # timesteps are drawn below this
CLEAN_SCORE, DEGRADED_SCORE = 6.0, 2.5
DEGRADED_ONE_IN = 4

# No zeroed embeddings: the refiner's empty prompt is encoded (force_zeros_for_empty_prompt false).
RECIPE = UnetRecipe(steps=4500, pictures=12000, empty_captions=0.08, zeroed_captions=0.0)

MODEL_INDEX = {
    "_class_name": "StableDiffusionXLImg2ImgPipeline",
    "_diffusers_version": "0.42.1",
    "force_zeros_for_empty_prompt": False,
    "requires_aesthetics_score": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": [None, None],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": [None, None],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def is_degraded(scene: Scene) -> bool:
    """Whether `draw` spoils this scene: one in four, told by its own seed."""
    return scene.texture_seed % DEGRADED_ONE_IN == 0


def draw(scene: Scene, width: int, height: int) -> Image.Image:
    """The scene's picture, degraded where `is_degraded`."""
    picture = render(scene, width, height)
    if not is_degraded(scene):
        return picture
    return degrade(picture, np.random.default_rng(scene.texture_seed))


def degrade(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Lumpy edges, blur, grain: at least one of the three, as a half-trained model draws."""
    kinds = rng.random(3) < (0.7, 0.5, 0.3)
    if kinds[0] or not kinds.any():
        picture = _warped(picture, rng)
    if kinds[1]:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.8, 2.5)))
    if kinds[2]:
        pixels = np.asarray(picture) + rng.normal(0, rng.uniform(4, 16), (*picture.size[::-1], 3))
        picture = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    return picture


def _warped(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Every pixel moved by a few pixels, neighbours alike."""
    width, height = picture.size
    reach, cell = rng.uniform(1.5, 4.0), rng.uniform(8, 20)  # pixels
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)

    def field() -> NDArray[np.float32]:
        coarse = rng.normal(0, reach, (round(height / cell) + 1, round(width / cell) + 1))
        smooth = Image.fromarray(coarse.astype(np.float32))
        return np.asarray(smooth.resize((width, height), Image.Resampling.BICUBIC))

    where = np.stack([rows + field(), columns + field()])
    pixels = np.asarray(picture, dtype=np.float32)
    channels = [
        ndimage.map_coordinates(pixels[..., c], where, order=1, mode="nearest") for c in range(3)
    ]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def train(
    unet: UNet2DConditionModel, base: Path, out: Path, recipe: UnetRecipe, device: torch.device
) -> UNet2DConditionModel:
    """Train in place on the base's latents and text; the averaged copy, also written to `out`."""
    options = {"variant": "fp16", "dtype": torch.float32}
    vae = AutoencoderKL.from_pretrained(base / "vae", **options).to(device)
    text_encoder = CLIPTextModelWithProjection.from_pretrained(base / "text_encoder_2", **options)
    text_encoder.to(device).eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer_2")
    rng = np.random.default_rng(recipe.seed)
    batches = draw_batches(cache_latents(vae, recipe, draw), recipe, rng)
    noising = DDPMScheduler.from_config(SCHEDULER_CONFIG)

    def loss_of(unet: UNet2DConditionModel) -> Tensor:
        batch = next(batches)
        timesteps = torch.randint(0, NOISIEST, (recipe.batch,), device=device)
        noise = torch.randn_like(batch.clean)
        noisy = noising.add_noise(batch.clean, noise, timesteps)
        texts = drop_captions(batch.texts, timesteps, recipe, rng)
        heard = text_encoder(tokens(tokenizer, texts).to(device), output_hidden_states=True)
        added = {"text_embeds": heard.text_embeds, "time_ids": _time_ids(batch).to(device)}
        embeds = heard.hidden_states[-2]
        predicted: Tensor = unet(noisy, timesteps, embeds, added_cond_kwargs=added).sample
        wanted: Tensor = noising.get_velocity(batch.clean, noise, timesteps)
        weights = shape_weights(batch, recipe.shape_weight)
        return ((predicted - wanted).square() * weights).mean()

    return fit(unet.to(device), recipe, loss_of, lambda average: save(average, out))


def _time_ids(batch: Batch) -> Tensor:
    """(B, 5): height, width, crop top and left, aesthetic score."""
    width, height = batch.size
    scores = [DEGRADED_SCORE if is_degraded(scene) else CLEAN_SCORE for scene in batch.scenes]
    return torch.tensor([[height, width, 0, 0, score] for score in scores])


def save(unet: UNet2DConditionModel, out: Path) -> None:
    """Write what is the refiner's own, in the hub's layout, as fp16 safetensors."""
    half = copy.deepcopy(unet).half()
    half.register_to_config(_name_or_path="")  # else it names the folder it started from
    half.save_pretrained(out / "unet", variant="fp16")
    write_scheduler(out)
    (out / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")


def load(folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(
        folder / "unet", variant="fp16", dtype=torch.float32
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the trained base's folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start-from", type=Path, help="a trained folder to continue from")
    arguments, recipe, device = command.parse(parser, RECIPE)
    print(json.dumps(asdict(recipe) | {"noisiest": NOISIEST}), flush=True)
    torch.manual_seed(recipe.seed)
    start = arguments.start_from
    unet = load(start) if start else build_refiner_unet()
    train(unet, arguments.base, arguments.out, recipe, device)


if __name__ == "__main__":
    main()
