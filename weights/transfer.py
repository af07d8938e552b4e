"""One file over https: resumed where it was cut, checked, and only then given its name.

Bytes arrive in `<folder>/.partial/<digest>`. That name says what the content must become, so a
partial file is good for resuming whichever server, mirror or process wrote it, and no validator
such as If-Range has to be remembered: a server whose file has changed cannot pass the hash. Where
nobody knows the hash beforehand, the name is made of what the server says of the file, and the part
is continued only if the server can say that it is still the same file (If-Range).
"""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import httpx

from weights.errors import ChecksumMismatch, DiskFull, DownloadError
from weights.http import Digest, RemoteFile, opened, too_large
from weights.retry import RetryPolicy, TemporaryFailure, with_retries

PARTIAL_FOLDER = ".partial"
TIMEOUT = httpx.Timeout(30.0, connect=10.0)  # seconds without any byte, not for the whole file


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
    """Whether `path` holds exactly the bytes of `file`, as far as anybody knows them."""
    return (
        path.is_file()
        and (file.size_bytes is None or path.stat().st_size == file.size_bytes)
        and (file.digest is None or digest_of(path, file.digest.kind) == file.digest)
    )


def partial_path(folder: Path, file: RemoteFile) -> Path:
    """Where the bytes of `file` gather until they are complete."""
    return folder / PARTIAL_FOLDER / file.part_name


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
    partial = fetch_part(client, file, folder, policy, on_bytes)
    destination = folder / file.path
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(destination)
    except OSError as error:
        raise _explain_os_error(error, file, partial) from error


def fetch_part(
    client: httpx.Client,
    file: RemoteFile,
    folder: Path,
    policy: RetryPolicy,
    on_bytes: Callable[[int], object],
) -> Path:
    """The same up to the last step: the part, complete, checked and on the disk for good."""
    partial = partial_path(folder, file)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        _fetch_partial(client, file, partial, policy, on_bytes)
        with partial.open("rb") as written:
            os.fsync(written.fileno())  # after a power cut too, the final name means whole content
    except OSError as error:
        raise _explain_os_error(error, file, partial) from error
    return partial


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
    continuable = file.digest is not None or file.validator is not None
    if have and (not continuable or (file.size_bytes is not None and have > file.size_bytes)):
        have -= _discard(partial, on_bytes)
    headers = {}
    if have:
        headers["Range"] = f"bytes={have}-"
        if file.digest is None and file.validator is not None:
            headers["If-Range"] = file.validator
    with opened(client, file, headers, also=(416,)) as response:
        if response.status_code == 416:
            _discard(partial, on_bytes)
            raise TemporaryFailure(f"{file.where}: the server's file is shorter than our part")
        if have and response.status_code == 206 and _is_another(response, file):
            _discard(partial, on_bytes)
            raise TemporaryFailure(f"{file.where}: the file changed while it was fetched")
        if have and not _continues(response, have):
            _discard(partial, on_bytes)
        _append(response, partial, file, on_bytes)


def _append(
    response: httpx.Response, partial: Path, file: RemoteFile, on_bytes: Callable[[int], object]
) -> None:
    """Write the body at the end of `partial`, unbuffered: a killed process loses nothing it got."""
    if "Content-Length" not in response.headers and "Transfer-Encoding" not in response.headers:
        raise DownloadError(
            f"{file.where}: the server does not say where the file ends, so a cut would go"
            f" unnoticed; {file.advice.other}"
        )
    written = bytes_on_disk(partial)
    most = file.limit_bytes if file.size_bytes is None else file.size_bytes
    with partial.open("ab", buffering=0) as output:
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
            _discard(partial, on_bytes)
            raise too_large(file)
    elif written < file.size_bytes:
        raise TemporaryFailure(f"{file.where}: ended after {written} of {file.size_bytes} bytes")


def _continues(response: httpx.Response, have: int) -> bool:
    """Whether the body starts at byte `have`: a server may ignore Range and send the whole."""
    content_range = response.headers.get("Content-Range", "")
    return response.status_code == 206 and content_range.startswith(f"bytes {have}-")


def _is_another(response: httpx.Response, file: RemoteFile) -> bool:
    """Whether a server continued another version than we have a part of, despite If-Range."""
    if file.digest is not None or file.validator is None:
        return False
    header = "ETag" if file.validator.startswith('"') else "Last-Modified"
    return bool(response.headers.get(header, file.validator) != file.validator)


def _discard(partial: Path, on_bytes: Callable[[int], object]) -> int:
    """Throw the partial file away; the number of bytes it had."""
    size_bytes = bytes_on_disk(partial)
    partial.unlink(missing_ok=True)
    on_bytes(-size_bytes)
    return size_bytes


def _wrong_bytes(file: RemoteFile, size_bytes: int) -> ChecksumMismatch:
    expected = f"{file.size_bytes}"
    if file.digest is not None:
        expected += f" with {file.digest.kind} {file.digest.hexdigest}"
    return ChecksumMismatch(
        f"{file.where}: {size_bytes} bytes came, but {expected} are expected; they were thrown"
        f" away. Try again; if it persists, {file.advice.changed}"
    )


def _explain_os_error(error: OSError, file: RemoteFile, partial: Path) -> DownloadError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        missing = (file.size_bytes or file.limit_bytes) - bytes_on_disk(partial)
        return DiskFull(
            f"{file.where}: the disk of {partial.parent} is full, {missing} bytes"
            f"{'' if file.size_bytes else ' at most'} are still to come; free some and run again to"
            " resume, or set WEIGHTS_CACHE to another disk"
        )
    return DownloadError(f"{file.where}: cannot write {partial}: {error}")
