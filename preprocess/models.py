"""One model in memory at a time: loaded for one stage, and freed before the next."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weights.edition import Device


@contextmanager
def pretrained(cls: Any, folder: Path, device: Device) -> Iterator[Any]:  # noqa: ANN401
    """Load a model of one of transformers' classes for inference, and free its memory on exit.

    Also after an error or a cancellation, whose traceback still refers to the model.
    """
    model = cls.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    try:
        with torch.inference_mode():
            yield ready(model, device)
    finally:
        release(model, device)


def ready(model: nn.Module, device: Device) -> nn.Module:
    """Return the model on the device, in float32, without dropout and gradients."""
    return model.to(device, torch.float32).eval().requires_grad_(False)


def release(model: nn.Module, device: Device) -> None:
    """Free the memory of the model's tensors; the model cannot be used afterwards."""
    model.to("meta")  # tensors without data, so that remaining references hold nothing
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    elif device == "mps":
        torch.mps.empty_cache()
