"""Measure upscaling in tiles beside upscaling in one piece: time, memory, and their difference.

Each in a process of its own, in turns: what one leaves in memory would count for the other.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from spandrel.architectures.ESRGAN import ESRGAN
from spandrel.architectures.SwinIR import SwinIR
from torch import nn

from benchmarks.photo import photo
from benchmarks.report import markdown_table
from preprocess import upscale
from weights.catalog import Edition

EDGE = 32  # pixels of the small image, at its borders, that are not compared
UNTILED = 1 << 20  # pixels: larger than any image
COLUMNS = (
    "model, in one piece and in tiles",
    "in one piece, s",
    "in tiles, s",
    "times as long",
    "in one piece, MB more",
    "in tiles, MB more",
    "largest difference, of 255",
)


Figures = tuple[float, float]  # seconds, and MB that the process took more than before


def table(size: int, published: bool) -> str:
    """Measure and return the table; each measurement is also printed at once, as JSON."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        whole, tiled = Path(folder, "whole.npy"), Path(folder, "tiled.npy")
        for name in (upscale.SWINIR, upscale.REAL_ESRGAN):
            # Networks of the published size take gigabytes and minutes for one piece.
            one = None if published else _measure(name, size, False, False, whole)
            seconds, more_mb = _measure(name, size, True, published, tiled)
            cells = [name, "", f"{seconds:.1f}", "", "", f"{more_mb:.0f}", ""]
            if one is not None:
                images = [np.load(file).astype(int) for file in (whole, tiled)]
                inside = slice(4 * EDGE, -4 * EDGE)
                cells[1], cells[3] = f"{one[0]:.1f}", f"{seconds / one[0]:.2f}"
                cells[4] = f"{one[1]:.0f}"
                cells[6] = str(np.abs(images[0] - images[1])[inside, inside].max())
            rows.append(cells)
    return markdown_table(COLUMNS, rows)


def _measure(name: str, size: int, tiled: bool, published: bool, file: Path) -> Figures:
    """Upscale in a forked process: it has this one's modules, and memory of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        seconds, more_mb = pool.apply(_upscale, (name, size, tiled, published, file))
    figures = {"upscale": name, "size": size, "tiled": tiled, "published": published}
    print(json.dumps(figures | {"seconds": seconds, "more_mb": more_mb}), flush=True)
    return seconds, more_mb


def _published(name: str) -> nn.Module:
    """Build the published network with random weights."""
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


def _upscale(name: str, size: int, tiled: bool, published: bool, file: Path) -> Figures:
    """Upscale one image and save the result in `file`."""
    if published:  # this process ends with the measurement
        upscale._load = lambda folder: _published(name)
    if not tiled:
        upscale.TILE = UNTILED
    with upscale.Upscaler(Edition.MINIATURE, "cpu", name) as upscaler:
        upscaler.upscale(Image.fromarray(photo(64, 64)), 4)  # loads code
        image = Image.fromarray(photo(size, size))
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here, proc(5)
        before, began = _memory("VmRSS"), time.perf_counter()
        large = upscaler.upscale(image, 4)
        seconds = time.perf_counter() - began
    np.save(file, np.asarray(large))
    return seconds, (_memory("VmHWM") - before) / 1e6


def _memory(entry: str) -> int:
    """Return bytes of this process, by an entry's name in proc(5); Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{entry}:"))
    return int(line.split()[1]) * 1024
