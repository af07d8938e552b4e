"""The figures of pictures as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_COLUMNS = (
    "request",
    "side",
    "p50, ms",
    "p95",
    "runs",
    "pictures a second",
    "ours took, beside it",
    "set up, s",
    "first picture, s",
)
_ON_GPU = ("peak memory, GB", "times the floor", "TFLOP/s")


def tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Those that have rows. Ratios are of time, ours to the peer's: below 1 is faster."""
    plain = [row for row in rows if "switch" not in row]
    switches = [row for row in rows if "switch" in row]
    made = [_sides(plain), _stages(plain)] if plain else []
    return made + ([_switches(switches)] if switches else [])


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _sides(rows: Sequence[dict[str, Any]]) -> str:
    on_gpu = any("floor" in side for row in rows for side in row["sides"].values())
    lines = []
    for row in rows:
        for name, side in row["sides"].items():
            cells = [
                row["workload"],
                name,
                _ms(side["p50"]),
                _ms(side["p95"]),
                str(side["runs"]),
                f"{side['pictures_per_second']:.2f}",
                _ratio(row["ratios"].get(name)),
                "" if side["setup"] is None else f"{side['setup']:.1f}",
                f"{side['first']:.2f}",
            ]
            if on_gpu:
                cells.append(f"{side['peak_bytes'] / 1e9:.1f}")
                cells += [f"{side['times_the_floor']:.2f}", f"{side['tflops']:.0f}"]
            lines.append(cells)
    return _table([*_COLUMNS, *(_ON_GPU if on_gpu else ())], lines)


def _stages(rows: Sequence[dict[str, Any]]) -> str:
    """Of ours, in milliseconds."""
    sides = [
        (row["workload"], name, side["stages"])
        for row in rows
        for name, side in row["sides"].items()
        if "stages" in side
    ]
    names = list(dict.fromkeys(stage for *_, stages in sides for stage in stages))
    lines = [
        [workload, name, *(_ms(stages[s]) if s in stages else "" for s in names)]
        for workload, name, stages in sides
    ]
    return _table(["of ours, ms", "side", *names], lines)


def _switches(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            row["workload"],
            name,
            _ms(side["p50"]),
            _ms(side["same_again"]),
            f"{_ms(side['more'])} ({_ms(side['lowest'])} to {_ms(side['highest'])})",
            _ratio(row["ratios"].get(name)),
        ]
        for row in rows
        for name, side in row["sides"].items()
    ]
    columns = ["request", "side", "p50, ms", "the same again", "more for the switch"]
    return _table([*columns, "ours took, beside it"], lines)


def _ms(seconds: float) -> str:
    milliseconds = 1000 * seconds
    return f"{milliseconds:.0f}" if abs(milliseconds) >= 10 else f"{milliseconds:.1f}"


def _ratio(said: dict[str, Any] | None) -> str:
    """Ours to a peer."""
    if said is None:
        return ""
    return f"{said['median']:.2f} ({said['lowest']:.2f} to {said['highest']:.2f})"
