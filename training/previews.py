"""Preview images of a model in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image

from models.components import TOKENIZERS, ModelComponents

N_STEPS = 20
GUIDANCE_SCALE = 7.5

# The model in training, with tokenizers that know its placeholder tokens; prompts that have them.
GeneratePreviews = Callable[[ModelComponents, Sequence[str]], list[Image.Image]]


def generate_previews(model: ModelComponents, prompts: Sequence[str]) -> list[Image.Image]:
    """Return one image per prompt at the model's native size, with seeds 0, 1, …"""
    import diffusers

    pipeline = diffusers.StableDiffusionXLPipeline(
        unet=model.unet,
        vae=model.vae,
        **model.text_encoders,
        **{TOKENIZERS[name]: tokenizer for name, tokenizer in model.tokenizers.items()},
        scheduler=diffusers.EulerDiscreteScheduler.from_config(model.scheduler_config),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for seed, prompt in enumerate(prompts):
        images += pipeline(
            prompt,
            num_inference_steps=N_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images
    return images
