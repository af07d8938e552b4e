"""Run a model's forward passes eagerly, as captured CUDA graphs, or compiled.

The first pass of a shape runs eagerly. On a GPU the second is captured as a CUDA graph: a CPU
launches about 25 kernels per millisecond, and SDXL's UNet has 1,850, but a graph is one launch.
With `COMPILE=on` the pass is also compiled in the background, and used once it is warm.

Weights are changed in place only (`generation/lora.py`), so that no graph goes stale.
"""

from __future__ import annotations

import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from models.compile import CompileJob, Compiler, ForwardPass, clone_tensors, map_tensors

Replay = Callable[[], None]
# Runs a function once, and returns what runs it again on the same memory.
Capture = Callable[[Callable[[], None]], Replay]

MAX_SHAPES = 16  # per model; each keeps its inputs, its outputs and a share of a memory pool
_COMPILE_AT_CALL = 2  # a shape that comes once is not worth compiling


@dataclass(frozen=True)
class ExecutionConfig:
    """How the forward passes of an engine run."""

    capture: Capture | None = None  # None: no CUDA graphs
    compiler: Compiler | None = None  # None: no compilation

    @classmethod
    def for_device(cls, device: torch.device, compiles: bool) -> ExecutionConfig:
        """Return what the device supports."""
        capture = cuda_graph_capture() if device.type == "cuda" else None
        return cls(capture, Compiler() if compiles else None)


def cuda_graph_capture() -> Capture:
    """Return a function that captures CUDA graphs into one memory pool.

    They can share memory because none is replayed before the previous one has ended.
    """
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], None]) -> Replay:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries initialise at a first call: not capturable
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(torch.cuda.current_stream()),  # restored if the capture fails
            # A compiling thread may use the device meanwhile, outside this capture.
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            run()
        replay: Replay = graph.replay
        return replay

    return capture


class CUDAGraphRunner:
    """Runs the forward passes of one model; graphs end with it, as they refer to its memory."""

    def __init__(self, config: ExecutionConfig) -> None:
        self._config = config
        self._entries: OrderedDict[Hashable, _GraphEntry] = OrderedDict()  # last used last

    def run(self, name: str, function: ForwardPass, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Return `function(*args, **kwargs)`, which `name` must always mean.

        Arguments are tensors and constants in tuples, lists and dicts. The function must depend on
        its arguments and on weights alone, read no tensor's values, and return tensors.
        """
        if self._config.capture is None and self._config.compiler is None:
            return function(*args, **kwargs)
        key = (name, _signature((args, kwargs)))
        if key not in self._entries:
            self._entries[key] = _GraphEntry(function, self._config)
        self._entries.move_to_end(key)
        while len(self._entries) > MAX_SHAPES:
            self._entries.popitem(last=False)
        try:
            return self._entries[key](args, kwargs)
        except torch.OutOfMemoryError:
            if not any(entry.is_captured for entry in self._entries.values()):
                raise
            # Graphs hold memory that other passes would reuse; this shape has to do without one.
            self.clear()
            torch.cuda.empty_cache()
            self._entries[key] = _GraphEntry(function, ExecutionConfig())
            return function(*args, **kwargs)

    def clear(self) -> None:
        """Free all graphs; each shape starts eagerly again."""
        self._entries.clear()


def _signature(tree: Any) -> Hashable:  # noqa: ANN401
    """Return all that a pass is captured for: constants, and shapes rather than values."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.dtype, tree.device
    if isinstance(tree, dict):
        return tuple((name, _signature(value)) for name, value in tree.items())
    if isinstance(tree, (list, tuple)):
        return type(tree), *map(_signature, tree)
    return type(tree), tree


class _GraphEntry:
    """One forward pass for inputs of one signature."""

    def __init__(self, function: ForwardPass, config: ExecutionConfig) -> None:
        self._function, self._config = function, config
        self._calls = 0
        self._graph: CapturedGraph | None = None
        self._job: CompileJob | None = None

    @property
    def is_captured(self) -> bool:
        """Whether it holds a graph, or has tried to capture one."""
        return self._config.capture is not None and self._calls > 1

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        self._calls += 1
        if self._config.compiler is not None:
            self._compile(self._config.compiler, args, kwargs)
        if self._config.capture is None or self._calls == 1:
            return self._function(*args, **kwargs)
        if self._graph is None:
            try:
                self._graph = CapturedGraph(self._function, args, kwargs, self._config.capture)
            except torch.OutOfMemoryError:
                raise  # the runner has memory to free
            except Exception:  # images can be made without it, whatever the driver reports
                print("A forward pass could not be captured and runs as before", flush=True)
                traceback.print_exc()
                self._config = replace(self._config, capture=None)
                return self._function(*args, **kwargs)
        return self._graph(args, kwargs)

    def _compile(self, compiler: Compiler, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start compiling, or use what is compiled by now."""
        if self._calls == _COMPILE_AT_CALL:
            device = next(iter(_tensors((args, kwargs)))).device.type
            args, kwargs = clone_tensors((args, kwargs))
            self._job = compiler.start(self._function, args, kwargs, device)
        if self._job is not None and self._job.compiled is not None:
            self._function, self._job = self._job.compiled, None
            self._graph = None  # it was captured from the pass that was not compiled


class CapturedGraph:
    """A captured forward pass, with the memory of its inputs and outputs."""

    def __init__(
        self,
        function: ForwardPass,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        capture: Capture,
    ) -> None:
        args, kwargs = clone_tensors((args, kwargs))
        self._inputs = _tensors((args, kwargs))
        self._outputs: Any = None

        def run() -> None:
            self._outputs = function(*args, **kwargs)

        self._replay = capture(run)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Copy the arguments in, replay, and copy the outputs out."""
        for static, given in zip(self._inputs, _tensors((args, kwargs)), strict=True):
            static.copy_(given, non_blocking=True)
        self._replay()
        # The next replay of any graph writes there, and schedulers keep what they are given.
        return clone_tensors(self._outputs)


def _tensors(tree: Any) -> list[Tensor]:  # noqa: ANN401
    """Return the tensors in nested tuples, lists and dicts, in a fixed order."""
    found: list[Tensor] = []
    map_tensors(found.append, tree)
    return found
