"""What a benchmark ran on, said before its figures."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SIDE = 8192  # of the matrices whose product measures the arithmetic ceiling
COPIED_BYTES = 8 << 30
REPEATS = 20


def describe(cpu: bool) -> dict[str, Any]:
    """Hardware, versions and commit; on a GPU its two ceilings, measured now."""
    import diffusers
    import torch

    said: dict[str, Any] = {
        "machine": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "measured": "the miniature" if cpu else "the real architectures, random weights",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if not cpu:
        said |= {"gpu": torch.cuda.get_device_name(), **ceilings()}
    return said


def ceilings() -> dict[str, float]:
    """The GPU's own: bf16 matrix products, and copies (read and write both count)."""
    import torch

    measured = {"matmul_tflops": round(_matmul(), 1), "copy_tb_per_s": round(_copy(), 2)}
    torch.cuda.empty_cache()
    return measured


def _matmul() -> float:
    import torch

    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * SIDE**3 / _seconds(lambda: a @ b) / 1e12


def _copy() -> float:
    import torch

    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _seconds(lambda: target.copy_(source)) / 1e12


def _seconds(work: Callable[[], object]) -> float:
    """Of one call, on a warm GPU."""
    import torch

    for _ in range(3):
        work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(REPEATS):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / REPEATS


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """With a plus where the code differs from it; None where git does not know."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--short") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
