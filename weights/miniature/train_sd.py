"""Train a miniature Stable Diffusion: `python -m weights.miniature.train_sd NAME --base X --out Y`.

NAME is `sd15` (predicts noise, on SD 1.5's scaled_linear betas) or `sd21` (predicts v, on the
miniature SDXL's). The layout is that of the published ones: one text encoder, whose last state is
read behind its final norm, and no conditioning on sizes. It has the miniature SDXL in `--base` for
a teacher: what that would say of a noisy picture at the same signal-to-noise ratio is its target,
which has none of the noise that a drawn picture's own target has; the share `data` is the latter.

The text encoder begins as the teacher's first one for sd15 (quick_gelu, as CLIP-L) and as its
second one for sd21 (gelu, as OpenCLIP-H), each without its last layer, which that model does not
read. The VAE is the teacher's.
"""

import argparse
import copy
import json
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from weights.miniature import command
from weights.miniature.architecture import (
    NATIVE_SIZE,
    SCHEDULER_CONFIG,
    TEXT_WIDTH,
    load_tokenizers,
)
from weights.miniature.captions import describe, held_out_captions
from weights.miniature.evaluate import judge_captions, shares
from weights.miniature.recorded import Recorded
from weights.miniature.train_unet import (
    BUCKETS,
    EMPTY_UNTIL,
    Batch,
    Bucket,
    TextToNoise,
    cache_latents,
    fit,
    shape_weights,
    tokens,
)
from weights.miniature.train_unet import load as load_teacher
from weights.miniature.train_vae import LATENT_NOISE
from weights.miniature.world import render

SD15, SD21 = "sd15", "sd21"
ENCODERS = {SD15: "text_encoder", SD21: "text_encoder_2"}  # the teacher's that a student begins as
SCHEDULERS = {
    # As in both published models' own files, but for what decides the noise levels.
    SD15: {
        **SCHEDULER_CONFIG,
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "prediction_type": "epsilon",
    },
    SD21: {**SCHEDULER_CONFIG, "_class_name": "DDIMScheduler"},
}
CHOICE_CAPTIONS, CHOICE_SEED = 48, 77  # by which checkpoints are compared; not the report card's


@dataclass(frozen=True)
class SdRecipe:
    steps: int = 8000
    batch: int = 128
    learning_rate: float = 1.2e-3
    pictures: int = 6000
    wordings: int = 6  # of each picture's caption
    empty_captions: float = 0.08
    empty_captions_without_noise: float = 0.7
    zeroed_captions: float = 0.0
    shape_weight: float = 4.0
    data: float = 0.2  # share of the target that is the drawn picture's own
    most_weight: float = 250.0  # of an error in the noise, which counts 1 / alpha_bar
    ema_decay: float = 0.998
    checkpoint_every: int = 4000
    seed: int = 0


class Student(nn.Module):
    """UNet and text encoder as one module."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, latents: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """`latents` (B, 4, h, w), `ids` (B, 77) to what the UNet predicts, of the same size."""
        embeds = self.text_encoder(ids).last_hidden_state
        predicted: Tensor = self.unet(latents, timesteps, embeds).sample
        return predicted


def build_unet(time_cond_proj_dim: int | None = None) -> UNet2DConditionModel:
    """Three levels of SD's four; as there, attention in all but the deepest.

    `time_cond_proj_dim` is the width of a guidance embedding, which LCM's distilled UNets have.
    """
    return UNet2DConditionModel(
        sample_size=NATIVE_SIZE // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        attention_head_dim=4,  # the number of heads, as in SD's configs
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        time_cond_proj_dim=time_cond_proj_dim,
    )


def build_text_encoder(name: str, teacher: TextToNoise) -> CLIPTextModel:
    source = teacher.text_encoder if name == SD15 else teacher.text_encoder_2
    known = source.config
    config = CLIPTextConfig(
        vocab_size=known.vocab_size,
        hidden_size=known.hidden_size,
        intermediate_size=known.intermediate_size,
        projection_dim=known.projection_dim,
        num_hidden_layers=known.num_hidden_layers - 1,
        num_attention_heads=known.num_attention_heads,
        max_position_embeddings=known.max_position_embeddings,
        hidden_act=known.hidden_act,
        bos_token_id=known.bos_token_id,
        eos_token_id=known.eos_token_id,
        pad_token_id=known.pad_token_id,
    )
    encoder = CLIPTextModel(config)
    state = {
        key.removeprefix("text_model."): value
        for key, value in source.state_dict().items()
        if "final_layer_norm" not in key  # it has never been read
    }
    own = {key.removeprefix("text_model."): key for key in encoder.state_dict()}
    found = {own[key]: value for key, value in state.items() if key in own}
    missing = encoder.load_state_dict(found, strict=False).missing_keys
    assert all("final_layer_norm" in key for key in missing), missing
    return encoder


def build(name: str, teacher: TextToNoise) -> Student:
    return Student(build_unet(), build_text_encoder(name, teacher))


@dataclass(frozen=True)
class Pool:
    """Pictures of one size with their captions, on the device: drawing waits for nothing."""

    latents: Tensor  # (N, 4, h, w)
    weights: Tensor  # (N, 1, h, w)
    ids: Tensor  # (N, wordings, 2, 77): both of the teacher's tokenizers
    empty: Tensor  # (2, 77)
    time_ids: Tensor  # (1, 6)

    @classmethod
    def of(
        cls,
        bucket: Bucket,
        tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
        recipe: SdRecipe,
        rng: np.random.Generator,
    ) -> "Pool":
        device, (width, height) = bucket.latents.device, bucket.size
        count = len(bucket.scenes)
        texts = [describe(scene, rng) for scene in bucket.scenes for _ in range(recipe.wordings)]
        both = torch.stack([tokens(t, [*texts, ""]) for t in tokenizers], dim=1).to(device)
        whole = Batch(bucket.size, bucket.scenes, bucket.latents, [], torch.ones(0))
        return cls(
            bucket.latents,
            shape_weights(whole, recipe.shape_weight),
            both[:-1].reshape(count, recipe.wordings, *both.shape[1:]),
            both[-1],
            torch.tensor([[height, width, 0, 0, height, width]]).float().to(device),
        )

    def draw(self, recipe: SdRecipe) -> tuple[Tensor, ...]:
        """Latents, noise, timesteps, weights, both tokenizers' ids, and the pictures' sizes."""
        device, batch = self.latents.device, recipe.batch
        rows = torch.randint(len(self.latents), (batch,), device=device)
        wordings = torch.randint(self.ids.shape[1], (batch,), device=device)
        clean = self.latents[rows]
        clean = clean + LATENT_NOISE * torch.randn_like(clean)
        timesteps = noise_levels(batch).to(device)
        share = recipe.empty_captions_without_noise * (1 - timesteps / EMPTY_UNTIL)
        dropped = torch.rand(batch, device=device) < share.clamp(min=recipe.empty_captions)
        ids = torch.where(dropped[:, None, None], self.empty, self.ids[rows, wordings])
        return (
            clean,
            torch.randn_like(clean),
            timesteps,
            self.weights[rows],
            ids[:, 0].contiguous(),
            ids[:, 1].contiguous(),
            self.time_ids.repeat(batch, 1),
        )


def noise_levels(count: int) -> Tensor:
    """A third uniform, a third in the middle, where shapes are decided, and a third above it."""
    third = count // 3
    middle = (torch.sigmoid(torch.randn(third)) * 1000).long()
    above = torch.randint(700, 1000, (third,))
    return torch.cat([middle, above, torch.randint(0, 1000, (count - 2 * third,))])


class Teaching:
    """What the teacher would say, in the student's terms."""

    def __init__(self, name: str, base: Path, device: torch.device) -> None:
        self._teacher = load_teacher(base).to(device).eval().requires_grad_(False)
        self.noising = DDPMScheduler.from_config(SCHEDULERS[name])
        own = DDPMScheduler.from_config(SCHEDULER_CONFIG).alphas_cumprod
        levels = self.noising.alphas_cumprod
        # Where each of the student's noise levels lies among the teacher's, which fall with t.
        places = np.interp(-levels.logit().numpy(), -own.logit().numpy(), np.arange(len(own)))
        self._places = torch.from_numpy(places).float().to(device)
        self._levels = levels.to(device)

    @property
    def teacher(self) -> TextToNoise:
        return self._teacher

    @torch.no_grad()
    def velocity(
        self, noisy: Tensor, timesteps: Tensor, first: Tensor, second: Tensor, time_ids: Tensor
    ) -> Tensor:
        """v (B, 4, h, w) at the student's `timesteps`."""
        keep = torch.ones(len(noisy), device=noisy.device)
        predicted: Tensor = self._teacher(
            noisy, self._places[timesteps], (first, second), keep, time_ids
        )
        return predicted

    def levels(self, timesteps: Tensor) -> Tensor:
        """alpha_bar (B, 1, 1, 1)."""
        levels: Tensor = self._levels[timesteps][:, None, None, None]
        return levels


def train(
    name: str,
    student: Student,
    teaching: Teaching,
    base: Path,
    recipe: SdRecipe,
    out: Path,
    device: torch.device,
    seconds: float,
) -> None:
    """Train on `device`; the averaged copy is written to `out` every so often."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    vae = AutoencoderKL.from_pretrained(base / "vae", variant="fp16", dtype=torch.float32)
    pools = [
        Pool.of(bucket, load_tokenizers(base), recipe, rng)
        for bucket in cache_latents(vae.to(device), recipe, render)
    ]

    def error_of(
        student: nn.Module,
        clean: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        weights: Tensor,
        first: Tensor,
        second: Tensor,
        time_ids: Tensor,
    ) -> Tensor:
        level = teaching.levels(timesteps)
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        velocity = teaching.velocity(noisy, timesteps, first, second, time_ids)
        drawn = level.sqrt() * noise - (1 - level).sqrt() * clean
        velocity = velocity + recipe.data * (drawn - velocity)
        wanted = velocity
        if name == SD15:
            wanted = level.sqrt() * velocity + (1 - level).sqrt() * noisy
            weights = weights * (1 / level).clamp(max=recipe.most_weight)
        predicted = student(noisy, timesteps, first)
        loss: Tensor = ((predicted - wanted).square() * weights).mean()
        return loss

    recorded = Recorded(error_of)

    def loss_of(student: Student) -> Tensor:
        pool = pools[int(rng.choice(len(pools), p=[share for _, share in BUCKETS]))]
        return recorded(student, *pool.draw(recipe))

    def checkpoint(average: Student) -> None:
        save(name, average, base, out)
        pipeline = load_pipeline(out, vae)
        rows = judge_captions(pipeline, held_out_captions(CHOICE_CAPTIONS, CHOICE_SEED))
        found = " ".join(f"{key} {share:.0%}" for key, share in shares(rows).items())
        print(f"of {CHOICE_CAPTIONS} captions: {found}", flush=True)

    fit(student.to(device), recipe, loss_of, checkpoint, seconds)


def save(name: str, student: Student, base: Path, out: Path) -> None:
    """Write everything but the VAE in the hub's layout, as fp16 safetensors."""
    half = copy.deepcopy(student).half()
    half.unet.register_to_config(_name_or_path="")
    half.unet.save_pretrained(out / "unet", variant="fp16")
    half.text_encoder.save_pretrained(out / "text_encoder", variant="fp16")
    shutil.copytree(base / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    (out / "scheduler").mkdir(exist_ok=True)
    for path, content in (
        ("scheduler/scheduler_config.json", SCHEDULERS[name]),
        ("model_index.json", _index(str(SCHEDULERS[name]["_class_name"]))),
    ):
        (out / path).write_text(json.dumps(content, indent=2) + "\n")


def _index(scheduler: str) -> dict[str, object]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def load(folder: Path) -> Student:
    options = {"variant": "fp16", "dtype": torch.float32}
    return Student(
        UNet2DConditionModel.from_pretrained(folder / "unet", **options),
        CLIPTextModel.from_pretrained(folder / "text_encoder", **options),
    )


def load_pipeline(folder: Path, vae: AutoencoderKL) -> StableDiffusionPipeline:
    """The stock pipeline, with Euler's sampler."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, vae=vae, variant="fp16", dtype=torch.float32
    )
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(vae.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[SD15, SD21])
    parser.add_argument("--base", type=Path, required=True, help="the miniature SDXL's folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start-from", type=Path, help="a trained folder to continue from")
    parser.add_argument("--batch", type=int, default=SdRecipe.batch)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop then")
    arguments, recipe, device = command.parse(parser, SdRecipe())
    recipe = replace(recipe, batch=arguments.batch)
    print(json.dumps(asdict(recipe)), flush=True)
    torch.manual_seed(recipe.seed)
    teaching = Teaching(arguments.name, arguments.base, device)
    start = arguments.start_from
    student = load(start) if start else build(arguments.name, teaching.teacher)
    train(
        arguments.name,
        student,
        teaching,
        arguments.base,
        recipe,
        arguments.out,
        device,
        arguments.seconds,
    )


if __name__ == "__main__":
    main()
