"""The implementations that are compared: our `predict`, and baselines."""

from __future__ import annotations

import gc
import os
import time
from abc import ABC, abstractmethod
from base64 import b64encode
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks import environment
from benchmarks.random_weights import write_cog_lora
from benchmarks.workloads import (
    COG_SDXL,
    COMPILED,
    DIFFUSERS,
    LORA_RANK,
    LORA_SCALE,
    OURS,
    OURS_FULL,
    Workload,
)
from generation.options import GenerationRequest
from inputs import flatten
from weights.miniature import world

if TYPE_CHECKING:
    from predict import Predictor

CONTROLNET = "controlnet-union-sdxl"
PLAIN = {"apply_watermark": False, "disable_safety_checker": True}
FULL = {"apply_watermark": True, "disable_safety_checker": False, "lora_scale": LORA_SCALE}


def default_inputs() -> dict[str, object]:
    """Return the arguments that Cog passes to `predict` for an empty request."""
    return {entry.name: entry.default for entry in flatten(GenerationRequest)}


def allocated_bytes() -> int:
    """Return the bytes of tensors on the GPU; 0 on a CPU, where one process holds all sides."""
    return torch.cuda.memory_allocated() if environment.device().type == "cuda" else 0


class Side(ABC):
    """An implementation that generates images."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}  # seconds of the last request, where they are measured
        self.setup_seconds: float | None = None  # until they are reported, with one workload
        self.resident_bytes = 0  # of a GPU, that stay allocated between requests

    @abstractmethod
    def prepare(self, workload: Workload) -> None:
        """Do what is done once for a workload, before any request."""

    @abstractmethod
    def run(self, workload: Workload, seed: int, folder: Path) -> list[Path]:
        """Make one request and return its files, which may be in `folder`."""

    def use_lora(self, file: Path) -> None:
        """Use this LoRA in the requests that follow."""
        raise NotImplementedError

    def wait_until_warm(self) -> None:
        """Wait for work that the warm-up has started in the background."""
        return

    def close(self) -> None:
        """Delete files."""
        return


class Ours(Side):
    """predict.py, called with the values that Cog passes where a request leaves inputs out."""

    def __init__(
        self,
        predictor: Predictor,
        inputs: Mapping[str, object],
        control_image: Path | None = None,
        stub: bool = False,
    ) -> None:
        """`inputs` are in every request; `stub` models take no files."""
        super().__init__()
        self.predictor = predictor
        self.predictor.record_metric = self._record
        self._common, self._control_image, self._stub = dict(inputs), control_image, stub
        self._arguments: dict[str, Any] = {}

    @classmethod
    def load(
        cls, model: str, inputs: Mapping[str, object], control_image: Path, lora: Path | None
    ) -> Ours:
        """Set up a predictor; `lora` is the operator's weights."""
        from predict import Predictor

        environment.provide(model)
        os.environ["MODEL"] = model  # all that setup loads; `environment.settings` restores it
        predictor = Predictor()
        predictor.setup(str(lora) if lora else None)
        return cls(predictor, inputs, control_image)

    def _record(self, name: str, value: Any, *_: object) -> None:  # noqa: ANN401
        if name.startswith("seconds."):
            self.stages[name.removeprefix("seconds.")] = value

    def prepare(self, workload: Workload) -> None:
        """Provide the workload's files, and its inputs as Cog passes them."""
        if not self._stub:
            environment.provide(workload.model, workload.is_refined)
        inputs = {**self._common, **workload.inputs}
        if workload.control_type:
            environment.folder(CONTROLNET)
            inputs["controlnet_1"] = workload.control_type
            inputs["controlnet_1_image"] = self._control_image
        self._arguments = {**default_inputs(), **inputs}

    def use_lora(self, file: Path) -> None:
        """Send the LoRA with the requests that follow, as its content."""
        content = b64encode(file.read_bytes()).decode()
        url = f"data:application/octet-stream;name={file.name};base64,{content}"
        self._arguments["replicate_weights"] = url
        self._arguments["lora_scale"] = LORA_SCALE

    def wait_until_warm(self) -> None:
        """With COMPILE=on, wait until what the warm-up asked for is compiled."""
        compiler = self.predictor.engine._models.execution.compiler
        if compiler is not None:
            compiler.wait()

    def run(self, workload: Workload, seed: int, folder: Path) -> list[Path]:
        self.stages = {}
        files = self.predictor.predict(**{**self._arguments, "seed": seed})
        return [Path(file) for file in files]

    def close(self) -> None:
        self.predictor.folders.remove()


class Sides:
    """All sides, in one process, each built when a workload first needs it. Close it."""

    def __init__(self, folder: Path) -> None:
        """`folder` is for the files that requests are made with."""
        self._folder = folder
        self._built: dict[tuple[str, str], Side] = {}
        self.control_image = folder / "control.png"
        scene = world.random_scene(np.random.default_rng(0))
        size = environment.spec("sdxl").native_size
        world.render(scene, size, size).save(self.control_image)

    @property
    def loras(self) -> list[Path]:
        """Two LoRAs in cog-sdxl's format."""
        files = [self._folder / f"lora-{seed}.safetensors" for seed in (0, 1)]
        for seed, file in enumerate(files):
            if not file.exists():
                write_cog_lora(file, environment.spec("sdxl").weights, LORA_RANK, seed)
        return files

    def has(self, name: str, workload: Workload) -> bool:
        """Whether the side is built already."""
        return _key(name, workload) in self._built

    def get(self, name: str, workload: Workload) -> Any:  # noqa: ANN401  of the class in _build
        """Return the side, built if need be, and prepared for the workload."""
        key, is_new = _key(name, workload), not self.has(name, workload)
        bytes_before, began = allocated_bytes(), time.perf_counter()
        if is_new:
            self._built[key] = self._build(name, workload)
        side = self._built[key]
        side.prepare(workload)
        if is_new:
            side.setup_seconds = time.perf_counter() - began
        side.resident_bytes += allocated_bytes() - bytes_before
        return side

    def _build(self, name: str, workload: Workload) -> Side:
        from benchmarks.baseline_cog_sdxl import CogSdxl
        from benchmarks.baseline_diffusers import Diffusers

        if name == OURS:
            return Ours.load(workload.model, PLAIN, self.control_image, None)
        if name == OURS_FULL:
            operators = None if workload.switches_lora else self.loras[0]
            return Ours.load(workload.model, FULL, self.control_image, operators)
        if name == COG_SDXL:
            return CogSdxl(self.get(DIFFUSERS, workload), self.loras[0])
        return Diffusers.load(workload.model, self.control_image, compiled=name == COMPILED)

    def make_room(self, workload: Workload, later: Iterable[Workload]) -> None:
        """Drop what no later workload needs; if the GPU is half full, all but this workload's."""
        if environment.device().type == "cuda":
            free, total = torch.cuda.mem_get_info()
            later = [] if free < total / 2 else later
        self._keep([workload, *later])

    def _keep(self, workloads: Iterable[Workload]) -> None:
        needed = {_key(name, w) for w in workloads for name in (*w.sides, DIFFUSERS)}
        for key in set(self._built) - needed:
            self._built.pop(key).close()
        gc.collect()
        if environment.device().type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Drop all of them, with their files."""
        self._keep([])


def _key(name: str, workload: Workload) -> tuple[str, str]:
    """Return a key that is equal where one side serves both workloads.

    A side that has the operator's LoRA cannot serve requests that send one.
    """
    switches = name == OURS_FULL and workload.switches_lora
    return name, f"{workload.model}, a LoRA in requests" if switches else workload.model
