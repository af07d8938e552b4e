"""What comes after a picture: our PNG beside Pillow's, our watermark beside the stock encoder's.

Both in turns in this process, on one thread, on a noisy picture like a photo. Then enlarging in
tiles beside enlarging in one piece (bench_upscale).
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from script.tools.photo import photo


@dataclass(frozen=True)
class Row:
    """One piece of work, and whether ours is right."""

    name: str
    theirs: Callable[[], Any]
    ours: Callable[[], Any]
    right: Callable[[Any], bool]  # of what ours gave


def rows(side: int) -> list[Row]:
    """The work, on a picture of `side` x `side` pixels."""
    import torch
    from imwatermark.maxDct import EmbedMaxDct
    from PIL import Image

    from generation import watermark
    from generation.encode import encode
    from generation.options import OutputFormat

    torch.set_num_threads(1)
    pixels = photo(side, side)
    picture = Image.fromarray(pixels)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
    bgr = np.ascontiguousarray(pixels[..., ::-1])

    def pillow() -> bytes:
        output = io.BytesIO()
        picture.save(output, "PNG")
        return output.getvalue()

    def same_pixels(ours: bytes) -> bool:
        return np.array_equal(np.asarray(Image.open(io.BytesIO(ours))), pixels)

    def read(ours: torch.Tensor) -> bool:
        """The stock decoder finds every bit."""
        own = np.ascontiguousarray(ours[0].permute(1, 2, 0).numpy()[..., ::-1])
        found = EmbedMaxDct(wmLen=len(watermark.BITS)).decode(own).astype(int)
        return list(found) == list(watermark.BITS)

    encoder = EmbedMaxDct(list(watermark.BITS), len(watermark.BITS))
    return [
        Row(
            "PNG; Pillow's default",
            pillow,
            lambda: encode(pixels, OutputFormat.PNG, 1, None),
            same_pixels,
        ),
        Row(
            "watermark; imwatermark",
            lambda: encoder.encode(bgr.copy()),
            lambda: watermark.apply(tensor),
            read,
        ),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=1024, help="of the square picture, in pixels")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument(
        "--upscale-size", type=int, default=512, help="of the square picture that is enlarged"
    )
    parser.add_argument(
        "--published", action="store_true", help="enlarge with models of the published size"
    )


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.runs < 1 or arguments.size < 256:
        parser.error("--runs must be 1 at least, and --size 256")
    if arguments.upscale_size < 128:
        parser.error("--upscale-size must be 128 at least")
    lines = []
    for row in rows(arguments.size):
        times: list[list[float]] = [[], []]
        given: Any = None
        for _ in range(arguments.runs + 1):  # the first warms up
            for side, work in enumerate((row.theirs, row.ours)):
                began = time.perf_counter()
                given = work()
                times[side].append(1000 * (time.perf_counter() - began))
        ratios = sorted(a / b for a, b in zip(times[0][1:], times[1][1:], strict=True))
        figures = {
            "work": row.name,
            "theirs_ms": statistics.median(times[0][1:]),
            "ours_ms": statistics.median(times[1][1:]),
            "times_faster": statistics.median(ratios),
            "lowest": ratios[0],
            "highest": ratios[-1],
            "right": row.right(given),
        }
        print(json.dumps(figures), flush=True)
        lines.append(
            f"| {row.name} | {figures['theirs_ms']:.0f} | {figures['ours_ms']:.1f} |"
            f" {figures['times_faster']:.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f}) |"
            f" {'yes' if figures['right'] else 'NO'} |"
        )
    print("| work; beside | theirs, ms | ours, ms | times faster | right |")
    print("|---|---|---|---|---|")
    print("\n".join(lines), flush=True)
    from script.tools import bench_upscale  # only for this workload: it loads much

    print("\n".join(["", *bench_upscale.table(arguments.upscale_size, arguments.published)]))
