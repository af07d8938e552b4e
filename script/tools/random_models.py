"""Stable Diffusion 1.5 and 2.1, SDXL's ControlNets and the safety models as they are built.

With random weights, like random_sdxl: to measure speed and memory without any of their files.
Sizes are those of the published configs; a test holds the numbers of parameters.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPTextModel,
    ViTConfig,
    ViTForImageClassification,
)

from generation.safety import UNSAFE
from script.tools import random_sdxl

UNREACHABLE = 2.0  # a cosine: a checker of random values must not flag what is drawn

_SD_UNET = {
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}
_SDXL_CONTROLNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "conditioning_embedding_out_channels": (16, 32, 96, 256),
}


def build_sd15_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **_SD_UNET, sample_size=64, attention_head_dim=8, cross_attention_dim=768
    )


def build_sd21_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **_SD_UNET,
        sample_size=96,
        attention_head_dim=(5, 10, 20, 20),
        cross_attention_dim=1024,
        use_linear_projection=True,
    )


def build_sd15_text_encoder() -> CLIPTextModel:
    """SDXL's first one."""
    return random_sdxl.build_text_encoders()[0]


def build_sd21_text_encoder() -> CLIPTextModel:
    """OpenCLIP's H without its last layer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=random_sdxl.VOCABULARY,
            hidden_size=1024,
            intermediate_size=4096,
            projection_dim=512,
            num_hidden_layers=23,
            num_attention_heads=16,
            hidden_act="gelu",
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
        )
    )


def build_sd_vae() -> AutoencoderKL:
    """SDXL's, with another scale."""
    vae = random_sdxl.build_vae()
    vae.register_to_config(scaling_factor=0.18215, sample_size=512)
    return vae


def build_controlnet() -> ControlNetModel:
    """For one kind of map."""
    return ControlNetModel(**_SDXL_CONTROLNET)


def build_controlnet_union() -> ControlNetUnionModel:
    """For eight kinds of map: xinsir's promax model."""
    return ControlNetUnionModel(**_SDXL_CONTROLNET, num_control_type=8)


def build_safety_checker() -> StableDiffusionSafetyChecker:
    """Around CLIP's ViT-L; it flags nothing."""
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=768))
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(UNREACHABLE)
        checker.special_care_embeds_weights.fill_(UNREACHABLE)
    return checker


def build_nsfw_detector() -> ViTForImageClassification:
    """ViT-B, which is asked about what the checker flags."""
    labels = {0: "normal", 1: UNSAFE}
    return ViTForImageClassification(
        ViTConfig(id2label=labels, label2id={name: i for i, name in labels.items()})
    )
