"""One request, from beginning to end."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from generation import canvas, modes, noise, outputs, parameters, prompts, refine, watermark
from generation.adapters import Adapter, text_state
from generation.base_models import BASE_MODELS, DEFAULT_BASE_MODEL, BaseModelSpec
from generation.blending import Mask
from generation.errors import OutOfDeviceMemory
from generation.pipelines import PipelineStore
from generation.replaceable import ReplaceableWeights, replace_all_trigger_words
from generation.request import GenerationPlan, GenerationRequest, RepaintPlan, resolve, resolve_mode
from preprocess.images import read_image, read_mask
from preprocess.upscale import Upscaler
from weights.catalog import Edition
from weights.edition import Device
from weights.references import Tokens, parse_operator_source

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
    from PIL import Image

T = TypeVar("T")


@dataclass(frozen=True)
class GenerationResult:
    """What came out, and what it took."""

    files: tuple[Path, ...]
    plan: GenerationPlan
    seconds: dict[str, float]  # stage → wall time
    peak_memory: int  # bytes: of the request on a GPU, of the process so far elsewhere


class Engine:
    """Makes pictures with the models of one edition on one device. One request at a time."""

    def __init__(
        self, edition: Edition, device: Device, store: PipelineStore | None = None
    ) -> None:
        self.device = torch.device(device)
        # fp16 holds more of the published weights' precision than bf16 at the same speed; CPUs are
        # faster in fp32 than in either.
        self.dtype = torch.float32 if device == "cpu" else torch.float16
        self._models = BASE_MODELS[edition]
        self._store = store or PipelineStore(edition, self.device, self.dtype)
        self._replaceable: dict[str, ReplaceableWeights] = {}  # by base model
        self._texts = prompts.EmbeddingCache()
        self._edition, self._kind = edition, device
        self._upscaler: Upscaler | None = None  # loaded when first asked for

    @torch.inference_mode()
    def load(self, weights: str | None = None) -> None:
        """Load the default model ahead of the first request, and the operator's `weights` into it.

        `weights` is a path or anything that a request may name; HF_TOKEN and CIVITAI_API_TOKEN are
        used for it. Raises a WeightsError.
        """
        source = parse_operator_source(weights) if weights else None
        replaceable = self._load(self._models[DEFAULT_BASE_MODEL])
        if source is not None:
            hub, civitai = (os.environ.get(f"{n}_TOKEN") for n in ("HF", "CIVITAI_API"))
            replaceable.set_up(source, Tokens(hub or None, civitai or None))

    def _load(self, spec: BaseModelSpec) -> ReplaceableWeights:
        if spec.name not in self._replaceable:
            self._replaceable[spec.name] = ReplaceableWeights(self._store.load(spec).parts)
        return self._replaceable[spec.name]

    @torch.inference_mode()
    def generate(self, request: GenerationRequest, folder: Path) -> GenerationResult:
        """Make the pictures and write them into `folder`.

        Raises:
            InvalidRequest: before any model is loaded or changed.
            BadPicture: the same, for a picture that was sent.
            WeightsError: trained weights that are named cannot be had or used; nothing is changed.
            OutOfDeviceMemory: the models stay loaded and intact.
        """
        spec = self._models[DEFAULT_BASE_MODEL]
        resolve_mode(request)  # before images are read: whether they add up to something
        image = read_image(request.image, "image") if request.image else None
        mask = read_mask(request.mask, "mask") if request.mask else None
        plan = resolve(request, spec, image.rgb.size if image else None)
        source = canvas.fit(image, mask, plan) if image else None
        print(f"Using seed: {plan.seeds[0]}", flush=True)
        if plan.negative_prompt and not plan.guided:
            print("negative_prompt has no effect: guidance_scale of up to 1 runs no guidance pass")
        stages = _Stages(self.device)
        with stages.time("load"):
            replaceable = self._load(spec)
        with stages.time("weights"):
            adapters = replaceable.read(plan.weights, plan.tokens)
        with (
            _explain_out_of_memory(plan),
            noise.drawn_in_fp32(),
            stages.around("weights", replaceable.applied(adapters)) as own,
        ):
            texts = prompts.Texts(self._texts, (spec.name, text_state(adapters)))
            painter = _Painter.open(
                self._store, spec, _in_words(plan, adapters), own, texts, stages
            )
            if source is None:
                pictures = painter.paint((plan.width, plan.height), [], None)
            elif plan.repaint is None:
                pictures = painter.paint(source.picture.size, [source.picture], None)
            else:
                pictures = _repaint(painter, source, plan.repaint)
        if plan.upscale > 1:
            with stages.time("upscale"), _explain_out_of_memory(plan):
                upscaler = self._upscaler = self._upscaler or Upscaler(self._edition, self._kind)
                pictures = [upscaler.upscale(picture, plan.upscale) for picture in pictures]
        if plan.watermark:
            with stages.time("watermark"):
                pictures = _marked(pictures, self.device)
        with stages.time("save"):
            told = [
                None
                if plan.output.parameters is None
                else parameters.describe(plan, spec, adapters, seed)
                for seed in plan.seeds
            ]
            files = outputs.save(pictures, folder, plan.output, told)
        return GenerationResult(files, plan, stages.seconds, stages.peak_memory())


def _in_words(plan: GenerationPlan, adapters: Sequence[Adapter]) -> GenerationPlan:
    """The plan as the text encoders read it: trigger words are tokens of their own."""
    prompt, negative = (
        replace_all_trigger_words(text, adapters) for text in (plan.prompt, plan.negative_prompt)
    )
    return replace(plan, prompt=prompt, negative_prompt=negative)


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
    """What stays the same over the passes of one request."""

    spec: BaseModelSpec
    plan: GenerationPlan
    stages: _Stages
    pipeline: StableDiffusionXLPipeline
    embeddings: prompts.PromptEmbeddings
    refiner: _Refiner | None
    denoising_end: float | None  # where an expert ensemble's refiner takes over
    # Each picture's noise comes from a generator of its own on the CPU: its seed alone decides it,
    # whatever the device and its place in the batch.
    generators: list[torch.Generator]

    @classmethod
    def open(
        cls,
        store: PipelineStore,
        spec: BaseModelSpec,
        plan: GenerationPlan,
        own: Mapping[str, object],
        texts: prompts.Texts,
        stages: _Stages,
    ) -> _Painter:
        """Load what the plan needs and read its prompts; `own` parts replace the model's."""
        with stages.time("load"):
            pipeline = store.pipeline(spec, plan.mode, plan.scheduler, own)
            second = store.refiner_pipeline(spec, plan.scheduler, own) if plan.refine else None
        with stages.time("text"):
            embeddings = texts.encode(pipeline, plan)
            refiner = _Refiner(second, texts.encode(second, plan)) if second else None
        end = refine.handover(plan, store.load(spec).scheduler_config)
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
    return _to_pictures((shares * 255).round().to(torch.uint8))


def _marked(pictures: Sequence[Image.Image], device: torch.device) -> list[Image.Image]:
    """The pictures, of one size, with the invisible watermark."""
    stacked = torch.stack([torch.from_numpy(np.array(p)) for p in pictures])  # (N, H, W, 3) uint8
    return _to_pictures(watermark.apply(stacked.to(device).permute(0, 3, 1, 2).contiguous()))


def _to_pictures(values: torch.Tensor) -> list[Image.Image]:
    """(N, 3, H, W) uint8, on any device."""
    from PIL import Image

    rows = values.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [Image.fromarray(picture) for picture in rows]


class _Stages:
    """Wall time of each stage and the request's peak memory."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if (
            self._device.type == "cuda"
        ):  # its work is queued: the stage has ended when the queue has
            torch.cuda.synchronize(self._device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    @contextmanager
    def around(self, stage: str, context: AbstractContextManager[T]) -> Iterator[T]:
        """The same for the time that a context takes to be entered and left."""
        with ExitStack() as stack:
            with self.time(stage):
                value = stack.enter_context(context)
            try:
                yield value
            finally:
                with self.time(stage):
                    stack.close()

    def peak_memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, kibibytes here
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def _explain_out_of_memory(plan: GenerationPlan) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise OutOfDeviceMemory(
            f"the device's memory does not hold {len(plan.seeds)} picture(s) of "
            f"{plan.width}x{plan.height}; ask for fewer with num_outputs or for a smaller width "
            "and height"
        ) from error
