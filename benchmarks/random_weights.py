"""A cache of weights as downloads would leave it, with random values in the published networks.

So a benchmark needs no files and measures the code that serves users: what loads a model cannot
tell. Entries are written when they are first needed; nothing is ever downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessor, ViTConfig, ViTImageProcessor

from benchmarks import architectures, environment
from benchmarks.architectures import NETWORKS, SCHEDULER_CONFIG
from weights import cache
from weights.catalog import CATALOG, Edition

LORA_STRENGTH = 0.3  # of the change, beside a layer's weights as PyTorch initialises them
LORA_MODULES = ("to_q", "to_k", "to_v", "to_out.0")

Writer = Callable[[Path, torch.device], None]


def write(name: str, device: torch.device) -> Path:
    """Return the full edition's folder of a catalog entry; write it, made on `device`, if needed.

    On a CPU, initialising SDXL takes a minute; on a GPU, a moment.
    """
    entry = CATALOG[Edition.FULL][name]
    folder = cache.entry_folder(entry)
    if not (folder / cache.COMPLETE).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        WRITERS[name](folder, device)
        files = {
            path: {"size_bytes": (folder / path).stat().st_size, "sha256": f"{name}/{path}"}
            for path in cache.files_of(entry)
        }
        (folder / cache.COMPLETE).write_text(json.dumps({"files": files}))
    return folder


def _build(network: str, device: torch.device) -> Any:  # noqa: ANN401
    torch.manual_seed(0)
    with device:
        return NETWORKS[network]()


def _network(network: str, dtype: torch.dtype) -> Writer:
    """Return what saves a network as the hub has it."""

    def write_network(folder: Path, device: torch.device) -> None:
        variant = "fp16" if dtype is torch.float16 else None
        _build(network, device).to("cpu", dtype).save_pretrained(folder, variant=variant)

    return write_network


def _model(model: str, miniature: str) -> Writer:
    """Return what saves a model's networks, with the index of a miniature one."""

    def write_model(folder: Path, device: torch.device) -> None:
        shutil.copy(cache.MINIATURE_FOLDER / miniature / "model_index.json", folder)
        (folder / "scheduler").mkdir(exist_ok=True)
        config = json.dumps(SCHEDULER_CONFIG)
        (folder / "scheduler" / "scheduler_config.json").write_text(config)
        for network in architectures.folders(model):
            _network(f"{model}/{network}", torch.float16)(folder / network, device)
            if network.startswith("text_encoder"):
                tokenizer = network.replace("text_encoder", "tokenizer")
                architectures.write_tokenizer(tokenizer, folder / tokenizer)

    return write_model


def _sdxl_turbo(folder: Path, device: torch.device) -> None:
    """Link the same files as SDXL's under other names."""
    shutil.copytree(write("sdxl-base", device), folder, copy_function=os.link, dirs_exist_ok=True)
    (folder / cache.COMPLETE).unlink()


def _safety_checker(folder: Path, device: torch.device) -> None:
    """Save a pickle of tensors, as it was published."""
    checker = _build("safety-checker", device).cpu()
    checker.config.save_pretrained(folder)
    torch.save(checker.state_dict(), folder / "pytorch_model.bin")
    size = checker.config.vision_config.image_size
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size).save_pretrained(folder)


def _nsfw_detector(folder: Path, device: torch.device) -> None:
    _network("nsfw-detector", torch.float32)(folder, device)
    size = ViTConfig.from_pretrained(folder).image_size
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)


def _lora(model: str) -> Writer:
    """Return what saves a LoRA of a model's UNet as diffusers does."""

    def write_lora(folder: Path, device: torch.device) -> None:
        with torch.device("meta"):
            unet = NETWORKS[f"{model}/unet"]()
        tensors = {}
        for path, down, up in _lora_pairs(unet, rank=8, seed=1):
            tensors[f"unet.{path}.lora_A.weight"] = down
            tensors[f"unet.{path}.lora_B.weight"] = up
        save_file(tensors, folder / "pytorch_lora_weights.safetensors")

    return write_lora


def write_cog_lora(file: Path, weights: str, rank: int, seed: int) -> None:
    """Write a LoRA of a catalog entry's UNet as cog-sdxl's trainer does."""
    config = UNet2DConditionModel.load_config(environment.folder(weights) / "unet")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    tensors = {}
    for path, down, up in _lora_pairs(unet, rank, seed):
        layer, _, matrix = path.removesuffix(".0").rpartition(".")
        tensors[f"{layer}.processor.{matrix}_lora.down.weight"] = down
        tensors[f"{layer}.processor.{matrix}_lora.up.weight"] = up
    save_file(tensors, file)


def _lora_pairs(unet: nn.Module, rank: int, seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Draw path, down (rank, in) and up (out, rank) of each attention layer, visible in an image.

    The UNet may be on the meta device.
    """
    generator = torch.Generator().manual_seed(seed)
    for path, layer in unet.named_modules():
        if isinstance(layer, nn.Linear) and ".attn" in path and path.endswith(LORA_MODULES):
            n_in, n_out = layer.in_features, layer.out_features
            down = torch.randn(rank, n_in, generator=generator) / n_in**0.5
            up = torch.randn(n_out, rank, generator=generator) * LORA_STRENGTH / rank**0.5
            yield path, down.half(), up.half()


WRITERS: dict[str, Writer] = {
    "sdxl-base": _model("sdxl", "sdxl-base"),
    "sdxl-turbo": _sdxl_turbo,
    "sdxl-refiner": _model("sdxl-refiner", "sdxl-refiner"),
    "sdxl-vae-fp16-fix": _network("sdxl-vae", torch.float32),
    "sd15": _model("sd15", "sd15"),
    "sd-turbo": _model("sd21", "sd21"),
    "lcm-lora-sdxl": _lora("sdxl"),
    "lcm-lora-sd15": _lora("sd15"),
    "controlnet-union-sdxl": _network("sdxl-controlnet-union", torch.float16),
    "safety-checker": _safety_checker,
    "nsfw-detection": _nsfw_detector,
}
