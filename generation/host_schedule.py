"""Schedulers that never make a GPU wait for its host."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# Solves a small linear system on the GPU at each step, and asks whether that worked.
WAITS = frozenset({"UniPCMultistepScheduler"})


def on_the_host(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler itself, with its schedule on the CPU wherever its latents are.

    diffusers puts timesteps onto the GPU and then asks in Python which step a timestep is, or
    whether it is the last: each question makes the host wait until the GPU has done all it was
    given. On the CPU they cost nothing, and the arithmetic is the same, as a number of no
    dimensions enters a GPU's operation by value.
    """
    set_timesteps, add_noise = scheduler.set_timesteps, scheduler.add_noise

    @functools.wraps(set_timesteps)
    def set_here(num_inference_steps: int, device: object = None, **more: object) -> None:
        set_timesteps(num_inference_steps, device="cpu", **more)

    @functools.wraps(add_noise)
    def add_here(
        original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """All rows at the first's noise level, as pipelines ask for it.

        Every scheduler's is a · samples + b · noise: of ones and zeros it gives a and b.
        """
        one = torch.ones(1, dtype=original_samples.dtype)
        level = timesteps[:1].cpu()
        a, b = add_noise(one, 0 * one, level)[0], add_noise(0 * one, one, level)[0]
        noisy: torch.Tensor = a * original_samples + b * noise
        return noisy

    scheduler.set_timesteps, scheduler.add_noise = set_here, add_here
    return scheduler
