"""One function per mode: a plan and its embeddings to the arguments of the mode's pipeline.

The dict that each returns is the last step into diffusers; nothing else in the project passes one.
"""

from typing import Any

import torch

from generation.prompts import PromptEmbeddings
from generation.request import GenerationPlan


def txt2img(
    plan: GenerationPlan, embeddings: PromptEmbeddings, generators: list[torch.Generator]
) -> dict[str, Any]:
    """From noise alone."""
    return {
        "prompt_embeds": embeddings.prompt_embeds,
        "pooled_prompt_embeds": embeddings.pooled_prompt_embeds,
        "negative_prompt_embeds": embeddings.negative_prompt_embeds,
        "negative_pooled_prompt_embeds": embeddings.negative_pooled_prompt_embeds,
        "width": plan.width,
        "height": plan.height,
        "num_images_per_prompt": len(plan.seeds),
        "num_inference_steps": plan.num_inference_steps,
        "guidance_scale": plan.guidance_scale,
        "generator": generators,
    }
