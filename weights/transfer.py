"""Download one file over https: resumed where it was cut, and checked before it has its name.

Bytes arrive in `<folder>/.partial/<digest>`. That name says what the content must become, so a part
can be resumed from whichever server, mirror or process wrote it: a server whose file has changed
cannot pass the hash. Where the hash is not known beforehand, the name is made of the server's
metadata, and the part is continued only if the server confirms that it is the same file (If-Range).
"""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
from tqdm import tqdm

from weights.errors import ChecksumMismatch, DiskFull, DownloadError
from weights.http import RemoteFile, opened, too_large
from weights.retry import RetryPolicy, TemporaryFailure, with_retries

PARTIAL_FOLDER = ".partial"
PROGRESS_BYTES = 1 << 20  # a try that brought this much counts as no failure of the server
TIMEOUT = httpx.Timeout(30.0, connect=10.0)  # seconds without any byte, not for the whole file


def partial_path(folder: Path, file: RemoteFile) -> Path:
    """Return where the bytes of `file` gather until they are complete."""
    return folder / PARTIAL_FOLDER / file.part_name


def bytes_on_disk(path: Path) -> int:
    """Return the size in bytes, 0 for a file that does not exist."""
    return path.stat().st_size if path.exists() else 0


def publish(part: Path, destination: Path) -> None:
    """Give a checked file its final name; after a power cut too, that name means whole content."""
    with part.open("rb") as written:
        os.fsync(written.fileno())
    destination.parent.mkdir(parents=True, exist_ok=True)
    part.replace(destination)


def download(client: httpx.Client, file: RemoteFile, folder: Path, policy: RetryPolicy) -> Path:
    """Return the part of `file` in `folder`, complete and checked. Raises a DownloadError."""
    part = partial_path(folder, file)
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with tqdm(
            desc=file.path,
            total=file.size_bytes,
            initial=bytes_on_disk(part),
            unit="B",
            unit_scale=True,
            file=sys.stderr,  # the prediction's log
        ) as bar:
            _complete(client, file, part, policy, bar.update)
    except OSError as error:
        raise _translated(error, file, part) from error
    return part


def _complete(
    client: httpx.Client,
    file: RemoteFile,
    part: Path,
    policy: RetryPolicy,
    on_bytes: Callable[[int], object],
) -> None:
    """Bring `part` to the right content, from whatever it holds now."""
    resumed = bytes_on_disk(part) > 0
    while True:
        while not with_retries(lambda: _progress(client, file, part, on_bytes), policy):
            pass
        if file.matches(part):
            return
        size_bytes = _discard(part, on_bytes)
        if not resumed:
            raise wrong_bytes(file, size_bytes)
        resumed = False  # an old part may have been the wrong one: once more from the start


def _progress(
    client: httpx.Client, file: RemoteFile, part: Path, on_bytes: Callable[[int], object]
) -> bool:
    """Return whether the file is complete; False if it is cut, but after real progress."""
    before = bytes_on_disk(part)
    try:
        _transfer(client, file, part, on_bytes)
    except TemporaryFailure:
        if bytes_on_disk(part) - before < PROGRESS_BYTES:
            raise
        return False
    return True


def _transfer(
    client: httpx.Client, file: RemoteFile, part: Path, on_bytes: Callable[[int], object]
) -> None:
    """Request once what is missing. Returns when the server has sent all that it meant to."""
    have = bytes_on_disk(part)
    if have == file.size_bytes:
        return
    can_continue = file.digest is not None or file.validator is not None
    if have and (not can_continue or (file.size_bytes is not None and have > file.size_bytes)):
        have -= _discard(part, on_bytes)
    headers = {}
    if have:
        headers["Range"] = f"bytes={have}-"
        if file.digest is None and file.validator is not None:
            headers["If-Range"] = file.validator
    with opened(client, file, headers, also=(416,)) as response:
        if response.status_code == 416:
            _discard(part, on_bytes)
            raise TemporaryFailure(f"{file.where}: the server's file is shorter than our part")
        if have and response.status_code == 206 and _is_another(response, file):
            _discard(part, on_bytes)
            raise TemporaryFailure(f"{file.where}: the file changed while it was fetched")
        if have and not _continues(response, have):
            _discard(part, on_bytes)
        _append(response, part, file, on_bytes)


def _append(
    response: httpx.Response, part: Path, file: RemoteFile, on_bytes: Callable[[int], object]
) -> None:
    """Write the body at the end of `part`, unbuffered: a killed process loses nothing it got."""
    if "Content-Length" not in response.headers and "Transfer-Encoding" not in response.headers:
        raise DownloadError(
            f"{file.where}: the server does not say where the file ends, so a cut would go"
            f" unnoticed; {file.hints.other}"
        )
    written = bytes_on_disk(part)
    most = file.limit_bytes if file.size_bytes is None else file.size_bytes
    with part.open("ab", buffering=0) as output:
        for chunk in response.iter_raw():
            view = memoryview(chunk)
            while view:  # a nearly full disk takes part of a write before it refuses the next
                view = view[output.write(view) :]
            written += len(chunk)
            on_bytes(len(chunk))
            if written > most:
                break  # too long already
    if file.size_bytes is None:
        if written > file.limit_bytes:
            _discard(part, on_bytes)
            raise too_large(file)
    elif written < file.size_bytes:
        raise TemporaryFailure(f"{file.where}: ended after {written} of {file.size_bytes} bytes")


def _continues(response: httpx.Response, have: int) -> bool:
    """Return whether the body starts at byte `have`: a server may ignore Range and send all."""
    content_range = response.headers.get("Content-Range", "")
    return response.status_code == 206 and content_range.startswith(f"bytes {have}-")


def _is_another(response: httpx.Response, file: RemoteFile) -> bool:
    """Return whether a server continues another version than our part's, despite If-Range."""
    if file.digest is not None or file.validator is None:
        return False
    header = "ETag" if file.validator.startswith('"') else "Last-Modified"
    return bool(response.headers.get(header, file.validator) != file.validator)


def _discard(part: Path, on_bytes: Callable[[int], object]) -> int:
    """Delete the part. Returns the number of bytes it had."""
    size_bytes = bytes_on_disk(part)
    part.unlink(missing_ok=True)
    on_bytes(-size_bytes)
    return size_bytes


def wrong_bytes(file: RemoteFile, size_bytes: int) -> ChecksumMismatch:
    """Return the error for a file of `size_bytes` that is not the expected one."""
    expected = f"{file.size_bytes}"
    if file.digest is not None:
        expected += f" with {file.digest.kind} {file.digest.hexdigest}"
    return ChecksumMismatch(
        f"{file.where}: {size_bytes} bytes came, but {expected} are expected; they were thrown"
        f" away. Try again; if it persists, {file.hints.changed}"
    )


def _translated(error: OSError, file: RemoteFile, part: Path) -> DownloadError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        missing = (file.size_bytes or file.limit_bytes) - bytes_on_disk(part)
        return DiskFull(
            f"{file.where}: the disk of {part.parent} is full, {missing} bytes"
            f"{'' if file.size_bytes else ' at most'} are still to come; free some and run again to"
            " resume, or set WEIGHTS_CACHE to another disk"
        )
    return DownloadError(f"{file.where}: cannot write {part}: {error}")
