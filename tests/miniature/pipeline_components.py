"""A model's components as the engine holds them, and as a stock diffusers pipeline takes them."""

from collections.abc import Mapping
from typing import Any

from models.components import TOKENIZERS, ModelComponents


def from_pipeline(pipeline: Any) -> ModelComponents:
    """Return a pipeline's components."""
    encoders = {name: getattr(pipeline, name) for name in TOKENIZERS if hasattr(pipeline, name)}
    return ModelComponents(
        unet=pipeline.unet,
        vae=pipeline.vae,
        text_encoders=encoders,
        tokenizers={name: getattr(pipeline, TOKENIZERS[name]) for name in encoders},
        scheduler_config=dict(pipeline.scheduler.config),
        is_sdxl="text_encoder_2" in encoders,
    )


def to_pipeline(
    components: ModelComponents, tokenizers: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a pipeline's arguments, without a scheduler; `tokenizers` by text encoder."""
    tokenizers = tokenizers or components.tokenizers
    return {
        "unet": components.unet,
        "vae": components.vae,
        **components.text_encoders,
        **{TOKENIZERS[encoder]: tokenizer for encoder, tokenizer in tokenizers.items()},
    }
