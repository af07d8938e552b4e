"""A model's forward passes, each in the fastest way that is ready for the shapes of its inputs.

The first pass of a shape runs as PyTorch runs it, operation by operation. On a GPU the second is
recorded as a CUDA graph: a host launches some 25 operations in a millisecond, SDXL's UNet has
1,850, and a recording is launched as one. With `COMPILE=on` the pass is compiled too, in the
background, and what is compiled takes its place as soon as it is warm.

Weights are changed in place alone (`generation/adapters.py`), so that neither goes stale.
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Pass = Callable[..., Any]  # of tensors and constants in lists, tuples and dicts; gives such
Replay = Callable[[], None]
# Runs what it is given once, and then again at each replay, on the same memory.
Record = Callable[[Callable[[], None]], Replay]

MAX_SHAPES = 16  # of a model; a recording's memory is its inputs, its outputs and a share of a pool
_COMPILED_AT = 2  # calls after which a shape is worth compiling


@dataclass(frozen=True)
class Acceleration:
    """How passes of one engine are made fast."""

    record: Record | None  # None: they are not recorded
    compiler: Compiler | None  # None: they are not compiled


def acceleration(device: torch.device, compiles: bool) -> Acceleration:
    """What the device can do."""
    record = cuda_recorder() if device.type == "cuda" else None
    return Acceleration(record, Compiler() if compiles else None)


def cuda_recorder() -> Record:
    """Records CUDA graphs. They share memory: none is replayed before the last one's end."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], None]) -> Replay:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what libraries set up at a first call cannot be recorded
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(torch.cuda.current_stream()),  # a failed recording stays on its own
            # Another thread may be compiling: what it does to the device is its own affair.
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            run()
        replay: Replay = graph.replay
        return replay

    return record


class Passes:
    """The ways of one model's passes. They end with the model, whose memory recordings name."""

    def __init__(self, acceleration: Acceleration) -> None:
        self._acceleration = acceleration
        self._ways: OrderedDict[Hashable, _Way] = OrderedDict()  # used last: last

    def run(self, name: str, function: Pass, *args: object, **kwargs: object) -> Any:  # noqa: ANN401
        """What the function gives for these arguments; `name` always means the same function.

        It must be a function of its arguments and of weights alone, ask no tensor for its values,
        and give tensors.
        """
        if self._acceleration.record is None and self._acceleration.compiler is None:
            return function(*args, **kwargs)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        key = (name, structure, *map(_described, leaves))
        if key not in self._ways:
            self._ways[key] = _Way(function, leaves, structure, self._acceleration)
        self._ways.move_to_end(key)
        while len(self._ways) > MAX_SHAPES:
            self._ways.popitem(last=False)
        try:
            return self._ways[key]([leaf for leaf in leaves if isinstance(leaf, Tensor)])
        except torch.OutOfMemoryError:
            if not any(way.is_recorded for way in self._ways.values()):
                raise
            # Recordings keep what other passes free; this one has to do without.
            self.forget()
            torch.cuda.empty_cache()
            plain = Acceleration(None, None)
            self._ways[key] = _Way(function, leaves, structure, plain)
            return function(*args, **kwargs)

    def forget(self) -> None:
        """Let go of every way; the next passes begin anew."""
        self._ways.clear()


def _described(leaf: object) -> Hashable:
    """All of an argument that a pass is made for: a tensor's values are not."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return type(leaf), leaf


class _Way:
    """One pass for inputs of one shape."""

    def __init__(
        self,
        function: Pass,
        leaves: Sequence[object],
        structure: pytree.TreeSpec,
        acceleration: Acceleration,
    ) -> None:
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._structure = structure
        self._function = function
        self._acceleration = acceleration
        self._calls = 0
        self._recording: _Recording | None = None
        self._job: CompileJob | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether it holds a recording, or tried to make one."""
        return self._acceleration.record is not None and self._calls > 1

    def __call__(self, inputs: Sequence[Tensor]) -> Any:  # noqa: ANN401
        self._calls += 1
        compiler, record = self._acceleration.compiler, self._acceleration.record
        if compiler is not None and self._calls == _COMPILED_AT:
            self._job = compiler.start(self._function, self._arguments([i.clone() for i in inputs]))
        if self._job is not None and self._job.compiled is not None:
            self._function, self._job = self._job.compiled, None
            self._recording = None  # of what was not compiled yet
        if record is None or self._calls == 1:
            return self._run(inputs)
        if self._recording is None:
            try:
                self._recording = _Recording(self._run, inputs, record)
            except torch.OutOfMemoryError:
                raise  # `Passes` has memory to give back
            except Exception:  # whatever a driver meets, pictures can be made without it
                print("A pass could not be recorded and is launched as before", flush=True)
                traceback.print_exc()
                self._acceleration = replace(self._acceleration, record=None)
                return self._run(inputs)
        return self._recording(inputs)

    def _run(self, inputs: Sequence[Tensor]) -> Any:  # noqa: ANN401
        args, kwargs = self._arguments(inputs)
        return self._function(*args, **kwargs)

    def _arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves = list(self._constants)
        for place, tensor in zip(self._places, inputs, strict=True):
            leaves[place] = tensor
        arguments: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(
            leaves, self._structure
        )
        return arguments


class _Recording:
    """A recorded pass: what goes in and what comes out lies where it lay at the recording."""

    def __init__(
        self, function: Callable[[Sequence[Tensor]], Any], inputs: Sequence[Tensor], record: Record
    ) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        self._outputs: Any = None

        def run() -> None:
            self._outputs = function(self._inputs)

        self._replay = record(run)

    def __call__(self, inputs: Sequence[Tensor]) -> Any:  # noqa: ANN401
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self._replay()
        # The next replay, of any recording, writes there; schedulers keep what they are given.
        return pytree.tree_map_only(Tensor, Tensor.clone, self._outputs)


class CompileJob:
    """One pass being compiled."""

    def __init__(self, function: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._function, self._args, self._kwargs = function, args, kwargs
        # torch.compile's results are for callers with as many threads as the one it worked for.
        self._threads = torch.get_num_threads()
        self.compiled: Pass | None = None  # once it is warm

    def run(self) -> None:
        """Compile, and run it once; what fails is told, and passes go on as they were."""
        torch.set_num_threads(self._threads)
        try:
            # Recorded by ourselves; "max-autotune" tries kernels, which a CPU has few of.
            on_gpu = any(
                leaf.is_cuda for leaf in pytree.tree_leaves(self._args) if isinstance(leaf, Tensor)
            )
            mode = "max-autotune-no-cudagraphs" if on_gpu else "default"
            compiled = torch.compile(self._function, fullgraph=True, dynamic=False, mode=mode)
            with torch.inference_mode():
                for _ in range(2):
                    compiled(*self._args, **self._kwargs)
            self.compiled = compiled
        except Exception:  # whatever a compiler meets, pictures can be made without it
            print("COMPILE: a pass could not be compiled and stays as it is", flush=True)
            traceback.print_exc()


class Compiler:
    """Compiles one pass after the other, in a thread of its own."""

    def __init__(self) -> None:
        import torch._dynamo

        # One function serves all shapes, each of which counts as a recompilation of it.
        torch._dynamo.config.recompile_limit = max(
            torch._dynamo.config.recompile_limit, 4 * MAX_SHAPES
        )
        self._jobs: queue.Queue[CompileJob] = queue.Queue()
        threading.Thread(target=self._work, name="compiler", daemon=True).start()

    def start(
        self, function: Pass, arguments: tuple[tuple[Any, ...], dict[str, Any]]
    ) -> CompileJob:
        """Have it compiled for these arguments' shapes, after what was asked for before."""
        job = CompileJob(function, *arguments)
        self._jobs.put(job)
        return job

    def wait(self) -> None:
        """Until nothing is left to do: for measurements."""
        self._jobs.join()

    def _work(self) -> None:
        while True:
            self._jobs.get().run()  # kept nowhere: it names a model
            self._jobs.task_done()
