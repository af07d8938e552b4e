"""The passes of one request, from a plan to pictures at the size they are drawn at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from generation import canvas, control, modes, prompts, refine, stand_ins
from generation.base_models import BaseModelSpec
from generation.blending import Mask
from generation.controlnets import ControlNetPlan
from generation.finish import Finisher, to_pictures
from generation.passes import Passes
from generation.pipelines import PipelineStore, scheduler_of
from generation.plan import GenerationPlan, HiresPlan, Mode, RepaintPlan
from generation.sizes import outpaint_steps
from generation.stages import Stages

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from PIL import Image


@dataclass(frozen=True)
class Studio:
    """What all passes of one request share; `own` parts replace the model's."""

    store: PipelineStore
    spec: BaseModelSpec
    own: Mapping[str, object]
    texts: prompts.Texts
    maps: control.ControlMaps
    finisher: Finisher
    stages: Stages

    def draw(self, plan: GenerationPlan, source: canvas.FittedSource | None) -> list[Image.Image]:
        """The plan's pictures, before `plan.upscale`."""
        hires, size = plan.hires, (plan.width, plan.height)
        # Of two passes, the refiner works in the last.
        painter = _Painter.open(self, replace(plan, refine=None) if hires else plan)
        if source is None:
            pictures = painter.paint(canvas.Frame.whole(size, size), [], None)
        elif plan.repaint is None:
            pictures = painter.paint(canvas.Frame.whole(size, size), [source.picture], None)
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
        return redraw.paint(canvas.Frame.whole((plan.width, plan.height), size), pictures, None)


def _repaint(
    painter: _Painter, source: canvas.FittedSource, settings: RepaintPlan
) -> list[Image.Image]:
    """Inpainting in one pass; outpainting in as many as its margins need."""
    pictures = [source.picture]
    if source.mask is not None:
        return _repaint_once(painter, pictures, source.mask, (0, 0))
    left, top = settings.outpaint.left, settings.outpaint.top  # still to be added
    for margins in outpaint_steps(source.picture.size, settings.outpaint):
        left, top = left - margins.left, top - margins.top
        pictures = [canvas.extend(picture, margins) for picture in pictures]
        mask = canvas.margin_mask(pictures[0].size, margins)
        pictures = _repaint_once(painter, pictures, mask, (left, top))
    return pictures


def _repaint_once(
    painter: _Painter, pictures: list[Image.Image], mask: Mask, place: tuple[int, int]
) -> list[Image.Image]:
    """One pass over pictures that lie at `place` in those that come out in the end."""
    repaint = canvas.repaint(mask, painter.plan, painter.spec)
    views = [repaint.look(picture) for picture in pictures]
    results = painter.paint(repaint.frame.moved(*place), views, repaint.change)
    sources = pictures * (len(results) // len(pictures))
    return [
        repaint.paste(picture, result) for picture, result in zip(sources, results, strict=True)
    ]


@dataclass(frozen=True)
class _Refiner:
    """The refiner's pipeline and how it reads the prompts."""

    pipeline: DiffusionPipeline
    passes: Passes
    embeddings: prompts.PromptEmbeddings


@dataclass(frozen=True)
class _Painter:
    """What stays the same over passes of one plan."""

    spec: BaseModelSpec
    plan: GenerationPlan
    stages: Stages
    pipeline: StableDiffusionXLPipeline
    passes: Passes
    embeddings: prompts.PromptEmbeddings
    refiner: _Refiner | None
    maps: control.ControlMaps
    nets: Mapping[str, control.Net]  # by catalog entry
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
            nets = _load_controlnets(store, spec, plan.controlnets)
            second = store.refiner_pipeline(spec, plan, own) if plan.refine else None
        with stages.time("text"):
            embeddings = studio.texts.encode(pipeline, plan)
            refiner = None
            if second is not None:
                passes = store.passes(store.load_refiner(spec))
                refiner = _Refiner(second, passes, studio.texts.encode(second, plan))
        end = refine.handover(plan, lambda: scheduler_of(spec, plan, store.load(spec)))
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in plan.seeds]
        return cls(
            spec,
            plan,
            stages,
            pipeline,
            store.passes(store.load(spec)),
            embeddings,
            refiner,
            studio.maps,
            nets,
            end,
            generators,
        )

    def paint(
        self, frame: canvas.Frame, images: list[Image.Image], change: Mask | None
    ) -> list[Image.Image]:
        """One pass: pictures of the frame, from noise or from `images` (one for all or one each).

        `frame` is the part of the final picture that is drawn.
        """
        plan, pipeline = self.plan, self.pipeline
        latents = cells = None
        if images:
            with self.stages.time("encode"):
                latents = _encode(pipeline, images, self.generators, self.passes)
        if change is not None and latents is not None:
            cells = modes.to_cells(change).to(latents)
            latents = modes.masked_content(plan, latents, cells, self.generators)
        start = modes.Start(frame.size, latents, cells, self.denoising_end)
        said = self._hints(frame)
        with self.stages.time("denoise"):
            arguments = modes.ARGUMENTS[plan.mode](plan, self.embeddings, self.generators, start)
            progress = stand_ins.Progress(pipeline.scheduler, plan.skipped_steps)
            forward = control.listening(_fast(self.passes, pipeline), said, progress)
            with stand_ins.given(pipeline, self._guided(forward, progress), progress):
                latents = pipeline(**arguments, output_type="latent", return_dict=False)[0]
        if self.refiner is not None:
            with self.stages.time("refine"):
                latents = self._refine(self.refiner, latents, start, progress.step)
        with self.stages.time("decode"):
            return _decode(pipeline, latents, self.passes)

    def _refine(
        self, refiner: _Refiner, latents: torch.Tensor, start: modes.Start, made: int
    ) -> torch.Tensor:
        """`made` is the number of the base model's steps."""
        plan, pipeline = self.plan, refiner.pipeline
        skipped, begun = refine.steps_before(plan, made)
        progress = stand_ins.Progress(pipeline.scheduler, skipped, begun)
        forward = self._guided(_fast(refiner.passes, pipeline), progress)
        with stand_ins.given(pipeline, forward, progress):
            generators = self.generators
            return refine.refine(pipeline, plan, refiner.embeddings, generators, latents, start)

    def _hints(self, frame: canvas.Frame) -> list[control.Hint]:
        """Of the controls that there are, for this frame."""
        if not self.plan.controlnets:
            return []
        with self.stages.time("control_maps"):
            maps = self.maps.look(frame)
        like = self.embeddings.prompt_embeds
        return control.hints(self.plan.controlnets, self.nets, maps, like.device, like.dtype)

    def _guided(
        self, forward: stand_ins.Forward, progress: stand_ins.Progress
    ) -> stand_ins.Forward:
        """With guidance where the plan wants it."""
        start, end = self.plan.guidance_start, self.plan.guidance_end
        if not self.plan.do_classifier_free_guidance or (start, end) == (0, 1):
            return forward
        return stand_ins.guided_between(forward, start, end, progress)


def _fast(passes: Passes, pipeline: DiffusionPipeline) -> stand_ins.Forward:
    """The pipeline's UNet's own forward pass, in the fastest way that is ready."""
    unet: UNet2DConditionModel = pipeline.unet

    def call(sample: torch.Tensor, timestep: torch.Tensor, **others: object) -> Any:  # noqa: ANN401
        return passes.run("unet", unet.forward, sample, timestep, **others)

    return call


def _load_controlnets(
    store: PipelineStore, spec: BaseModelSpec, plans: Sequence[ControlNetPlan]
) -> dict[str, control.Net]:
    """Those that count at all, by catalog entry."""
    needed = {c.weights for c in plans if c.conditioning_scale > 0}
    nets = {}
    for weights in sorted(needed):
        model = store.load_controlnet(weights, {spec.weights, *needed})
        (module,) = model.modules()
        nets[weights] = control.Net(module, store.passes(model))
    return nets


def _encode(
    pipeline: StableDiffusionXLPipeline,
    images: list[Image.Image],
    generators: modes.Generators,
    passes: Passes,
) -> torch.Tensor:
    """Pictures of one size to latents (N, 4, H/8, W/8), scaled; a single one serves all N.

    Draws from each generator as diffusers' pipelines do: first the image's, then their own noise.
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    vae = pipeline.vae

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        moments: torch.Tensor = vae.encode(pixels).latent_dist.parameters
        return moments

    pixels = pipeline.image_processor.preprocess(images).to(next(vae.parameters()))
    moments = passes.run("encode", encode, pixels)
    if len(images) < len(generators):
        moments = moments.repeat(len(generators), 1, 1, 1)
    latents = DiagonalGaussianDistribution(moments).sample(generators)
    scaled: torch.Tensor = latents * vae.config.scaling_factor
    return scaled


def _decode(
    pipeline: StableDiffusionXLPipeline, latents: torch.Tensor, passes: Passes
) -> list[Image.Image]:
    vae = pipeline.vae

    def decode(latents: torch.Tensor) -> torch.Tensor:
        pixels = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        # As diffusers' VaeImageProcessor, but in eight bits before they leave the device.
        shares = (pixels * 0.5 + 0.5).clamp(0, 1).float()  # (N, 3, H, W)
        values: torch.Tensor = (shares * 255).round().to(torch.uint8)
        return values

    return to_pictures(passes.run("decode", decode, latents))
