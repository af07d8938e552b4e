"""Forward and backward passes as CUDA graphs: one launch instead of thousands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Outputs = tuple[Tensor, ...]
ForwardPass = Callable[..., Outputs]  # of tensors alone


class GraphedCallable:
    """Captures a forward pass and its backward pass at the first call of each shape, then replays.

    Passes without gradients run eagerly. A replay's outputs are overwritten by the next one: each
    forward pass must be followed by its backward pass, and its gradients used, before the next.
    """

    def __init__(self, function: ForwardPass, parameters: Sequence[nn.Parameter]) -> None:
        """Gradients reach `parameters`, some of which may be frozen, and inputs that need them."""
        self._function = function
        self._parameters = parameters
        self._graphs: dict[object, Any] = {}
        self._pool = torch.cuda.graph_pool_handle()  # shared, as graphs never run concurrently

    def __call__(self, *inputs: Tensor) -> Outputs:
        """Return the function's outputs."""
        trained = tuple(p.requires_grad for p in self._parameters)
        needs_gradient = any(trained) or any(i.requires_grad for i in inputs)
        if not torch.is_grad_enabled() or not needs_gradient:
            return self._function(*inputs)
        key = (trained, *((i.shape, i.dtype, i.requires_grad) for i in inputs))
        if key not in self._graphs:
            self._graphs[key] = self._capture(inputs)
        outputs: Outputs = self._graphs[key](*inputs)
        return outputs

    def _capture(self, inputs: Sequence[Tensor]) -> Any:  # noqa: ANN401
        trained = [p for p in self._parameters if p.requires_grad]
        samples = tuple(i.detach().clone().requires_grad_(i.requires_grad) for i in inputs)
        torch.cuda.empty_cache()  # a graph cannot use what is cached for other passes
        # The graph has to contain its casts: the weights that are cast change at every step.
        with torch.autocast(
            "cuda",
            dtype=torch.get_autocast_dtype("cuda"),
            enabled=torch.is_autocast_enabled("cuda"),
            cache_enabled=False,
        ):
            return torch.cuda.make_graphed_callables(
                _Module(self._function, trained),
                samples,
                allow_unused_input=True,
                pool=self._pool,
            )

    def close(self) -> None:
        """Free the graphs' memory."""
        self._graphs.clear()


class _Module(nn.Module):
    """A forward pass as `make_graphed_callables` takes it: gradients for its parameters alone."""

    def __init__(self, function: ForwardPass, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self._function = function
        self.trained = nn.ParameterList(parameters)

    def forward(self, *inputs: Tensor) -> Outputs:
        """Return the function's outputs."""
        return self._function(*inputs)
