"""Enlarging in tiles beside enlarging in one piece: time, memory, and how far they differ.

Each in a process of its own, in turn: what one leaves in memory would count for the other.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from spandrel.architectures.ESRGAN import ESRGAN
from spandrel.architectures.SwinIR import SwinIR
from torch import nn

from preprocess import upscale
from script.tools.photo import photo
from weights.catalog import Edition

EDGE = 32  # pixels of the small picture, at its borders, that are not compared
NAMES = (upscale.SWINIR, upscale.REAL_ESRGAN)


def table(size: int, published: bool) -> list[str]:
    """Lines of the table, as Markdown; each measurement is also printed at once, as JSON."""
    lines = [
        "| model, in one piece and in tiles | in one piece, s | in tiles, s | times as long"
        " | in one piece, MB more | in tiles, MB more | largest difference, of 255 |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            # What is published takes gigabytes and minutes for one piece of this size.
            whole = None if published else _measured(name, size, False, False, Path(folder))
            tiled = _measured(name, size, True, published, Path(folder))
            lines.append(_row(name, whole, tiled))
    return lines


def _row(name: str, whole: dict[str, Any] | None, tiled: dict[str, Any]) -> str:
    cells = [name, "", f"{tiled['seconds']:.1f}", "", "", f"{tiled['more_mb']:.0f}", ""]
    if whole is not None:
        one, other = (np.load(side["file"]).astype(int) for side in (whole, tiled))
        inside = slice(4 * EDGE, -4 * EDGE)
        cells[1] = f"{whole['seconds']:.1f}"
        cells[3] = f"{tiled['seconds'] / whole['seconds']:.2f}"
        cells[4] = f"{whole['more_mb']:.0f}"
        cells[6] = str(np.abs(one - other)[inside, inside].max())
    return f"| {' | '.join(cells)} |"


def _measured(name: str, size: int, tiled: bool, published: bool, folder: Path) -> dict[str, Any]:
    """In a process that is forked: it has this one's modules, and memory of its own."""
    fork = multiprocessing.get_context("fork")
    told = fork.SimpleQueue()
    file = folder / f"{name}-{tiled}.npy"

    def work() -> None:
        told.put(_enlarge(name, size, tiled, published, file))

    process = fork.Process(target=work)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"enlarging by {name} ended with status {process.exitcode}")
    figures: dict[str, Any] = told.get()
    print(json.dumps(figures), flush=True)
    return figures


def _published(name: str) -> nn.Module:
    """The published architecture with random values."""
    if name == upscale.REAL_ESRGAN:
        esrgan: nn.Module = ESRGAN()
        return esrgan
    swinir: nn.Module = SwinIR(  # the M of "003_realSR_BSRGAN_DFO_s64w8_SwinIR-M_x4_GAN"
        img_size=64,
        embed_dim=180,
        depths=[6] * 6,
        num_heads=[6] * 6,
        window_size=8,
        mlp_ratio=2.0,
        upscale=4,
        upsampler="nearest+conv",
    )
    return swinir


def _enlarge(name: str, size: int, tiled: bool, published: bool, file: Path) -> dict[str, Any]:
    """One picture; what comes out is written to `file`."""
    if published:
        upscale._load = lambda folder: _published(name)
    if not tiled:
        upscale.TILE = 1 << 20
    with upscale.Upscaler(Edition.MINIATURE, "cpu", name) as upscaler:
        upscaler.upscale(Image.fromarray(photo(64, 64)), 4)  # loads code
        picture = Image.fromarray(photo(size, size))
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here, proc(5)
        before, began = _memory("VmRSS"), time.perf_counter()
        large = upscaler.upscale(picture, 4)
        seconds = time.perf_counter() - began
    np.save(file, np.asarray(large))
    return {
        "upscale": name,
        "size": size,
        "tiled": tiled,
        "published": published,
        "seconds": seconds,
        "more_mb": (_memory("VmHWM") - before) / 1e6,
        "file": str(file),
    }


def _memory(entry: str) -> int:
    """Bytes of this process, as proc(5) calls them; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{entry}:"))
    return int(line.split()[1]) * 1024
