"""The stages of a request: what each starts from, how it is sampled, what comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from generation.base_models import BaseModelSpec
from generation.blending import Mask
from generation.conditioning import PromptEmbeddings, condition
from generation.controlnet import active_controlnets
from generation.crop import CropRegion, cover_crop
from generation.inpaint import InpaintRegion, inpaint_region
from generation.latents import (
    LATENT_CHANNELS,
    Generators,
    encode_images,
    randn,
    to_latent_mask,
)
from generation.options import MaskedContent, Refine
from generation.outpaint import extend, margin_mask
from generation.plan import BASE_IMAGE_STRENGTH, GenerationPlan, Mode, StagePlan
from generation.sampling import (
    CFGDenoiser,
    GuidanceInterval,
    KnownLatents,
    build_scheduler,
    denoise,
    initial_latents,
    refiner_cutoff,
    select_timesteps,
    start_from,
)
from generation.sizes import SIDE_MULTIPLE, Size
from generation.timings import Timings
from models.cache import LoadedControlNet, LoadedModel

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class StageInput:
    """The images that a stage starts from, and the region of them that it samples."""

    images: Sequence[Image.Image]  # RGB: none, one for all outputs, or one for each
    region: CropRegion  # in the final image: what control maps are rendered for
    inpaint: InpaintRegion | None  # None: the whole image is sampled

    def model_images(self) -> list[Image.Image]:
        """Return what the VAE encodes, of the region's size."""
        if self.inpaint is None:
            return list(self.images)
        return [self.inpaint.model_input(image) for image in self.images]

    def merge(self, results: Sequence[Image.Image]) -> list[Image.Image]:
        """Return the stage's output from what was decoded."""
        if self.inpaint is None:
            return list(results)
        images = list(self.images) * (len(results) // len(self.images))
        return [
            self.inpaint.paste_back(image, result)
            for image, result in zip(images, results, strict=True)
        ]


def prepare_stage(
    stage: StagePlan,
    plan: GenerationPlan,
    spec: BaseModelSpec,
    images: Sequence[Image.Image],
    mask: Mask | None,
) -> StageInput:
    """Fit images to a stage's size, extend them by its margins, and choose the region to sample.

    `mask` (H, W) is that of inpainting; outpainting's is the margins.
    """
    if stage.margins:
        images = [extend(image, stage.margins) for image in images]
        mask = margin_mask(stage.size, stage.margins)
    else:
        images = [cover_crop(image, stage.size) for image in images]
    if stage.mode is not Mode.INPAINT:
        return StageInput(
            images, CropRegion((0, 0, plan.width, plan.height), stage.size, stage.size), None
        )
    assert mask is not None
    inpaint = inpaint_region(mask, plan.request, stage.strength, spec)
    return StageInput(images, inpaint.crop.moved(*stage.offset), inpaint)


@dataclass(frozen=True)
class StageSampler:
    """What the stages of a request share: models, prompts, and a generator for each image."""

    plan: GenerationPlan
    spec: BaseModelSpec
    base: LoadedModel
    refiner: LoadedModel | None
    controlnets: Mapping[str, LoadedControlNet]  # by catalog entry
    prompts: PromptEmbeddings
    refiner_prompts: PromptEmbeddings | None
    generators: Generators
    timings: Timings

    def sample(
        self, stage: StagePlan, start: StageInput, maps: Mapping[str, Image.Image]
    ) -> Tensor:
        """Return a stage's latents (N, 4, H/8, W/8); `maps` are the control maps by input."""
        init, change = self._encode(start) if start.images else (None, None)
        with self.timings.measure("denoise"):
            config = {**self.base.components.scheduler_config, **self.spec.scheduler_config}
            scheduler = build_scheduler(self.plan.scheduler, self.plan.schedule_type, config)
            timesteps = select_timesteps(scheduler, stage.num_inference_steps, stage.strength)
            request, cutoff = self.plan.request, None
            if stage.is_refined and request.refine == Refine.EXPERT_ENSEMBLE:
                levels = scheduler.config.num_train_timesteps
                cutoff = refiner_cutoff(timesteps, request.high_noise_frac, levels)
                timesteps = timesteps if cutoff is None else timesteps.until(cutoff)
            noise = self._noise(start.region.size)
            starts_from_noise = init is None or (change is not None and stage.strength == 1)
            latents = initial_latents(
                scheduler, timesteps, noise, None if starts_from_noise else init, self.plan.seeds
            )
            known = None
            if init is not None and change is not None:
                known = KnownLatents(init, noise, change)
            denoiser = self._denoiser(self.base, self.prompts, start.region.size, maps)
            latents = denoise(denoiser, scheduler, timesteps, self.generators, latents, known)
        if self.refiner is None or not stage.is_refined:
            return latents
        with self.timings.measure("refine"):
            return self._refine(self.refiner, stage, start.region.size, latents, known, cutoff)

    def _encode(self, start: StageInput) -> tuple[Tensor, Tensor | None]:
        """Return the latents that a stage starts from, and what inpainting may change of them.

        That is (1, 1, H/8, W/8) in [0, 1], see `KnownLatents`.
        """
        with self.timings.measure("encode"):
            init = encode_images(self.base, start.model_images(), self.generators)
        if start.inpaint is None:
            return init, None
        change = to_latent_mask(start.inpaint.change).to(init.device)
        if self.plan.request.masked_content == MaskedContent.NOISE:
            init = torch.where(change >= 1, self._noise(start.region.size), init)
        return init, change

    def _refine(
        self,
        refiner: LoadedModel,
        stage: StagePlan,
        size: Size,
        latents: Tensor,
        known: KnownLatents | None,
        cutoff: int | None,
    ) -> Tensor:
        """Continue the base model's steps with the refiner, or refine its result."""
        assert self.refiner_prompts is not None
        if known is not None:  # the base has opened grey parts: the refiner may change them at once
            known = replace(known, change=(known.change > 0).to(known.change))
        config = refiner.components.scheduler_config
        scheduler = build_scheduler(self.plan.scheduler, self.plan.schedule_type, config)
        if self.plan.request.refine == Refine.BASE_IMAGE:
            timesteps = select_timesteps(scheduler, self.plan.refine_steps, BASE_IMAGE_STRENGTH)
            noise = self._noise(size)
            known = known and replace(known, noise=noise)
            latents = initial_latents(scheduler, timesteps, noise, latents, self.plan.seeds)
        elif cutoff is None:
            return latents
        else:
            timesteps = select_timesteps(scheduler, stage.num_inference_steps, stage.strength)
            timesteps = timesteps.below(cutoff, scheduler.order)
            start_from(scheduler, timesteps, latents.shape, latents.device, self.plan.seeds)
        denoiser = self._denoiser(refiner, self.refiner_prompts, size, {})
        return denoise(denoiser, scheduler, timesteps, self.generators, latents, known)

    def _noise(self, size: Size) -> Tensor:
        """Draw noise (N, 4, H/8, W/8) for images of a size."""
        shape = (LATENT_CHANNELS, size[1] // SIDE_MULTIPLE, size[0] // SIDE_MULTIPLE)
        return randn(self.generators, shape, self.base.device)

    def _denoiser(
        self,
        model: LoadedModel,
        prompts: PromptEmbeddings,
        size: Size,
        maps: Mapping[str, Image.Image],
    ) -> CFGDenoiser:
        plan = self.plan
        guidance = None
        if plan.do_classifier_free_guidance:
            start, end = plan.request.guidance_start, plan.request.guidance_end
            guidance = GuidanceInterval(plan.guidance_scale, start, end)
        n_images, controlnets = len(self.generators), []
        conditioning = condition(model.components, prompts, size, n_images, plan.guidance_scale)
        if maps:
            controlnets = active_controlnets(
                plan.controlnets, self.controlnets, maps, model.device, model.dtype
            )
        return CFGDenoiser(model, conditioning, guidance, controlnets)
