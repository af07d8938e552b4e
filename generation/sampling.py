"""The sampling loop: timesteps, denoising with guidance, inpainting's known latents.

Latents and the scheduler's arithmetic are fp32; only the UNet's input is cast, as in k-diffusion.
Timesteps and sigmas stay on the CPU, where reading one waits for no GPU: in an operation with a
tensor on a GPU, a CPU tensor of no dimensions is a number.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from generation.conditioning import Conditioning
from generation.controlnet import ActiveControlNet, Residuals, add_residuals
from generation.latents import Generators, NonBlockingCopies, copy_to_device
from models.cache import LoadedModel

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@dataclass(frozen=True)
class Timesteps:
    """The timesteps that one model samples: a part of a scheduler's, from noisy to clean."""

    scheduled: Tensor  # (S,) on the CPU: all of the scheduler's
    begin: int  # the first index that is sampled
    end: int  # one after the last
    preceding: int = 0  # steps of the same image that another model has made

    def __len__(self) -> int:
        return self.end - self.begin

    def __getitem__(self, step: int) -> Tensor:
        return self.scheduled[self.begin + step]

    def until(self, cutoff: int) -> Timesteps:
        """Return the steps at or above a timestep: a base model's part of an ensemble."""
        sampled = self.scheduled[self.begin : self.end]
        return replace(self, end=self.begin + int((sampled >= cutoff).sum()))

    def below(self, cutoff: int, order: int) -> Timesteps:
        """Return the steps below a timestep: a refiner's part of an ensemble.

        With a scheduler of second order they begin with a whole step (diffusers,
        StableDiffusionXLImg2ImgPipeline.get_timesteps).
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

    def progress(self, step: int) -> tuple[float, float]:
        """Return the shares of the image's steps before and after a step, in [0, 1]."""
        total = self.preceding + len(self.scheduled) - self.begin
        return (self.preceding + step) / total, (self.preceding + step + 1) / total


def select_timesteps(
    scheduler: SchedulerMixin, num_inference_steps: int, strength: float = 1.0
) -> Timesteps:
    """Set a scheduler's timesteps; the last `strength` of them are sampled (arXiv:2108.01073)."""
    scheduler.set_timesteps(num_inference_steps, device="cpu")
    skipped = num_inference_steps - int(num_inference_steps * strength)
    begin = skipped * scheduler.order
    return Timesteps(scheduler.timesteps, begin, len(scheduler.timesteps))


def noised(
    scheduler: SchedulerMixin, latents: Tensor, noise: Tensor, timestep: Tensor | None
) -> Tensor:
    """Return latents with the noise of a timestep (on the CPU; None: without noise).

    Every scheduler's `add_noise` is a · latents + b · noise; on ones and zeros it returns a and b
    without copying its table of noise levels to the latents' device.
    """
    if timestep is None:
        return latents
    one, level = torch.ones(1), timestep[None]
    a = scheduler.add_noise(one, 0 * one, level)[0]
    b = scheduler.add_noise(0 * one, one, level)[0]
    result: Tensor = a * latents + b * noise
    return result


def refiner_cutoff(
    timesteps: Timesteps, high_noise_frac: float, num_train_timesteps: int
) -> int | None:
    """Return the timestep below which SDXL's refiner takes over (arXiv:2307.01952, section 2.5).

    None if no step is left for it. The base model makes the first step at least, because the
    refiner cannot start from pure noise.
    """
    sampled = timesteps.scheduled[timesteps.begin : timesteps.end].tolist()
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
    return noised(scheduler, init, noise, timesteps[0])


def start_from(
    scheduler: SchedulerMixin,
    timesteps: Timesteps,
    shape: torch.Size,
    device: torch.device,
    seeds: Sequence[int],
) -> None:
    """Prepare a scheduler for its first timestep: some visit one twice, and one draws noise.

    DPM-Solver++ (SDE) draws on the latents' device by default; here from one Brownian motion per
    image, by its seed, on the CPU. Other schedulers draw by the generators.
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


@dataclass(frozen=True)
class GuidanceInterval:
    """Classifier-free guidance in a part of the steps (arXiv:2207.12598, 2404.07724)."""

    scale: float
    start: float  # shares of the steps
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

    def __call__(self, sample: Tensor, timestep: Tensor, progress: tuple[float, float]) -> Tensor:
        """Return the prediction (N, 4, H/8, W/8) in fp32 for a scaled sample of that shape.

        `progress`: the shares of the steps before and after this one.
        """
        guidance, conditioning = self.guidance, self.conditioning
        if guidance is not None:
            if is_active(guidance.start, guidance.end, progress):
                sample = torch.cat([sample, sample])
            else:
                guidance, conditioning = None, conditioning.of_prompts()
        unet = self.model.components.unet
        sample = sample.to(unet.dtype)
        # As a number: copying the tensor to a GPU would wait for it.
        t = torch.full((), float(timestep), dtype=torch.float32, device=sample.device)
        residuals: Residuals | None = None
        for controlnet in self.controlnets:
            if is_active(controlnet.plan.start, controlnet.plan.end, progress):
                added = controlnet.residuals(sample, t, conditioning)
                residuals = added if residuals is None else add_residuals(residuals, added)
        arguments = conditioning.unet_arguments()
        if residuals is not None:
            arguments["down_block_additional_residuals"] = residuals.down
            arguments["mid_block_additional_residual"] = residuals.mid
        noise_pred: Tensor = self.model.graphs.run("unet", unet.forward, sample, t, **arguments)[0]
        noise_pred = noise_pred.float()
        if guidance is None:
            return noise_pred
        negative, positive = noise_pred.chunk(2)
        return negative + guidance.scale * (positive - negative)


def is_active(start: float, end: float, progress: tuple[float, float]) -> bool:
    """Whether a step lies within [start, end], shares of the steps, as diffusers decides it."""
    return start <= progress[0] and progress[1] <= end


@dataclass(frozen=True)
class KnownLatents:
    """An image's latents, which return where inpainting must not change them yet."""

    latents: Tensor  # (N, 4, h, w)
    noise: Tensor  # (N, 4, h, w)
    change: Tensor  # (1, 1, h, w) in [0, 1]: the share of the steps that may change it

    def editable(self, step: int, steps: int) -> Tensor:
        """Return where a step may change: grey areas join late (arXiv:2306.00950, algorithm 1)."""
        return self.change >= 1 - step / steps - 1e-6

    def restore(
        self, sample: Tensor, scheduler: SchedulerMixin, timesteps: Timesteps, step: int
    ) -> Tensor:
        """Return the sample after a step with the known latents, as noisy, where they belong."""
        known = noised(scheduler, self.latents, self.noise, timesteps.after(step))
        return torch.where(self.editable(step, len(timesteps)), sample, known)


def denoise(
    denoiser: CFGDenoiser,
    scheduler: SchedulerMixin,
    timesteps: Timesteps,
    generators: Generators,
    sample: Tensor,
    known: KnownLatents | None = None,
) -> Tensor:
    """Sample latents (N, 4, H/8, W/8) from a noisy sample; outside a mask they follow `known`."""
    arguments = _step_arguments(scheduler, generators)
    draws = "generator" in arguments and sample.device.type != "cpu"
    total = -(-len(timesteps) // scheduler.order)
    with tqdm(total=total, mininterval=1.0) as bar:
        for step in range(len(timesteps)):
            t = timesteps[step]
            scaled = scheduler.scale_model_input(sample, t)
            noise_pred = denoiser(scaled, t, timesteps.progress(step))
            with NonBlockingCopies() if draws else nullcontext():
                sample = scheduler.step(noise_pred, t, sample, return_dict=False, **arguments)[0]
            if known is not None:
                sample = known.restore(sample, scheduler, timesteps, step)
            if step == len(timesteps) - 1 or (step + 1) % scheduler.order == 0:
                bar.update(min(1, total - bar.n))
    return sample


def _step_arguments(scheduler: SchedulerMixin, generators: Generators) -> dict[str, Any]:
    """Return what `scheduler.step` takes beside the prediction, as diffusers' pipelines pass it."""
    accepted = inspect.signature(scheduler.step).parameters
    arguments: dict[str, Any] = {}
    if "eta" in accepted:
        arguments["eta"] = 0.0  # DDIM's and TCD's: without noise of its own
    if "generator" in accepted:
        arguments["generator"] = list(generators)
    return arguments
