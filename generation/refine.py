"""SDXL's refiner: a second model for the least noisy steps (arXiv:2307.01952, section 2.5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from generation.modes import Generators, Source, Start, common_arguments, noise_to_come
from generation.options import Refine
from generation.plan import BASE_IMAGE_STRENGTH, GenerationPlan
from generation.prompts import PromptEmbeddings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin


def handover(plan: GenerationPlan, new_scheduler: Callable[[], SchedulerMixin]) -> float | None:
    """The share of the noise levels after which the refiner takes over; None: it does not.

    `new_scheduler` gives one for the plan.

    `high_noise_frac` as asked, but the base model makes at least the first step, because the
    refiner cannot start from pure noise; with so few steps that none is left, it makes all.
    """
    if plan.refine is None or plan.refine.style is not Refine.EXPERT_ENSEMBLE:
        return None
    scheduler = new_scheduler()
    scheduler.set_timesteps(plan.num_inference_steps)
    levels: int = scheduler.config.num_train_timesteps
    first = plan.skipped_steps * scheduler.order
    timesteps = [float(t) for t in scheduler.timesteps[first:]]
    # diffusers: the base model makes the steps at or above the cutoff, the refiner those below.
    cutoff = min(round(levels * (1 - plan.refine.high_noise_frac)), math.floor(timesteps[0]))
    if not any(t < cutoff for t in timesteps):
        print("refine has no effect: the base model's steps leave none for the refiner")
        return None
    return 1 - cutoff / levels


def steps_before(plan: GenerationPlan, made: int) -> tuple[int, int]:
    """(steps of its schedule that the refiner leaves out, the step it begins with).

    An expert ensemble's goes on in the base model's schedule, of which that has `made` its part.
    """
    assert plan.refine is not None
    if plan.refine.style is Refine.EXPERT_ENSEMBLE:
        return plan.skipped_steps, made
    steps = plan.refine.num_inference_steps
    return steps - int(steps * BASE_IMAGE_STRENGTH), 0


def refine(
    pipeline: DiffusionPipeline,
    plan: GenerationPlan,
    embeddings: PromptEmbeddings,
    generators: Generators,
    latents: torch.Tensor,
    start: Start,
) -> torch.Tensor:
    """Latents (N, 4, H/8, W/8) of the base model to refined ones; outside a mask the source's."""
    assert plan.refine is not None
    if plan.refine.style is Refine.EXPERT_ENSEMBLE:
        if start.denoising_end is None:
            return latents
        steps, strength = plan.num_inference_steps, 1.0  # not read beside denoising_start
    else:
        steps, strength = plan.refine.num_inference_steps, BASE_IMAGE_STRENGTH
    source = None
    if start.latents is not None and start.change is not None:
        # All that the base has repainted, its grey parts too, is the refiner's from the start.
        touched = (start.change > 0).to(start.change)
        source = Source(start.latents, touched, noise_to_come(generators, latents), None)
    refined: torch.Tensor = pipeline(
        **common_arguments(plan, embeddings, generators),
        image=latents,
        num_inference_steps=steps,
        strength=strength,
        denoising_start=start.denoising_end,
        callback_on_step_end=source.keep_outside if source else None,
        output_type="latent",
        return_dict=False,
    )[0]
    return refined
