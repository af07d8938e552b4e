"""Distil models that need few steps: `python -m weights.miniature.distil NAME --out FOLDER`.

NAME is one of `STUDENTS`: the Turbo models, which draw in one step without guidance, the LCM-LoRAs,
and LCM's UNet that is told the guidance scale. All of them learn to jump: from any point of the
path that their teacher takes from noise to a picture, under guidance and without noise of its own
(DDIM, arXiv:2010.02502), straight to that path's end. That is the consistency function
(arXiv:2303.01469), under guidance as LCM has it (arXiv:2310.04378). The teacher is so small that
whole paths are walked first, and learning is a regression on them (arXiv:2101.02388): no target
network, and no error handed down from step to step.

Some paths begin at noise, others at a drawn picture under less noise, with its own caption or
another one's, as in image to image and inpainting. Some points are a path's end under new noise:
what samplers of few steps go on from.
"""

import argparse
import copy
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weights.miniature import command, train_sd
from weights.miniature.captions import describe, held_out_captions, training_scene
from weights.miniature.evaluate import judge_captions, shares
from weights.miniature.recorded import Recorded
from weights.miniature.train_unet import Bucket, cache_latents, fit, tokens
from weights.miniature.world import render

HERE = Path(__file__).parent
LEVELS = 1000  # timesteps
LORA_FILE = "pytorch_lora_weights.safetensors"  # as the LCM-LoRAs are published
CHUNK = 512  # paths walked at once
GUIDANCE_WIDTH = 256  # of the embedding of a guidance scale, as in LCM_Dreamshaper_v7
GUIDANCES = (2.0, 14.0)  # the scales that such a UNet learns


@dataclass(frozen=True)
class DistilRecipe:
    steps: int = 6000
    batch: int = 64
    learning_rate: float = 1e-3
    pictures: int = 6000
    walks: int = 2  # paths for each picture
    zeroed_captions: float = 0.0
    empty_captions: float = 0.0
    empty_captions_without_noise: float = 0.0
    guidance: float = 7.5  # of the teacher
    path_steps: int = 20
    from_noise: float = 0.7  # share of paths
    own_captions: float = 0.5  # share of the other paths
    renoised: float = 0.3  # share of points that are a path's end under new noise
    outline_weight: float = 4.0  # of a latent that is unlike most of its picture
    huber: float = 0.05  # below this an error counts squared
    ema_decay: float = 0.998
    checkpoint_every: int = 4000
    seed: int = 0


@dataclass(frozen=True)
class Student:
    """What becomes of a teacher, and with which sampler its pictures are judged."""

    teacher: str  # a folder of weights/miniature
    rank: int | None  # of the LoRA; None: a UNet that is told the guidance
    first: float  # share of points that are a path's first
    sampler: type[EulerAncestralDiscreteScheduler | LCMScheduler]
    steps: int
    guidance: float = 1.0


def _turbo(teacher: str) -> Student:
    return Student(teacher, 24, 0.5, EulerAncestralDiscreteScheduler, steps=1)


def _lcm(teacher: str, rank: int | None, guidance: float = 1.0) -> Student:
    return Student(teacher, rank, 0.25, LCMScheduler, steps=4, guidance=guidance)


STUDENTS = {
    "sdxl-turbo": _turbo("sdxl-base"),
    "sd-turbo": _turbo("sd21"),
    "lcm-lora-sdxl": _lcm("sdxl-base", rank=16),
    "lcm-lora-sd15": _lcm("sd15", rank=16),
    "lcm-dreamshaper": _lcm("sd15", rank=None, guidance=8.0),
}
CHOICE_CAPTIONS, CHOICE_SEED = 48, 77  # by which checkpoints are compared; not the report card's


@dataclass(frozen=True)
class Meaning:
    """What the UNet hears of N captions."""

    embeds: Tensor  # (N, 77, width)
    pooled: Tensor | None = None  # (N, width), SDXL's
    time_ids: Tensor | None = None  # (N, 6), SDXL's

    def tensors(self) -> list[Tensor]:
        """Those that there are."""
        return [t for t in (self.embeds, self.pooled, self.time_ids) if t is not None]

    def __getitem__(self, rows: Tensor) -> "Meaning":
        return Meaning(*(tensor[rows] for tensor in self.tensors()))

    def __add__(self, other: "Meaning") -> "Meaning":
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return Meaning(*(torch.cat(pair) for pair in pairs))


class Teacher:
    """A trained miniature, SDXL's or SD's, and its noise levels."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        vae = AutoencoderKL.from_pretrained(
            HERE / "sdxl-base" / "vae", variant="fp16", dtype=torch.float32
        )
        settings = {"variant": "fp16", "dtype": torch.float32, "vae": vae}
        self.pipeline = DiffusionPipeline.from_pretrained(folder, **settings).to(device)
        self.unet = self.pipeline.unet.eval().requires_grad_(False)
        self.vae, self.device = vae, device
        ends = [end for end in ("", "_2") if hasattr(self.pipeline, f"tokenizer{end}")]
        self._readers = [
            (
                getattr(self.pipeline, f"tokenizer{end}"),
                getattr(self.pipeline, f"text_encoder{end}"),
            )
            for end in ends
        ]
        config = self.pipeline.scheduler.config
        self._kind = config.prediction_type
        self._levels = DDPMScheduler.from_config(config).alphas_cumprod.to(device)

    def judged(self, student: Student, unet: UNet2DConditionModel) -> str:
        """How many captions' pictures are right, of each attribute."""
        components = {**self.pipeline.components, "unet": unet}
        pipeline = type(self.pipeline)(**components)
        config = pipeline.scheduler.config
        pipeline.scheduler = student.sampler.from_config(config, timestep_spacing="trailing")
        pipeline.set_progress_bar_config(disable=True)
        captions = held_out_captions(CHOICE_CAPTIONS, CHOICE_SEED)
        found = shares(judge_captions(pipeline, captions, student.steps, student.guidance))
        return " ".join(f"{key} {share:.0%}" for key, share in found.items())

    @torch.no_grad()
    def read(self, texts: list[str], size: tuple[int, int]) -> Meaning:
        """Captions of pictures of `size` (width, height) in pixels."""
        states, pooled = [], None
        for tokenizer, encoder in self._readers:
            output = encoder(tokens(tokenizer, texts).to(self.device), output_hidden_states=True)
            one = len(self._readers) == 1
            states.append(output.last_hidden_state if one else output.hidden_states[-2])
            pooled = getattr(output, "text_embeds", None)
        if pooled is None:
            return Meaning(torch.cat(states, dim=-1))
        width, height = size
        time_ids = torch.tensor([[height, width, 0, 0, height, width]]).repeat(len(texts), 1)
        return Meaning(torch.cat(states, dim=-1), pooled, time_ids.float().to(self.device))

    def shares(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Of picture and of noise, (N, 1, 1, 1) each: the roots of alpha_bar and 1 - alpha_bar."""
        level = self._levels[timesteps][:, None, None, None]
        return level.sqrt(), (1 - level).sqrt()

    def noised(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        picture, rest = self.shares(timesteps)
        return picture * clean + rest * noise

    def clean(
        self,
        unet: UNet2DConditionModel,
        noisy: Tensor,
        timesteps: Tensor,
        meaning: Meaning,
        told: Tensor | None = None,
    ) -> Tensor:
        """The picture (N, 4, h, w) that a UNet sees in `noisy`; `told` (N, width) where it asks."""
        added = None
        if meaning.pooled is not None:
            added = {"text_embeds": meaning.pooled, "time_ids": meaning.time_ids}
        output = unet(
            noisy, timesteps, meaning.embeds, added_cond_kwargs=added, timestep_cond=told
        ).sample
        return self.seen(output, noisy, timesteps)

    def seen(self, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The picture that a UNet's output means."""
        picture, rest = self.shares(timesteps)
        if self._kind == "epsilon":
            clean: Tensor = (noisy - rest * output) / picture
        else:
            clean = picture * noisy - rest * output
        return clean


@dataclass(frozen=True)
class Paths:
    """The points of N paths through pictures of one size."""

    points: Tensor  # (N, steps, 4, h, w)
    timesteps: Tensor  # (N, steps)
    ends: Tensor  # (N, 4, h, w)
    meaning: Meaning
    told: Tensor  # (N, GUIDANCE_WIDTH), of the guidance
    weights: Tensor  # (N, 1, h, w) with mean 1
    from_noise: Tensor  # those of the N that begin at noise


@torch.no_grad()
def walk(
    teacher: Teacher, starts: Tensor, first: Tensor, meaning: Meaning, guidance: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """DDIM under guidance from `starts` at timesteps `first`: points, their timesteps, the ends."""
    width, height = 8 * starts.shape[-1], 8 * starts.shape[-2]
    both = teacher.read([""] * len(starts), (width, height)) + meaning
    noisy, points, timesteps = starts, [], []
    clean = starts
    for step in range(steps):
        now, then = ((first * (1 - s / steps)).long() for s in (step, step + 1))
        points.append(noisy)
        timesteps.append(now)
        seen = teacher.clean(teacher.unet, noisy.repeat(2, 1, 1, 1), now.repeat(2), both)
        without, with_caption = seen.chunk(2)
        clean = without + guidance[:, None, None, None] * (with_caption - without)
        picture, rest = teacher.shares(now)
        noise = (noisy - picture * clean) / rest
        noisy = teacher.noised(clean, noise, then)
    return torch.stack(points, dim=1), torch.stack(timesteps, dim=1), clean


def draw_paths(
    teacher: Teacher, bucket: Bucket, recipe: DistilRecipe, rng: np.random.Generator, varied: bool
) -> Paths:
    """The recipe's paths for each of the bucket's pictures; `varied`: each at its own guidance."""
    parts = []
    pictures = len(bucket.scenes)
    for start in range(0, pictures * recipe.walks, CHUNK):
        rows = np.arange(start, min(start + CHUNK, pictures * recipe.walks)) % pictures
        clean = bucket.latents[torch.from_numpy(rows).to(teacher.device)]
        scenes, count = [bucket.scenes[row] for row in rows], len(rows)
        own = rng.random(count) < recipe.own_captions
        scenes = [s if own[i] else training_scene(rng) for i, s in enumerate(scenes)]
        meaning = teacher.read([describe(scene, rng) for scene in scenes], bucket.size)
        from_noise = torch.from_numpy(rng.random(count) < recipe.from_noise).to(teacher.device)
        levels = torch.randint(recipe.path_steps, LEVELS - 1, (count,)).to(teacher.device)
        first = torch.where(from_noise, LEVELS - 1, levels)
        noise = torch.randn_like(clean)
        starts = torch.where(
            from_noise[:, None, None, None], noise, teacher.noised(clean, noise, first)
        )
        guidance = torch.full((count,), recipe.guidance)
        if varied:
            low, high = GUIDANCES
            guidance = low + (high - low) * torch.rand(count)
        told = StableDiffusionPipeline.get_guidance_scale_embedding(
            None, guidance - 1, embedding_dim=GUIDANCE_WIDTH
        ).to(teacher.device)
        guidance = guidance.to(teacher.device)
        walked = walk(teacher, starts, first, meaning, guidance, recipe.path_steps)
        parts.append((*walked, told, from_noise, *meaning.tensors()))
    points, timesteps, ends, told, from_noise, *meanings = (
        torch.cat(column) for column in zip(*parts, strict=True)
    )
    print(f"walked {len(ends)} paths of {bucket.size[0]}x{bucket.size[1]} px", flush=True)
    return Paths(
        points,
        timesteps,
        ends,
        Meaning(*meanings),
        told,
        outline_weights(ends, recipe.outline_weight),
        from_noise.nonzero()[:, 0],
    )


def outline_weights(latents: Tensor, weight: float) -> Tensor:
    """(N, 1, h, w) with mean 1: cells unlike most of the picture count up to `weight` as much."""
    ground = latents.flatten(2).median(dim=2).values[..., None, None]
    unlike = (latents - ground).square().sum(dim=1, keepdim=True)
    weights = 1 + (weight - 1) * (unlike / unlike.mean(dim=(2, 3), keepdim=True)).clamp(max=1)
    return weights / weights.mean(dim=(2, 3), keepdim=True)


@dataclass(frozen=True)
class Batch:
    """Points of paths and where those end."""

    points: Tensor  # (B, 4, h, w)
    timesteps: Tensor  # (B,)
    ends: Tensor  # (B, 4, h, w)
    meaning: Meaning
    told: Tensor  # (B, GUIDANCE_WIDTH)
    weights: Tensor  # (B, 1, h, w)


def draw_batches(
    teacher: Teacher, each: list[Paths], recipe: DistilRecipe, first: float
) -> Iterator[Batch]:
    """Endless batches, each of one size; `first` is the share of points at which paths begin."""
    sizes = torch.tensor([float(len(paths.ends)) for paths in each])
    while True:
        paths = each[int(torch.multinomial(sizes, 1))]
        device, count = paths.ends.device, recipe.batch
        rows = torch.randint(len(paths.ends), (count,), device=device)
        kind = torch.rand(count, device=device)
        begins = kind < first
        chosen = torch.randint(len(paths.from_noise), (count,), device=device)
        rows = torch.where(begins, paths.from_noise[chosen], rows)
        steps = torch.randint(paths.points.shape[1], (count,), device=device)
        steps = torch.where(begins, 0, steps)
        points, timesteps = paths.points[rows, steps], paths.timesteps[rows, steps]
        ends = paths.ends[rows]
        renoised = (kind >= first) & (kind < first + recipe.renoised)
        levels = torch.randint(1, LEVELS - 50, (count,), device=device)
        again = teacher.noised(ends, torch.randn_like(ends), levels)
        yield Batch(
            torch.where(renoised[:, None, None, None], again, points),
            torch.where(renoised, levels, timesteps),
            ends,
            paths.meaning[rows],
            paths.told[rows],
            paths.weights[rows],
        )


class LowRank(nn.Module):
    """A weight W becomes W + up @ down (LoRA, arXiv:2106.09685), with W itself fixed."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        out, into = weight.shape[0], weight[0].numel()
        rank = min(rank, out, into)
        self.kernel = weight.shape[2:]
        self.down = nn.Parameter(torch.randn(rank, into, device=weight.device) * into**-0.5)
        self.up = nn.Parameter(torch.zeros(out, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def with_lora(unet: UNet2DConditionModel, rank: int) -> UNet2DConditionModel:
    """A copy of the UNet in which all that learns is a LoRA of every linear and convolution."""
    student = copy.deepcopy(unet)
    for module in list(student.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))
    return student


def told_guidance(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy of the UNet that is told the guidance scale, and does not listen yet."""
    student = train_sd.build_unet(GUIDANCE_WIDTH)
    missing = student.load_state_dict(unet.state_dict(), strict=False).missing_keys
    assert missing == ["time_embedding.cond_proj.weight"], missing
    nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student.to(unet.device)


def load_into(student: UNet2DConditionModel, folder: Path) -> None:
    """Go on from what `save` has written there."""
    if not (folder / LORA_FILE).exists():
        trained = UNet2DConditionModel.from_pretrained(
            folder / "unet", variant="fp16", dtype=torch.float32
        )
        student.load_state_dict(trained.state_dict())
        return
    tensors = load_file(folder / LORA_FILE)
    for key, low_rank in _low_ranks(student).items():
        for half in ("down", "up"):
            parameter = getattr(low_rank, half)
            parameter.data.copy_(tensors[f"{key}.lora_{half}.weight"].view_as(parameter))


def _low_ranks(student: UNet2DConditionModel) -> dict[str, LowRank]:
    """By kohya's names."""
    return {
        f"lora_unet_{name.replace('.', '_')}": module.parametrizations.weight[0]
        for name, module in student.named_modules()
        if parametrize.is_parametrized(module, "weight")
    }


def lora_tensors(student: UNet2DConditionModel) -> dict[str, Tensor]:
    """The LoRA under kohya's names, as the LCM-LoRAs are published, in fp16."""
    tensors = {}
    for key, low_rank in _low_ranks(student).items():
        rank, kernel = len(low_rank.down), low_rank.kernel
        down, up = (
            low_rank.down.view(rank, -1, *kernel),
            low_rank.up.view(-1, rank, *(1 for _ in kernel)),
        )
        tensors[f"{key}.lora_down.weight"] = down.detach().half().contiguous().cpu()
        tensors[f"{key}.lora_up.weight"] = up.detach().half().contiguous().cpu()
        tensors[f"{key}.alpha"] = torch.tensor(float(rank)).half()
    return tensors


def save(name: str, student: UNet2DConditionModel, teacher: Path, out: Path) -> None:
    """A LoRA's one file, or all of a model but the VAE in the hub's layout."""
    out.mkdir(parents=True, exist_ok=True)
    if STUDENTS[name].rank is not None:
        save_file(lora_tensors(student), out / LORA_FILE)
        return
    half = copy.deepcopy(student).half()
    half.register_to_config(_name_or_path="")
    half.save_pretrained(out / "unet", variant="fp16")
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(teacher / part, out / part, dirs_exist_ok=True)
    config = {
        **json.loads((teacher / "scheduler" / "scheduler_config.json").read_text()),
        "_class_name": "LCMScheduler",
        "original_inference_steps": 50,
    }
    index = json.loads((teacher / "model_index.json").read_text())
    index = {**index, "_class_name": "LatentConsistencyModelPipeline"}
    index["scheduler"] = ["diffusers", "LCMScheduler"]
    (out / "scheduler").mkdir(exist_ok=True)
    for path, content in (
        ("scheduler/scheduler_config.json", config),
        ("model_index.json", index),
    ):
        (out / path).write_text(json.dumps(content, indent=2) + "\n")


def train(
    name: str,
    teacher_folder: Path,
    recipe: DistilRecipe,
    out: Path,
    device: torch.device,
    seconds: float,
    start: Path | None = None,
) -> None:
    """Distil on `device`; the averaged copy is written to `out` every so often."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    chosen = STUDENTS[name]
    teacher = Teacher(teacher_folder, device)
    buckets = cache_latents(teacher.vae, recipe, render)
    varied = chosen.rank is None
    paths = [draw_paths(teacher, bucket, recipe, rng, varied) for bucket in buckets]
    batches = draw_batches(teacher, paths, recipe, chosen.first)

    def error_of(
        student: UNet2DConditionModel,
        points: Tensor,
        timesteps: Tensor,
        ends: Tensor,
        weights: Tensor,
        told: Tensor,
        *meaning: Tensor,
    ) -> Tensor:
        asked = told if varied else None
        clean = teacher.clean(student, points, timesteps, Meaning(*meaning), asked)
        # Pseudo-Huber (arXiv:2310.14189): a mean of all that may come is blurred, a median less.
        error = ((clean - ends).square() + recipe.huber**2).sqrt() - recipe.huber
        loss: Tensor = (error * weights).mean()
        return loss

    recorded = Recorded(error_of)

    def loss_of(student: UNet2DConditionModel) -> Tensor:
        batch = next(batches)
        tensors = (batch.points, batch.timesteps, batch.ends, batch.weights, batch.told)
        return recorded(student, *tensors, *batch.meaning.tensors())

    def checkpoint(average: UNet2DConditionModel) -> None:
        save(name, average, teacher_folder, out)
        print(f"of {CHOICE_CAPTIONS} captions: {teacher.judged(chosen, average)}", flush=True)

    if chosen.rank is None:
        student = told_guidance(teacher.unet).requires_grad_(True)
    else:
        student = with_lora(teacher.unet, chosen.rank)
    if start is not None:
        load_into(student, start)
    fit(student, recipe, loss_of, checkpoint, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(STUDENTS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, help="its folder, if not the embedded one")
    parser.add_argument("--start-from", type=Path, help="a distilled folder to continue from")
    parser.add_argument("--batch", type=int, default=DistilRecipe.batch)
    parser.add_argument("--walks", type=int, default=DistilRecipe.walks)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop then")
    arguments, recipe, device = command.parse(parser, DistilRecipe())
    recipe = replace(recipe, batch=arguments.batch, walks=arguments.walks)
    print(json.dumps(asdict(recipe)), flush=True)
    teacher = arguments.teacher or HERE / STUDENTS[arguments.name].teacher
    train(
        arguments.name,
        teacher,
        recipe,
        arguments.out,
        device,
        arguments.seconds,
        arguments.start_from,
    )


if __name__ == "__main__":
    main()
