"""What it costs when a request names another LoRA than the one before: against the same again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from script.tools.bench_sides import Sides
from script.tools.bench_times import LEAST_RUNS, Times, start_watching
from script.tools.bench_workloads import BESIDE, Workload


def measure(
    sides: Mapping[str, Any], workload: Workload, loras: tuple[Path, Path], runs: int, end: float
) -> dict[str, list[tuple[float, float]]]:
    """Of each side, seconds of a request with another LoRA, and of the next with the same."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    with TemporaryDirectory() as folder:
        # Both LoRAs are known before it counts: their files have been read.
        for run in range(len(loras) + runs):
            if run >= len(loras) + LEAST_RUNS and time.monotonic() > end:
                break
            for name, side in sides.items():
                pair = _seconds(side, workload, loras[run % 2], run, Path(folder))
                if run >= len(loras):
                    seconds[name].append(pair)
    return seconds


def _seconds(
    side: Any,  # noqa: ANN401
    workload: Workload,
    lora: Path,
    seed: int,
    folder: Path,
) -> tuple[float, float]:
    """Of the request that brings the LoRA, and of the same request again."""
    taken = []
    for _ in range(2):
        start_watching()
        began = time.perf_counter()
        side.wear(lora)
        side.run(workload, seed, folder)
        taken.append(time.perf_counter() - began)
    return taken[0], taken[1]


def figures(
    name: str,
    workload: Workload,
    times: Mapping[str, Times],
    seconds: Mapping[str, list[tuple[float, float]]],
) -> dict[str, Any]:
    """Of the workload; `more` is what the switch adds to a request, in seconds."""
    sides = {}
    for side, pairs in seconds.items():
        more = sorted(switched - same for switched, same in pairs)
        sides[side] = {
            "runs": len(pairs),
            "p50": statistics.median(switched for switched, _ in pairs),
            "same_again": statistics.median(same for _, same in pairs),
            "more": statistics.median(more),
            "lowest": more[0],
            "highest": more[-1],
            "setup": times[side].setup,
        }
    ratios = {}
    for peer, own in BESIDE.items():
        if peer in sides:
            both = sorted(
                ours[0] / theirs[0]
                for ours, theirs in zip(seconds[own], seconds[peer], strict=True)
            )
            middle = statistics.median(both)
            ratios[peer] = {"ours": own, "median": middle, "lowest": both[0], "highest": both[-1]}
    said = {"workload": name, "id": workload.id, "model": workload.model, "switch": True}
    return said | {"pictures": workload.pictures, "sides": sides, "ratios": ratios}


def run(
    name: str, workload: Workload, sides: Sides, times: Mapping[str, Times], runs: int, end: float
) -> dict[str, Any]:
    """Measure it, and its figures."""
    built = {side: sides.get(side, workload) for side in times}
    seconds = measure(built, workload, sides.loras, runs, end)
    return figures(name, workload, times, seconds)
