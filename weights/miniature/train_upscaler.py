"""Train a miniature upscaler (x4): `python -m weights.miniature.train_upscaler NAME --out FOLDER`.

NAME is `swinir-x4` (arXiv:2108.10257), with the light upsampler of SwinIR-S
("pixelshuffledirect"), which works at the small picture's size, or `real-esrgan-x4`
(arXiv:2107.10833): one of its 23 blocks. The architecture classes are the real ones', as spandrel
has them. They learn on 16x16 windows of pictures that were drawn at several sizes and shrunk by a
bicubic filter, most of the windows on a shape's outline; mean absolute error, no adversary. What
Real-ESRGAN learns on are windows that are also blurred, noisy and saved as JPEG, half of them.
"""

import argparse
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from spandrel import MAIN_REGISTRY, canonicalize_state_dict
from spandrel.architectures.ESRGAN import ESRGAN
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
SWINIR, REAL_ESRGAN = "swinir-x4", "real-esrgan-x4"
FILENAMES = {SWINIR: "swinir-x4.safetensors", REAL_ESRGAN: "RealESRGAN_x4plus.pth"}
FEATURES = 24  # channels of the miniature Real-ESRGAN
WORN = 0.5  # share of its windows that are worn


@dataclass(frozen=True)
class UpscalerRecipe:
    steps: int = 1000
    batch: int = 16
    learning_rate: float = 1.5e-3
    pictures: int = 800
    ema_decay: float = 0.99
    checkpoint_every: int = 200
    seed: int = 0


def build_swinir() -> SwinIR:
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


def build_real_esrgan() -> ESRGAN:
    """Its first output is a bilinear enlargement, too."""
    model = ESRGAN(num_filters=FEATURES, num_blocks=1, scale=FACTOR)
    shortcut = model.model[1]
    convolutions = [m for m in model.model if isinstance(m, nn.Conv2d)]
    smooth = torch.outer(*[torch.tensor([0.25, 0.5, 0.25])] * 2)  # after pixels were repeated
    with torch.no_grad():
        for parameter in shortcut.sub[-1].parameters():
            parameter.zero_()
        for layer in convolutions:
            assert layer.bias is not None
            layer.weight[:3] = 0
            layer.bias[:3] = 0
            for colour in range(3):
                if layer in convolutions[1:3]:
                    layer.weight[colour, colour] = smooth
                else:
                    layer.weight[colour, colour, 1, 1] = 1
    return model


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    SWINIR: build_swinir,
    REAL_ESRGAN: build_real_esrgan,
}


@dataclass(frozen=True)
class Pair:
    scene: Scene
    sharp: NDArray[np.uint8]  # (H, W, 3)
    small: NDArray[np.uint8]  # (H / FACTOR, W / FACTOR, 3)


def shrink(picture: Image.Image) -> Image.Image:
    size = (picture.width // FACTOR, picture.height // FACTOR)
    return picture.resize(size, Image.Resampling.BICUBIC)


def wear(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A picture as it comes from the web: blurred a little, noisy, saved as JPEG."""
    blurred = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 0.6))))
    noise = rng.normal(0, rng.uniform(0, 8), (picture.height, picture.width, 3))
    noisy = (np.asarray(blurred, dtype=np.float64) + noise).round().clip(0, 255)
    saved = io.BytesIO()
    Image.fromarray(noisy.astype(np.uint8)).save(saved, "JPEG", quality=int(rng.integers(40, 95)))
    return Image.open(saved).convert("RGB")


def draw_pairs(count: int, seed: int, worn: float) -> list[Pair]:
    """`worn` is the share of small pictures that are worn."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(count):
        scene, side = training_scene(rng), SIZES[i % len(SIZES)]
        picture = render(scene, side, side)
        small = shrink(picture)
        if rng.random() < worn:
            small = wear(small, rng)
        pairs.append(Pair(scene, np.asarray(picture), np.asarray(small)))
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


def train(
    name: str, recipe: UpscalerRecipe, start_from: Path | None, out: Path, device: torch.device
) -> None:
    """Train anew or from a trained folder; the averaged copy goes to `out` every so often."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    pairs = draw_pairs(recipe.pictures, recipe.seed, WORN if name == REAL_ESRGAN else 0)
    print(f"drew {len(pairs)} pictures", flush=True)
    model = load(start_from / FILENAMES[name]) if start_from else BUILDERS[name]()

    def loss_of(model: nn.Module) -> Tensor:
        small, sharp = _windows(pairs, recipe.batch, rng)
        enlarged: Tensor = model(small.to(device))
        return nn.functional.l1_loss(enlarged, sharp.to(device))

    def checkpoint(average: nn.Module) -> None:
        save(name, average, out)
        for side in (128, 256):
            clean, worn = (held_out_gain(average, side, worn) for worn in (False, True))
            print(f"gain over bicubic at {side} px {clean:.2f} dB, worn {worn:.2f} dB", flush=True)

    fit(model.to(device), recipe, loss_of, checkpoint)


def psnr(a: Image.Image, b: Image.Image) -> float:
    """In dB, peak 255."""
    error = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return float(10 * np.log10(255**2 / np.square(error).mean()))


@torch.no_grad()
def held_out_gain(model: nn.Module, side: int, worn: bool) -> float:
    """Mean of PSNR less a bicubic filter's, in dB, over 16 pictures."""
    device = next(model.parameters()).device
    rng = np.random.default_rng(4242)
    gains = []
    for scene in held_out_scenes(16, seed=4242):
        sharp = render(scene, side, side)
        small = wear(shrink(sharp), rng) if worn else shrink(sharp)
        pixels = model(to_unit([np.asarray(small)]).to(device))[0].clamp(0, 1).permute(1, 2, 0)
        enlarged = Image.fromarray((pixels * 255).round().byte().cpu().numpy())
        plain = small.resize(sharp.size, Image.Resampling.BICUBIC)
        gains.append(psnr(enlarged, sharp) - psnr(plain, sharp))
    return float(np.mean(gains))


# spandrel's names of an ESRGAN's tensors to those of the published files.
_PUBLISHED = (
    (r"^model\.0\.", "conv_first."),
    (r"^model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.", r"body.\1.rdb\2.conv\3."),
    (r"^model\.1\.sub\.\d+\.(weight|bias)$", r"conv_body.\1"),
    (r"^model\.3\.", "conv_up1."),
    (r"^model\.6\.", "conv_up2."),
    (r"^model\.8\.", "conv_hr."),
    (r"^model\.10\.", "conv_last."),
)


def save(name: str, model: nn.Module, out: Path) -> None:
    """Write one file in fp16: SwinIR's as safetensors, Real-ESRGAN's as the pickle it is."""
    out.mkdir(parents=True, exist_ok=True)
    state = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in model.state_dict().items()
    }
    if name == SWINIR:
        save_file(state, out / FILENAMES[name])
        return
    for pattern, replacement in _PUBLISHED:
        state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
    torch.save({"params_ema": state}, out / FILENAMES[name])


def load(path: Path) -> nn.Module:
    """A model that `save` has written."""
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        state = torch.load(path, weights_only=True)
    model: nn.Module = MAIN_REGISTRY.load(canonicalize_state_dict(state)).model
    return model.float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[SWINIR, REAL_ESRGAN])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start-from", type=Path, help="a trained folder to continue from")
    arguments, recipe, device = command.parse(parser, UpscalerRecipe())
    print(json.dumps(asdict(recipe)), flush=True)
    train(arguments.name, recipe, arguments.start_from, arguments.out, device)


if __name__ == "__main__":
    main()
