"""Texts to what the UNet is conditioned on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from generation.request import GenerationPlan

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline


@dataclass(frozen=True)
class PromptEmbeddings:
    """One prompt's embeddings; the negative ones are None where no guidance pass runs."""

    prompt_embeds: torch.Tensor  # (1, 77, width of both text encoders)
    pooled_prompt_embeds: torch.Tensor  # (1, width of the second encoder's projection)
    negative_prompt_embeds: torch.Tensor | None
    negative_pooled_prompt_embeds: torch.Tensor | None


def encode(pipeline: StableDiffusionXLPipeline, plan: GenerationPlan) -> PromptEmbeddings:
    """Run both text encoders once, however many pictures are made from the prompt."""
    prompt, negative, pooled, negative_pooled = pipeline.encode_prompt(
        prompt=plan.prompt,
        negative_prompt=plan.negative_prompt,
        do_classifier_free_guidance=plan.guided,
    )
    return PromptEmbeddings(prompt, pooled, negative, negative_pooled)
