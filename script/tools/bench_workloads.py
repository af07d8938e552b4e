"""The requests that are measured, the most telling first, and beside whom.

To add one, add an entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DIFFUSERS = "diffusers"
COMPILED = "diffusers, compiled"
COG = "cog-sdxl's way"
OURS = "ours"
OURS_ALL = "ours, all of it"  # with a LoRA, the safety checker and the watermark, as cog-sdxl's way
BESIDE = {DIFFUSERS: OURS, COMPILED: OURS, COG: OURS_ALL}  # a peer → which of ours does its work

CEILING_TFLOPS = 788.0  # bf16 matrix products on an H200, measured: what floors are counted with
PROMPT = "a large red circle on a blue background"
LORA_SCALE, LORA_RANK = 0.6, 32  # cog-sdxl's defaults


@dataclass(frozen=True)
class Workload:
    """What is asked, by predict's names; the size is the model's own."""

    id: str
    tflop: float  # arithmetic of the real model, text encoders and VAE included
    asked: Mapping[str, Any]
    peers: tuple[str, ...]
    model: str = "sdxl"
    control: str | None = None  # the kind of control, taken from a picture
    switches: bool = False  # the LoRA changes from one request to the next

    @property
    def pictures(self) -> int:
        return int(self.asked.get("num_outputs", 1))

    @property
    def floor_seconds(self) -> float:
        """What the arithmetic alone takes at the ceiling."""
        return self.tflop / CEILING_TFLOPS

    @property
    def sides(self) -> tuple[str, ...]:
        """The peers, and those of ours that stand beside them."""
        own = dict.fromkeys(BESIDE[peer] for peer in self.peers)
        return (*self.peers, *own)


def _of(
    id_: str,
    tflop: float,
    steps: int,
    guidance: float,
    *peers: str,
    asked: Mapping[str, Any] | None = None,
    **more: Any,  # noqa: ANN401
) -> Workload:
    plain = {"num_inference_steps": steps, "guidance_scale": guidance}
    return Workload(id_, tflop, {**plain, **(asked or {})}, peers, **more)


_ALL = (DIFFUSERS, COG, COMPILED)
_STOCK = (DIFFUSERS, COMPILED)
_REFINED = {"refine": "expert_ensemble_refiner"}

WORKLOADS: dict[str, Workload] = {
    "30 steps": _of("W1", 416.4, 30, 7.5, *_ALL),
    "20 steps": _of("W9", 281.1, 20, 8.0, *_ALL),
    "LCM, 4 steps": _of("W3", 37.6, 4, 1.0, *_STOCK, model="sdxl-lcm"),
    "SDXL-Turbo, 1 step": _of("W4", 4.2, 1, 0.0, *_STOCK, model="sdxl-turbo"),
    "SD-Turbo, 1 step": _of("W5", 3.4, 1, 0.0, *_STOCK, model="sd-turbo"),
    "another LoRA, 4 steps": _of("W8", 64.7, 4, 7.5, COG, switches=True),
    "30 steps, refiner for the last fifth": _of(
        "W2", 423.2, 30, 7.5, DIFFUSERS, COG, asked={"refine": "expert_ensemble_refiner"}
    ),
    "30 steps, edges as control": _of("W7", 597.6, 30, 7.5, DIFFUSERS, control="edge_canny"),
    "SD-Turbo, 1 step, 12 pictures": _of(
        "W5b", 39.8, 1, 0.0, DIFFUSERS, model="sd-turbo", asked={"num_outputs": 12}
    ),
    "SD 1.5 LCM, 4 steps": _of("W6", 5.7, 4, 1.0, *_STOCK, model="sd15-lcm"),
    "20 steps, 4 pictures": _of("W9b", 1124.4, 20, 8.0, DIFFUSERS, COG, asked={"num_outputs": 4}),
    "50 steps": _of("W1b", 686.8, 50, 7.5, *_ALL),
}
