"""Measure what adapters cost a prediction, on the miniature: `python -m tests.evals.swap`.

Times are medians; processor time is that of this process alone.
"""

import contextlib
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from generation.engine import Engine
from tests.helpers.request import REQUEST
from tests.miniature.request_pool import FILES, data_url, with_references, write_files
from weights.catalog import Edition

STEPS = 20
ALTERNATIONS = 40
SWAPS, WARM_UP = 200, 5
SMALLEST = {"num_inference_steps": 1, "width": 64, "height": 64}
MAX_EXTRA = 0.10  # threshold: of a prediction's time
MAX_GROWTH = 0.02  # threshold

PAIRS = {
    "kohya LoRA of the UNet and both text encoders": ("kohya", "other kohya"),
    "cog-sdxl archive, attention and words": ("words", "other words"),
    "whole UNet and words; whole checkpoint": ("unet", "checkpoint"),
}


@dataclass(frozen=True)
class Times:
    """Times of one prediction in seconds."""

    wall: float
    processor: float
    weights: float  # wall time to read, merge and restore

    @classmethod
    def median(cls, seen: Iterable["Times"]) -> "Times":
        columns = zip(*((t.wall, t.processor, t.weights) for t in seen), strict=True)
        return cls(*map(statistics.median, columns))


@dataclass(frozen=True)
class Swap:
    """Times of a prediction with and without weights."""

    plain: Times
    swapped: Times

    @property
    def extra_wall(self) -> float:
        return (self.swapped.wall - self.plain.wall) / self.plain.wall

    @property
    def extra_processor(self) -> float:
        return (self.swapped.processor - self.plain.processor) / self.plain.processor


def swap(engine: Engine, folder: Path, pair: tuple[str, str]) -> Swap:
    """Alternate between two files and no weights, so that all see the same machine."""
    references = [data_url(folder, name) for name in pair]
    for reference in references:
        _predict(engine, folder, replicate_weights=reference)  # into the caches
    plain, swapped = [], []
    for reference in itertools.islice(itertools.cycle(references), ALTERNATIONS):
        swapped.append(_predict(engine, folder, replicate_weights=reference))
        plain.append(_predict(engine, folder))
    return Swap(Times.median(plain), Times.median(swapped))


def _predict(engine: Engine, folder: Path, **changes: object) -> Times:
    request = replace(REQUEST, num_inference_steps=STEPS, prompt="a large TOK", **changes)
    wall, processor = time.perf_counter(), time.process_time()
    result = engine.generate(request, folder)
    return Times(
        time.perf_counter() - wall, time.process_time() - processor, result.seconds["weights"]
    )


@dataclass(frozen=True)
class Memory:
    """Resident memory in bytes."""

    before: int
    after: int

    @property
    def growth(self) -> float:
        return self.after / self.before - 1


def memory(engine: Engine, folder: Path, swaps: int = SWAPS) -> Memory:
    """Measure the smallest request before and after so many swaps between files of each kind."""
    process = psutil.Process()
    names = itertools.cycle(("kohya", "words", "dora", "other words", "inversion"))
    urls = {name: data_url(folder, name) for name in FILES}
    seen = []
    for count in range(WARM_UP + swaps + 1):
        if count in (WARM_UP, WARM_UP + swaps):
            seen.append(process.memory_info().rss)
        changes = {"replicate_weights": next(names), **SMALLEST}
        engine.generate(replace(REQUEST, **with_references(changes, urls.__getitem__)), folder)
    return Memory(*seen)


@contextlib.contextmanager
def open_engine() -> Iterator[tuple[Engine, Path]]:
    """Yield an engine and a folder with all files; the cache is empty."""
    with tempfile.TemporaryDirectory() as name:
        os.environ["WEIGHTS_CACHE"] = name + "/cache"
        write_files(Path(name))
        engine = Engine(Edition.MINIATURE, "cpu")
        engine.load()
        yield engine, Path(name)


def _row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |")


def _print_swap(name: str, swap: Swap) -> None:
    _row(
        name,
        *(f"{1000 * t:.0f} ms" for t in (swap.plain.wall, swap.swapped.wall)),
        f"{swap.extra_wall:.1%}",
        f"{1000 * (swap.swapped.processor - swap.plain.processor):.0f} ms",
        f"{swap.extra_processor:.1%}",
        f"{1000 * swap.swapped.weights:.0f} ms",
    )


def main() -> None:
    quiet = contextlib.redirect_stdout(sys.stderr)  # the engine prints its seeds
    with quiet, open_engine() as (engine, folder):
        used = memory(engine, folder)
        times = {name: swap(engine, folder, pair) for name, pair in PAIRS.items()}
    print(f"{ALTERNATIONS} predictions of {STEPS} steps, by turns with two files and without\n")
    _row("files", "without", "with", "more", "more of the processor", "share", "stage weights")
    _row(*["---"] * 7)
    for name, seen in times.items():
        _print_swap(name, seen)
    _row("threshold", "", "", f"≤ {MAX_EXTRA:.0%}", "", f"≤ {MAX_EXTRA:.0%}", "")
    before, after = (round(size / 1e6) for size in (used.before, used.after))
    growth = f"{used.growth:+.2%} (threshold: ≤ {MAX_GROWTH:.0%})"
    print(f"\nMemory: {before} MB, after {SWAPS} more swaps {after} MB: {growth}")


if __name__ == "__main__":
    main()
