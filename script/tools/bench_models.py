"""What a benchmark measures: the real architectures on a GPU, or the miniature on the CPU."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from generation.base_models import BaseModelSpec
    from weights.catalog import Edition

# What predict.py's setup reads: none of it may come from who runs a benchmark.
_VARIABLES = ("WEIGHTS_EDITION", "DEVICE", "WEIGHTS_CACHE", "MODEL", "PRELOAD", "MAX_MODEL_GB")


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="the miniature on the CPU; without it, the real architectures with random weights,"
        " on a CUDA GPU",
    )


def check(cpu: bool, parser: argparse.ArgumentParser) -> None:
    """End with an error where that cannot be measured."""
    import torch

    if not cpu and not torch.cuda.is_available():
        parser.error(
            "the real architectures need a CUDA GPU; measure the miniature on the CPU with --cpu"
        )


@contextmanager
def settings(cpu: bool, full: bool = False) -> Iterator[None]:
    """The environment for it, of child processes too, with a cache of its own.

    `full`: the real architectures on the CPU too.
    """
    before = {name: os.environ.get(name) for name in _VARIABLES}
    with TemporaryDirectory(prefix="bench-weights-") as folder:
        try:
            for name in _VARIABLES:
                os.environ.pop(name, None)
            os.environ["WEIGHTS_CACHE"] = folder
            os.environ["WEIGHTS_EDITION"] = "miniature" if cpu and not full else "full"
            os.environ["DEVICE"] = "cpu" if cpu else "cuda"
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def edition() -> Edition:
    """The one that `settings` chose."""
    from weights.catalog import Edition

    return Edition(os.environ["WEIGHTS_EDITION"])


def device() -> torch.device:
    """The one that `settings` chose."""
    import torch

    return torch.device(os.environ["DEVICE"])


def spec(model: str) -> BaseModelSpec:
    """The model in the edition."""
    from generation.base_models import BASE_MODELS

    return BASE_MODELS[edition()][model]


def folder(entry: str) -> Path:
    """The files of a catalog entry: the embedded ones, or random ones that are made now."""
    from weights import cache
    from weights.catalog import Edition

    if edition() is Edition.FULL:
        from script.tools import random_cache

        return random_cache.write(entry, device())
    return cache.ensure(entry, Edition.MINIATURE)


def provide(model: str, refiner: bool = False) -> None:
    """Have all files that serving the model takes; what is missing would be fetched otherwise."""
    from generation.base_models import SAFETY_ENTRIES

    own = spec(model)
    second = [own.refiner.weights] if refiner and own.refiner else []
    for entry in (*own.catalog_entries, *SAFETY_ENTRIES, *second):
        folder(entry)
