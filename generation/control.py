"""What ControlNets say at each step, and the UNet that hears it.

diffusers has a pipeline class of its own for each kind of ControlNet, model and mode. They differ
from the ones without control in one place: what the ControlNets make of the UNet's input is added
inside the UNet. Here that happens in front of the UNet's own pass (`generation/stand_ins.py`), so
that the pipelines without control serve every mode, with whatever else those can do: masks that
open step by step, models that are told their guidance, a refiner's hand-over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from generation.canvas import Covering, Frame
from generation.controlnets import ControlPlan, ControlsPlan
from generation.passes import Passes
from generation.stand_ins import Forward, Progress
from preprocess import annotators

if TYPE_CHECKING:
    from diffusers import ControlNetModel

Residuals = tuple[list[torch.Tensor], torch.Tensor]  # for the UNet's skips, and for its middle


class ControlMaps:
    """The maps of a request's controls, for whatever part of the picture is worked on."""

    def __init__(
        self,
        plan: ControlsPlan,
        pictures: Mapping[str, Covering],
        detectors: annotators.Detectors,
    ) -> None:
        """`pictures` are the controls' own, by input."""
        self._plan, self._pictures, self._detectors = plan, pictures, detectors
        self._frame: Frame | None = None
        self.last: dict[str, Image.Image] = {}  # by input: the maps of the last frame

    def look(self, frame: Frame) -> Mapping[str, Image.Image]:
        """The maps (RGB, of the frame's size) for a part of the picture."""
        if frame != self._frame:
            self.last = {control.name: self._map(control, frame) for control in self._plan.controls}
            self._frame = frame
        return self.last

    def _map(self, control: ControlPlan, frame: Frame) -> Image.Image:
        ready, name = control.annotator is None, control.annotator
        resampling = Image.Resampling.BILINEAR if ready else Image.Resampling.LANCZOS
        if ready and control.spec.flat:
            resampling = Image.Resampling.NEAREST
        seen = self._pictures[control.name].look(frame, resampling)
        if name is not None:
            seen = annotators.annotate(name, seen, self._plan.annotators, self._detectors)
        if annotators.is_empty(seen):
            detects = "anything" if name is None else annotators.ANNOTATORS[name].detects
            print(
                f"{control.name}: {control.spec.name} does not find {detects} in the picture;"
                " its map is of one colour and says nothing",
                flush=True,
            )
        return seen


@dataclass(frozen=True)
class Net:
    """A ControlNet in memory."""

    module: ControlNetModel  # or diffusers' ControlNetUnionModel
    passes: Passes


@dataclass(frozen=True)
class Hint:
    """One ControlNet and what it is to say."""

    plan: ControlPlan
    net: Net
    map: torch.Tensor  # (1, 3, H, W) in [0, 1]

    def residuals(
        self, sample: torch.Tensor, timestep: torch.Tensor, heard: Mapping[str, Any]
    ) -> Residuals:
        """What to add inside the UNet for its input `sample` (B, 4, H/8, W/8).

        `heard` are the arguments that the UNet is called with by name.
        """
        seen = self.map.expand(len(sample), -1, -1, -1)
        said: dict[str, Any] = {
            "encoder_hidden_states": heard["encoder_hidden_states"],
            "added_cond_kwargs": heard.get("added_cond_kwargs"),
            "return_dict": False,
        }
        scale, index = float(self.plan.conditioning_scale), self.plan.spec.union_index
        net = self.net.module
        if not hasattr(net, "task_embedding"):  # one that knows a single kind of map
            said |= {"controlnet_cond": seen, "conditioning_scale": scale}
        else:
            types = sample.new_zeros(len(sample), net.config.num_control_type)
            types[:, index] = 1
            said |= {
                "controlnet_cond": [seen],
                "control_type": types,
                "control_type_idx": [index],
                "conditioning_scale": [scale],
            }
        residuals: Residuals = self.net.passes.run("net", net, sample, timestep, **said)
        return residuals


def hints(
    plan: ControlsPlan,
    nets: Mapping[str, Net],
    maps: Mapping[str, Image.Image],
    device: torch.device,
    dtype: torch.dtype,
) -> list[Hint]:
    """Of the controls that count at all; `nets` by catalog entry, `maps` by input."""
    return [
        Hint(control, nets[control.weights], _to_tensor(maps[control.name]).to(device, dtype))
        for control in plan.controls
        if control.conditioning_scale > 0
    ]


def _to_tensor(picture: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def listening(forward: Forward, said: Sequence[Hint], progress: Progress) -> Forward:
    """A UNet's forward pass, hearing ControlNets.

    Each ControlNet looks at the picture for itself, and their answers are added up (as diffusers'
    MultiControlNetModel does, for SDXL's union model too: there, a scale of a map in a common look
    would not weigh what comes of it, and a map whose steps are over would still be looked for).
    """

    def call(sample: torch.Tensor, timestep: torch.Tensor, **others: Any) -> Any:  # noqa: ANN401
        total: Residuals | None = None
        for hint in said:
            if progress.between(hint.plan.start, hint.plan.end):
                total = _sum(total, hint.residuals(sample, timestep, others))
        if total is None:
            return forward(sample, timestep, **others)
        skips, middle = total
        return forward(
            sample,
            timestep,
            down_block_additional_residuals=skips,
            mid_block_additional_residual=middle,
            **others,
        )

    return call


def _sum(total: Residuals | None, more: Residuals) -> Residuals:
    if total is None:
        return more
    skips = [before + now for before, now in zip(total[0], more[0], strict=True)]
    return skips, total[1] + more[1]
