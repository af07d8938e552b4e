"""The predictions of replicate/cog-sdxl (predict.py at c79cb3c), stated again to be measured.

What costs time there is kept: diffusers' pipeline as it is, a LoRA whose layers run beside the
UNet's in every step (the old LoRAAttnProcessor2_0, which diffusers no longer has), a LoRA's file
read again whenever another one is asked for, a new scheduler for each call, diffusers' own
watermarker on the CPU, the safety checker on PIL's pictures, PNG by Pillow. What it does wrong
otherwise is not: its schedulers inherit from the one before, and its seeds have 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from script.tools import bench_models
from script.tools.bench_workloads import LORA_SCALE, PROMPT, Workload
from script.tools.peer_diffusers import HIGH_NOISE_SHARE, Diffusers, arguments
from script.tools.peer_lora import MATRICES, LoraProcessor


class CogSdxl:
    """SDXL with a LoRA on; shares what is not changed with the stock pipeline."""

    stages: dict[str, float] = {}  # noqa: RUF012  it measures none

    def __init__(self, stock: Diffusers, lora: Path) -> None:
        import diffusers
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        self._stock = stock
        unet = diffusers.UNet2DConditionModel.from_pretrained(
            bench_models.folder(stock.spec.weights) / "unet", variant="fp16", dtype=stock.dtype
        )
        parts = {**stock.base.components, "unet": unet.to(stock.device)}
        self._pipe = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=True)
        self._pipe.set_progress_bar_config(disable=True)
        self._refiner: Any = None
        folder = bench_models.folder("safety-checker")
        self._features = CLIPImageProcessor.from_pretrained(folder)
        checker = StableDiffusionSafetyChecker.from_pretrained(folder, dtype=stock.dtype)
        self._checker = checker.to(stock.device)
        self._worn: Path | None = None
        self.wear(lora)

    def prepare(self, workload: Workload) -> None:
        """Load what the workload needs beside the model."""
        import diffusers

        if "refine" in workload.asked and self._refiner is None:
            self._stock.prepare(workload)
            parts = self._stock.refiner.components
            self._refiner = diffusers.StableDiffusionXLImg2ImgPipeline(
                **parts, add_watermarker=True, requires_aesthetics_score=True
            )
            self._refiner.set_progress_bar_config(disable=True)

    def wear(self, lora: Path) -> None:
        """Read the LoRA's file and build its layers, unless it is the one that is on."""
        from safetensors.torch import load_file

        if lora == self._worn:
            return
        tensors, unet = load_file(lora), self._pipe.unet
        processors = {}
        for name in unet.attn_processors:
            attention: Any = unet.get_submodule(name.removesuffix(".processor"))
            rank = tensors[f"{name}.to_out_lora.up.weight"].shape[1]
            processor = LoraProcessor(attention, rank, LORA_SCALE)
            own = {
                f"{matrix}.{way}.weight": tensors[f"{name}.{matrix}.{way}.weight"]
                for matrix in MATRICES
                for way in ("down", "up")
            }
            processor.load_state_dict(own)
            processors[name] = processor.to(unet.device, unet.dtype)
        unet.set_attn_processor(processors)
        self._worn = lora

    @contextmanager
    def unmarked(self) -> Iterator[None]:
        """As with apply_watermark off."""
        marker, self._pipe.watermark = self._pipe.watermark, None
        try:
            yield
        finally:
            self._pipe.watermark = marker

    def run(self, workload: Workload, seed: int, folder: Path) -> list[Path]:
        """The request, its files in `folder`."""
        import torch

        with torch.inference_mode():
            pictures = self._draw(workload, seed)
            unsafe = self._unsafe(pictures)
        files = []
        for number, picture in enumerate(pictures):
            if unsafe[number]:
                print(f"NSFW content detected in image {number}")
                continue
            files.append(folder / f"cog-sdxl-{number}.png")
            picture.save(files[-1])
        return files

    def _draw(self, workload: Workload, seed: int) -> Any:  # noqa: ANN401
        pipe, size = self._pipe, self._stock.spec.native_size
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        common = arguments(workload, seed)
        count = common.pop("num_images_per_prompt")
        common |= {"prompt": [PROMPT] * count, "negative_prompt": [""] * count}
        ensemble = "refine" in workload.asked
        late = {"output_type": "latent", "denoising_end": HIGH_NOISE_SHARE} if ensemble else {}
        drawn = pipe(**common, width=size, height=size, **late).images
        if not ensemble:
            return drawn
        return self._refiner(**common, image=drawn, denoising_start=HIGH_NOISE_SHARE).images

    def _unsafe(self, pictures: Any) -> list[bool]:  # noqa: ANN401
        seen = self._features(pictures, return_tensors="pt").to(self._stock.device)
        values = [np.array(picture) for picture in pictures]
        _, unsafe = self._checker(images=values, clip_input=seen.pixel_values.to(self._stock.dtype))
        return [bool(bad) for bad in unsafe]
