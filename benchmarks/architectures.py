"""The published networks as they are built, with random weights.

They measure speed and memory without the models' files. Sizes are those of the published configs;
a test checks the numbers of parameters.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKL, ControlNetUnionModel, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    ViTConfig,
    ViTForImageClassification,
)

from generation.safety import UNSAFE
from weights.miniature import architecture
from weights.miniature.architecture import END, START
from weights.miniature.evaluate import FOLDER

VOCABULARY = 49408
UNREACHABLE = 2.0  # a cosine: a checker with random weights must not flag what is generated
# The miniature's is SDXL's but for these.
SCHEDULER_CONFIG: dict[str, object] = {
    **architecture.SCHEDULER_CONFIG,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "prediction_type": "epsilon",
}

_SDXL_CONDITIONING = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}
_SDXL_SIZES = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "projection_class_embeddings_input_dim": 2816,
}
_SDXL_UNET = {
    **_SDXL_CONDITIONING,
    **_SDXL_SIZES,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "sample_size": 128,
}
_REFINER_UNET = {
    **_SDXL_CONDITIONING,
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "block_out_channels": (384, 768, 1536, 1536),
    "transformer_layers_per_block": 4,
    "attention_head_dim": (6, 12, 24, 24),
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
    "sample_size": 128,
}
_SDXL_CONTROLNET = {
    **_SDXL_CONDITIONING,
    **_SDXL_SIZES,
    "conditioning_embedding_out_channels": (16, 32, 96, 256),
}
_SD15_UNET = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "sample_size": 64,
}
_SD21_UNET = {
    **_SD15_UNET,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "sample_size": 96,
}
_VIT_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}


def _clip(
    width: int, layers: int, heads: int, activation: str, projection: int | None = None
) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=projection or width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=activation,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )


def _clip_l() -> CLIPTextModel:
    return CLIPTextModel(_clip(768, 12, 12, "quick_gelu"))


def _openclip_h() -> CLIPTextModel:
    """Build it without its last layer."""
    return CLIPTextModel(_clip(1024, 23, 16, "gelu", projection=512))


def _openclip_bigg() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(_clip(1280, 32, 20, "gelu"))


def _vae(scaling_factor: float, sample_size: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=sample_size,
        scaling_factor=scaling_factor,
        force_upcast=False,  # as sdxl-vae-fp16-fix
    )


def _safety_checker() -> StableDiffusionSafetyChecker:
    """Build one that flags nothing."""
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=_VIT_L, projection_dim=768))
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(UNREACHABLE)
        checker.special_care_embeds_weights.fill_(UNREACHABLE)
    return checker


def _nsfw_detector() -> ViTForImageClassification:
    """Build ViT-B, which judges what the checker flags."""
    labels = {0: "normal", 1: UNSAFE}
    return ViTForImageClassification(
        ViTConfig(id2label=labels, label2id={name: i for i, name in labels.items()})
    )


# A model's networks by the folder that each has in the hub's layout.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "sdxl/unet": lambda: UNet2DConditionModel(**_SDXL_UNET),
    "sdxl/text_encoder": _clip_l,
    "sdxl/text_encoder_2": _openclip_bigg,
    "sdxl-vae": lambda: _vae(0.13025, 1024),
    "sdxl-refiner/unet": lambda: UNet2DConditionModel(**_REFINER_UNET),
    "sd15/unet": lambda: UNet2DConditionModel(**_SD15_UNET),
    "sd15/text_encoder": _clip_l,
    "sd15/vae": lambda: _vae(0.18215, 512),
    "sd21/unet": lambda: UNet2DConditionModel(**_SD21_UNET),
    "sd21/text_encoder": _openclip_h,
    "sd21/vae": lambda: _vae(0.18215, 512),
    # xinsir's promax model, for eight types of map
    "sdxl-controlnet-union": lambda: ControlNetUnionModel(**_SDXL_CONTROLNET, num_control_type=8),
    "safety-checker": _safety_checker,
    "nsfw-detector": _nsfw_detector,
}


def folders(model: str) -> list[str]:
    """Return the folders of a model's networks, such as unet."""
    return [key.partition("/")[2] for key in NETWORKS if key.startswith(f"{model}/")]


def vocabulary() -> str:
    """Return the miniature's vocab.json with CLIP's number of tokens, start and end token last."""
    miniature = json.loads((FOLDER / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    tokens = [token for token in miniature if token not in (START, END)]
    tokens += [f"unused{i}</w>" for i in range(VOCABULARY - len(tokens) - 2)]
    return json.dumps({token: i for i, token in enumerate([*tokens, START, END])})


def write_tokenizer(name: str, folder: Path) -> None:
    """Write the miniature's tokenizer or tokenizer_2 with CLIP's number of tokens."""
    copytree(FOLDER / name, folder, dirs_exist_ok=True)
    (folder / "vocab.json").write_text(vocabulary(), encoding="utf-8")


def build_tokenizer(name: str) -> CLIPTokenizer:
    """Build what `write_tokenizer` writes."""
    with TemporaryDirectory() as folder:
        write_tokenizer(name, Path(folder))
        return CLIPTokenizer.from_pretrained(folder)
