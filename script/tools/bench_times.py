"""Times of sides that take turns, and the figures that are made of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from script.tools import bench_models
from script.tools.bench_sides import Ours, Side, Sides
from script.tools.bench_workloads import BESIDE, DIFFUSERS, Workload

WARM_UP = 3  # requests of each side
LEAST_RUNS = 3


@dataclass
class Times:
    """One side's requests in one workload."""

    setup: float | None  # seconds; None where an earlier workload had built the side
    resident_bytes: int = 0  # of a GPU, that are there between requests because of this side
    first: float = 0.0  # seconds of the first request
    seconds: list[float] = field(default_factory=list)
    working_bytes: int = 0  # of a GPU, at the most, beside all that was there before a request
    stages: list[dict[str, float]] = field(default_factory=list)
    blank: bool = False  # the last picture is of one colour: random values have overflown


def build(sides: Sides, workload: Workload, names: Sequence[str]) -> dict[str, Times]:
    """Have these sides ready."""
    times = {}
    for name in names:
        was_there, bytes_before = sides.has(name, workload), allocated()
        began = time.perf_counter()
        sides.get(name, workload)
        seconds = time.perf_counter() - began
        resident = sides.resident.get(sides.key(name, workload), 0) + allocated() - bytes_before
        times[name] = Times(None if was_there else seconds, resident)
    return times


def measure(
    sides: Mapping[str, Side], times: Mapping[str, Times], workload: Workload, runs: int, end: float
) -> None:
    """Requests of each side, in turns, until `end` on the monotonic clock; at least three."""
    names = list(sides)
    with TemporaryDirectory() as folder:
        for run in range(WARM_UP + runs):
            if run >= WARM_UP + LEAST_RUNS and time.monotonic() > end:
                break
            shift = run % len(names)  # nobody always comes after the same one
            for name in names[shift:] + names[:shift]:
                _run(sides[name], times[name], workload, run, Path(folder))
                if run == WARM_UP - 1 and isinstance(side := sides[name], Ours):
                    side.settle()


def _run(side: Side, own: Times, workload: Workload, run: int, folder: Path) -> None:
    before = start_watching()
    began = time.perf_counter()
    files = side.run(workload, run, folder)
    seconds = time.perf_counter() - began
    if run == 0:
        own.first = seconds
        own.resident_bytes += allocated() - before
    elif run >= WARM_UP:
        own.seconds.append(seconds)
        own.working_bytes = max(own.working_bytes, peak() - before)
        own.stages.append(dict(side.stages))
        own.blank = _is_blank(files)


def _is_blank(files: Sequence[Path]) -> bool:
    from PIL import Image

    with Image.open(files[-1]) as picture:
        return all(low == high for low, high in picture.convert("RGB").getextrema())  # type: ignore[misc]


def allocated() -> int:
    """Bytes of tensors on the GPU; 0 on a CPU, where one process holds all sides."""
    import torch

    return torch.cuda.memory_allocated() if bench_models.device().type == "cuda" else 0


def peak() -> int:
    import torch

    return torch.cuda.max_memory_allocated() if bench_models.device().type == "cuda" else 0


def start_watching() -> int:
    """What is allocated, on a GPU that has nothing left to do."""
    import torch

    if bench_models.device().type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return allocated()


def p95(seconds: Sequence[float]) -> float:
    return sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Of the turns, one by one."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return {"median": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}


def figures(name: str, workload: Workload, times: Mapping[str, Times]) -> dict[str, Any]:
    """Of one workload; seconds are of a whole request, whatever its number of pictures."""
    said = {
        "workload": name,
        "id": workload.id,
        "model": workload.model,
        "pictures": workload.pictures,
        "sides": {side: _side(workload, own) for side, own in times.items()},
        "ratios": {
            peer: {"ours": own} | ratio(times[own].seconds, times[peer].seconds)
            for peer, own in BESIDE.items()
            if peer in times
        },
    }
    if DIFFUSERS in times:
        stock = times[DIFFUSERS].seconds
        said["to_diffusers"] = {s: ratio(own.seconds, stock) for s, own in times.items()}
    return said


def _side(workload: Workload, times: Times) -> dict[str, Any]:
    middle = statistics.median(times.seconds)
    said: dict[str, Any] = {
        "runs": len(times.seconds),
        "p50": middle,
        "p95": p95(times.seconds),
        "pictures_per_second": workload.pictures / middle,
        "setup": times.setup,
        "first": times.first,
        "blank": times.blank,
    }
    if bench_models.device().type == "cuda":
        said |= {
            "peak_bytes": times.resident_bytes + times.working_bytes,
            "floor": workload.floor_seconds,
            "times_the_floor": middle / workload.floor_seconds,
            "tflops": workload.tflop / middle,
        }
    names = dict.fromkeys(stage for stages in times.stages for stage in stages)
    if names:
        said["stages"] = {
            stage: round(statistics.median(s.get(stage, 0.0) for s in times.stages), 5)
            for stage in names
        }
    return said
