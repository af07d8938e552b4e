"""The components of a Stable Diffusion model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

UNET = "unet"
# A text encoder's name to that of its tokenizer, in the order in which embeddings are concatenated.
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@dataclass(frozen=True, eq=False)  # compared by identity: models are keys of caches
class ModelComponents:
    """A base model, or its refiner, which shares the base model's VAE and second text encoder."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: Mapping[str, CLIPTextModel | CLIPTextModelWithProjection]  # keys of TOKENIZERS
    tokenizers: Mapping[str, CLIPTokenizer]  # by their text encoder's name
    scheduler_config: Mapping[str, object]  # as published, never that of a scheduler in use
    is_sdxl: bool  # the UNet takes pooled embeddings and time ids (arXiv:2307.01952, section 2.2)
    requires_aesthetics_score: bool = False  # time ids end with a score, not with the target size

    def modules(self) -> list[nn.Module]:
        """Return every network."""
        return [self.unet, self.vae, *self.text_encoders.values()]

    def adaptable(self) -> dict[str, nn.Module]:
        """Return the networks that adapters can change, by the names that files use."""
        return {UNET: self.unet, **self.text_encoders}
