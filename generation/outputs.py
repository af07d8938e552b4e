"""Pictures to files, in a directory that belongs to one prediction."""

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from generation.encode import encode
from generation.options import OutputFormat
from generation.plan import OutputPlan

_ROOT_PREFIX = "stable-diffusion-outputs-"

_MAX_ENCODERS = 4  # threads; encoders let others run meanwhile


# Cog's server makes a folder per prediction here, whatever TMPDIR says, and never removes it; a
# large response's copy stays in it too (coglet 0.23.1).
SERVER_LEFTOVERS = Path("/tmp/coglet/predictions")
_LEFTOVER_SECONDS = 600.0  # age at which a folder is surely no other server's running prediction


class OutputFolders:
    """A folder for each prediction's files; only the newest prediction's is kept.

    Cog's server reads the files after `predict` has returned and does not delete them, so they are
    deleted when the next prediction begins, together with what the server itself left of earlier
    ones. Folders of processes that have died are deleted at the start.
    """

    def __init__(
        self, parent: Path | None = None, server_leftovers: Path = SERVER_LEFTOVERS
    ) -> None:
        self._parent = Path(tempfile.gettempdir()) if parent is None else parent
        self._leftovers = server_leftovers
        for old in self._parent.glob(f"{_ROOT_PREFIX}*"):
            if not _is_alive(old):
                shutil.rmtree(old, ignore_errors=True)
        self._root = self._parent / f"{_ROOT_PREFIX}{os.getpid()}"

    def fresh(self) -> Path:
        """An empty folder; those of earlier predictions are gone."""
        shutil.rmtree(self._root, ignore_errors=True)
        self._root.mkdir(mode=0o700)
        self._remove_server_leftovers()
        return Path(tempfile.mkdtemp(dir=self._root))

    def remove(self) -> None:
        """Delete everything; for callers that have taken the files."""
        shutil.rmtree(self._root, ignore_errors=True)

    def _remove_server_leftovers(self) -> None:
        """Delete the server's folders of earlier predictions; the newest one is the running one's.

        Where another server runs on the same machine, its folders cannot be told from ours: then
        only old ones are deleted.
        """
        if not self._leftovers.is_dir():
            return
        ages = {folder: _age(folder) for folder in self._leftovers.iterdir()}
        others = [p for p in self._parent.glob(f"{_ROOT_PREFIX}*") if p != self._root]
        limit = (
            _LEFTOVER_SECONDS
            if any(_is_alive(p) for p in others)
            else min(ages.values(), default=0)
        )
        for folder, age in ages.items():
            if age > limit:
                shutil.rmtree(folder, ignore_errors=True)


def _age(path: Path) -> float:
    """Seconds since the folder was made; 0 if it has just gone."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _is_alive(root: Path) -> bool:
    """Whether the process that a root folder is named after still runs."""
    pid = root.name.removeprefix(_ROOT_PREFIX)
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def save_maps(maps: Mapping[str, Image.Image], folder: Path) -> tuple[Path, ...]:
    """Write control maps, by their inputs' names, as PNG: a map that loses something is another.

    `control-1.png` is that of controlnet_1.
    """
    paths = []
    for name, picture in maps.items():
        path = folder / f"control-{name.rpartition('_')[2]}.png"
        path.write_bytes(encode(np.asarray(picture), OutputFormat.PNG, 100, None))
        paths.append(path)
    return tuple(paths)


def save(
    pictures: Mapping[int, Image.Image],
    folder: Path,
    plan: OutputPlan,
    parameters: Mapping[int, str],
) -> tuple[Path, ...]:
    """Write each picture as `out-<its number>.png`; returns the paths in the pictures' order.

    `parameters` are texts to write into the files, by the same numbers.
    """

    def write(number: int) -> Path:
        path = folder / f"out-{number}.{plan.format}"
        pixels = np.asarray(pictures[number])
        path.write_bytes(encode(pixels, plan.format, plan.quality, parameters.get(number)))
        return path

    if len(pictures) == 1:
        return (write(*pictures),)
    with ThreadPoolExecutor(min(len(pictures), _MAX_ENCODERS)) as threads:
        return tuple(threads.map(write, pictures))
