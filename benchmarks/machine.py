"""Describe what a benchmark runs on, before its figures."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).parents[1]
MATRIX_SIZE = 8192  # of the matrices whose product measures the arithmetic ceiling
COPIED_BYTES = 8 << 30
REPEATS = 20

Description = dict[str, str | int | float | None]


def describe(cpu: bool, measured: str | None = None) -> Description:
    """Return hardware, versions and commit; on a GPU its two ceilings, measured now."""
    import diffusers
    import torch

    weights = "the miniature" if cpu else "the published architectures, random weights"
    description: Description = {
        "machine": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "measured": measured or weights,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if not cpu:
        description |= {"gpu": torch.cuda.get_device_name(), **_ceilings()}
        torch.cuda.empty_cache()
    return description


def _ceilings() -> Description:
    """Measure products of bf16 matrices, and copies; their reading and writing both count."""
    import torch

    size = (MATRIX_SIZE, MATRIX_SIZE)
    a, b = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = _seconds("a @ b", {"a": a, "b": b})
    a = torch.ones(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    copy = _seconds("b.copy_(a)", {"a": a, "b": torch.empty_like(a)})
    return {
        "matmul_tflops": round(2 * MATRIX_SIZE**3 / product / 1e12, 1),
        "copy_tb_per_s": round(2 * COPIED_BYTES / copy / 1e12, 2),
    }


def _seconds(statement: str, arrays: dict[str, Tensor]) -> float:
    """Return the time of a statement on the GPU, which the timer warms up and waits for."""
    from torch.utils.benchmark import Timer

    return float(Timer(statement, globals=arrays).timeit(REPEATS).mean)


def _processor() -> str:
    file = Path("/proc/cpuinfo")  # Linux
    names = re.findall(r"model name\s*: (.+)", file.read_text()) if file.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit, with a plus where the code differs; None where git does not know."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--short") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
