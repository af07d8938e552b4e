"""Captures forward passes on a CPU, with the restrictions of CUDA graphs.

A capture holds the operations that ran, on the memory that they used: no Python runs in a replay,
and its decisions are fixed. Captures share memory, so each replay overwrites the others' results.
"""

from collections.abc import Callable

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class _Capture(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        assert func.overloadpacket.__name__ not in ("item", "_local_scalar_dense", "nonzero")
        self.operations.append((func, args, kwargs or {}, results))
        return results


class FakeGraphCapture:
    """Stands in for `models.cuda_graphs.cuda_graph_capture()`."""

    def __init__(self) -> None:
        self.captures: list[_Capture] = []
        self.replays = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        run()  # as CUDA graphs need before a capture
        captured = _Capture()
        with captured:
            run()
        self.captures.append(captured)
        _overwrite(captured)  # a capture computes nothing
        return lambda: self._replay(captured)

    def _replay(self, captured: _Capture) -> None:
        self.replays += 1
        for other in self.captures:
            if other is not captured:
                _overwrite(other)
        for func, args, kwargs, results in captured.operations:
            again = pytree.tree_leaves(func(*args, **kwargs))
            for kept, new in zip(pytree.tree_leaves(results), again, strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


def _overwrite(captured: _Capture) -> None:
    """Fill all memory that a capture's operations allocated."""
    for _, args, kwargs, results in captured.operations:
        inputs = {
            t.untyped_storage().data_ptr()
            for t in pytree.tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for result in pytree.tree_leaves(results):
            is_float = isinstance(result, torch.Tensor) and result.is_floating_point()
            if is_float and result.untyped_storage().data_ptr() not in inputs:
                result.fill_(float("nan"))
