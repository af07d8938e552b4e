"""One request, from beginning to end."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from generation import modes, outputs, prompts
from generation.base_models import BASE_MODELS, DEFAULT_BASE_MODEL
from generation.errors import OutOfDeviceMemory
from generation.pipelines import PipelineStore
from generation.request import GenerationPlan, GenerationRequest, resolve
from weights.catalog import Edition
from weights.edition import Device

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline
    from PIL import Image


@dataclass(frozen=True)
class GenerationResult:
    """What came out, and what it took."""

    files: tuple[Path, ...]
    plan: GenerationPlan
    seconds: dict[str, float]  # stage → wall time
    peak_memory: int  # bytes: of the request on a GPU, of the process so far elsewhere


class Engine:
    """Makes pictures with the models of one edition on one device. One request at a time."""

    def __init__(self, edition: Edition, device: Device) -> None:
        self.device = torch.device(device)
        # fp16 holds more of the published weights' precision than bf16 at the same speed; CPUs are
        # faster in fp32 than in either.
        self.dtype = torch.float32 if device == "cpu" else torch.float16
        self._models = BASE_MODELS[edition]
        self._store = PipelineStore(edition, self.device, self.dtype)

    def load(self) -> None:
        """Load the default model ahead of the first request."""
        self._store.load(self._models[DEFAULT_BASE_MODEL])

    @torch.inference_mode()
    def generate(self, request: GenerationRequest, folder: Path) -> GenerationResult:
        """Make the pictures and write them into `folder`.

        Raises:
            InvalidRequest: before anything is loaded or changed.
            OutOfDeviceMemory: the models stay loaded and intact.
        """
        spec = self._models[DEFAULT_BASE_MODEL]
        plan = resolve(request, spec)
        print(f"Using seed: {plan.seeds[0]}", flush=True)
        if plan.negative_prompt and not plan.guided:
            print("negative_prompt has no effect: guidance_scale of up to 1 runs no guidance pass")
        stages = _Stages(self.device)
        with _explain_out_of_memory(plan):
            with stages.time("load"):
                pipeline = self._store.pipeline(spec, plan.mode, plan.scheduler)
            with stages.time("text"):
                embeddings = prompts.encode(pipeline, plan)
            with stages.time("denoise"):
                latents = _denoise(pipeline, plan, embeddings)
            with stages.time("decode"):
                pictures = _decode(pipeline, latents)
        with stages.time("save"):
            files = outputs.save(pictures, folder)
        return GenerationResult(files, plan, stages.seconds, stages.peak_memory())


def _denoise(
    pipeline: StableDiffusionXLPipeline, plan: GenerationPlan, embeddings: prompts.PromptEmbeddings
) -> torch.Tensor:
    """Latents (N, 4, H/8, W/8), scaled.

    Each picture's noise comes from a generator of its own on the CPU: its seed alone decides it,
    whatever the device and its place in the batch.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in plan.seeds]
    arguments = modes.txt2img(plan, embeddings, generators)
    latents: torch.Tensor = pipeline(**arguments, output_type="latent", return_dict=False)[0]
    return latents


def _decode(pipeline: StableDiffusionXLPipeline, latents: torch.Tensor) -> list[Image.Image]:
    pixels = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    pictures: list[Image.Image] = pipeline.image_processor.postprocess(pixels, output_type="pil")
    return pictures


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
        self.seconds[stage] = time.perf_counter() - started

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
