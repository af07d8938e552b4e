"""Forward and backward passes recorded as CUDA graphs: one launch in place of thousands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Outputs = tuple[Tensor, ...]
Pass = Callable[..., Outputs]  # of tensors alone


class Graphed:
    """A pass that is recorded at its first call with inputs of each shape, and then replayed.

    A pass that nothing learns from is not recorded. What a replay gives lies where the next one
    writes, so each forward pass must be followed by its backward pass, and each gradient be used,
    before the next forward pass.
    """

    def __init__(self, function: Pass, parameters: Sequence[nn.Parameter]) -> None:
        """`function` learns through `parameters`, or some of them, and through its inputs."""
        self._function = function
        self._parameters = parameters
        self._recordings: dict[object, Any] = {}
        # Recordings may use one another's memory, as they never run at the same time.
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, *inputs: Tensor) -> Outputs:
        """What the function gives, by a replay where something learns from it."""
        learns = tuple(p.requires_grad for p in self._parameters)
        matters = any(learns) or any(i.requires_grad for i in inputs)
        if not torch.is_grad_enabled() or not matters:
            return self._function(*inputs)
        key = (learns, *((i.shape, i.dtype, i.requires_grad) for i in inputs))
        if key not in self._recordings:
            self._recordings[key] = self._record(inputs)
        outputs: Outputs = self._recordings[key](*inputs)
        return outputs

    def _record(self, inputs: Sequence[Tensor]) -> Any:  # noqa: ANN401
        learning = [p for p in self._parameters if p.requires_grad]
        samples = tuple(i.detach().clone().requires_grad_(i.requires_grad) for i in inputs)
        torch.cuda.empty_cache()  # a recording cannot use what is kept for other passes
        # Casts belong into the recording: what they are made of changes from step to step.
        with torch.autocast(
            "cuda",
            dtype=torch.get_autocast_dtype("cuda"),
            enabled=torch.is_autocast_enabled("cuda"),
            cache_enabled=False,
        ):
            return torch.cuda.make_graphed_callables(
                _Module(self._function, learning),
                samples,
                allow_unused_input=True,
                pool=self._pool,
            )

    def close(self) -> None:
        """Give the memory back."""
        self._recordings.clear()


class _Module(nn.Module):
    """The form in which PyTorch takes a pass: only its parameters are given gradients."""

    def __init__(self, function: Pass, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self._function = function
        self.parameters_ = nn.ParameterList(parameters)

    def forward(self, *inputs: Tensor) -> Outputs:
        """The function's."""
        return self._function(*inputs)
