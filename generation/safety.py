"""Find images that are not safe for work.

CompVis' checker compares an image with fixed concepts (arXiv:2210.04610 analyses it) and flags many
harmless ones. As in replicate/cog-flux, a second model looks at what it flags, and an image is
unsafe if both agree. Both see a square of 224 pixels, the checker the middle of an image.
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

UNSAFE = "nsfw"  # the second model's label


class SafetyChecker:
    """The two models, in memory."""

    def __init__(self, edition: Edition, device: torch.device, dtype: torch.dtype) -> None:
        """Load both, so that neither can be missing when it is needed.

        Raises:
            WeightsError: they cannot be had, or are not whole.
        """
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor, ViTForImageClassification, ViTImageProcessor

        # It says that images come back black, which they do not here.
        logging.getLogger(StableDiffusionSafetyChecker.__module__).setLevel(logging.ERROR)
        folder = cache.ensure(SAFETY_ENTRIES[0], edition)
        self._prepare = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        self._checker = _load(StableDiffusionSafetyChecker, folder, device, dtype)
        folder = cache.ensure(SAFETY_ENTRIES[1], edition)
        self._prepare_again = ViTImageProcessor.from_pretrained(folder, local_files_only=True)
        self._second = _load(ViTForImageClassification, folder, device, dtype)

    @torch.inference_mode()
    def unsafe(self, images: Sequence[Image.Image]) -> list[bool]:
        """Return for each image (RGB, any size) whether both models find it unsafe."""
        flagged = self.flagged(images)
        doubtful = [image for image, bad in zip(images, flagged, strict=True) if bad]
        confirmed = iter(self.confirmed(doubtful) if doubtful else [])
        return [bad and next(confirmed) for bad in flagged]

    @torch.inference_mode()
    def flagged(self, images: Sequence[Image.Image]) -> list[bool]:
        """Return the checker's verdicts alone."""
        if not images:
            return []
        pixels = self._prepare(list(images), return_tensors="pt").pixel_values
        blackened = [np.zeros(0)] * len(images)  # the images it returns are not used
        _, flagged = self._checker(
            clip_input=pixels.to(self._checker.device, self._checker.dtype), images=blackened
        )
        return [bool(bad) for bad in flagged]

    @torch.inference_mode()
    def confirmed(self, images: Sequence[Image.Image]) -> list[bool]:
        """Return the second model's verdicts alone."""
        if not images:
            return []
        pixels = self._prepare_again(list(images), return_tensors="pt").pixel_values
        logits = self._second(pixels.to(self._second.device, self._second.dtype)).logits
        return [self._second.config.id2label[i] == UNSAFE for i in logits.argmax(dim=1).tolist()]


def _load(
    model_class: type[Model], folder: Path, device: torch.device, dtype: torch.dtype
) -> Model:
    """Load the model in a folder whole: one with random values would pass every image."""
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
