"""Which pictures may not be given out.

CompVis' checker compares a picture with fixed concepts (arXiv:2210.04610 takes it apart) and flags
much that is harmless. As in replicate/cog-flux, what it flags is shown to a second model, and only
what both find unsafe counts. Both see a square of 224 pixels, the checker the middle of a picture.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from generation.base_models import SAFETY_ENTRIES
from weights import cache
from weights.catalog import Edition
from weights.errors import IncompleteModel

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel

    Model = TypeVar("Model", bound=PreTrainedModel)

UNSAFE = "nsfw"  # the second model's own name for it


class SafetyChecker:
    """The two models, in memory."""

    def __init__(self, edition: Edition, device: torch.device, dtype: torch.dtype) -> None:
        """Load both, so that neither can be missing when it is needed.

        Raises:
            WeightsError: they cannot be had, or are not whole.
        """
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor, ViTForImageClassification, ViTImageProcessor

        # It says that pictures come back black, which they do not here.
        logging.getLogger(StableDiffusionSafetyChecker.__module__).setLevel(logging.ERROR)
        folder = cache.ensure(SAFETY_ENTRIES[0], edition)
        self._prepare = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        self._checker = _load(StableDiffusionSafetyChecker, folder, device, dtype)
        folder = cache.ensure(SAFETY_ENTRIES[1], edition)
        self._prepare_again = ViTImageProcessor.from_pretrained(folder, local_files_only=True)
        self._second = _load(ViTForImageClassification, folder, device, dtype)

    @torch.inference_mode()
    def unsafe(self, pictures: Sequence[Image.Image]) -> list[bool]:
        """Of each picture (mode RGB, any size) whether both models find it unsafe."""
        flagged = self.flagged(pictures)
        doubtful = [picture for picture, bad in zip(pictures, flagged, strict=True) if bad]
        confirmed = iter(self.confirmed(doubtful))
        return [bad and next(confirmed) for bad in flagged]

    @torch.inference_mode()
    def flagged(self, pictures: Sequence[Image.Image]) -> list[bool]:
        """The checker's opinion alone."""
        if not pictures:
            return []
        pixels = self._prepare(list(pictures), return_tensors="pt").pixel_values
        blackened = [np.zeros(0)] * len(pictures)  # what it would make of the pictures is not used
        _, flagged = self._checker(
            clip_input=pixels.to(self._checker.device, self._checker.dtype), images=blackened
        )
        return [bool(bad) for bad in flagged]

    @torch.inference_mode()
    def confirmed(self, pictures: Sequence[Image.Image]) -> list[bool]:
        """The second model's opinion alone."""
        if not pictures:
            return []
        pixels = self._prepare_again(list(pictures), return_tensors="pt").pixel_values
        logits = self._second(pixels.to(self._second.device, self._second.dtype)).logits
        return [self._second.config.id2label[i] == UNSAFE for i in logits.argmax(dim=1).tolist()]


def _load(
    model_class: type[Model], folder: Path, device: torch.device, dtype: torch.dtype
) -> Model:
    """The model in the folder; one with random values in it would pass everything."""
    model, report = model_class.from_pretrained(
        folder, dtype=dtype, local_files_only=True, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise IncompleteModel(
            f"{folder} lacks {len(missing)} of the values of {model_class.__name__}, the first of"
            f" them {missing[0]}; delete the folder, so that it is fetched again"
        )
    loaded: Model = model.to(device).eval().requires_grad_(False)
    return loaded
