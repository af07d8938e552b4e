"""The passes of one request, from a plan to pictures at the size they are drawn at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from generation import canvas, modes, prompts, refine
from generation.base_models import BaseModelSpec
from generation.blending import Mask
from generation.finish import Finisher, to_pictures
from generation.pipelines import PipelineStore, scheduler_of
from generation.request import GenerationPlan, HiresPlan, Mode, RepaintPlan
from generation.stages import Stages

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
    from PIL import Image


@dataclass(frozen=True)
class Studio:
    """What all passes of one request share; `own` parts replace the model's."""

    store: PipelineStore
    spec: BaseModelSpec
    own: Mapping[str, object]
    texts: prompts.Texts
    finisher: Finisher
    stages: Stages

    def draw(self, plan: GenerationPlan, source: canvas.FittedSource | None) -> list[Image.Image]:
        """The plan's pictures, before `plan.upscale`."""
        hires = plan.hires
        # Of two passes, the refiner works in the last.
        painter = _Painter.open(self, replace(plan, refine=None) if hires else plan)
        if source is None:
            pictures = painter.paint((plan.width, plan.height), [], None)
        elif plan.repaint is None:
            pictures = painter.paint(source.picture.size, [source.picture], None)
        else:
            pictures = _repaint(painter, source, plan.repaint)
        return pictures if hires is None else self._redraw(painter, plan, hires, pictures)

    def _redraw(
        self,
        painter: _Painter,
        plan: GenerationPlan,
        hires: HiresPlan,
        pictures: list[Image.Image],
    ) -> list[Image.Image]:
        """Image to image with the first pass's pictures, enlarged; the noise goes on from there."""
        size = (hires.width, hires.height)
        factor = max(new / old for new, old in zip(size, pictures[0].size, strict=True))
        if factor > 1:
            pictures = self.finisher.enlarge(pictures, factor, plan.upscaler, self.stages)
        pictures = [canvas.cover_crop(picture, size) for picture in pictures]
        second = replace(
            plan,
            mode=Mode.IMG2IMG,
            strength=hires.strength,
            num_inference_steps=hires.num_inference_steps,
        )
        redraw = replace(_Painter.open(self, second), generators=painter.generators)
        return redraw.paint(size, pictures, None)


def _repaint(
    painter: _Painter, source: canvas.FittedSource, settings: RepaintPlan
) -> list[Image.Image]:
    """Inpainting in one pass; outpainting in as many as its margins need."""
    pictures = [source.picture]
    if source.mask is not None:
        return _repaint_once(painter, pictures, source.mask)
    for margins in canvas.outpaint_passes(source.picture.size, settings.outpaint):
        pictures = [canvas.extend(picture, margins) for picture in pictures]
        mask = canvas.margin_mask(pictures[0].size, margins)
        pictures = _repaint_once(painter, pictures, mask)
    return pictures


def _repaint_once(painter: _Painter, pictures: list[Image.Image], mask: Mask) -> list[Image.Image]:
    repaint = canvas.repaint(mask, painter.plan, painter.spec)
    views = [repaint.look(picture) for picture in pictures]
    results = painter.paint(repaint.frame.size, views, repaint.change)
    sources = pictures * (len(results) // len(pictures))
    return [
        repaint.paste(picture, result) for picture, result in zip(sources, results, strict=True)
    ]


@dataclass(frozen=True)
class _Refiner:
    """The refiner's pipeline and how it reads the prompts."""

    pipeline: DiffusionPipeline
    embeddings: prompts.PromptEmbeddings


@dataclass(frozen=True)
class _Painter:
    """What stays the same over passes of one plan."""

    spec: BaseModelSpec
    plan: GenerationPlan
    stages: Stages
    pipeline: StableDiffusionXLPipeline
    embeddings: prompts.PromptEmbeddings
    refiner: _Refiner | None
    denoising_end: float | None  # where an expert ensemble's refiner takes over
    # Each picture's noise comes from a generator of its own on the CPU: its seed alone decides it,
    # whatever the device and its place in the batch.
    generators: list[torch.Generator]

    @classmethod
    def open(cls, studio: Studio, plan: GenerationPlan) -> _Painter:
        """Load what the plan needs and read its prompts."""
        store, spec, own, stages = studio.store, studio.spec, studio.own, studio.stages
        with stages.time("load"):
            pipeline = store.pipeline(spec, plan, own)
            second = store.refiner_pipeline(spec, plan, own) if plan.refine else None
        with stages.time("text"):
            embeddings = studio.texts.encode(pipeline, plan)
            refiner = _Refiner(second, studio.texts.encode(second, plan)) if second else None
        end = refine.handover(plan, scheduler_of(spec, plan, store.load(spec)))
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in plan.seeds]
        return cls(spec, plan, stages, pipeline, embeddings, refiner, end, generators)

    def paint(
        self, size: tuple[int, int], images: list[Image.Image], change: Mask | None
    ) -> list[Image.Image]:
        """One pass: pictures of `size`, from noise or from `images` (one for all, or one each)."""
        plan, pipeline = self.plan, self.pipeline
        latents = cells = None
        if images:
            with self.stages.time("encode"):
                latents = _encode(pipeline, images, self.generators)
        if change is not None and latents is not None:
            cells = modes.to_cells(change).to(latents)
            latents = modes.masked_content(plan, latents, cells, self.generators)
        start = modes.Start(size, latents, cells, self.denoising_end)
        with self.stages.time("denoise"):
            arguments = modes.ARGUMENTS[plan.mode](plan, self.embeddings, self.generators, start)
            latents = pipeline(**arguments, output_type="latent", return_dict=False)[0]
        if self.refiner is not None:
            second, embeddings = self.refiner.pipeline, self.refiner.embeddings
            with self.stages.time("refine"):
                latents = refine.refine(second, plan, embeddings, self.generators, latents, start)
        with self.stages.time("decode"):
            return _decode(pipeline, latents)


def _encode(
    pipeline: StableDiffusionXLPipeline, images: list[Image.Image], generators: modes.Generators
) -> torch.Tensor:
    """Pictures of one size to latents (N, 4, H/8, W/8), scaled; a single one serves all N.

    Draws from each generator as diffusers' pipelines do: first the image's, then their own noise.
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    vae = pipeline.vae
    pixels = pipeline.image_processor.preprocess(images).to(vae.device, vae.dtype)
    moments = vae.encode(pixels).latent_dist.parameters
    if len(images) < len(generators):
        moments = moments.repeat(len(generators), 1, 1, 1)
    latents = DiagonalGaussianDistribution(moments).sample(generators)
    scaled: torch.Tensor = latents * vae.config.scaling_factor
    return scaled


def _decode(pipeline: StableDiffusionXLPipeline, latents: torch.Tensor) -> list[Image.Image]:
    pixels = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    # As diffusers' VaeImageProcessor, but in eight bits before they leave the device.
    shares = (pixels * 0.5 + 0.5).clamp(0, 1).float()  # (N, 3, H, W)
    return to_pictures((shares * 255).round().to(torch.uint8))
