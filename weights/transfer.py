"""One file over https: resumed where it was cut, checked, and only then given its name.

Bytes arrive in `<folder>/.partial/<digest>`. That name says what the content must become, so a
partial file is good for resuming whichever server, mirror or process wrote it, and no validator
such as If-Range has to be remembered: a server whose file has changed cannot pass the hash.
"""

import errno
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx

from weights.errors import (
    AccessDenied,
    ChecksumMismatch,
    DownloadError,
    NotEnoughDisk,
    NotOnServer,
)
from weights.retry import (
    RetryPolicy,
    TemporaryFailure,
    is_temporary,
    retry_after_s,
    with_retries,
)

PARTIAL_FOLDER = ".partial"
TIMEOUT = httpx.Timeout(30.0, connect=10.0)  # seconds without any byte, not for the whole file


@dataclass(frozen=True)
class Digest:
    """A hexadecimal hash; git-sha1 is git's blob id: sha1 of `blob <size>\\0` and the content."""

    kind: Literal["sha256", "git-sha1"]
    hexdigest: str


@dataclass(frozen=True)
class RemoteFile:
    """One file to fetch: `path` inside its folder, exact size, and what proves it right."""

    path: str
    url: str
    size_bytes: int
    digest: Digest
    headers: tuple[tuple[str, str], ...]
    mirror_path: str  # below WEIGHTS_MIRROR


def digest_of(path: Path, kind: Literal["sha256", "git-sha1"]) -> Digest:
    """Hash a file as it stands on disk."""
    hasher = hashlib.sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
    if kind == "git-sha1":
        hasher.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return Digest(kind, hasher.hexdigest())


def matches(path: Path, file: RemoteFile) -> bool:
    """Whether `path` holds exactly the bytes of `file`."""
    return (
        path.is_file()
        and path.stat().st_size == file.size_bytes
        and digest_of(path, file.digest.kind) == file.digest
    )


def partial_path(folder: Path, file: RemoteFile) -> Path:
    """Where the bytes of `file` gather until they are complete."""
    return folder / PARTIAL_FOLDER / file.digest.hexdigest


def bytes_on_disk(path: Path) -> int:
    """Size in bytes, 0 for a file that does not exist."""
    return path.stat().st_size if path.exists() else 0


def fetch_file(
    client: httpx.Client,
    file: RemoteFile,
    folder: Path,
    policy: RetryPolicy,
    on_bytes: Callable[[int], object],
) -> None:
    """Fetch `file` into `folder`, or raise a DownloadError with nothing under its final name.

    `on_bytes` hears of every change in the number of bytes there, also when bytes are thrown away.
    """
    partial = partial_path(folder, file)
    destination = folder / file.path
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        destination.parent.mkdir(parents=True, exist_ok=True)
        _fetch_partial(client, file, partial, policy, on_bytes)
        with partial.open("rb") as written:
            os.fsync(written.fileno())  # after a power cut too, the final name means whole content
        partial.replace(destination)
    except OSError as error:
        raise _explain_os_error(error, file, partial) from error


def _fetch_partial(
    client: httpx.Client,
    file: RemoteFile,
    partial: Path,
    policy: RetryPolicy,
    on_bytes: Callable[[int], object],
) -> None:
    """Bring `partial` to the right content, from whatever it holds now."""
    resumed = bytes_on_disk(partial) > 0
    while True:
        with_retries(
            lambda: _transfer(client, file, partial, on_bytes),
            policy,
            progress=lambda: bytes_on_disk(partial),
        )
        if matches(partial, file):
            return
        size_bytes = _discard(partial, on_bytes)
        if not resumed:
            raise _wrong_bytes(file, size_bytes)
        resumed = False  # an old part may have been the wrong one: once more from the start


def _transfer(
    client: httpx.Client, file: RemoteFile, partial: Path, on_bytes: Callable[[int], object]
) -> None:
    """One request for what is missing. Returns when the server has sent all it meant to."""
    have = bytes_on_disk(partial)
    if have == file.size_bytes:
        return
    if have > file.size_bytes:
        have -= _discard(partial, on_bytes)
    headers = {**dict(file.headers), "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        with client.stream("GET", file.url, headers=headers) as response:
            if response.status_code == 416:
                _discard(partial, on_bytes)
                raise TemporaryFailure(f"{file.url}: the server's file is shorter than our part")
            _check_status(response, file)
            if have and not _continues(response, have):
                _discard(partial, on_bytes)
            _append(response, partial, file, on_bytes)
    except (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.TooManyRedirects) as error:
        raise DownloadError(
            f"{file.path} from {file.url}: {error}; check WEIGHTS_MIRROR and HF_ENDPOINT"
        ) from error
    except httpx.RequestError as error:
        raise TemporaryFailure(
            f"{file.path} from {file.url}: {type(error).__name__}: {error}"
        ) from error


def _append(
    response: httpx.Response, partial: Path, file: RemoteFile, on_bytes: Callable[[int], object]
) -> None:
    """Write the body at the end of `partial`, unbuffered: a killed process loses nothing it got."""
    written = bytes_on_disk(partial)
    with partial.open("ab", buffering=0) as output:
        for chunk in response.iter_bytes():
            view = memoryview(chunk)
            while view:  # a nearly full disk takes part of a write before it refuses the next
                view = view[output.write(view) :]
            written += len(chunk)
            on_bytes(len(chunk))
            if written > file.size_bytes:
                return  # too long already: the hash check will throw it away
    if written < file.size_bytes:
        raise TemporaryFailure(
            f"{file.path} from {file.url}: ended after {written} of {file.size_bytes} bytes"
        )


def _check_status(response: httpx.Response, file: RemoteFile) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    where = f"{file.path} from {file.url}"
    if is_temporary(status):
        raise TemporaryFailure(f"{where}: the server answered {status}", retry_after_s(response))
    if status in (401, 403):
        raise AccessDenied(
            f"{where}: the server answered {status}; accept the repository's licence on its page"
            " and set HF_TOKEN to a token that may read it"
        )
    if status in (404, 410):
        raise NotOnServer(
            f"{where}: the server answered {status}; correct the entry in weights/catalog.py, or"
            " see that the mirror has the file"
        )
    raise DownloadError(f"{where}: the server answered {status}; check HF_ENDPOINT, WEIGHTS_MIRROR")


def _continues(response: httpx.Response, have: int) -> bool:
    """Whether the body starts at byte `have`: a server may ignore Range and send the whole."""
    content_range = response.headers.get("Content-Range", "")
    return response.status_code == 206 and content_range.startswith(f"bytes {have}-")


def _discard(partial: Path, on_bytes: Callable[[int], object]) -> int:
    """Throw the partial file away; the number of bytes it had."""
    size_bytes = bytes_on_disk(partial)
    partial.unlink(missing_ok=True)
    on_bytes(-size_bytes)
    return size_bytes


def _wrong_bytes(file: RemoteFile, size_bytes: int) -> ChecksumMismatch:
    return ChecksumMismatch(
        f"{file.path} from {file.url}: {size_bytes} bytes came, but {file.size_bytes} with"
        f" {file.digest.kind} {file.digest.hexdigest} are expected; they were thrown away. Try"
        " again; if it persists, the server's file has changed: set WEIGHTS_MIRROR or HF_ENDPOINT"
        " to another server, or renew the lock with script/weights --lock"
    )


def _explain_os_error(error: OSError, file: RemoteFile, partial: Path) -> DownloadError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        missing = file.size_bytes - bytes_on_disk(partial)
        return NotEnoughDisk(
            f"{file.path} from {file.url}: the disk of {partial.parent} is full, {missing} bytes"
            " are still to come; free some and run again to resume, or set WEIGHTS_CACHE to another"
            " disk"
        )
    return DownloadError(f"{file.path} from {file.url}: cannot write {partial}: {error}")
