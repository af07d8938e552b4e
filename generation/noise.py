"""Noise that the seed alone decides, on every device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils import torch_utils


def moved(drawn: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The CPU's values on the device, which is not waited for: it copies when it comes to it."""
    if device.type == "cuda":
        drawn = drawn.pin_memory()
    return drawn.to(device, non_blocking=True)


class _Torch:
    """The library, but for its normal distribution."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(torch, name)

    def randn(
        self,
        *size: Any,  # noqa: ANN401
        dtype: torch.dtype | None = None,
        **options: Any,  # noqa: ANN401
    ) -> torch.Tensor:
        """On the engine's device at once, where diffusers would move it to."""
        drawn = torch.randn(*size, dtype=torch.float32, **options).to(dtype or torch.float32)
        return moved(drawn, self._device)


@contextmanager
def drawn_in_fp32(device: torch.device) -> Iterator[None]:
    """All that diffusers draws by `randn_tensor` is drawn in fp32, then rounded.

    A generator's fp16 numbers are others than its fp32 numbers, so that a seed's picture on a GPU
    would not be its picture on a CPU. Every pipeline and scheduler has imported the function under
    its own name; so what the function calls is replaced.
    """
    original = torch_utils.torch
    try:
        torch_utils.torch = _Torch(device)
        yield
    finally:
        torch_utils.torch = original
