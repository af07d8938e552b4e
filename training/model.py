"""The base model of a training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.components import TOKENIZERS, ModelComponents
from models.loading import (
    load_text_encoder,
    load_tokenizers,
    load_unet,
    load_vae,
    read_scheduler_config,
)
from training.config import Method, TrainableSpec
from training.dataset import NoiseSettings
from training.errors import MissingCompiler
from weights import cache
from weights.catalog import Edition
from weights.edition import NO_COMPILER, has_compiler

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DConditionModel


@dataclass(frozen=True)
class TrainableModel:
    """A base model whose parameters are frozen, on one device."""

    spec: TrainableSpec
    components: ModelComponents
    noise_scheduler: DDPMScheduler  # by the model's own config
    # The properties of these names in diffusers search all modules: a fifth of a step's time.
    device: torch.device
    unet_dtype: torch.dtype  # of the UNet's inputs

    @property
    def prediction_type(self) -> str:
        """`epsilon` or `v_prediction`."""
        return str(self.noise_scheduler.config.prediction_type)

    @property
    def noise(self) -> NoiseSettings:
        """What batches need to know of the model."""
        n_timesteps = self.noise_scheduler.config.num_train_timesteps
        return NoiseSettings(self.components.vae.config.scaling_factor, n_timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the UNet is to predict (B, 4, h/8, w/8)."""
        if self.prediction_type == "epsilon":
            return noise
        assert self.prediction_type == "v_prediction"
        velocity: Tensor = self.noise_scheduler.get_velocity(latents, noise, timesteps)
        return velocity


def load(
    spec: TrainableSpec, edition: Edition, device: torch.device, method: Method
) -> TrainableModel:
    """Load the model, and download what is missing. Raises a WeightsError.

    On a GPU, frozen networks are in bf16, which needs no loss scaling; trained parameters are in
    fp32, and so is the VAE, which runs only once.
    """
    from diffusers import DDPMScheduler

    if device.type == "cuda" and "LOCAL_RANK" in os.environ:  # one of several processes
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    frozen = torch.bfloat16 if device.type == "cuda" else torch.float32
    unet_dtype = torch.float32 if method is Method.FULL else frozen
    folder = cache.ensure(spec.weights, edition)
    vae_folder = cache.ensure(spec.vae_weights, edition) if spec.vae_weights else folder
    scheduler_config = read_scheduler_config(folder)
    components = ModelComponents(
        unet=load_unet(folder, unet_dtype),
        vae=load_vae(vae_folder, torch.float32),
        text_encoders={name: load_text_encoder(folder, name, frozen) for name in TOKENIZERS},
        tokenizers=load_tokenizers(folder),
        scheduler_config=scheduler_config,
        is_sdxl=True,
    )
    for module in components.modules():
        module.to(device).requires_grad_(False)
    return TrainableModel(
        spec, components, DDPMScheduler.from_config(scheduler_config), device, unet_dtype
    )


@contextmanager
def training_mode(unet: UNet2DConditionModel, gradient_checkpointing: bool) -> Iterator[None]:
    """Put the UNet in training mode, in which alone PyTorch recomputes activations."""
    try:
        unet.train()
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        yield
    finally:
        unet.eval()
        unet.disable_gradient_checkpointing()


def compile_unet(model: TrainableModel) -> UNet2DConditionModel:
    """Return the UNet, compiled at its first step of each size. Raises MissingCompiler.

    On a CPU as a whole. On a GPU the transformer blocks are compiled in place, and stay so: there
    are many of few kinds, which takes a fraction of the time.
    """
    check_compiler(model.device.type)
    unet = model.components.unet
    if model.device.type != "cuda":
        compiled: UNet2DConditionModel = torch.compile(unet)
        return compiled
    unet.compile_repeated_blocks(fullgraph=True, dynamic=False)
    return unet


def check_compiler(device: str) -> None:
    """Raise MissingCompiler where torch.compile cannot work on a kind of device."""
    if device == "cpu" and not has_compiler():
        raise MissingCompiler(f"compile_unet {NO_COMPILER}, or leave compile_unet out")


def without_compiling() -> AbstractContextManager[None]:
    """Run modules eagerly, where they run too rarely to be worth a compilation."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance
