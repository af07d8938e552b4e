"""Measure what follows generation: our PNG beside Pillow's, our watermark beside imwatermark's.

Both in turns in this process, on one thread, on a noisy image like a photo. Then upscaling in tiles
beside upscaling in one piece.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from imwatermark.maxDct import EmbedMaxDct
from PIL import Image

from benchmarks import environment, upscale
from benchmarks.photo import photo
from benchmarks.report import Spread, markdown_table
from generation import watermark
from generation.options import OutputFormat
from generation.outputs import encode


@dataclass(frozen=True)
class Work:
    """One piece of work, done twice, and whether ours is correct."""

    name: str
    theirs: Callable[[], object]
    ours: Callable[[], Any]
    is_correct: Callable[[Any], bool]  # of what `ours` returned


def works(size: int) -> list[Work]:
    """Return the work, on an image of `size` x `size` pixels."""
    pixels = photo(size, size)
    image = Image.fromarray(pixels)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
    bgr = np.ascontiguousarray(pixels[..., ::-1])
    encoder = EmbedMaxDct(list(watermark.BITS), len(watermark.BITS))

    def has_same_pixels(png: bytes) -> bool:
        return np.array_equal(np.asarray(Image.open(io.BytesIO(png))), pixels)

    def is_decoded(marked: torch.Tensor) -> bool:
        """Whether imwatermark finds every bit."""
        values = np.ascontiguousarray(marked[0].permute(1, 2, 0).numpy()[..., ::-1])
        found = EmbedMaxDct(wmLen=len(watermark.BITS)).decode(values).astype(int)
        return list(found) == list(watermark.BITS)

    return [
        Work(
            "PNG; Pillow's default",
            lambda: image.save(io.BytesIO(), "PNG"),
            lambda: encode(pixels, OutputFormat.PNG, 1, None),
            has_same_pixels,
        ),
        Work(
            "watermark; imwatermark",
            lambda: encoder.encode(bgr.copy()),
            lambda: watermark.apply(tensor),
            is_decoded,
        ),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    environment.add_runs(parser, 7, "repetitions")
    parser.add_argument("--size", type=int, default=1024, help="of the square image, in pixels")
    parser.add_argument(
        "--upscale-size", type=int, default=512, help="of the square image that is upscaled"
    )
    parser.add_argument(
        "--published", action="store_true", help="upscale with networks of the published size"
    )


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.size < 256 or arguments.upscale_size < 128:
        parser.error("--size must be at least 256, and --upscale-size at least 128")
    torch.set_num_threads(1)
    rows = [_measure(work, arguments.runs) for work in works(arguments.size)]
    columns = ["work; beside", "theirs, ms", "ours, ms", "times faster", "correct"]
    print(markdown_table(columns, rows), flush=True)
    print(f"\n{upscale.table(arguments.upscale_size, arguments.published)}")


def _measure(work: Work, runs: int) -> list[str]:
    """Measure, print a JSON line, and return a row of the table."""
    times: list[list[float]] = [[], []]
    for _ in range(runs + 1):  # the first warms up
        for side, function in zip(times, (work.theirs, work.ours), strict=True):
            began = time.perf_counter()
            result = function()
            side.append(1000 * (time.perf_counter() - began))
    theirs, ours = (statistics.median(side[1:]) for side in times)
    faster = Spread.of_ratios(times[0][1:], times[1][1:])
    correct = work.is_correct(result)
    figures = {"work": work.name, "theirs_ms": theirs, "ours_ms": ours}
    print(json.dumps(figures | {"times_faster": asdict(faster), "correct": correct}), flush=True)
    return [work.name, f"{theirs:.0f}", f"{ours:.1f}", faster.cell(1), "yes" if correct else "NO"]
