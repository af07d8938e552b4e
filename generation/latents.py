"""Latents: noise from seeds, images to latents and back, masks of latents.

Latents are (N, 4, H/8, W/8) in fp32, scaled to unit variance by the VAE's scaling factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from generation.blending import Mask
from generation.sizes import SIDE_MULTIPLE
from models.cache import LoadedModel

Generators = Sequence[torch.Generator]  # one per image, on the CPU

LATENT_CHANNELS = 4


def randn(generators: Generators, size: Sequence[int], device: torch.device) -> Tensor:
    """Draw noise (N, *size), one generator per image.

    On the CPU and in fp32, so that a seed's noise depends on neither device, precision nor batch.
    """
    noise = torch.stack([torch.randn(*size, generator=g) for g in generators])
    return copy_to_device(noise, device)


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor without waiting for the work that a GPU has yet to do."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class NonBlockingCopies(TorchFunctionMode):
    """Within it, `tensor.to(device)` copies from the CPU without waiting for the GPU.

    Schedulers draw noise at each step by diffusers' `randn_tensor`, which copies it so.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        """Replace this one kind of call; see PyTorch's torch.overrides."""
        if func is Tensor.to and len(args) == 2 and isinstance(args[1], torch.device):
            tensor, device = args
            if tensor.device.type == "cpu":
                return copy_to_device(tensor, device)
        return func(*args, **(kwargs or {}))


def encode_images(
    model: LoadedModel, images: Sequence[Image.Image], generators: Generators
) -> Tensor:
    """Encode RGB images of one size, one for all generators or one for each.

    Each image's latents are a sample of the VAE's distribution (arXiv:1312.6114).
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    vae = model.components.vae

    def encode(pixels: Tensor) -> Tensor:
        parameters: Tensor = vae.encode(pixels).latent_dist.parameters
        return parameters

    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    pixels = 2 * (pixels.permute(0, 3, 1, 2).float() / 255) - 1  # (N, 3, H, W) in [-1, 1]
    parameters = model.graphs.run("encode", encode, pixels.to(model.device, model.dtype)).float()
    if len(images) < len(generators):
        parameters = parameters.expand(len(generators), -1, -1, -1)
    distribution = DiagonalGaussianDistribution(parameters)
    noise = randn(generators, distribution.mean.shape[1:], distribution.mean.device)
    latents: Tensor = (distribution.mean + distribution.std * noise) * vae.config.scaling_factor
    return latents


def decode_latents(model: LoadedModel, latents: Tensor) -> list[Image.Image]:
    """Decode latents to RGB images."""
    vae = model.components.vae

    def decode(latents: Tensor) -> Tensor:
        pixels = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        # Eight bits before they leave the device.
        shares = (pixels * 0.5 + 0.5).clamp(0, 1).float()  # (N, 3, H, W)
        values: Tensor = (shares * 255).round().to(torch.uint8)
        return values

    return to_images(model.graphs.run("decode", decode, latents.to(model.dtype)))


def to_images(values: Tensor) -> list[Image.Image]:
    """Copy values (N, 3, H, W) uint8 on any device to N RGB images."""
    rows = values.permute(0, 2, 3, 1).contiguous()
    if rows.is_cuda:  # by way of pinned memory, which a GPU writes to directly
        rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows)
    return [Image.fromarray(image) for image in rows.cpu().numpy()]


def to_latent_mask(mask: Mask) -> Tensor:
    """Reduce a mask (H, W) uint8 to latents' resolution: (1, 1, H/8, W/8) in [0, 1].

    By the maximum: pixels that may change must not be held by a neighbour.
    """
    pixels = torch.from_numpy(mask.astype(np.float32) / 255)[None, None]
    return functional.max_pool2d(pixels, SIDE_MULTIPLE)
