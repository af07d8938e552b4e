"""Measure a request: wall time by stage, and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


class Timings:
    """Wall time in seconds of each part of a request."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of the `with` block to a part's."""
        started = time.perf_counter()
        yield
        if self._device.type == "cuda":  # work is queued: it is done when the queue is empty
            torch.cuda.synchronize(self._device)
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

    @contextmanager
    def wrap(self, part: str, context: AbstractContextManager[T]) -> Iterator[T]:
        """Add the time that a context takes to enter and to exit."""
        with ExitStack() as stack:
            with self.measure(part):
                value = stack.enter_context(context)
            try:
                yield value
            finally:
                with self.measure(part):
                    stack.close()

    def peak_memory(self) -> int:
        """Return bytes: of this request on a GPU, of the process so far elsewhere."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, kibibytes here
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
