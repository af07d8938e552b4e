"""The predictions of replicate/cog-sdxl (predict.py at c79cb3c), written again as a baseline.

What takes time there is kept: diffusers' pipeline as it is, a LoRA whose layers run beside the
UNet's in every step (the old LoRAAttnProcessor2_0, which diffusers no longer has), a LoRA's file
read again whenever another one is requested, a new scheduler for each call, diffusers' own
watermarker on the CPU, the safety checker on PIL's images, PNG by Pillow. Its bugs are not: its
schedulers inherit from the one before, and its seeds have 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessor

from benchmarks import environment
from benchmarks.baseline_diffusers import HIGH_NOISE_FRAC, Diffusers, call, save
from benchmarks.baseline_lora import MATRICES, LoraProcessor
from benchmarks.sides import Side
from benchmarks.workloads import LORA_SCALE, PROMPT, Workload


class CogSdxl(Side):
    """SDXL with a LoRA; shares what the LoRA does not change with the stock pipeline."""

    def __init__(self, stock: Diffusers, lora: Path) -> None:
        super().__init__()
        self.stock = stock
        unet = diffusers.UNet2DConditionModel.from_pretrained(
            environment.folder(stock.spec.weights) / "unet", variant="fp16", dtype=stock.dtype
        )
        components = {**stock.base.components, "unet": unet.to(stock.device)}
        self._pipeline = diffusers.StableDiffusionXLPipeline(**components, add_watermarker=True)
        self._pipeline.set_progress_bar_config(disable=True)
        self._refiner: Any = None
        folder = environment.folder("safety-checker")
        self._features = CLIPImageProcessor.from_pretrained(folder)
        checker = StableDiffusionSafetyChecker.from_pretrained(folder, dtype=stock.dtype)
        self._checker = checker.to(stock.device)
        self._lora: Path | None = None
        self.use_lora(lora)

    def prepare(self, workload: Workload) -> None:
        if workload.is_refined and self._refiner is None:
            self.stock.prepare(workload)
            self._refiner = diffusers.StableDiffusionXLImg2ImgPipeline(
                **self.stock.refiner.components,
                add_watermarker=True,
                requires_aesthetics_score=True,
            )
            self._refiner.set_progress_bar_config(disable=True)

    def use_lora(self, file: Path) -> None:
        """Read the LoRA's file and build its layers, unless it is the one in use."""
        if file == self._lora:
            return
        tensors, unet = load_file(file), self._pipeline.unet
        processors = {}
        for name in unet.attn_processors:
            attention: Any = unet.get_submodule(name.removesuffix(".processor"))
            rank = tensors[f"{name}.to_out_lora.up.weight"].shape[1]
            processor = LoraProcessor(attention, rank, LORA_SCALE)
            keys = [f"{matrix}.{way}.weight" for matrix in MATRICES for way in ("down", "up")]
            processor.load_state_dict({key: tensors[f"{name}.{key}"] for key in keys})
            processors[name] = processor.to(unet.device, unet.dtype)
        unet.set_attn_processor(processors)
        self._lora = file

    @contextmanager
    def without_watermark(self) -> Iterator[None]:
        """Generate as with apply_watermark off."""
        watermark, self._pipeline.watermark = self._pipeline.watermark, None
        try:
            yield
        finally:
            self._pipeline.watermark = watermark

    def run(self, workload: Workload, seed: int, folder: Path) -> list[Path]:
        with torch.inference_mode():
            images = self._generate(workload, seed)
            unsafe = self._unsafe(images)
        for number, is_unsafe in enumerate(unsafe):
            if is_unsafe:
                print(f"NSFW content detected in image {number}")
        safe = [image for image, bad in zip(images, unsafe, strict=True) if not bad]
        return save(safe, folder, "cog-sdxl")

    def _generate(self, workload: Workload, seed: int) -> Any:  # noqa: ANN401
        pipeline = self._pipeline
        size = {"width": self.stock.size, "height": self.stock.size}
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        common = call(workload, seed)
        count = common.pop("num_images_per_prompt")
        common |= {"prompt": [PROMPT] * count, "negative_prompt": [""] * count}
        if not workload.is_refined:
            return pipeline(**common, **size).images
        share = HIGH_NOISE_FRAC
        latents = pipeline(**common, **size, denoising_end=share, output_type="latent").images
        return self._refiner(**common, image=latents, denoising_start=share).images

    def _unsafe(self, images: Sequence[Image.Image]) -> list[bool]:
        stock = self.stock
        features = self._features(images, return_tensors="pt").to(stock.device)
        values = [np.array(image) for image in images]
        pixels = features.pixel_values.to(stock.dtype)
        _, unsafe = self._checker(images=values, clip_input=pixels)
        return [bool(bad) for bad in unsafe]
