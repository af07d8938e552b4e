"""Figures of workloads, as JSON lines for programs and as tables for people."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Spread:
    """The median of several values, and their range."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise values."""
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def of_ratios(cls, values: Sequence[float], others: Sequence[float]) -> Spread:
        """Summarise the ratios of pairs, which were measured in turns."""
        return cls.of([a / b for a, b in zip(values, others, strict=True)])

    def cell(self, digits: int = 2) -> str:
        """Return the text of a table's cell."""
        median, low, high = (f"{v:.{digits}f}" for v in (self.median, self.lowest, self.highest))
        return f"{median} ({low} to {high})"


@dataclass(frozen=True)
class SideFigures:
    """The requests of one side; seconds are of a whole request, whatever its number of images."""

    runs: int
    p50: float
    p95: float
    images_per_second: float
    setup: float | None  # None where an earlier workload had built the side
    first: float  # seconds of the first request
    blank: bool  # the last image has one colour: random weights have overflowed
    peak_bytes: int | None = None  # on a GPU, like the next two
    times_the_floor: float | None = None  # see `Workload.floor_seconds`
    tflops: float | None = None
    stages: Mapping[str, float] = field(default_factory=dict)  # medians of ours, in seconds
    same_again: float | None = None  # p50 of the same request once more, where the LoRA switches
    switch: Spread | None = None  # seconds that the switch adds to a request


@dataclass(frozen=True)
class WorkloadFigures:
    """One workload on all sides; ratios are of time in turns: below 1 is faster."""

    workload: str
    id: str
    model: str
    images: int
    sides: Mapping[str, SideFigures]
    ratios: Mapping[str, Spread]  # by baseline: of ours that does the same work, to the baseline
    to_diffusers: Mapping[str, Spread]  # by side; empty where diffusers was not measured
    left_out: Sequence[str] = ()  # sides for which there was no time


def json_line(figures: object) -> str:
    """Return a dataclass as one line, without empty fields."""

    def compact(items: list[tuple[str, object]]) -> dict[str, object]:
        return {key: value for key, value in items if value is not None and value not in ({}, ())}

    return json.dumps(asdict(figures, dict_factory=compact))  # type: ignore[call-overload]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(figures: Sequence[WorkloadFigures]) -> list[str]:
    """Return a table of all sides, and one of the parts of our requests."""
    rows = [(each, name, side) for each in figures for name, side in each.sides.items()]
    return [_sides(rows), _stages(rows)]


_Row = tuple[WorkloadFigures, str, SideFigures]
_COLUMNS = ("request", "side", "p50, ms", "p95", "runs", "images a second", "ours took, beside it")
_STARTING = ("set up, s", "first image, s")
_ON_GPU = ("peak memory, GB", "times the floor", "TFLOP/s")
_SWITCHES = ("the same LoRA again, ms", "added by the switch")


def _sides(rows: Sequence[_Row]) -> str:
    on_gpu = any(side.peak_bytes for *_, side in rows)
    switches = any(side.switch for *_, side in rows)
    lines = []
    for figures, name, side in rows:
        ratio = figures.ratios.get(name)
        cells = [figures.workload, name, _ms(side.p50), _ms(side.p95), str(side.runs)]
        cells += [f"{side.images_per_second:.2f}", ratio.cell() if ratio else ""]
        cells += ["" if side.setup is None else f"{side.setup:.1f}", f"{side.first:.2f}"]
        if side.peak_bytes:
            cells.append(f"{side.peak_bytes / 1e9:.1f}")
            cells += [f"{side.times_the_floor:.2f}", f"{side.tflops:.0f}"]
        if side.switch and side.same_again:
            added = [_ms(v) for v in (side.switch.median, side.switch.lowest, side.switch.highest)]
            cells += [_ms(side.same_again), "{} ({} to {})".format(*added)]
        elif switches:
            cells += ["", ""]
        lines.append(cells)
    optional = (*(_ON_GPU if on_gpu else ()), *(_SWITCHES if switches else ()))
    return markdown_table([*_COLUMNS, *_STARTING, *optional], lines)


def _stages(rows: Sequence[_Row]) -> str:
    """Return the parts of our requests, in milliseconds."""
    names = list(dict.fromkeys(stage for *_, side in rows for stage in side.stages))
    lines = []
    for figures, name, side in rows:
        if side.stages:
            cells = [_ms(side.stages[s]) if s in side.stages else "" for s in names]
            lines.append([figures.workload, name, *cells])
    return markdown_table(["of ours, ms", "side", *names], lines)


def _ms(seconds: float) -> str:
    milliseconds = 1000 * seconds
    return f"{milliseconds:.0f}" if abs(milliseconds) >= 10 else f"{milliseconds:.1f}"
