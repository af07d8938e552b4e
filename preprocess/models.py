"""One model in memory at a time: loaded for one stage, and gone before the next."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from weights.edition import Device

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def borrowed(load: Callable[[], Model], device: Device) -> Iterator[Model]:
    """What `load` returns, on the device and only to infer with; its memory is free afterwards.

    Also after an error or a cancellation, and whoever still holds the model: a traceback does.
    """
    model = ready(load(), device)
    try:
        with torch.inference_mode():
            yield model
    finally:
        release(model, device)


def ready(model: Model, device: Device) -> Model:
    """The model on the device, in float32, without dropout and gradients."""
    return model.to(device, torch.float32).eval().requires_grad_(False)


def release(model: nn.Module, device: Device) -> None:
    """Give the memory of the model's tensors back; the model is of no use afterwards."""
    model.to("meta")  # a tensor without data: so references that are left hold nothing
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    elif device == "mps":
        torch.mps.empty_cache()
