"""Settings from environment variables: edition of the weights, device, models.

`WEIGHTS_EDITION` = full | miniature | auto (default): auto is full where a CUDA GPU is used.
`DEVICE` = cuda | mps | cpu: by default the first of these that is available. Every edition runs on
every device when asked to. `MODEL` is the model of requests that name none, `PRELOAD` the models
that setup loads, separated by commas (by default that one alone), `MAX_MODEL_GB` how many gigabytes
of models stay in memory (by default half of the GPU's memory, or of the machine's). `COMPILE` = on
| off (default): whether models are compiled, in the background.
"""

import math
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Literal

from weights.catalog import Edition
from weights.errors import WrongSetting

Device = Literal["cuda", "mps", "cpu"]
AUTO = "auto"


def requested_edition() -> Edition | None:
    """Return WEIGHTS_EDITION; None for auto. Raises WrongSetting for any other value."""
    value = os.environ.get("WEIGHTS_EDITION", "").strip().lower() or AUTO
    if value == AUTO:
        return None
    try:
        return Edition(value)
    except ValueError:
        choices = ", ".join([*Edition, AUTO])
        raise WrongSetting(f"WEIGHTS_EDITION is {value!r}; set it to one of: {choices}") from None


def resolve_edition(cuda_available: bool) -> Edition:
    """Return the edition to use; where that is automatic, print which and why to stderr."""
    requested = requested_edition()
    if requested is not None:
        return requested
    edition = Edition.FULL if cuda_available else Edition.MINIATURE
    why = "a CUDA GPU is used" if cuda_available else "no CUDA GPU is used"
    print(
        f"Using the {edition} weights: {why} (WEIGHTS_EDITION=full|miniature overrides)",
        file=sys.stderr,
    )
    return edition


def available_devices() -> tuple[Device, ...]:
    """Return the devices of this machine, best first; always ends with cpu. Imports torch."""
    import torch  # here, so that listing and prefetching weights need no torch

    devices: list[Device] = []
    if torch.cuda.is_available():
        devices.append("cuda")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return (*devices, "cpu")


def resolve_device() -> Device:
    """Return DEVICE or the best device there is. Raises WrongSetting for one that is missing."""
    available = available_devices()
    requested = os.environ.get("DEVICE", "").strip().lower()
    if not requested:
        return available[0]
    for device in available:
        if device == requested:
            return device
    raise WrongSetting(
        f"DEVICE is {requested!r}, which this machine does not have;"
        f" set it to one of: {', '.join(available)}"
    )


def requested_models(names: Sequence[str], default: str) -> tuple[str, tuple[str, ...]]:
    """Return MODEL, by default `default`, and the models of PRELOAD, by default that one.

    Raises WrongSetting for one that is not among `names`.
    """

    def known(variable: str, value: str) -> str:
        if value not in names:
            raise WrongSetting(
                f"{variable} is {os.environ[variable]!r}; set it to one of: {', '.join(names)}"
            )
        return value

    value = os.environ.get("MODEL", "").strip()
    model = known("MODEL", value) if value else default
    listed = [name.strip() for name in os.environ.get("PRELOAD", "").split(",") if name.strip()]
    return model, tuple(known("PRELOAD", name) for name in listed) or (model,)


def model_budget(device: Device) -> int:
    """Return how many bytes of models may stay in memory. Raises WrongSetting."""
    value = os.environ.get("MAX_MODEL_GB", "").strip()
    if value:
        try:
            gigabytes = float(value)
        except ValueError:
            gigabytes = math.nan
        if not 0 < gigabytes < 1e6:
            raise WrongSetting(
                f"MAX_MODEL_GB is {value!r}; set it to a number of gigabytes above 0"
            )
        return round(gigabytes * 1e9)
    if device == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory) // 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def requested_compiling(device: Device) -> bool:
    """Return whether COMPILE is on. Raises WrongSetting, also where there is no compiler for it."""
    value = os.environ.get("COMPILE", "").strip().lower() or "off"
    if value not in ("on", "off"):
        raise WrongSetting(f"COMPILE is {value!r}; set it to on or off")
    if value == "on" and device == "cpu" and not has_compiler():
        raise WrongSetting(f"COMPILE is on, which {NO_COMPILER}, or leave COMPILE out")
    return value == "on"


NO_COMPILER = "needs a C++ compiler on a CPU, and none was found; install g++, name one in CXX"


def has_compiler() -> bool:
    """Return whether torch.compile finds what it needs on a CPU."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return any(name and shutil.which(name) for name in names)
