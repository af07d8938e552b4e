"""SDXL as it is built, with random weights: to measure speed and memory without its files.

Sizes are those of stabilityai's published configs; a test holds the numbers of parameters.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from weights.miniature import architecture
from weights.miniature.architecture import END, START
from weights.miniature.evaluate import FOLDER

VOCABULARY = 49408
# The miniature's is SDXL's own but for these.
SCHEDULER_CONFIG = {
    **architecture.SCHEDULER_CONFIG,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "prediction_type": "epsilon",
}
_UNET = {
    "sample_size": 128,
    "layers_per_block": 2,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **_UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def build_refiner_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **_UNET,
        down_block_types=(
            "DownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(384, 768, 1536, 1536),
        transformer_layers_per_block=4,
        attention_head_dim=(6, 12, 24, 24),
        cross_attention_dim=1280,
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2560,
    )


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=1024,
        scaling_factor=0.13025,
        force_upcast=False,  # as sdxl-vae-fp16-fix
    )


def build_text_encoders() -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    def config(width: int, layers: int, heads: int, activation: str) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            hidden_act=activation,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
        )

    return (
        CLIPTextModel(config(768, 12, 12, "quick_gelu")),
        CLIPTextModelWithProjection(config(1280, 32, 20, "gelu")),
    )


def vocabulary() -> str:
    """The miniature's vocab.json with CLIP's number of tokens, its start and end token last."""
    own = json.loads((FOLDER / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    tokens = [token for token in own if token not in (START, END)]
    tokens += [f"unused{i}</w>" for i in range(VOCABULARY - len(tokens) - 2)]
    return json.dumps({token: i for i, token in enumerate([*tokens, START, END])})


def build_tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """The miniature's tokenizers with CLIP's number of tokens."""
    built = []
    for name in ("tokenizer", "tokenizer_2"):
        with TemporaryDirectory() as folder:
            shutil.copytree(FOLDER / name, folder, dirs_exist_ok=True)
            (Path(folder) / "vocab.json").write_text(vocabulary(), encoding="utf-8")
            built.append(CLIPTokenizer.from_pretrained(folder))
    return built[0], built[1]


def build_parts(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """All parts by a pipeline's names, frozen, as PyTorch initialises such layers."""
    torch.manual_seed(0)

    def made(build: Any) -> Any:  # noqa: ANN401
        with device:  # a minute on a CPU, a moment on a GPU
            return build()

    def ready(module: nn.Module) -> nn.Module:
        return module.to(dtype).eval().requires_grad_(False)

    encoders = made(build_text_encoders)
    tokenizers = build_tokenizers()
    return {
        "unet": ready(made(build_unet)),
        "vae": ready(made(build_vae)),
        "text_encoder": ready(encoders[0]),
        "text_encoder_2": ready(encoders[1]),
        "tokenizer": tokenizers[0],
        "tokenizer_2": tokenizers[1],
    }
