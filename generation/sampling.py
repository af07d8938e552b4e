"""The sampling loop: timesteps, denoising with guidance, inpainting's known latents.

Latents and the scheduler's arithmetic are fp32; only the UNet's input is cast, as in k-diffusion.
Timesteps and sigmas stay on the CPU, so that reading one does not wait for the GPU; in operations
with GPU tensors, 0-dim CPU tensors act like Python numbers.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from generation.conditioning import Conditioning
from generation.controlnet import ActiveControlNet, Residuals, add_residuals
from generation.latents import Generators, NonBlockingCopies, copy_to_device
from generation.schedulers import SCHEDULE_OVERRIDES, SCHEDULERS, ScheduleType
from models.cache import LoadedModel

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@dataclass(frozen=True)
class Timesteps:
    """A range of a scheduler's timesteps, from noisy to clean: those that one model denoises."""

    scheduled: Tensor  # (S,) on the CPU: all of the scheduler's
    begin: int  # the first index that is sampled
    end: int  # one after the last
    preceding: int = 0  # number of steps that another model has made before

    @property
    def sampled(self) -> Tensor:
        """(end - begin,) on the CPU."""
        return self.scheduled[self.begin : self.end]

    def until(self, cutoff: int) -> Timesteps:
        """Return the steps at or above a timestep: a base model's part of an ensemble."""
        return replace(self, end=self.begin + int((self.sampled >= cutoff).sum()))

    def below(self, cutoff: int, order: int) -> Timesteps:
        """Return the steps below a timestep: a refiner's part of an ensemble.

        Called on all of a stage's steps, not on the result of `until`. A second-order scheduler
        visits most timesteps twice; the refiner repeats the base model's last visit if it would
        else begin with a second one (diffusers, StableDiffusionXLImg2ImgPipeline.get_timesteps).
        """
        count = int((self.scheduled < cutoff).sum())
        if order == 2 and count % 2 == 0:
            count += 1
        begin = len(self.scheduled) - count
        return replace(self, begin=begin, preceding=begin - self.begin)

    def after(self, step: int) -> Tensor | None:
        """Return the timestep that follows a step; None if its result has no noise left."""
        index = self.begin + step + 1
        return self.scheduled[index] if index < len(self.scheduled) else None


def build_scheduler(
    name: str, schedule_type: ScheduleType, published_config: Mapping[str, object]
) -> SchedulerMixin:
    """Return a new scheduler of the registry from the config that a model was published with.

    Never from another scheduler's config: its overrides would stay for the rest of the process
    (after one KarrasDPM request every later scheduler would use Karras sigmas).
    """
    config = json.dumps(dict(published_config), sort_keys=True)
    return copy.deepcopy(_scheduler_template(name, schedule_type, config))


@functools.lru_cache(maxsize=128)
def _scheduler_template(name: str, schedule_type: ScheduleType, config_json: str) -> SchedulerMixin:
    """Return a scheduler to copy: making diffusers' DPM2 takes half a second, a copy 1 ms."""
    import diffusers

    spec = SCHEDULERS[name]
    config = {**json.loads(config_json), **spec.overrides, **SCHEDULE_OVERRIDES[schedule_type]}
    scheduler_class = getattr(diffusers, spec.class_name)
    # The config was written for another class; diffusers warns about entries this one lacks.
    known = inspect.signature(scheduler_class.__init__).parameters
    scheduler: SchedulerMixin = scheduler_class.from_config(
        {key: value for key, value in config.items() if key in known}
    )
    return scheduler


def select_timesteps(
    scheduler: SchedulerMixin, num_inference_steps: int, strength: float = 1.0
) -> Timesteps:
    """Set a scheduler's timesteps, and skip the first 1 - `strength` of them (arXiv:2108.01073).

    int(num_inference_steps * strength), diffusers' count of steps to run, is not 0 in a valid plan.
    """
    scheduler.set_timesteps(num_inference_steps, device="cpu")
    skipped = num_inference_steps - int(num_inference_steps * strength)
    return Timesteps(scheduler.timesteps, skipped * scheduler.order, end=len(scheduler.timesteps))


def refiner_cutoff(
    timesteps: Timesteps, high_noise_frac: float, num_train_timesteps: int
) -> int | None:
    """Return the timestep below which SDXL's refiner takes over (arXiv:2307.01952, section 2.5).

    None if no step is left for it. The base model makes the first step at least, because the
    refiner cannot start from pure noise.
    """
    sampled = timesteps.sampled.tolist()
    cutoff: int = min(round(num_train_timesteps * (1 - high_noise_frac)), math.floor(sampled[0]))
    if any(t < cutoff for t in sampled):
        return cutoff
    print("refine has no effect: the base model's steps leave none for the refiner")
    return None


def initial_latents(
    scheduler: SchedulerMixin,
    timesteps: Timesteps,
    noise: Tensor,
    init: Tensor | None,
    seeds: Sequence[int],
) -> Tensor:
    """Return the sample that the first timestep denoises: noise, or `init` under noise."""
    start_from(scheduler, timesteps, noise.shape, noise.device, seeds)
    if init is None:
        sample: Tensor = noise * scheduler.init_noise_sigma
        return sample
    return noised(scheduler, init, noise, timesteps.sampled[0])


def start_from(
    scheduler: SchedulerMixin,
    timesteps: Timesteps,
    shape: torch.Size,
    device: torch.device,
    seeds: Sequence[int],
) -> None:
    """Set a scheduler's first step, and the noise of DPM-Solver++ (SDE).

    The index is given because some schedulers visit a timestep twice. DPM-Solver++ (SDE) draws on
    the latents' device by default; here each image has a Brownian motion from its seed, on the CPU.
    Other schedulers take the generators at each step.
    """
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(timesteps.begin)
    if hasattr(scheduler, "noise_sampler"):
        from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

        sigmas = scheduler.sigmas[scheduler.sigmas > 0]
        like, low, high = torch.zeros(shape), sigmas.min().item(), sigmas.max().item()
        draw = BrownianTreeNoiseSampler(like, low, high, list(seeds))
        scheduler.noise_sampler = lambda sigma, sigma_next: copy_to_device(
            draw(sigma.cpu(), sigma_next.cpu()), device
        )


def noised(
    scheduler: SchedulerMixin, latents: Tensor, noise: Tensor, timestep: Tensor | None
) -> Tensor:
    """Return latents with the noise of a timestep (on the CPU; None: without noise).

    Every scheduler's `add_noise` is a · latents + b · noise; on ones and zeros it returns a and b
    without copying its table of noise levels to the latents' device. Many schedulers take the level
    of the step that comes next, whatever the timestep: call this before the first step, with the
    first timestep, or right after a step, with the one that follows.
    """
    if timestep is None:
        return latents
    one, level = torch.ones(1), timestep[None]
    a = scheduler.add_noise(one, 0 * one, level)[0]
    b = scheduler.add_noise(0 * one, one, level)[0]
    result: Tensor = a * latents + b * noise
    return result


@dataclass(frozen=True)
class GuidanceInterval:
    """Classifier-free guidance in a part of the steps (arXiv:2207.12598, 2404.07724)."""

    scale: float
    start: float  # fractions of the steps
    end: float


@dataclass(frozen=True)
class CFGDenoiser:
    """Predicts noise with a UNet: classifier-free guidance, ControlNets, guidance embeddings.

    With `guidance`, the rows of `conditioning` are N negative prompts, then N prompts.
    """

    model: LoadedModel
    conditioning: Conditioning
    guidance: GuidanceInterval | None  # None: the prompts alone
    controlnets: Sequence[ActiveControlNet] = ()

    def __call__(self, sample: Tensor, timestep: Tensor, begin: float, end: float) -> Tensor:
        """Return the prediction (N, 4, H/8, W/8) in fp32 for a scaled sample of that shape.

        The step lasts from `begin` to `end`, fractions of the image's steps. Guidance and
        ControlNets act in it if their intervals include both, as in diffusers.
        """
        guidance, conditioning = self.guidance, self.conditioning
        if guidance is not None:
            if guidance.start <= begin and end <= guidance.end:
                sample = torch.cat([sample, sample])
            else:
                guidance, conditioning = None, conditioning.of_prompts()
        sample = sample.to(self.model.dtype)
        # Filled in by the GPU: copying the CPU's tensor would wait for it.
        t = torch.full((), float(timestep), dtype=torch.float32, device=sample.device)
        residuals: Residuals | None = None
        for controlnet in self.controlnets:
            if controlnet.plan.start <= begin and end <= controlnet.plan.end:
                added = controlnet.residuals(sample, t, conditioning)
                residuals = added if residuals is None else add_residuals(residuals, added)
        noise_pred: Tensor = self.model.graphs.run(
            "unet",
            self.model.components.unet,
            sample,
            t,
            encoder_hidden_states=conditioning.prompt_embeds,
            timestep_cond=conditioning.timestep_cond,
            added_cond_kwargs=conditioning.added_arguments(),
            down_block_additional_residuals=residuals.down if residuals else None,
            mid_block_additional_residual=residuals.mid if residuals else None,
            return_dict=False,
        )[0].float()
        if guidance is None:
            return noise_pred
        negative, positive = noise_pred.chunk(2)
        return negative + guidance.scale * (positive - negative)


@dataclass(frozen=True)
class KnownLatents:
    """The source image's latents: after each step, they replace what may not change yet."""

    latents: Tensor  # (N, 4, h, w)
    noise: Tensor  # (N, 4, h, w)
    change: Tensor  # (1, 1, h, w) in [0, 1]: the fraction of the steps that may change a latent

    def editable(self, step: int, steps: int) -> Tensor:
        """Return where a step may change latents: white always, grey in the last steps only.

        Differential diffusion (arXiv:2306.00950, algorithm 1).
        """
        return self.change >= 1 - step / steps - 1e-6

    def restore(
        self, sample: Tensor, scheduler: SchedulerMixin, timesteps: Timesteps, step: int
    ) -> Tensor:
        """Return a step's result with known latents, noised alike, outside the editable part."""
        known = noised(scheduler, self.latents, self.noise, timesteps.after(step))
        editable = self.editable(step, timesteps.end - timesteps.begin)
        return torch.where(editable, sample, known)


def denoise(
    denoiser: CFGDenoiser,
    scheduler: SchedulerMixin,
    timesteps: Timesteps,
    generators: Generators,
    sample: Tensor,
    known: KnownLatents | None = None,
) -> Tensor:
    """Sample latents (N, 4, H/8, W/8) from a noisy sample; outside a mask they follow `known`."""
    accepted = inspect.signature(scheduler.step).parameters
    # As diffusers' pipelines: DDIM and TCD add no noise, others draw it by the generators.
    arguments = {"eta": 0.0, "generator": list(generators), "return_dict": False}
    arguments = {name: value for name, value in arguments.items() if name in accepted}
    draws = "generator" in arguments and sample.device.type != "cpu"
    steps = len(timesteps.sampled)
    image_steps = timesteps.preceding + len(timesteps.scheduled) - timesteps.begin
    total = -(-steps // scheduler.order)
    with tqdm(total=total, mininterval=1.0) as bar:
        for step, t in enumerate(timesteps.sampled):
            begin, end = ((timesteps.preceding + k) / image_steps for k in (step, step + 1))
            noise_pred = denoiser(scheduler.scale_model_input(sample, t), t, begin, end)
            with NonBlockingCopies() if draws else nullcontext():
                sample = scheduler.step(noise_pred, t, sample, **arguments)[0]
            if known is not None:
                sample = known.restore(sample, scheduler, timesteps, step)
            if step == steps - 1 or (step + 1) % scheduler.order == 0:
                bar.update(min(1, total - bar.n))
    return sample
