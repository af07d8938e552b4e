"""What a request takes: time by stage, and memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


class Stages:
    """Wall time of each stage and the request's peak memory."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add what happens inside to the stage's time."""
        started = time.perf_counter()
        yield
        if self._device.type == "cuda":  # work is queued: the stage ends when the queue is empty
            torch.cuda.synchronize(self._device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    @contextmanager
    def around(self, stage: str, context: AbstractContextManager[T]) -> Iterator[T]:
        """The same for the time that a context takes to be entered and left."""
        with ExitStack() as stack:
            with self.time(stage):
                value = stack.enter_context(context)
            try:
                yield value
            finally:
                with self.time(stage):
                    stack.close()

    def peak_memory(self) -> int:
        """In bytes: of this request on a GPU, of the process so far elsewhere."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, kibibytes here
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
