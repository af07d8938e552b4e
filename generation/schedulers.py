"""The schedulers a request can name, and how their noise levels may be spaced.

replicate/cog-sdxl's seven names come first, with its exact meanings; the others are A1111's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

Overrides = Mapping[str, bool | str | float]


class ScheduleType(StrEnum):
    """How noise levels are spaced; A1111's names."""

    AUTOMATIC = "automatic"  # as the model's own config says
    KARRAS = "karras"  # arXiv:2206.00364, equation 5
    EXPONENTIAL = "exponential"  # evenly in log sigma
    SGM_UNIFORM = "sgm_uniform"  # evenly in time, from the last timestep on ("trailing")


SCHEDULE_OVERRIDES: dict[ScheduleType, Overrides] = {
    ScheduleType.AUTOMATIC: {},
    ScheduleType.KARRAS: {"use_karras_sigmas": True},
    ScheduleType.EXPONENTIAL: {"use_exponential_sigmas": True},
    ScheduleType.SGM_UNIFORM: {"timestep_spacing": "trailing"},
}
_AUTOMATIC = (ScheduleType.AUTOMATIC,)
_IN_TIME = (ScheduleType.AUTOMATIC, ScheduleType.SGM_UNIFORM)
_IN_SIGMA = (ScheduleType.AUTOMATIC, ScheduleType.KARRAS, ScheduleType.EXPONENTIAL)
_ANY = tuple(ScheduleType)
A1111_SCHEDULE_NAMES = {
    ScheduleType.AUTOMATIC: "",
    ScheduleType.KARRAS: "Karras",
    ScheduleType.EXPONENTIAL: "Exponential",
    ScheduleType.SGM_UNIFORM: "SGM Uniform",
}


@dataclass(frozen=True)
class SchedulerSpec:
    """A diffusers scheduler class, and what it overrides in the model's own scheduler config.

    The class is named, not imported: choosing a scheduler then imports nothing.
    """

    class_name: str
    a1111: str  # what AUTOMATIC1111/stable-diffusion-webui calls it, in pictures' parameters
    schedule_types: tuple[ScheduleType, ...]
    overrides: Overrides = field(default_factory=dict)
    max_steps: int | None = None


_SDE: Overrides = {"algorithm_type": "sde-dpmsolver++"}
# Distilled for at most so many levels: their schedules are drawn from those.
_DISTILLED_STEPS = 50

SCHEDULERS: dict[str, SchedulerSpec] = {
    "DDIM": SchedulerSpec("DDIMScheduler", "DDIM", _IN_TIME),
    "DPMSolverMultistep": SchedulerSpec("DPMSolverMultistepScheduler", "DPM++ 2M", _ANY),
    "HeunDiscrete": SchedulerSpec("HeunDiscreteScheduler", "Heun", _ANY),
    "KarrasDPM": SchedulerSpec(
        "DPMSolverMultistepScheduler", "DPM++ 2M Karras", _AUTOMATIC, {"use_karras_sigmas": True}
    ),
    "K_EULER_ANCESTRAL": SchedulerSpec("EulerAncestralDiscreteScheduler", "Euler a", _IN_TIME),
    "K_EULER": SchedulerSpec("EulerDiscreteScheduler", "Euler", _ANY),
    "PNDM": SchedulerSpec("PNDMScheduler", "PLMS", _IN_TIME),
    "Euler": SchedulerSpec("EulerDiscreteScheduler", "Euler", _ANY),
    "Euler a": SchedulerSpec("EulerAncestralDiscreteScheduler", "Euler a", _IN_TIME),
    "Heun": SchedulerSpec("HeunDiscreteScheduler", "Heun", _ANY),
    "LMS": SchedulerSpec("LMSDiscreteScheduler", "LMS", _ANY),
    "DPM2": SchedulerSpec("KDPM2DiscreteScheduler", "DPM2", _ANY),
    "DPM2 a": SchedulerSpec("KDPM2AncestralDiscreteScheduler", "DPM2 a", _ANY),
    "DPM++ 2M": SchedulerSpec("DPMSolverMultistepScheduler", "DPM++ 2M", _ANY),
    "DPM++ 2M SDE": SchedulerSpec("DPMSolverMultistepScheduler", "DPM++ 2M SDE", _ANY, _SDE),
    "DPM++ SDE": SchedulerSpec("DPMSolverSDEScheduler", "DPM++ SDE", _ANY),
    "DPM++ 2S a": SchedulerSpec("DPMSolverSinglestepScheduler", "DPM++ 2S a", _IN_SIGMA, _SDE),
    "UniPC": SchedulerSpec("UniPCMultistepScheduler", "UniPC", _ANY),
    "DEIS": SchedulerSpec("DEISMultistepScheduler", "DEIS", _ANY),
    "LCM": SchedulerSpec("LCMScheduler", "LCM", _AUTOMATIC, max_steps=_DISTILLED_STEPS),
    "TCD": SchedulerSpec("TCDScheduler", "TCD", _AUTOMATIC, max_steps=_DISTILLED_STEPS),
}
