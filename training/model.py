"""A base model as a training needs it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from training.base_models import Method, TrainableSpec
from training.dataset import Noise
from training.errors import MissingCompiler
from weights import cache
from weights.catalog import Edition
from weights.edition import NO_COMPILER, has_compiler
from weights.formats.types import TEXT_ENCODERS, UNET

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
    # diffusers' own properties of these names look through all modules each time they are asked,
    # which took a fifth of a step.
    device: torch.device  # where all parts are
    unet_dtype: torch.dtype  # of what it takes in

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
        device=device,
        unet_dtype=unet_dtype,
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


@contextmanager
def compiled(model: TrainableModel, wanted: bool) -> Iterator[None]:
    """The UNet's steps compiled by torch.compile, if that is wanted, and as they were afterwards.

    Each size of picture is compiled for itself, at its first step: the whole UNet on a CPU, and on
    a GPU its transformer blocks, which are alike but for their widths. Raises MissingCompiler.
    """
    if not wanted:
        yield
        return
    check_compiler(model.device.type)
    try:
        if model.device.type == "cuda":
            model.unet.compile_repeated_blocks(fullgraph=True, dynamic=False)
        else:
            model.unet.compile()
        yield
    finally:
        for module in model.unet.modules():
            module._compiled_call_impl = None  # what nn.Module.compile sets


def check_compiler(device: str) -> None:
    """Raises MissingCompiler where torch.compile cannot work on a kind of device."""
    if device == "cpu" and not has_compiler():
        raise MissingCompiler(f"compile_unet {NO_COMPILER}, or leave compile_unet out")


def uncompiled() -> AbstractContextManager[None]:
    """What runs but now and then, such as a preview, is not worth a compilation."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance
