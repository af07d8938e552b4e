"""Train a miniature ControlNet: `python -m weights.miniature.train_controlnet NAME --out FOLDER`.

NAME is `union-sdxl`, one ControlNet for every kind of map (as xinsir's union model: diffusers,
ControlNetUnionModel), or a base and a kind, as `sd15-canny`, or a base alone, as `sd15`: one for
all of `SD_KINDS`, from which those of one kind start (`--start-from`). ControlNet's own training
(arXiv:2302.05543): the base is frozen, its noise or v is the target, and half of the captions are
dropped, so that maps are read and not guessed. Without attention, as the small published ones
(diffusers/controlnet-canny-sdxl-1.0-small).
"""

import argparse
import copy
import functools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from weights.miniature import command
from weights.miniature.captions import training_scene
from weights.miniature.controls import MAPS, Subject, random_pose
from weights.miniature.distil import HERE, Meaning, Teacher, outline_weights
from weights.miniature.recorded import Recorded
from weights.miniature.train_unet import BUCKETS, fit
from weights.miniature.train_vae import LATENT_NOISE, to_unit

UNION = "union-sdxl"
SD_KINDS = ("canny", "depth", "scribble", "segmentation")
BASES = {UNION: "sdxl-base", "sd15": "sd15", "sd21": "sd21"} | {
    f"{base}-{kind}": base for base in ("sd15", "sd21") for kind in SD_KINDS
}
CONTROL_TYPES = 8  # of the union model
FIGURES = 0.3  # share of pictures that show a stick figure, where poses are a kind


@dataclass(frozen=True)
class ControlNetRecipe:
    steps: int = 8000
    batch: int = 16
    learning_rate: float = 1e-3
    pictures: int = 1000  # for each kind
    dropped_captions: float = 0.5
    half_maps: float = 0.2  # share of maps of which a half is black: nothing is known of it
    outline_weight: float = 4.0  # of a latent that is unlike most of its picture
    most_weight: float = 20.0  # of an error in the noise, which counts 1 / alpha_bar
    ema_decay: float = 0.998
    checkpoint_every: int = 4000
    seed: int = 0


def kinds_of(name: str) -> tuple[str, ...]:
    if name == UNION:
        return tuple(MAPS)
    _, _, kind = name.partition("-")
    return (kind,) if kind else SD_KINDS


def build(name: str, unet: UNet2DConditionModel) -> ControlNetModel | ControlNetUnionModel:
    """The UNet's first half without attention; its equal parts begin as the UNet's."""
    config = unet.config
    names = (
        *("in_channels", "block_out_channels", "layers_per_block", "norm_num_groups"),
        *("cross_attention_dim", "addition_embed_type", "addition_time_embed_dim"),
        *("projection_class_embeddings_input_dim", "attention_head_dim"),
        "use_linear_projection",
    )
    own = {key: config[key] for key in names}
    own |= {"down_block_types": ("DownBlock2D",) * len(config.block_out_channels)}
    own |= {"conditioning_embedding_out_channels": (8, 16, 24, 32)}
    if name == UNION:
        union = {"num_trans_channel": 32, "num_proj_channel": 32, "num_trans_head": 4}
        # Its mid block has to be the kind with attention: the class knows no other.
        net = ControlNetUnionModel(**own, **union, num_control_type=CONTROL_TYPES)
    else:
        net = ControlNetModel(**own, mid_block_type="UNetMidBlock2D")
    theirs = unet.state_dict()
    same = {
        k: theirs[k]
        for k, v in net.state_dict().items()
        if k in theirs and theirs[k].shape == v.shape
    }
    net.load_state_dict(same, strict=False)
    return net


@dataclass(frozen=True)
class Pool:
    """Pictures of one size and one kind of map, on the device."""

    latents: Tensor  # (N, 4, h, w)
    maps: Tensor  # (N, 3, H, W) uint8
    meaning: Meaning
    kind: str


@torch.no_grad()
def draw_pool(
    teacher: Teacher, kind: str, size: tuple[int, int], count: int, rng: np.random.Generator
) -> Pool:
    latents, maps, texts = [], [], []
    for start in range(0, count, 64):
        subjects = []
        for _ in range(min(64, count - start)):
            posed = kind == "openpose" or rng.random() < FIGURES
            subjects.append(Subject(training_scene(rng), random_pose(rng) if posed else None))
        pixels = np.stack([np.asarray(s.picture(*size)) for s in subjects])
        batch = to_unit(torch.from_numpy(pixels).permute(0, 3, 1, 2)).to(teacher.device)
        vae = teacher.vae
        latents.append(vae.encode(batch).latent_dist.mean * vae.config.scaling_factor)
        drawn = np.stack([MAPS[kind][0](s, *size) for s in subjects])
        maps.append(torch.from_numpy(drawn).permute(0, 3, 1, 2).to(teacher.device))
        texts += [subject.caption(rng) for subject in subjects]
    print(f"drew {count} of {kind}, {size[0]}x{size[1]} px", flush=True)
    return Pool(torch.cat(latents), torch.cat(maps), teacher.read(texts, size), kind)


def train(
    name: str,
    recipe: ControlNetRecipe,
    out: Path,
    device: torch.device,
    seconds: float,
    start_from: Path | None = None,
) -> None:
    """Train on `device`; the averaged copy is written to `out` every so often."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    teacher = Teacher(HERE / BASES[name], device)
    pools = [
        draw_pool(teacher, kind, size, max(1, round(recipe.pictures * share)), rng)
        for kind in kinds_of(name)
        for size, share in BUCKETS
    ]
    shares = np.array([share for _ in kinds_of(name) for _, share in BUCKETS])
    shares = shares / shares.sum()
    run = _union_pass if name == UNION else _plain_pass

    def error_of(
        index: int,
        net: nn.Module,
        clean: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        maps: Tensor,
        *meaning: Tensor,
    ) -> Tensor:
        heard = Meaning(*meaning)
        noisy = teacher.noised(clean, noise, timesteps)
        down, mid = run(net, noisy, timesteps, heard, maps.float() / 255, index)
        added = None
        if heard.pooled is not None:
            added = {"text_embeds": heard.pooled, "time_ids": heard.time_ids}
        seen = teacher.seen(
            teacher.unet(
                noisy,
                timesteps,
                heard.embeds,
                added_cond_kwargs=added,
                down_block_additional_residuals=down,
                mid_block_additional_residual=mid,
            ).sample,
            noisy,
            timesteps,
        )
        _, rest = teacher.shares(timesteps)
        # An error in v, which is one in the picture over the share of noise.
        loss: Tensor = (
            (seen - clean).square()
            * outline_weights(clean, recipe.outline_weight)
            / rest.square().clamp(min=1 / recipe.most_weight)
        ).mean()
        return loss

    # What number a kind has is written into a recording.
    recorded = {k: Recorded(functools.partial(error_of, k)) for k in range(CONTROL_TYPES)}

    def loss_of(net: nn.Module) -> Tensor:
        pool = pools[int(rng.choice(len(pools), p=shares))]
        rows = torch.randint(len(pool.latents), (recipe.batch,), device=device)
        clean = pool.latents[rows]
        clean = clean + LATENT_NOISE * torch.randn_like(clean)
        meaning = pool.meaning[rows].tensors()
        nothing = teacher.read([""], _size(pool)).tensors()
        dropped = torch.rand(recipe.batch, device=device) < recipe.dropped_captions
        heard = [
            torch.where(dropped.view(-1, *(1,) * (own.ndim - 1)), other.expand_as(own), own)
            for own, other in zip(meaning, nothing, strict=True)
        ]
        timesteps = torch.randint(0, 1000, (recipe.batch,), device=device)
        noise = torch.randn_like(clean)
        maps = half_hidden(pool.maps[rows], recipe.half_maps)
        return recorded[MAPS[pool.kind][1]](net, clean, noise, timesteps, maps, *heard)

    def checkpoint(average: nn.Module) -> None:
        half = copy.deepcopy(average).half()
        half.save_pretrained(out, variant="fp16")  # type: ignore[operator]

    net = build(name, teacher.unet)
    if start_from is not None:
        file = start_from / "diffusion_pytorch_model.fp16.safetensors"
        net.load_state_dict({key: value.float() for key, value in load_file(file).items()})
    fit(net.to(device), recipe, loss_of, checkpoint, seconds)


def half_hidden(maps: Tensor, share: float) -> Tensor:
    """Maps (N, 3, H, W), of a share of which the left, right, upper or lower half is black."""
    count, _, height, width = maps.shape
    right = torch.arange(width, device=maps.device) >= width / 2
    low = torch.arange(height, device=maps.device)[:, None] >= height / 2
    halves = torch.stack([h.expand(height, width) for h in (right, ~right, low, ~low)])
    chosen = halves[torch.randint(4, (count,), device=maps.device)]
    hidden = chosen & (torch.rand(count, 1, 1, device=maps.device) < share)
    return maps * ~hidden[:, None]


def _size(pool: Pool) -> tuple[int, int]:
    height, width = pool.maps.shape[-2:]
    return width, height


Residuals = tuple[list[Tensor], Tensor]
Run = Callable[[nn.Module, Tensor, Tensor, Meaning, Tensor, int], Residuals]


def _plain_pass(
    net: nn.Module, noisy: Tensor, timesteps: Tensor, heard: Meaning, maps: Tensor, index: int
) -> Residuals:
    down, mid = net(noisy, timesteps, heard.embeds, controlnet_cond=maps, return_dict=False)
    return down, mid


def _union_pass(
    net: nn.Module, noisy: Tensor, timesteps: Tensor, heard: Meaning, maps: Tensor, index: int
) -> Residuals:
    # One kind in a batch: the class adds each map's own task embedding.
    types = torch.zeros(len(noisy), CONTROL_TYPES, device=noisy.device)
    types[:, index] = 1
    down, mid = net(
        noisy,
        timesteps,
        heard.embeds,
        controlnet_cond=[maps],
        control_type=types,
        control_type_idx=[index],
        conditioning_scale=1.0,
        added_cond_kwargs={"text_embeds": heard.pooled, "time_ids": heard.time_ids},
        return_dict=False,
    )
    return down, mid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(BASES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=ControlNetRecipe.batch)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop then")
    parser.add_argument("--start-from", type=Path, help="a trained folder of the same shapes")
    arguments, recipe, device = command.parse(parser, ControlNetRecipe())
    recipe = replace(recipe, batch=arguments.batch)
    print(json.dumps(asdict(recipe)), flush=True)
    seconds, start = arguments.seconds, arguments.start_from
    train(arguments.name, recipe, arguments.out, device, seconds, start)


if __name__ == "__main__":
    main()
