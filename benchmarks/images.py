"""Our whole `predict`, request to encoded file, beside peers that do the same work.

All run in this process with the same weights, after warm-ups, and take turns. What was measured on
is said first; then a JSON line as each workload ends, the most telling first; then tables.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from script.tools import (
    bench_machine,
    bench_models,
    bench_sides,
    bench_switch,
    bench_tables,
    bench_times,
)
from script.tools.bench_workloads import COMPILED, WORKLOADS, Workload

COMPILE_SECONDS = 150.0  # a workload with less than this is measured without the compiled peer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bench_models.add_argument(parser)
    parser.add_argument("--runs", type=int, default=20, help="requests of each side, a workload")
    parser.add_argument("--only", action="append", choices=WORKLOADS, help="this request alone")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for all workloads")
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        help="beside compiled diffusers too, after minutes of compiling; by default on a GPU",
    )
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.runs < 1:
        parser.error(f"--runs is {arguments.runs}; 1 at least")
    bench_models.check(arguments.cpu, parser)
    if arguments.compiled is None:
        arguments.compiled = not arguments.cpu

    def tell(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)
        if arguments.out:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    with bench_models.settings(arguments.cpu), TemporaryDirectory() as folder:
        began = time.monotonic()
        tell(bench_machine.describe(arguments.cpu))
        sides = bench_sides.Sides(Path(folder))
        try:
            rows = _measure_all(arguments, sides, began + arguments.budget, tell)
        finally:
            sides.close()
    print("\n\n".join(bench_tables.tables(rows)))


def _measure_all(
    arguments: argparse.Namespace,
    sides: bench_sides.Sides,
    end: float,
    tell: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Each workload gets its share of the time that is left."""
    rows: list[dict[str, Any]] = []
    names = arguments.only or list(WORKLOADS)
    for number, name in enumerate(names):
        workload = WORKLOADS[name]
        sides.make_room(workload, [WORKLOADS[later] for later in names[number:]])
        share = (end - time.monotonic()) / (len(names) - number)
        if rows and share <= 0:
            print(f"{name}: no time is left for it")
            continue
        deadline = time.monotonic() + share
        rows.append(_measure(name, workload, arguments, sides, deadline))
        tell(rows[-1])
    return rows


def _measure(
    name: str,
    workload: Workload,
    arguments: argparse.Namespace,
    sides: bench_sides.Sides,
    end: float,
) -> dict[str, Any]:
    wanted = [side for side in workload.sides if side != COMPILED or arguments.compiled]
    left_out = []
    if (
        COMPILED in wanted
        and not sides.has(COMPILED, workload)
        and end - time.monotonic() < COMPILE_SECONDS
    ):
        wanted.remove(COMPILED)
        left_out = [COMPILED]
    times = bench_times.build(sides, workload, wanted)
    if workload.switches:
        return bench_switch.run(name, workload, sides, times, arguments.runs, end)
    built = {side: sides.get(side, workload) for side in wanted}
    bench_times.measure(built, times, workload, arguments.runs, end)
    for side, own in times.items():
        sides.resident[sides.key(side, workload)] = own.resident_bytes
    row = bench_times.figures(name, workload, times)
    return row | ({"left_out": left_out} if left_out else {})
