"""Postprocess generated images: safety check, upscaling, invisible watermark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from generation import watermark
from generation.errors import UnsafeImages
from generation.latents import to_images
from generation.options import GenerationRequest, Upscale, Upscaler
from generation.safety import SafetyChecker
from generation.timings import Timings
from preprocess import upscale
from weights.catalog import Edition
from weights.edition import Device

if TYPE_CHECKING:
    from PIL import Image

_UPSCALERS: dict[str, str] = {
    Upscaler.SWINIR: upscale.SWINIR,
    Upscaler.REAL_ESRGAN: upscale.REAL_ESRGAN,
}


class PostProcessor:
    """The models that postprocess images, each loaded when it is first needed."""

    def __init__(self, edition: Edition, device: Device, dtype: torch.dtype) -> None:
        self._edition, self._device, self._dtype = edition, device, dtype
        self._upscalers: dict[str, upscale.Upscaler] = {}
        self._safety: SafetyChecker | None = None

    def load_safety_checker(self) -> SafetyChecker:
        """Load the safety checker, or return the loaded one. Raises a WeightsError."""
        if self._safety is None:
            self._safety = SafetyChecker(self._edition, torch.device(self._device), self._dtype)
        return self._safety

    def process(
        self, images: Sequence[Image.Image], request: GenerationRequest, timings: Timings
    ) -> dict[int, Image.Image]:
        """Return the images that are safe, by their place in the request; all of one size.

        Raises:
            UnsafeImages: none is.
        """
        kept = dict(enumerate(images))
        if not request.disable_safety_checker:
            with timings.measure("safety"):
                kept = _safe_images(kept, self.load_safety_checker())
        processed = list(kept.values())
        if request.upscale != Upscale.OFF:
            factor = int(request.upscale)
            processed = self.upscale(processed, factor, request.upscaler, timings)
        if request.apply_watermark:
            with timings.measure("watermark"):
                processed = _watermark(processed, torch.device(self._device))
        return dict(zip(kept, processed, strict=True))

    def upscale(
        self, images: Sequence[Image.Image], factor: float, name: str, timings: Timings
    ) -> list[Image.Image]:
        """Enlarge the images' sides by `factor`, above 1 and up to 4."""
        with timings.measure("upscale"):
            if name not in self._upscalers:
                self._upscalers[name] = upscale.Upscaler(
                    self._edition, self._device, _UPSCALERS[name]
                )
            return [self._upscalers[name].upscale(image, factor) for image in images]


def _safe_images(images: dict[int, Image.Image], checker: SafetyChecker) -> dict[int, Image.Image]:
    """Leave out unsafe images and log them, as replicate/cog-sdxl does."""
    verdicts = zip(images, checker.unsafe(list(images.values())), strict=True)
    unsafe = [place for place, is_unsafe in verdicts if is_unsafe]
    for place in unsafe:
        print(f"NSFW content detected in image {place}", flush=True)
    if len(unsafe) == len(images):
        raise UnsafeImages(
            "NSFW content detected. Try running it again, or try a different prompt."
        )
    return {place: image for place, image in images.items() if place not in unsafe}


def _watermark(images: Sequence[Image.Image], device: torch.device) -> list[Image.Image]:
    """Add the invisible watermark to images of one size."""
    stacked = torch.stack([torch.from_numpy(np.array(i)) for i in images])  # (N, H, W, 3) uint8
    return to_images(watermark.apply(stacked.to(device).permute(0, 3, 1, 2).contiguous()))
