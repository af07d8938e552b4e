"""Noise that the seed alone decides, on every device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils import torch_utils


class _Torch:
    """The library, but for its normal distribution."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(torch, name)

    @staticmethod
    def randn(*size: Any, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:  # noqa: ANN401
        return torch.randn(*size, dtype=torch.float32, **options).to(dtype or torch.float32)


@contextmanager
def drawn_in_fp32() -> Iterator[None]:
    """All that diffusers draws by `randn_tensor` is drawn in fp32, then rounded.

    A generator's fp16 numbers are others than its fp32 numbers, so that a seed's picture on a GPU
    would not be its picture on a CPU. Every pipeline and scheduler has imported the function under
    its own name; so what the function calls is replaced.
    """
    original = torch_utils.torch
    try:
        torch_utils.torch = _Torch()
        yield
    finally:
        torch_utils.torch = original
