"""The requests that are measured, the most telling first, and the baselines beside them.

To add one, add an entry.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field

DIFFUSERS = "diffusers"
COMPILED = "diffusers, compiled"
COG_SDXL = "cog-sdxl"
OURS = "ours"
OURS_FULL = "ours, all features"  # with a LoRA, the safety checker and the watermark, as cog-sdxl
# Each baseline → which of ours does the same work.
COUNTERPARTS = {DIFFUSERS: OURS, COMPILED: OURS, COG_SDXL: OURS_FULL}

CEILING_TFLOPS = 788.0  # bf16 matrix products on an H200, measured: what floors are computed with
PROMPT = "a large red circle on a blue background"
LORA_SCALE, LORA_RANK = 0.6, 32  # cog-sdxl's defaults
ENSEMBLE = "expert_ensemble_refiner"


@dataclass(frozen=True)
class Workload:
    """A request, at the model's native size."""

    id: str
    tflop: float  # arithmetic of the published model, text encoders and VAE included
    steps: int
    guidance_scale: float
    baselines: tuple[str, ...] = ()
    model: str = "sdxl"
    num_outputs: int = 1
    is_refined: bool = False  # by the ensemble of experts
    control_type: str | None = None  # of a ControlNet, whose map is made of an image
    switches_lora: bool = False  # from one request to the next
    sizes: Mapping[str, int] = field(default_factory=dict)  # width and height, if not native

    @property
    def floor_seconds(self) -> float:
        """The time that the arithmetic alone takes at the ceiling."""
        return self.tflop / CEILING_TFLOPS

    @property
    def sides(self) -> tuple[str, ...]:
        """The baselines, and those of ours that stand beside them."""
        ours = dict.fromkeys(COUNTERPARTS[baseline] for baseline in self.baselines)
        return (*self.baselines, *ours)

    @property
    def inputs(self) -> dict[str, object]:
        """The inputs of `predict`."""
        inputs: dict[str, object] = {
            "prompt": PROMPT,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "num_outputs": self.num_outputs,
            **self.sizes,
        }
        return inputs | ({"refine": ENSEMBLE} if self.is_refined else {})


_ALL = (DIFFUSERS, COG_SDXL, COMPILED)
_STOCK = (DIFFUSERS, COMPILED)
_UNCOMPILED = (DIFFUSERS, COG_SDXL)

WORKLOADS: dict[str, Workload] = {
    "30 steps": Workload("W1", 416.4, 30, 7.5, _ALL),
    "20 steps": Workload("W9", 281.1, 20, 8.0, _ALL),
    "LCM, 4 steps": Workload("W3", 37.6, 4, 1.0, _STOCK, "sdxl-lcm"),
    "SDXL-Turbo, 1 step": Workload("W4", 4.2, 1, 0.0, _STOCK, "sdxl-turbo"),
    "SD-Turbo, 1 step": Workload("W5", 3.4, 1, 0.0, _STOCK, "sd-turbo"),
    "another LoRA, 4 steps": Workload("W8", 64.7, 4, 7.5, (COG_SDXL,), switches_lora=True),
    "30 steps, refiner for the last fifth": Workload(
        "W2", 423.2, 30, 7.5, _UNCOMPILED, is_refined=True
    ),
    "30 steps, Canny ControlNet": Workload(
        "W7", 597.6, 30, 7.5, (DIFFUSERS,), control_type="edge_canny"
    ),
    "SD-Turbo, 1 step, 12 images": Workload(
        "W5b", 39.8, 1, 0.0, (DIFFUSERS,), "sd-turbo", num_outputs=12
    ),
    "SD 1.5 LCM, 4 steps": Workload("W6", 5.7, 4, 1.0, _STOCK, "sd15-lcm"),
    "20 steps, 4 images": Workload("W9b", 1124.4, 20, 8.0, _UNCOMPILED, num_outputs=4),
    "50 steps": Workload("W1b", 686.8, 50, 7.5, _ALL),
}


def add_only(parser: argparse.ArgumentParser, names: tuple[str, ...] = tuple(WORKLOADS)) -> None:
    """Add the option that chooses workloads, by name or by id."""
    by_id = {workload.id: name for name, workload in WORKLOADS.items()}
    parser.add_argument(
        "--only",
        action="append",
        type=lambda text: by_id.get(text, text),
        choices=names,
        help="measure this request alone, given by its name or as W1, W9, …",
    )
