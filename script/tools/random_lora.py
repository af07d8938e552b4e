"""LoRAs with random values, strong enough to be seen in a picture."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STRENGTH = 0.3  # of the change, beside a layer's values as PyTorch initialises them
MATRICES = ("to_q", "to_k", "to_v", "to_out.0")


def _attention(unet: nn.Module) -> dict[str, nn.Linear]:
    """The UNet's attention layers' matrices, by path."""
    return {
        path: module
        for path, module in unet.named_modules()
        if isinstance(module, nn.Linear) and ".attn" in path and path.endswith(MATRICES)
    }


def _pairs(unet: nn.Module, rank: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Down (rank, in) and up (out, rank) by path; the UNet may have no values."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    pairs = {}
    for path, layer in _attention(unet).items():
        down = drawn(rank, layer.in_features) / layer.in_features**0.5
        up = drawn(layer.out_features, rank) * STRENGTH / rank**0.5
        pairs[path] = down.half(), up.half()
    return pairs


def cog_tensors(unet: nn.Module, rank: int, seed: int) -> dict[str, Tensor]:
    """As cog-sdxl's trainer saves one."""
    tensors: dict[str, Tensor] = {}
    for path, (down, up) in _pairs(unet, rank, seed).items():
        path = path.removesuffix(".0")
        layer, _, matrix = path.rpartition(".")
        key = f"{layer}.processor.{matrix}_lora"
        tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    return tensors


def peft_tensors(unet: nn.Module, rank: int, seed: int) -> dict[str, Tensor]:
    """As diffusers saves one."""
    tensors: dict[str, Tensor] = {}
    for path, (down, up) in _pairs(unet, rank, seed).items():
        key = f"unet.{path}"
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    return tensors
