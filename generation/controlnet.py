"""ControlNets (arXiv:2302.05543): control maps, and the residuals added inside the UNet.

Each ControlNet runs by itself and their residuals are summed, as diffusers' MultiControlNetModel
does; SDXL's union model too, where one pass for several maps would ignore their scales and steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from generation.controlnets import ControlNetPlan
from generation.crop import CoverFit, CropRegion
from models.cache import LoadedControlNet
from preprocess import annotators

if TYPE_CHECKING:
    from generation.conditioning import Conditioning


class Residuals(NamedTuple):
    """What ControlNets add inside the UNet."""

    down: list[Tensor]  # to its skip connections
    mid: Tensor  # to its middle block


def add_residuals(first: Residuals, second: Residuals) -> Residuals:
    """Return the sum of two ControlNets' residuals."""
    down = [a + b for a, b in zip(first.down, second.down, strict=True)]
    return Residuals(down, first.mid + second.mid)


def render_control_maps(
    controlnets: Sequence[ControlNetPlan],
    settings: annotators.AnnotatorSettings,
    images: Mapping[str, CoverFit],
    region: CropRegion,
    detectors: annotators.Detectors,
) -> dict[str, Image.Image]:
    """Return the control maps (RGB, of the region's size) by their inputs' names.

    `images` are the control images, by the same names.
    """
    return {
        plan.name: _render_map(plan, settings, images[plan.name], region, detectors)
        for plan in controlnets
    }


def _render_map(
    plan: ControlNetPlan,
    settings: annotators.AnnotatorSettings,
    image: CoverFit,
    region: CropRegion,
    detectors: annotators.Detectors,
) -> Image.Image:
    annotator = plan.annotator
    resampling = Image.Resampling.LANCZOS
    if annotator is None:  # the image is the map, whose values must not ring, nor labels mix
        is_labels = plan.spec.is_label_map
        resampling = Image.Resampling.NEAREST if is_labels else Image.Resampling.BILINEAR
    control_map = image.crop_to(region, resampling)
    if annotator is not None:
        control_map = annotators.annotate(annotator, control_map, settings, detectors)
    if annotators.is_empty(control_map):
        detects = "anything" if annotator is None else annotators.ANNOTATORS[annotator].detects
        print(
            f"{plan.name}: {plan.spec.name} does not find {detects} in the image; its map is"
            " of one colour and has no effect",
            flush=True,
        )
    return control_map


@dataclass(frozen=True)
class ActiveControlNet:
    """A ControlNet and the map it follows."""

    plan: ControlNetPlan
    model: LoadedControlNet
    control_map: Tensor  # (1, 3, H, W) in [0, 1]

    def residuals(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Residuals:
        """Return the residuals for a UNet input `sample` (B, 4, H/8, W/8)."""
        control_map = self.control_map.expand(len(sample), -1, -1, -1)
        scale, index = float(self.plan.conditioning_scale), self.plan.spec.union_index
        network = self.model.controlnet
        arguments: dict[str, Any] = {
            "encoder_hidden_states": conditioning.prompt_embeds,
            "added_cond_kwargs": conditioning.added_arguments(),
            "return_dict": False,
        }
        if hasattr(network.config, "num_control_type"):  # a union of several kinds
            control_type = sample.new_zeros(len(sample), network.config.num_control_type)
            control_type[:, index] = 1
            arguments |= {
                "controlnet_cond": [control_map],
                "control_type": control_type,
                "control_type_idx": [index],
                "conditioning_scale": [scale],
            }
        else:
            arguments |= {"controlnet_cond": control_map, "conditioning_scale": scale}
        graphs = self.model.graphs
        return Residuals(*graphs.run("controlnet", network, sample, timestep, **arguments))


def active_controlnets(
    plans: Sequence[ControlNetPlan],
    models: Mapping[str, LoadedControlNet],
    maps: Mapping[str, Image.Image],
    device: torch.device,
    dtype: torch.dtype,
) -> list[ActiveControlNet]:
    """Return the ControlNets that have an effect; `models` by catalog entry, `maps` by input."""
    return [
        ActiveControlNet(plan, models[plan.weights], _to_tensor(maps[plan.name]).to(device, dtype))
        for plan in plans
        if plan.has_effect
    ]


def _to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
