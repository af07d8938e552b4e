"""A base model as a training needs it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from training.base_models import Method, TrainableSpec
from training.dataset import Noise
from weights import cache
from weights.catalog import Edition
from weights.trained_types import TEXT_ENCODERS, UNET

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTokenizer

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@dataclass(frozen=True)
class TrainableModel:
    """The parts of a base model, all frozen."""

    spec: TrainableSpec
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: Mapping[str, nn.Module]  # "text_encoder", "text_encoder_2"
    tokenizers: Mapping[str, CLIPTokenizer]  # by the same names
    noising: DDPMScheduler  # noise schedule and prediction type of the model's own config
    scheduler_config: Mapping[str, object]

    @property
    def device(self) -> torch.device:
        """Where all parts are."""
        device: torch.device = self.unet.device
        return device

    @property
    def prediction_type(self) -> str:
        """`epsilon` or `v_prediction`."""
        return str(self.noising.config.prediction_type)

    @property
    def noise(self) -> Noise:
        """What batches have to know."""
        config = self.noising.config
        return Noise(self.vae.config.scaling_factor, config.num_train_timesteps)

    def modules(self) -> dict[str, nn.Module]:
        """What a training can change, by the names that trained weights use."""
        return {UNET: self.unet, **self.text_encoders}

    def wanted(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet is to predict."""
        if self.prediction_type == "epsilon":
            return noise
        assert self.prediction_type == "v_prediction"
        velocity: Tensor = self.noising.get_velocity(latents, noise, timesteps)
        return velocity


def load(
    spec: TrainableSpec, edition: Edition, device: torch.device, method: Method
) -> TrainableModel:
    """Read (and fetch) the model. Raises a WeightsError.

    On a GPU what stays frozen is in bf16, which needs no loss scaling; what learns is in fp32, and
    so is the VAE, whose latents are made only once.
    """
    import diffusers
    import transformers

    folder = cache.ensure(spec.weights, edition)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:  # one of several processes
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    frozen = torch.bfloat16 if device.type == "cuda" else torch.float32
    unet_dtype = torch.float32 if method is Method.FULL else frozen

    def read(cls: Any, name: str, dtype: torch.dtype) -> Any:  # noqa: ANN401
        module = cls.from_pretrained(
            folder / name, variant="fp16", dtype=dtype, use_safetensors=True, local_files_only=True
        )
        return module.to(device).eval().requires_grad_(False)

    if spec.vae_weights is None:
        vae = read(diffusers.AutoencoderKL, "vae", torch.float32)
    else:
        vae = diffusers.AutoencoderKL.from_pretrained(
            cache.ensure(spec.vae_weights, edition), dtype=torch.float32, use_safetensors=True
        )
        vae = vae.to(device).eval().requires_grad_(False)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    encoders = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
    return TrainableModel(
        spec=spec,
        unet=read(diffusers.UNet2DConditionModel, "unet", unet_dtype),
        vae=vae,
        text_encoders={
            part: read(cls, part, frozen) for part, cls in zip(TEXT_ENCODERS, encoders, strict=True)
        },
        tokenizers={
            part: transformers.CLIPTokenizer.from_pretrained(
                folder / TOKENIZERS[part], local_files_only=True
            )
            for part in TEXT_ENCODERS
        },
        noising=diffusers.DDPMScheduler.from_config(config),
        scheduler_config=config,
    )


@contextmanager
def training_mode(unet: UNet2DConditionModel, recompute: bool) -> Iterator[None]:
    """The UNet in training mode, and back.

    `recompute` activations in the backward pass instead of keeping them (gradient checkpointing):
    a third more time for a fraction of the memory. PyTorch does so in training mode alone.
    """
    try:
        unet.train()
        if recompute:
            unet.enable_gradient_checkpointing()
        yield
    finally:
        unet.eval()
        unet.disable_gradient_checkpointing()
