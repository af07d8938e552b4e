"""One function per mode: what denoising starts from to the arguments of the mode's pipeline.

The dict that each returns is the last step into diffusers; nothing else in the project passes one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from generation.options import MaskedContent
from generation.plan import GenerationPlan, Mode
from generation.prompts import PromptEmbeddings
from generation.sizes import SIDE_MULTIPLE

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Generators = list[torch.Generator]


@dataclass(frozen=True)
class Start:
    """What one pass of denoising starts from."""

    size: tuple[int, int]  # (width, height) in pixels, multiples of 8
    latents: torch.Tensor | None  # (N, 4, H/8, W/8), scaled: the images'; None without images
    change: torch.Tensor | None  # (1, 1, H/8, W/8) in [0, 1]: the share of steps that may repaint
    denoising_end: float | None  # where the refiner takes over; None: nowhere


def txt2img(
    plan: GenerationPlan, embeddings: PromptEmbeddings, generators: Generators, start: Start
) -> dict[str, Any]:
    """From noise alone."""
    width, height = start.size
    return {**_base(plan, embeddings, generators, start), "width": width, "height": height}


def img2img(
    plan: GenerationPlan, embeddings: PromptEmbeddings, generators: Generators, start: Start
) -> dict[str, Any]:
    """From an image under noise (SDEdit, arXiv:2108.01073)."""
    return {
        **_base(plan, embeddings, generators, start),
        "image": start.latents,
        "strength": plan.strength,
    }


def inpaint(
    plan: GenerationPlan, embeddings: PromptEmbeddings, generators: Generators, start: Start
) -> dict[str, Any]:
    """As img2img where the mask lets it; elsewhere the image's own noised latents are put back."""
    assert start.latents is not None
    assert start.change is not None
    noise = noise_to_come(generators, start.latents)
    source = Source(start.latents, start.change, noise, plan.skipped_steps)
    # Constant over each latent's 8x8 pixels, because the pipeline looks at one of them.
    mask = functional.interpolate(source.free(0, 1).float(), scale_factor=SIDE_MULTIPLE)
    width, height = start.size
    return {
        **_base(plan, embeddings, generators, start),
        "image": start.latents,
        "masked_image_latents": start.latents,  # not read, but made from pixels unless given
        "mask_image": mask,
        "strength": plan.strength,
        "width": width,
        "height": height,
        "callback_on_step_end": source.open_mask,
        "callback_on_step_end_tensor_inputs": ["latents", "mask"],
    }


# Outpainting is inpainting after a canvas step.
ARGUMENTS: dict[
    Mode, Callable[[GenerationPlan, PromptEmbeddings, Generators, Start], dict[str, Any]]
] = {
    Mode.TXT2IMG: txt2img,
    Mode.IMG2IMG: img2img,
    Mode.INPAINT: inpaint,
    Mode.OUTPAINT: inpaint,
}


def _base(
    plan: GenerationPlan, embeddings: PromptEmbeddings, generators: Generators, start: Start
) -> dict[str, Any]:
    arguments = {
        **common_arguments(plan, embeddings, generators),
        "num_inference_steps": plan.num_inference_steps,
    }
    if start.denoising_end is not None:
        arguments["denoising_end"] = start.denoising_end
    return arguments


def common_arguments(
    plan: GenerationPlan, embeddings: PromptEmbeddings, generators: Generators
) -> dict[str, Any]:
    """What every pipeline is told, the refiner's too."""
    pooled = {}
    if embeddings.pooled_prompt_embeds is not None:
        pooled = {
            "pooled_prompt_embeds": embeddings.pooled_prompt_embeds,
            "negative_pooled_prompt_embeds": embeddings.negative_pooled_prompt_embeds,
        }
    return {
        "prompt_embeds": embeddings.prompt_embeds,
        "negative_prompt_embeds": embeddings.negative_prompt_embeds,
        **pooled,
        "num_images_per_prompt": len(plan.seeds),
        "guidance_scale": plan.guidance_scale,
        "generator": generators,
    }


@dataclass(frozen=True)
class Source:
    """The latents that come back outside the mask, and callbacks that put them there."""

    latents: torch.Tensor  # (N, 4, h, w), scaled
    change: torch.Tensor  # (1, 1, h, w) in [0, 1]
    noise: torch.Tensor  # (N, 4, h, w)
    skipped: int | None  # steps left out before the first; None: those that run are the last ones

    def free(self, step: int, steps: int) -> torch.Tensor:
        """Where step `step` of `steps` may repaint: grey areas join late.

        Differential diffusion (arXiv:2306.00950, algorithm 1).
        """
        return self.change >= 1 - step / steps - 1e-6

    def open_mask(
        self, pipeline: DiffusionPipeline, step: int, timestep: torch.Tensor, state: dict[str, Any]
    ) -> dict[str, Any]:
        """For diffusers' inpainting pipelines, which blend by their mask before they call this."""
        latents, mask = state["latents"], state["mask"]
        steps = pipeline.num_timesteps
        if step == steps - 1 and self._next_timestep(pipeline, step) is not None:
            # The refiner goes on from here, but the pipeline has put back latents without noise.
            latents = self._restored(pipeline, step, latents)
        free = self.free(step + 1, steps).to(mask.dtype)
        return {"latents": latents, "mask": free.expand(mask.shape[0], -1, -1, -1)}

    def keep_outside(
        self, pipeline: DiffusionPipeline, step: int, timestep: torch.Tensor, state: dict[str, Any]
    ) -> dict[str, Any]:
        """For diffusers' image-to-image pipelines, which know no mask."""
        return {"latents": self._restored(pipeline, step, state["latents"])}

    def _restored(
        self, pipeline: DiffusionPipeline, step: int, latents: torch.Tensor
    ) -> torch.Tensor:
        source, after = self.latents, self._next_timestep(pipeline, step)
        if after is not None:
            source = pipeline.scheduler.add_noise(source, self.noise, after[None])
        return torch.where(self.free(step, pipeline.num_timesteps), latents, source)

    def _next_timestep(self, pipeline: DiffusionPipeline, step: int) -> torch.Tensor | None:
        """The timestep after that of `step`; None after the schedule's last.

        By position: some schedulers visit a timestep twice.
        """
        timesteps = pipeline.scheduler.timesteps
        if self.skipped is None:
            first = len(timesteps) - pipeline.num_timesteps
        else:
            first = self.skipped * pipeline.scheduler.order
        after = first + step + 1
        return timesteps[after] if after < len(timesteps) else None


def noise_to_come(generators: Generators, latents: torch.Tensor) -> torch.Tensor:
    """The noise (N, 4, h, w) that a pipeline will draw next; the generators do not move."""
    return _noise([generator.clone_state() for generator in generators], latents)


def _noise(generators: Generators, latents: torch.Tensor) -> torch.Tensor:
    """As diffusers' pipelines draw it for `latents` (N, 4, h, w)."""
    from diffusers.utils.torch_utils import randn_tensor

    noise: torch.Tensor = randn_tensor(
        latents.shape, generator=generators, device=latents.device, dtype=latents.dtype
    )
    return noise


def to_cells(change: NDArray[np.uint8]) -> torch.Tensor:
    """A mask (H, W) of pixels to latents' cells (1, 1, H/8, W/8) in [0, 1].

    The most of a cell's pixels: what may change at all must not be held by a neighbour.
    """
    pixels = torch.from_numpy(change.astype(np.float32) / 255)[None, None]
    return functional.max_pool2d(pixels, SIDE_MULTIPLE)


def masked_content(
    plan: GenerationPlan, latents: torch.Tensor, cells: torch.Tensor, generators: Generators
) -> torch.Tensor:
    """The source's latents with noise for content where they are repainted, if that was asked."""
    if plan.repaint is None or plan.repaint.masked_content is not MaskedContent.NOISE:
        return latents
    return torch.where(cells >= 1, _noise(generators, latents), latents)
