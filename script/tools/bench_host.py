"""What requests cost the host: all that a GPU waits for beside its own arithmetic.

The real architectures, but as models that compute nothing (`hollow`), and small pictures: what is
left is what Python does around them. No GPU is needed. The peer is diffusers' stock pipeline with
the same models. Figures are as those of pictures, without what only a GPU could tell.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from script.tools import bench_machine, bench_models, bench_tables, bench_times
from script.tools.bench_sides import PLAIN, Ours, Side
from script.tools.bench_workloads import DIFFUSERS, OURS, WORKLOADS, Workload
from script.tools.peer_diffusers import Diffusers

NAMES = ("SDXL-Turbo, 1 step", "SD-Turbo, 1 step", "30 steps")
SIDE = 256  # pixels: the smallest that is served


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=40, help="requests of each side, a workload")
    parser.add_argument("--only", action="append", choices=NAMES, help="this request alone")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.runs < 1:
        parser.error(f"--runs is {arguments.runs}; 1 at least")
    rows = []
    with (
        bench_models.settings(cpu=True, full=True),
        _unwarned(),
        TemporaryDirectory() as folder,
    ):
        measured = {"measured": "the host's work around the real architectures"}
        print(json.dumps(bench_machine.describe(cpu=True) | measured), flush=True)
        for name in arguments.only or NAMES:
            workload = _small(WORKLOADS[name])
            sides = sides_of(workload, Path(folder))
            times = {side: bench_times.Times(None) for side in sides}
            bench_times.measure(sides, times, workload, arguments.runs, float("inf"))
            rows.append(bench_times.figures(name, workload, times))
            print(json.dumps(rows[-1]), flush=True)
    print("\n\n".join(bench_tables.tables(rows)))


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without diffusers' warnings of fp16 on a CPU, where nothing is computed."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _small(workload: Workload) -> Workload:
    size = {"width": SIDE, "height": SIDE}
    return replace(workload, peers=(DIFFUSERS,), asked={**workload.asked, **size})


def sides_of(workload: Workload, folder: Path) -> dict[str, Side]:
    """Both, prepared."""
    sides: dict[str, Side] = {
        DIFFUSERS: HollowDiffusers(workload.model, folder),
        OURS: HollowOurs(workload.model, folder),
    }
    for side in sides.values():
        side.prepare(workload)
    return sides


class HollowOurs(Ours):
    """predict.py around our store of hollow models, in place of what its setup loads."""

    def __init__(self, model: str, folder: Path) -> None:
        self._folder = folder
        super().__init__(model, dict(PLAIN), folder, None)

    def _set_up(self, model: str, lora: Path | None) -> Any:  # noqa: ANN401
        from generation.engine import Engine
        from generation.outputs import OutputFolders
        from predict import Predictor
        from script.tools.hollow import HollowStore
        from weights.catalog import Edition

        predictor = Predictor()
        # What else lies in this machine's temporary folder is not a container's.
        predictor.folders = OutputFolders(self._folder, self._folder / "server")
        predictor.engine = Engine(Edition.FULL, "cpu", HollowStore(), model=model)
        return predictor

    def _provide(self, model: str, refiner: bool = False) -> None:
        """No files are needed."""


class HollowDiffusers(Diffusers):
    """diffusers' stock pipeline around the same models."""

    def __init__(self, model: str, folder: Path) -> None:
        super().__init__(model, folder)
        self.spec = replace(self.spec, native_size=SIDE)

    def _load(self) -> Any:  # noqa: ANN401
        import diffusers
        from generation.pipelines import PIPELINE_CLASSES, SETTINGS

        from generation.plan import Mode
        from script.tools import hollow, random_sdxl

        family = self.spec.architecture
        return getattr(diffusers, PIPELINE_CLASSES[family, Mode.TXT2IMG])(
            **hollow.parts(self.spec.base_model),
            **SETTINGS[family],
            scheduler=diffusers.EulerDiscreteScheduler.from_config(random_sdxl.SCHEDULER_CONFIG),
        )
