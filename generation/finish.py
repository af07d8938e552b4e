"""What happens to pictures once they are drawn: checked, enlarged, marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from generation import watermark
from generation.errors import UnsafePictures
from generation.options import Upscaler
from generation.plan import GenerationPlan
from generation.safety import SafetyChecker
from generation.stages import Stages
from preprocess import upscale
from weights.catalog import Edition
from weights.edition import Device

if TYPE_CHECKING:
    from PIL import Image

_UPSCALERS = {Upscaler.SWINIR: upscale.SWINIR, Upscaler.REAL_ESRGAN: upscale.REAL_ESRGAN}


class Finisher:
    """The models that finish pictures, each loaded when it is first needed."""

    def __init__(self, edition: Edition, device: Device, dtype: torch.dtype) -> None:
        self._edition, self._device, self._dtype = edition, device, dtype
        self._upscalers: dict[Upscaler, upscale.Upscaler] = {}
        self._safety: SafetyChecker | None = None

    def load_safety_checker(self) -> SafetyChecker:
        """Raises a WeightsError if it cannot be had."""
        if self._safety is None:
            self._safety = SafetyChecker(self._edition, torch.device(self._device), self._dtype)
        return self._safety

    def finish(
        self, pictures: Sequence[Image.Image], plan: GenerationPlan, stages: Stages
    ) -> dict[int, Image.Image]:
        """Those that may be given out, by their place in the request; all of one size.

        Raises:
            UnsafePictures: none may.
        """
        kept = dict(enumerate(pictures))
        if plan.check_safety:
            with stages.time("safety"):
                kept = _safe(kept, self.load_safety_checker())
        finished = list(kept.values())
        if plan.upscale > 1:
            finished = self.enlarge(finished, plan.upscale, plan.upscaler, stages)
        if plan.watermark:
            with stages.time("watermark"):
                finished = _marked(finished, torch.device(self._device))
        return dict(zip(kept, finished, strict=True))

    def enlarge(
        self, pictures: Sequence[Image.Image], factor: float, name: Upscaler, stages: Stages
    ) -> list[Image.Image]:
        """The pictures at `factor` (above 1, at most 4) times the side."""
        with stages.time("upscale"):
            if name not in self._upscalers:
                self._upscalers[name] = upscale.Upscaler(
                    self._edition, self._device, _UPSCALERS[name]
                )
            return [self._upscalers[name].upscale(picture, factor) for picture in pictures]


def _safe(pictures: dict[int, Image.Image], checker: SafetyChecker) -> dict[int, Image.Image]:
    """As replicate/cog-sdxl: what is unsafe is left out, and the log says so."""
    verdicts = zip(pictures, checker.unsafe(list(pictures.values())), strict=True)
    unsafe = [place for place, bad in verdicts if bad]
    for place in unsafe:
        print(f"NSFW content detected in image {place}", flush=True)
    if len(unsafe) == len(pictures):
        raise UnsafePictures(
            "NSFW content detected. Try running it again, or try a different prompt."
        )
    return {place: picture for place, picture in pictures.items() if place not in unsafe}


def _marked(pictures: Sequence[Image.Image], device: torch.device) -> list[Image.Image]:
    """The pictures, of one size, with the invisible watermark."""
    stacked = torch.stack([torch.from_numpy(np.array(p)) for p in pictures])  # (N, H, W, 3) uint8
    return to_pictures(watermark.apply(stacked.to(device).permute(0, 3, 1, 2).contiguous()))


def to_pictures(values: torch.Tensor) -> list[Image.Image]:
    """Values (N, 3, H, W) uint8, on any device, to N pictures of mode RGB."""
    from PIL import Image

    rows = values.permute(0, 2, 3, 1).contiguous()
    if rows.is_cuda:  # to pinned memory, as from there to elsewhere: without a detour
        rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows)
    return [Image.fromarray(picture) for picture in rows.cpu().numpy()]
