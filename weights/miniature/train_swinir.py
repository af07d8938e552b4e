"""Train the miniature SwinIR (x4): `python -m weights.miniature.train_swinir --out FOLDER`.

The architecture class is the real one's (spandrel's SwinIR, arXiv:2108.10257), with the light
upsampler of its SwinIR-S ("pixelshuffledirect"), which works at the small picture's size. It learns
on 16x16 windows of pictures that were drawn at several sizes and shrunk by a bicubic filter, most
of the windows on a shape's outline; mean absolute error.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from spandrel.architectures.SwinIR import SwinIR
from torch import Tensor, nn

from weights.miniature import command
from weights.miniature.captions import training_scene
from weights.miniature.scenes import held_out_scenes
from weights.miniature.train_unet import fit
from weights.miniature.world import Scene, render

FACTOR = 4
SIZES = (128, 192, 256, 384)  # pixels of a side, of the sharp pictures
WINDOW = 16  # pixels of a side, of the small pictures
FILENAME = "swinir-x4.safetensors"


@dataclass(frozen=True)
class SwinIrRecipe:
    steps: int = 1000
    batch: int = 16
    learning_rate: float = 1.5e-3
    pictures: int = 800
    ema_decay: float = 0.99
    checkpoint_every: int = 200
    seed: int = 0


def build_model() -> SwinIR:
    """Its first output is a bilinear enlargement: random values took long to get there."""
    model = SwinIR(
        img_size=WINDOW,
        embed_dim=48,
        depths=[4, 4],
        num_heads=[4, 4],
        window_size=8,
        mlp_ratio=2.0,
        upscale=FACTOR,
        upsampler="pixelshuffledirect",
    )
    first, last, shuffled = model.conv_first, model.conv_after_body, model.upsample[0]
    with torch.no_grad():
        for parameter in (first.weight[:3], first.bias[:3], *last.parameters()):
            parameter.zero_()
        for parameter in shuffled.parameters():
            parameter.zero_()
        for colour in range(3):
            first.weight[colour, colour, 1, 1] = 1
            for row in range(FACTOR):
                for column in range(FACTOR):
                    taps = torch.outer(_bilinear(row), _bilinear(column))
                    shuffled.weight[(colour * FACTOR + row) * FACTOR + column, colour] = taps
    return model


def _bilinear(phase: int) -> Tensor:
    """(3,): what a pixel and its two neighbours give to the `phase`-th of its FACTOR parts."""
    offset = (phase + 0.5) / FACTOR - 0.5
    return torch.tensor([max(-offset, 0), 1 - abs(offset), max(offset, 0)])


@dataclass(frozen=True)
class Pair:
    scene: Scene
    sharp: NDArray[np.uint8]  # (H, W, 3)
    small: NDArray[np.uint8]  # (H / FACTOR, W / FACTOR, 3)


def shrink(picture: Image.Image) -> Image.Image:
    size = (picture.width // FACTOR, picture.height // FACTOR)
    return picture.resize(size, Image.Resampling.BICUBIC)


def draw_pairs(count: int, seed: int) -> list[Pair]:
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(count):
        scene, side = training_scene(rng), SIZES[i % len(SIZES)]
        picture = render(scene, side, side)
        pairs.append(Pair(scene, np.asarray(picture), np.asarray(shrink(picture))))
    return pairs


def _windows(pairs: list[Pair], count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """(B, 3, WINDOW, WINDOW) and (B, 3, FACTOR * WINDOW, FACTOR * WINDOW), both in [0, 1]."""
    small, sharp = [], []
    for i in rng.integers(len(pairs), size=count):
        pair = pairs[i]
        side, scene = pair.small.shape[0], pair.scene
        angle, r = rng.uniform(0, 2 * math.pi), scene.radius * rng.uniform(0, 1.2)
        x = (scene.x + r * math.cos(angle)) * side - WINDOW / 2
        y = (scene.y + r * math.sin(angle)) * side - WINDOW / 2
        left, top = (int(np.clip(at, 0, side - WINDOW)) for at in (x, y))
        small.append(pair.small[top : top + WINDOW, left : left + WINDOW])
        rows, columns = (slice(FACTOR * at, FACTOR * (at + WINDOW)) for at in (top, left))
        sharp.append(pair.sharp[rows, columns])
    return to_unit(small), to_unit(sharp)


def to_unit(pixels: list[NDArray[np.uint8]]) -> Tensor:
    """(B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255


def train(recipe: SwinIrRecipe, start_from: Path | None, out: Path, device: torch.device) -> None:
    """Train anew or from a trained folder; the averaged copy goes to `out` every so often."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    pairs = draw_pairs(recipe.pictures, recipe.seed)
    print(f"drew {len(pairs)} pictures", flush=True)
    model = build_model().to(device)
    if start_from:
        model.load_state_dict(load_file(start_from / FILENAME))

    def loss_of(model: SwinIR) -> Tensor:
        small, sharp = _windows(pairs, recipe.batch, rng)
        enlarged: Tensor = model(small.to(device))
        return nn.functional.l1_loss(enlarged, sharp.to(device))

    def checkpoint(average: SwinIR) -> None:
        save(average, out)
        for side in (128, 256):
            gain = held_out_gain(average, side)
            print(f"gain over bicubic at {side} px {gain:.2f} dB", flush=True)

    fit(model, recipe, loss_of, checkpoint)


def psnr(a: Image.Image, b: Image.Image) -> float:
    """In dB, peak 255."""
    error = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return float(10 * np.log10(255**2 / np.square(error).mean()))


@torch.no_grad()
def held_out_gain(model: SwinIR, side: int) -> float:
    """Mean of PSNR less a bicubic filter's, in dB, over 16 pictures."""
    device = next(model.parameters()).device
    gains = []
    for scene in held_out_scenes(16, seed=4242):
        sharp = render(scene, side, side)
        small = shrink(sharp)
        pixels = model(to_unit([np.asarray(small)]).to(device))[0].clamp(0, 1).permute(1, 2, 0)
        enlarged = Image.fromarray((pixels * 255).round().byte().cpu().numpy())
        plain = small.resize(sharp.size, Image.Resampling.BICUBIC)
        gains.append(psnr(enlarged, sharp) - psnr(plain, sharp))
    return float(np.mean(gains))


def save(model: SwinIR, out: Path) -> None:
    """Write one file under the architecture's own names, as fp16 safetensors."""
    out.mkdir(parents=True, exist_ok=True)
    state = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(state, out / FILENAME)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start-from", type=Path, help="a trained folder to continue from")
    arguments, recipe, device = command.parse(parser, SwinIrRecipe())
    print(json.dumps(asdict(recipe)), flush=True)
    train(recipe, arguments.start_from, arguments.out, device)


if __name__ == "__main__":
    main()
