"""Measure requests of several sides, which take turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from benchmarks import environment
from benchmarks.report import SideFigures, Spread, WorkloadFigures
from benchmarks.sides import Side, allocated_bytes
from benchmarks.workloads import COUNTERPARTS, DIFFUSERS, Workload

WARM_UP = 3  # requests of each side
MIN_RUNS = 3


@dataclass
class Samples:
    """One side's requests in one workload."""

    setup: float | None  # seconds; None where an earlier workload had built the side
    first: float = 0.0  # seconds of the first request
    seconds: list[float] = field(default_factory=list)
    repeated: list[float] = field(default_factory=list)  # where each request is made once more
    resident_bytes: int = 0  # of a GPU, that stay allocated between requests because of this side
    working_bytes: int = 0  # of a GPU, at most, beside all that was there before a request
    stages: list[dict[str, float]] = field(default_factory=list)
    blank: bool = False  # the last image has one colour


def measure(
    workload_name: str,
    workload: Workload,
    sides: Mapping[str, Side],
    runs: int,
    end: float = math.inf,
    loras: Sequence[Path] = (),
) -> WorkloadFigures:
    """Make requests of each side, in turns, until `end` on the monotonic clock; at least three.

    `loras` are those that a workload switches between: each request names another one than the
    request before, and is then repeated with the same.
    """
    samples = {name: Samples(side.setup_seconds) for name, side in sides.items()}
    for side in sides.values():
        side.setup_seconds = None
    names = list(sides)
    with TemporaryDirectory() as folder:
        for run in range(WARM_UP + runs):
            if run >= WARM_UP + MIN_RUNS and time.monotonic() > end:
                break
            shift = run % len(names)  # none always follows the same one
            for side_name in names[shift:] + names[:shift]:
                side, lora = sides[side_name], loras[run % len(loras)] if loras else None
                _run(side, samples[side_name], workload, run, lora, Path(folder))
                if run == WARM_UP - 1:
                    side.wait_until_warm()
    return summarise(workload_name, workload, samples)


def _run(
    side: Side, samples: Samples, workload: Workload, run: int, lora: Path | None, folder: Path
) -> None:
    before = _start_watching()
    files, seconds = _request(side, workload, run, lora, folder)
    if run == 0:
        samples.first = seconds
        side.resident_bytes += allocated_bytes() - before
    elif run >= WARM_UP:
        samples.seconds.append(seconds)
        samples.resident_bytes = side.resident_bytes
        samples.working_bytes = max(samples.working_bytes, _peak_bytes() - before)
        samples.stages.append(dict(side.stages))
        samples.blank = _is_blank(files[-1])
    if lora is not None:
        _start_watching()
        _, seconds = _request(side, workload, run, lora, folder)
        if run >= WARM_UP:
            samples.repeated.append(seconds)


def _request(
    side: Side, workload: Workload, seed: int, lora: Path | None, folder: Path
) -> tuple[list[Path], float]:
    """Return the files of a request, and how long it took."""
    began = time.perf_counter()
    if lora is not None:
        side.use_lora(lora)
    files = side.run(workload, seed, folder)
    return files, time.perf_counter() - began


def _is_blank(file: Path) -> bool:
    with Image.open(file) as image:
        return image.convert("RGB").getcolors(1) is not None


def _peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if environment.device().type == "cuda" else 0


def _start_watching() -> int:
    """Return what is allocated, on a GPU that has nothing left to do."""
    if environment.device().type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return allocated_bytes()


def summarise(name: str, workload: Workload, samples: Mapping[str, Samples]) -> WorkloadFigures:
    """Return the figures of one workload."""
    seconds = {side: own.seconds for side, own in samples.items()}
    diffusers = seconds.get(DIFFUSERS)
    return WorkloadFigures(
        workload=name,
        id=workload.id,
        model=workload.model,
        images=workload.num_outputs,
        sides={side: _summarise_side(workload, own) for side, own in samples.items()},
        ratios={
            baseline: Spread.of_ratios(seconds[ours], seconds[baseline])
            for baseline, ours in COUNTERPARTS.items()
            if baseline in seconds
        },
        to_diffusers={side: Spread.of_ratios(own, diffusers) for side, own in seconds.items()}
        if diffusers
        else {},
    )


def _summarise_side(workload: Workload, samples: Samples) -> SideFigures:
    ordered = sorted(samples.seconds)
    p50 = statistics.median(ordered)
    on_gpu = environment.device().type == "cuda"
    switch = same_again = None
    if samples.repeated:
        pairs = zip(samples.seconds, samples.repeated, strict=True)
        switch = Spread.of([switched - same for switched, same in pairs])
        same_again = statistics.median(samples.repeated)
    names = dict.fromkeys(stage for stages in samples.stages for stage in stages)
    return SideFigures(
        runs=len(ordered),
        p50=p50,
        p95=ordered[math.ceil(0.95 * len(ordered)) - 1],
        images_per_second=workload.num_outputs / p50,
        setup=samples.setup,
        first=samples.first,
        blank=samples.blank,
        peak_bytes=samples.resident_bytes + samples.working_bytes if on_gpu else None,
        times_the_floor=p50 / workload.floor_seconds if on_gpu else None,
        tflops=workload.tflop / p50 if on_gpu else None,
        stages={
            stage: round(statistics.median(s.get(stage, 0.0) for s in samples.stages), 5)
            for stage in names
        },
        same_again=same_again,
        switch=switch,
    )
