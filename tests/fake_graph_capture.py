"""A recorder of passes on a CPU, which keeps CUDA graphs' bargain.

A recording is the operations that ran, on the memory that they had: Python does not run again, and
what it decided is decided. Recordings share memory, so each replay spoils what the others left.
"""

from collections.abc import Callable

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        assert func.overloadpacket.__name__ not in ("item", "_local_scalar_dense", "nonzero")
        self.operations.append((func, args, kwargs or {}, results))
        return results


class Recorder:
    """In the place of `generation.passes.cuda_recorder()`."""

    def __init__(self) -> None:
        self.recordings: list[_Tape] = []
        self.replays = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        run()  # as before a capture
        tape = _Tape()
        with tape:
            run()
        self.recordings.append(tape)
        _spoil(tape)  # a capture computes nothing
        return lambda: self._replay(tape)

    def _replay(self, tape: _Tape) -> None:
        self.replays += 1
        for other in self.recordings:
            if other is not tape:
                _spoil(other)
        for func, args, kwargs, results in tape.operations:
            again = pytree.tree_leaves(func(*args, **kwargs))
            for kept, new in zip(pytree.tree_leaves(results), again, strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


def _spoil(tape: _Tape) -> None:
    """Fill all memory that the recording's operations took."""
    for _, args, kwargs, results in tape.operations:
        given = {
            t.untyped_storage().data_ptr()
            for t in pytree.tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for result in pytree.tree_leaves(results):
            own = isinstance(result, torch.Tensor) and result.is_floating_point()
            if own and result.untyped_storage().data_ptr() not in given:
                result.fill_(float("nan"))
