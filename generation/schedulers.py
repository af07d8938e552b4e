"""The schedulers a request can name: replicate/cog-sdxl's names, with its exact meanings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@dataclass(frozen=True)
class SchedulerSpec:
    """A diffusers scheduler class, and what it overrides in the model's own scheduler config.

    The class is named, not imported: choosing a scheduler then imports nothing.
    """

    class_name: str
    a1111: str  # what AUTOMATIC1111/stable-diffusion-webui calls it, in pictures' parameters
    overrides: Mapping[str, bool | str | float] = field(default_factory=dict)


SCHEDULERS: dict[str, SchedulerSpec] = {
    "DDIM": SchedulerSpec("DDIMScheduler", "DDIM"),
    "DPMSolverMultistep": SchedulerSpec("DPMSolverMultistepScheduler", "DPM++ 2M"),
    "HeunDiscrete": SchedulerSpec("HeunDiscreteScheduler", "Heun"),
    "KarrasDPM": SchedulerSpec(
        "DPMSolverMultistepScheduler", "DPM++ 2M Karras", {"use_karras_sigmas": True}
    ),
    "K_EULER_ANCESTRAL": SchedulerSpec("EulerAncestralDiscreteScheduler", "Euler a"),
    "K_EULER": SchedulerSpec("EulerDiscreteScheduler", "Euler"),
    "PNDM": SchedulerSpec("PNDMScheduler", "PLMS"),
}


def build_scheduler(name: str, pristine_config: Mapping[str, object]) -> SchedulerMixin:
    """A new scheduler of the registry from the config that the model came with.

    Never from another scheduler's config: its overrides would stay for the rest of the process
    (after one KarrasDPM request every later scheduler would run on Karras sigmas).
    """
    import diffusers

    spec = SCHEDULERS[name]
    scheduler: SchedulerMixin = getattr(diffusers, spec.class_name).from_config(
        {**pristine_config, **spec.overrides}
    )
    return scheduler
