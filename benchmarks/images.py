"""Measure our whole `predict`, request to encoded file, beside baselines that do the same work.

All run in this process with the same weights, after warm-ups, in turns. The first JSON line says
what it ran on; one follows as each workload ends, the most telling first; then tables.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import environment, machine, measure, report
from benchmarks.report import WorkloadFigures
from benchmarks.sides import Sides
from benchmarks.workloads import COMPILED, WORKLOADS, Workload, add_only

COMPILE_SECONDS = 150.0  # a workload with less time is measured without the compiled baseline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    environment.add_cpu(parser)
    environment.add_runs(parser, 20, "requests")
    add_only(parser)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for all workloads")
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        help="measure compiled diffusers too, after minutes of compiling; the default on a GPU",
    )
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.compiled is None:
        arguments.compiled = not arguments.cpu

    def write(line: str) -> None:
        print(line, flush=True)
        if arguments.out:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    with environment.settings(arguments.cpu), TemporaryDirectory() as folder:
        began = time.monotonic()
        write(json.dumps(machine.describe(arguments.cpu)))
        sides = Sides(Path(folder))
        try:
            figures = _measure_all(arguments, sides, began + arguments.budget, write)
        finally:
            sides.close()
    print("\n\n".join(report.tables(figures)))


def _measure_all(
    arguments: argparse.Namespace, sides: Sides, end: float, write: Callable[[str], None]
) -> list[WorkloadFigures]:
    """Measure each workload for its share of the time that is left."""
    figures: list[WorkloadFigures] = []
    names = arguments.only or list(WORKLOADS)
    for number, name in enumerate(names):
        sides.make_room(WORKLOADS[name], [WORKLOADS[later] for later in names[number:]])
        share = (end - time.monotonic()) / (len(names) - number)
        if figures and share <= 0:
            print(f"{name}: no time is left for it")
            continue
        figures.append(_measure(name, arguments, sides, time.monotonic() + share))
        write(report.json_line(figures[-1]))
    return figures


def _measure(name: str, arguments: argparse.Namespace, sides: Sides, end: float) -> WorkloadFigures:
    workload: Workload = WORKLOADS[name]
    names = [side for side in workload.sides if side != COMPILED or arguments.compiled]
    left_out: tuple[str, ...] = ()
    has_time = sides.has(COMPILED, workload) or end - time.monotonic() >= COMPILE_SECONDS
    if COMPILED in names and not has_time:
        names.remove(COMPILED)
        left_out = (COMPILED,)
    built = {side: sides.get(side, workload) for side in names}
    loras = sides.loras if workload.switches_lora else ()
    figures = measure.measure(name, workload, built, arguments.runs, end, loras)
    return replace(figures, left_out=left_out)
