"""Choose what is measured: the published architectures on a GPU, or the miniature on the CPU."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from unittest.mock import patch

if TYPE_CHECKING:
    import torch

    from generation.base_models import BaseModelSpec
    from weights.catalog import Edition

# All that predict.py's setup reads: a benchmark must not depend on the caller's.
_VARIABLES = ("WEIGHTS_EDITION", "DEVICE", "WEIGHTS_CACHE", "MODEL", "PRELOAD", "MAX_MODEL_GB")


def add_cpu(parser: argparse.ArgumentParser) -> None:
    """Add --cpu."""
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="measure the miniature on the CPU; by default the published architectures are measured"
        " with random weights, on a CUDA GPU",
    )


def add_runs(parser: argparse.ArgumentParser, runs: int, counted: str) -> None:
    """Add --runs."""
    parser.add_argument("--runs", type=int, default=runs, help=f"{counted} of each side")


def check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """End with an error for too few runs, or a machine that cannot run the benchmark."""
    import torch

    if getattr(options, "runs", 1) < 1:
        parser.error(f"--runs is {options.runs}; it must be at least 1")
    if not getattr(options, "cpu", True) and not torch.cuda.is_available():
        parser.error(
            "the published architectures need a CUDA GPU; use --cpu to measure the miniature"
        )


@contextmanager
def settings(cpu: bool, edition: str | None = None) -> Iterator[None]:
    """Set the environment, which child processes inherit, with an empty cache of weights."""
    with TemporaryDirectory(prefix="bench-weights-") as folder, patch.dict(os.environ):
        for name in _VARIABLES:
            os.environ.pop(name, None)
        os.environ["WEIGHTS_CACHE"] = folder
        os.environ["WEIGHTS_EDITION"] = edition or ("miniature" if cpu else "full")
        os.environ["DEVICE"] = "cpu" if cpu else "cuda"
        yield


def edition() -> Edition:
    """Return the edition that `settings` chose."""
    from weights.catalog import Edition

    return Edition(os.environ["WEIGHTS_EDITION"])


def device() -> torch.device:
    """Return the device that `settings` chose."""
    import torch

    return torch.device(os.environ["DEVICE"])


def spec(model: str) -> BaseModelSpec:
    """Return a model of the edition."""
    from generation.base_models import BASE_MODELS

    return BASE_MODELS[edition()][model]


def folder(entry: str) -> Path:
    """Return the files of a catalog entry; the full edition's are random, and written now."""
    from weights import cache
    from weights.catalog import Edition

    if edition() is Edition.FULL:
        from benchmarks import random_weights

        return random_weights.write(entry, device())
    return cache.ensure(entry, Edition.MINIATURE)


def provide(model: str, refiner: bool = False) -> None:
    """Provide all files that serving a model takes, so that none is downloaded."""
    from generation.base_models import SAFETY_ENTRIES

    base = spec(model)
    refiners = [base.refiner.weights] if refiner and base.refiner else []
    for entry in (*base.catalog_entries, *SAFETY_ENTRIES, *refiners):
        folder(entry)
