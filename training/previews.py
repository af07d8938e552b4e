"""Pictures of what a training has learnt so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

N_STEPS = 20
GUIDANCE_SCALE = 7.5


def paint(
    parts: Mapping[str, object], prompts: Sequence[str], seeds: Sequence[int]
) -> list[Image.Image]:
    """One picture of each prompt with the live model, at its own size, always from the same noise.

    `parts`: a model's components by name, and its `scheduler_config`. They stay as they are.
    """
    import diffusers

    modules: dict[str, Any] = {k: v for k, v in parts.items() if k != "scheduler_config"}
    pipeline = diffusers.StableDiffusionXLPipeline(
        **modules,
        scheduler=diffusers.EulerDiscreteScheduler.from_config(parts["scheduler_config"]),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        pictures += pipeline(
            prompt,
            num_inference_steps=N_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images
    return pictures
