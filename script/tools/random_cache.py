"""A cache of weights as downloads would leave it, but with random values in the real architectures.

So a benchmark needs no files and measures the code that serves people: what reads a model cannot
tell. Entries are written when they are first needed; nothing is ever fetched.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPImageProcessor, ViTConfig, ViTImageProcessor

from script.tools import random_lora, random_models, random_sdxl
from weights import cache
from weights.catalog import CATALOG, Edition

MINIATURE = cache.MINIATURE_FOLDER
Build = Callable[[], nn.Module]


def write(name: str, device: torch.device) -> Path:
    """The folder of the full edition's entry `name`, in the cache; made on `device` if need be."""
    entry = CATALOG[Edition.FULL][name]
    folder = cache.entry_folder(entry)
    if not (folder / cache.COMPLETE).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        WRITERS[name](folder, device)
        vouched = {
            path: {"size_bytes": (folder / path).stat().st_size, "sha256": f"{name}/{path}"}
            for path in cache.files_of(entry)
        }
        (folder / cache.COMPLETE).write_text(json.dumps({"files": vouched}))
    return folder


def _save(
    build: Build, device: torch.device, folder: Path, dtype: torch.dtype = torch.float16
) -> None:
    """The module as the hub has it, its values as PyTorch initialises such layers."""
    torch.manual_seed(0)
    with device:  # a minute on a CPU, a moment on a GPU
        module = build()
    variant = "fp16" if dtype is torch.float16 else None
    saved: Any = (module.half() if variant else module).cpu()
    saved.save_pretrained(folder, variant=variant)


def _tokenizer(name: str, folder: Path) -> None:
    shutil.copytree(MINIATURE / "sdxl-base" / name, folder / name, dirs_exist_ok=True)
    (folder / name / "vocab.json").write_text(random_sdxl.vocabulary(), encoding="utf-8")


def _index(miniature: str, folder: Path) -> None:
    """What the miniature of that name is made of, with SDXL's noise levels."""
    shutil.copy(MINIATURE / miniature / "model_index.json", folder)
    (folder / "scheduler").mkdir(exist_ok=True)
    text = json.dumps(random_sdxl.SCHEDULER_CONFIG)
    (folder / "scheduler" / "scheduler_config.json").write_text(text)


def _sdxl(folder: Path, device: torch.device) -> None:
    _index("sdxl-base", folder)
    _save(random_sdxl.build_unet, device, folder / "unet")
    for number, name in enumerate(("text_encoder", "text_encoder_2")):
        _save(lambda n=number: random_sdxl.build_text_encoders()[n], device, folder / name)  # type: ignore[misc]
        _tokenizer(name.replace("text_encoder", "tokenizer"), folder)


def _sdxl_turbo(folder: Path, device: torch.device) -> None:
    """As SDXL: the same files under other names."""
    shutil.copytree(write("sdxl-base", device), folder, copy_function=os.link, dirs_exist_ok=True)
    (folder / cache.COMPLETE).unlink()


def _refiner(folder: Path, device: torch.device) -> None:
    _index("sdxl-refiner", folder)
    _save(random_sdxl.build_refiner_unet, device, folder / "unet")


def _sd(name: str) -> Callable[[Path, torch.device], None]:
    """Of the architecture with that name."""

    def write_sd(folder: Path, device: torch.device) -> None:
        _index(name, folder)
        for part in ("unet", "text_encoder"):
            _save(getattr(random_models, f"build_{name}_{part}"), device, folder / part)
        _save(random_models.build_sd_vae, device, folder / "vae")
        _tokenizer("tokenizer", folder)

    return write_sd


def _vae(folder: Path, device: torch.device) -> None:
    _save(random_sdxl.build_vae, device, folder, torch.float32)


def _lora(base: str) -> Callable[[Path, torch.device], None]:
    """Made for the UNet of an entry."""

    def write_lora(folder: Path, device: torch.device) -> None:
        build = random_sdxl.build_unet if base == "sdxl-base" else random_models.build_sd15_unet
        with torch.device("meta"):
            unet = build()
        tensors = random_lora.peft_tensors(unet, rank=8, seed=1)
        save_file(tensors, folder / "pytorch_lora_weights.safetensors")

    return write_lora


def _controlnet(folder: Path, device: torch.device) -> None:
    _save(random_models.build_controlnet_union, device, folder)


def _checker(folder: Path, device: torch.device) -> None:
    """A pickle of values, as it was published."""
    with device:
        checker = random_models.build_safety_checker()
    checker.config.save_pretrained(folder)
    state: dict[str, Any] = {k: v.cpu() for k, v in checker.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    side = checker.config.vision_config.image_size
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(folder)


def _detector(folder: Path, device: torch.device) -> None:
    _save(random_models.build_nsfw_detector, device, folder, torch.float32)
    side = ViTConfig.from_pretrained(folder).image_size
    ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)


WRITERS: dict[str, Callable[[Path, torch.device], None]] = {
    "sdxl-base": _sdxl,
    "sdxl-turbo": _sdxl_turbo,
    "sdxl-refiner": _refiner,
    "sdxl-vae-fp16-fix": _vae,
    "sd15": _sd("sd15"),
    "sd-turbo": _sd("sd21"),
    "lcm-lora-sdxl": _lora("sdxl-base"),
    "lcm-lora-sd15": _lora("sd15"),
    "controlnet-union-sdxl": _controlnet,
    "safety-checker": _checker,
    "nsfw-detection": _detector,
}
