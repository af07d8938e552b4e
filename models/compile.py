"""Compile forward passes in the background (COMPILE=on)."""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ForwardPass = Callable[..., Any]

MAX_RECOMPILATIONS = 64  # one function serves all shapes, each of which counts as a recompilation


class CompileJob:
    """One forward pass being compiled for the shapes of its arguments."""

    def __init__(
        self, function: ForwardPass, args: tuple[Any, ...], kwargs: dict[str, Any], mode: str
    ) -> None:
        self._function, self._args, self._kwargs, self._mode = function, args, kwargs, mode
        # The number of threads is part of what torch.compile produces.
        self._threads = torch.get_num_threads()
        self.compiled: ForwardPass | None = None  # set once it has run and is warm

    def run(self) -> None:
        """Compile and run the pass; on failure, print why and leave `compiled` empty."""
        torch.set_num_threads(self._threads)
        try:
            compiled = torch.compile(self._function, fullgraph=True, dynamic=False, mode=self._mode)
            with torch.inference_mode():
                for _ in range(2):
                    compiled(*self._args, **self._kwargs)
            self.compiled = compiled
        except Exception:  # images can be made without it, whatever the compiler meets
            print("COMPILE: a forward pass could not be compiled and runs as before", flush=True)
            traceback.print_exc()


class Compiler:
    """Compiles one forward pass after the other, in a thread."""

    def __init__(self) -> None:
        limit = torch.compiler.config.recompile_limit
        torch.compiler.config.recompile_limit = max(limit, MAX_RECOMPILATIONS)
        self._jobs: queue.Queue[CompileJob] = queue.Queue()
        threading.Thread(target=self._work, name="compiler", daemon=True).start()

    def start(
        self, function: ForwardPass, args: tuple[Any, ...], kwargs: dict[str, Any], device: str
    ) -> CompileJob:
        """Compile a pass for these arguments' shapes, after the jobs started before."""
        # CUDA graphs are captured elsewhere; on a CPU, "max-autotune" has few kernels to try.
        mode = "max-autotune-no-cudagraphs" if device == "cuda" else "default"
        job = CompileJob(function, args, kwargs, mode)
        self._jobs.put(job)
        return job

    def wait(self) -> None:
        """Wait until no job is left (for measurements)."""
        self._jobs.join()

    def _work(self) -> None:
        while True:
            self._jobs.get().run()  # no variable: it would keep a model in memory
            self._jobs.task_done()


def clone_tensors(tree: Any) -> Any:  # noqa: ANN401
    """Copy nested tuples, lists and dicts with their tensors cloned."""
    return map_tensors(Tensor.clone, tree)


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:  # noqa: ANN401
    """Apply a function to the tensors in nested tuples, lists and dicts, in a fixed order."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(function, value) for value in tree)
    return tree
