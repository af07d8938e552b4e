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
from dataclasses import asdict
from typing import TypeVar

import numpy as np
import torch
from imwatermark.maxDct import EmbedMaxDct
from PIL import Image

from benchmarks import environment, upscale
from benchmarks.photo import photo
from benchmarks.report import Spread, markdown_table
from generation import watermark
from generation.options import OutputFormat
from generation.outputs import Pixels, encode

T = TypeVar("T")


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
    pixels = photo(arguments.size, arguments.size)
    rows = [_compare_png(pixels, arguments.runs), _compare_watermark(pixels, arguments.runs)]
    columns = ["work; beside", "theirs, ms", "ours, ms", "times faster", "correct"]
    print(markdown_table(columns, rows), flush=True)
    print(f"\n{upscale.table(arguments.upscale_size, arguments.published)}")


def _compare_png(pixels: Pixels, runs: int) -> list[str]:
    image = Image.fromarray(pixels)

    def is_correct(png: bytes) -> bool:
        return np.array_equal(np.asarray(Image.open(io.BytesIO(png))), pixels)

    return _compare(
        "PNG; Pillow's default",
        lambda: image.save(io.BytesIO(), "PNG"),
        lambda: encode(pixels, OutputFormat.PNG, 1, None),
        is_correct,
        runs,
    )


def _compare_watermark(pixels: Pixels, runs: int) -> list[str]:
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
    bgr = np.ascontiguousarray(pixels[..., ::-1])
    encoder = EmbedMaxDct(list(watermark.BITS), len(watermark.BITS))

    def is_correct(marked: torch.Tensor) -> bool:
        """Whether imwatermark finds every bit."""
        values = np.ascontiguousarray(marked[0].permute(1, 2, 0).numpy()[..., ::-1])
        found = EmbedMaxDct(wmLen=len(watermark.BITS)).decode(values).astype(int)
        return list(found) == list(watermark.BITS)

    return _compare(
        "watermark; imwatermark",
        lambda: encoder.encode(bgr.copy()),
        lambda: watermark.apply(tensor),
        is_correct,
        runs,
    )


def _compare(
    name: str,
    theirs: Callable[[], object],
    ours: Callable[[], T],
    is_correct: Callable[[T], bool],
    runs: int,
) -> list[str]:
    """Measure in turns, print a JSON line, and return a row of the table."""
    times: list[list[float]] = [[], []]
    for _ in range(runs + 1):  # the first warms up
        began = time.perf_counter()
        theirs()
        middle = time.perf_counter()
        result = ours()
        times[0].append(1000 * (middle - began))
        times[1].append(1000 * (time.perf_counter() - middle))
    medians = [statistics.median(side[1:]) for side in times]
    faster = Spread.of_ratios(times[0][1:], times[1][1:])
    correct = is_correct(result)
    figures = {"work": name, "theirs_ms": medians[0], "ours_ms": medians[1]}
    print(json.dumps(figures | {"times_faster": asdict(faster), "correct": correct}), flush=True)
    cells = [f"{medians[0]:.0f}", f"{medians[1]:.1f}", faster.cell(1), "yes" if correct else "NO"]
    return [name, *cells]
