"""Who is measured: our `predict`, and the peers, each built when a workload first needs it."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from script.tools import bench_models
from script.tools.bench_workloads import (
    COG,
    COMPILED,
    DIFFUSERS,
    LORA_RANK,
    LORA_SCALE,
    OURS,
    OURS_ALL,
    PROMPT,
    Workload,
)

ROOT = Path(__file__).parents[2]
PLAIN = {"apply_watermark": "false", "disable_safety_checker": "true"}
ALL = {"apply_watermark": "true", "disable_safety_checker": "false", "lora_scale": LORA_SCALE}
LORAS = ("first.safetensors", "second.safetensors")


class Side(Protocol):
    """Whoever makes pictures."""

    stages: dict[str, float]  # of the last request, where they are measured

    def prepare(self, workload: Workload) -> None:
        """What needs to be done once for a workload, before any request."""

    def run(self, workload: Workload, seed: int, folder: Path) -> list[Path]:
        """One request, its files perhaps in `folder`."""


class Ours:
    """predict.py, with the values that Cog gives where a request leaves them out."""

    def __init__(
        self, model: str, more: dict[str, Any], control_picture: Path, lora: Path | None
    ) -> None:
        """`lora` is in every picture, as the operator's weights."""
        from script.tools.openapi import document

        self._more, self._control_picture = more, control_picture
        self.predictor = self._set_up(model, lora)
        self.predictor.record_metric = self._hear
        self._schema = document(ROOT)
        self._inputs: dict[str, Any] = {}
        self.stages: dict[str, float] = {}

    def _set_up(self, model: str, lora: Path | None) -> Any:  # noqa: ANN401
        """The predictor, ready."""
        from predict import Predictor

        self._provide(model)
        os.environ["MODEL"] = (
            model  # which setup loads, and no other; bench_models.settings ends it
        )
        predictor = Predictor()
        predictor.setup(str(lora) if lora else None)
        return predictor

    def _provide(self, model: str, refiner: bool = False) -> None:
        """Have the model's files."""
        bench_models.provide(model, refiner)

    def _hear(self, name: str, value: Any, *_: object) -> None:  # noqa: ANN401
        if name.startswith("seconds."):
            self.stages[name.removeprefix("seconds.")] = value

    def prepare(self, workload: Workload) -> None:
        """Have the workload's files, and its inputs as Cog gives them."""
        self._provide(workload.model, "refine" in workload.asked)
        asked = {"prompt": PROMPT, **self._more, **workload.asked}
        if workload.control:
            bench_models.folder("controlnet-union-sdxl")
            asked |= {"controlnet_1": workload.control}
            asked |= {"controlnet_1_image": f"@{self._control_picture}"}
        self._inputs = self.inputs(asked)

    def inputs(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Arguments of predict."""
        from script.tools.arguments import as_cog_gives_them, parse_inputs

        flags = [f"{name}={value}" for name, value in asked.items()]
        parsed = parse_inputs(flags, self._schema, "Input", ROOT)
        return as_cog_gives_them(parsed, self._schema, "Input")

    def wear(self, lora: Path) -> None:
        """Name the LoRA in the requests to come, as its content."""
        named = self.inputs({"prompt": PROMPT, "replicate_weights": f"@{lora}"})
        self._inputs |= {"replicate_weights": named["replicate_weights"], "lora_scale": LORA_SCALE}

    def settle(self) -> None:
        """With COMPILE=on, wait until what the warm-ups asked for is compiled."""
        compiler = self.predictor.engine._store.acceleration.compiler
        if compiler is not None:
            compiler.wait()

    def run(self, workload: Workload, seed: int, folder: Path) -> list[Path]:
        self.stages = {}
        files = self.predictor.predict(**{**self._inputs, "seed": seed})
        return [Path(file) for file in files]


class Sides:
    """All of them, in one process, with the same weights. Close it."""

    def __init__(self, folder: Path) -> None:
        """`folder` is for the files that requests are made with."""
        self.folder = folder
        self._built: dict[tuple[str, str], Side] = {}
        self.resident: dict[tuple[str, str], int] = {}  # bytes of a GPU, as they are measured
        self.control_picture = folder / "control.png"
        _draw(self.control_picture)

    @property
    def loras(self) -> tuple[Path, Path]:
        """Two LoRAs in cog-sdxl's format."""
        first, second = (self.folder / name for name in LORAS)
        if not first.exists():
            _write_loras((first, second))
        return first, second

    def has(self, name: str, workload: Workload) -> bool:
        """Whether the side is built already."""
        return self.key(name, workload) in self._built

    def get(self, name: str, workload: Workload) -> Any:  # noqa: ANN401
        """The side, built if need be, and prepared for the workload."""
        key = self.key(name, workload)
        if key not in self._built:
            self._built[key] = self._build(name, workload)
        side = self._built[key]
        side.prepare(workload)
        return side

    def _build(self, name: str, workload: Workload) -> Side:
        from script.tools.peer_cog_sdxl import CogSdxl
        from script.tools.peer_diffusers import Diffusers

        if name == OURS:
            return Ours(workload.model, dict(PLAIN), self.control_picture, None)
        if name == OURS_ALL:
            own = None if workload.switches else self.loras[0]
            return Ours(workload.model, dict(ALL), self.control_picture, own)
        if name == COG:
            return CogSdxl(self.get(DIFFUSERS, workload), self.loras[0])
        return Diffusers(workload.model, self.control_picture, compiled=name == COMPILED)

    def make_room(self, workload: Workload, later: Iterable[Workload]) -> None:
        """Let go of what no later workload needs; of more if the GPU is half full."""
        if bench_models.device().type == "cuda":
            import torch

            free, total = torch.cuda.mem_get_info()
            later = [] if free < total / 2 else later
        self._keep([workload, *later])

    def _keep(self, workloads: Iterable[Workload]) -> None:
        needed = {self.key(name, w) for w in workloads for name in (*w.sides, DIFFUSERS)}
        for key in set(self._built) - needed:
            _end(self._built.pop(key))
            self.resident.pop(key, None)
        gc.collect()
        if bench_models.device().type == "cuda":
            import torch

            torch.cuda.empty_cache()

    def close(self) -> None:
        """Delete the files that are still there."""
        self._keep([])

    @staticmethod
    def key(name: str, workload: Workload) -> tuple[str, str]:
        """Equal where a side serves both: one that has the operator's LoRA names none itself."""
        switches = name == OURS_ALL and workload.switches
        return name, f"{workload.model}, a LoRA in requests" if switches else workload.model


def _end(side: Side) -> None:
    if isinstance(side, Ours):
        side.predictor.folders.remove()


def _draw(file: Path) -> None:
    """A picture to take edges from."""
    import numpy as np

    from weights.miniature import world

    scene = world.random_scene(np.random.default_rng(0))
    size = bench_models.spec("sdxl").native_size
    world.render(scene, size, size).save(file)


def _write_loras(files: tuple[Path, Path]) -> None:
    import diffusers
    import torch
    from safetensors.torch import save_file

    from script.tools import random_lora

    folder = bench_models.folder(bench_models.spec("sdxl").weights) / "unet"
    config = diffusers.UNet2DConditionModel.load_config(folder)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(config)
    for seed, file in enumerate(files):
        save_file(random_lora.cog_tensors(unet, LORA_RANK, seed), file)
