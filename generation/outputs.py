"""Write images to files, in a folder for each prediction."""

from __future__ import annotations

import io
import os
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from generation.options import OutputFormat

Pixels = NDArray[np.uint8]  # (H, W, 3), sRGB

_ROOT_PREFIX = "stable-diffusion-outputs-"

_MAX_ENCODERS = 4  # threads; encoders release Python's lock
_ISAL_LEVEL = 1  # 10 ms for 1024x1024; 3 takes twice as long for as many bytes
_WEBP_METHOD = 2  # 0 to 6, effort, as libwebp counts it
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286  # EXIF 2.3, section 4.6


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
    """Write control maps as lossless PNG, and return their paths.

    `control-1.png` is that of controlnet_1.
    """
    paths = []
    for name, image in maps.items():
        path = folder / f"control-{name.rpartition('_')[2]}.png"
        path.write_bytes(encode(np.asarray(image), OutputFormat.PNG, 100, None))
        paths.append(path)
    return tuple(paths)


def save(
    images: Mapping[int, Image.Image],
    folder: Path,
    file_format: str,
    quality: int,
    metadata: Mapping[int, str],
) -> tuple[Path, ...]:
    """Write each image as `out-<its number>.<format>`; return the paths in order.

    `metadata` are texts to write into the files, by the images' numbers.
    """

    def write(number: int) -> Path:
        path = folder / f"out-{number}.{file_format}"
        pixels = np.asarray(images[number])
        path.write_bytes(encode(pixels, file_format, quality, metadata.get(number)))
        return path

    if len(images) == 1:
        return (write(*images),)
    with ThreadPoolExecutor(min(len(images), _MAX_ENCODERS)) as threads:
        return tuple(threads.map(write, images))


def encode(pixels: Pixels, file_format: str, quality: int, metadata: str | None) -> bytes:
    """Return a file's bytes; `quality`, from 1 to 100, applies to webp and jpg."""
    if file_format == OutputFormat.PNG:
        return _png(pixels, metadata)
    output = io.BytesIO()
    image = Image.fromarray(pixels)
    exif = _exif(metadata)
    if file_format == OutputFormat.JPG:
        subsampling = 0 if quality >= 90 else 2  # colours at full size
        image.save(output, "JPEG", quality=quality, subsampling=subsampling, exif=exif)
    else:
        image.save(output, "WEBP", quality=quality, method=_WEBP_METHOD, exif=exif)
    return output.getvalue()


def _exif(metadata: str | None) -> Image.Exif:
    """Return a UserComment in UTF-16, as A1111 writes it (piexif.helper.UserComment.dump)."""
    exif = Image.Exif()
    if metadata is not None:
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + metadata.encode("utf-16-be")
    return exif


def _png(pixels: Pixels, metadata: str | None) -> bytes:
    """Encode losslessly, in a tenth of Pillow's time.

    Each row is written as differences to the pixel on the left ("Sub", PNG specification, section
    9.2), which suits images well enough to need no search for a row's best filter; ISA-L deflates
    them.
    """
    height, width, channels = pixels.shape
    rows = pixels.reshape(height, width * channels)
    filtered = np.empty((height, 1 + width * channels), np.uint8)
    filtered[:, 0] = 1
    filtered[:, 1 : 1 + channels] = rows[:, :channels]
    np.subtract(rows[:, channels:], rows[:, :-channels], out=filtered[:, 1 + channels :])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits each of RGB
    text = PngInfo()
    if metadata is not None:
        text.add_text("parameters", metadata)
    chunks = [
        (b"IHDR", header),
        *((kind, content) for kind, content, *_ in text.chunks),
        (b"IDAT", isal_zlib.compress(filtered, _ISAL_LEVEL)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))
    )
