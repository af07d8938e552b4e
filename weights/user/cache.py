"""The disk cache of users' weights, in the folder `trained` of the cache.

    files/<sha256>              content; has its name only once it is complete and on the disk
    index/<sha256 of key>.json  what an address held at the last request
    .partial/<name>             bytes under way, see weights.transfer
    locks/<2 digits>.lock       held by the process that fetches; 256, so none need be removed

Whoever uses a file holds a shared lock (flock) on it, which the kernel releases when the process
dies; eviction takes the exclusive one, without waiting. The time of last use is the file's
modification time. Parts count towards the budget too, and are removed like files once nobody has
written to them for STALE_PART_S, after OLD_PART_S in any case. Files in use together may exceed it.
"""

import fcntl
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from filelock import FileLock

from weights import cache
from weights.errors import DiskFull, DownloadError, WrongSetting
from weights.http import RemoteMetadata
from weights.transfer import PARTIAL_FOLDER, publish

DEFAULT_BUDGET_BYTES = 20_000_000_000
STALE_PART_S = 900.0  # no transfer is silent for so long: it would have been given up
OLD_PART_S = 86_400.0  # nobody comes back for it
MOST_FINGERPRINTS = 16

# What this process has hashed and found right, by path: inode and size at that time.
_verified: dict[Path, tuple[int, int]] = {}


@dataclass(frozen=True)
class CachedFile:
    """A file that stays where it is until `close`, or the end of a `with` block."""

    path: Path
    digest: str  # sha256, hexadecimal
    file_name: str  # the original one; "" where it has none
    handle: io.BufferedReader  # carries the shared lock

    def close(self) -> None:
        """Release the file."""
        self.handle.close()

    def __enter__(self) -> "CachedFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class IndexEntry:
    """What an address held at the last request.

    `fingerprints` are hashes of the exact requests, signature and token included, that a server has
    answered: only they may use the file while the server cannot be reached.
    """

    digest: str
    metadata: RemoteMetadata
    fingerprints: tuple[str, ...]

    def may_use(self, request: str) -> bool:
        """Return whether a server has answered exactly this request before."""
        return _hash(request) in self.fingerprints


def folder() -> Path:
    """Return the folder of the cache."""
    return cache.cache_root() / "trained"


def budget_bytes() -> int:
    """Return WEIGHTS_CACHE_BYTES or the default. Raises WrongSetting."""
    text = os.environ.get("WEIGHTS_CACHE_BYTES", "").strip()
    if not text:
        return DEFAULT_BUDGET_BYTES
    if not (text.isascii() and text.isdigit()):
        raise WrongSetting(f"WEIGHTS_CACHE_BYTES={text!r}: give a whole number of bytes")
    return int(text)


@contextmanager
def fetching(key: str, name: str) -> Iterator[None]:
    """Let one process at a time fetch `key`; makes the folders. Raises DownloadError."""
    try:
        for part in ("files", "index", "locks", PARTIAL_FOLDER):
            (folder() / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"{name}: cannot make {folder()}: {error}; set WEIGHTS_CACHE to a folder that can be"
            " written"
        ) from error
    with cache.one_at_a_time(folder() / "locks" / f"{_hash(key)[:2]}.lock", name):
        yield


def get(digest: str, file_name: str) -> CachedFile | None:
    """Return the file with this sha256, protected from eviction; None if there is none.

    At its first use in this process it is hashed, and thrown away if it is damaged.
    """
    path = folder() / "files" / digest
    handle = _open_shared(path)
    if handle is None:
        return None
    status = os.fstat(handle.fileno())
    if _verified.get(path) != (status.st_ino, status.st_size):
        if hashlib.file_digest(handle, "sha256").hexdigest() != digest:
            print(f"{path} is damaged and will be fetched again", file=sys.stderr)
            path.unlink(missing_ok=True)
            handle.close()
            return None
        _verified[path] = (status.st_ino, status.st_size)
    os.utime(path)
    return CachedFile(path, digest, file_name, handle)


def add(part: Path, file_name: str) -> CachedFile:
    """Take a complete part into the cache, then evict what exceeds the budget."""
    with part.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    file = get(digest, file_name)
    if file is None:
        path = folder() / "files" / digest
        handle = part.open("rb")
        fcntl.flock(handle, fcntl.LOCK_SH)  # before it has its name: never there unprotected
        os.utime(part)
        publish(part, path)
        status = os.fstat(handle.fileno())
        _verified[path] = (status.st_ino, status.st_size)
        file = CachedFile(path, digest, file_name, handle)
    part.unlink(missing_ok=True)
    evict(budget_bytes())
    return file


def check_budget(size_bytes: int, what: str) -> None:
    """Raise DiskFull for a file that is larger than the whole budget."""
    if size_bytes > budget_bytes():
        raise DiskFull(
            f"{what} has {size_bytes} bytes, more than the cache may have ({budget_bytes()}): set"
            " WEIGHTS_CACHE_BYTES higher"
        )


def evict(most_bytes: int) -> int:
    """Remove files and stale parts, least recently used first, until `most_bytes` are left.

    What is in use stays. Returns the bytes that are left.
    """
    with FileLock(folder() / "locks" / "evict.lock"):
        found = []  # last use, path, bytes
        for path in [*(folder() / "files").iterdir(), *(folder() / PARTIAL_FOLDER).iterdir()]:
            with suppress(FileNotFoundError):  # its process has just moved it
                status = path.stat()
                found.append((status.st_mtime, path, status.st_size))
        left = sum(size for _, _, size in found)
        for used, path, size in sorted(found):
            idle_s = time.time() - used
            is_part = path.parent.name == PARTIAL_FOLDER
            if is_part and idle_s < STALE_PART_S:
                continue
            if (left > most_bytes or (is_part and idle_s > OLD_PART_S)) and _removed(path):
                left -= size
        for index in (folder() / "index").glob("*.json"):
            entry = _read(index)
            if entry is None or not (folder() / "files" / entry.digest).exists():
                index.unlink(missing_ok=True)
        return left


def lookup(key: str) -> IndexEntry | None:
    """Return what is known of `key`, whether or not the file is still there."""
    return _read(_index_path(key))


def record(key: str, digest: str, metadata: RemoteMetadata, request: str) -> None:
    """Write down what `key` holds, and that the server has answered `request`.

    The caller holds the lock of the key.
    """
    before = lookup(key)
    fingerprints: tuple[str, ...] = (_hash(request),)
    if before is not None and before.digest == digest:
        fingerprints += tuple(old for old in before.fingerprints if old not in fingerprints)
    path = _index_path(key)
    partial = path.with_suffix(".writing")
    entry = IndexEntry(digest, metadata, fingerprints[:MOST_FINGERPRINTS])
    partial.write_text(json.dumps(asdict(entry)) + "\n")
    partial.replace(path)


def _index_path(key: str) -> Path:
    return folder() / "index" / f"{_hash(key)}.json"


def _read(path: Path) -> IndexEntry | None:
    try:
        content = json.loads(path.read_text())
        metadata = RemoteMetadata(**content["metadata"])
        return IndexEntry(content["digest"], metadata, tuple(content["fingerprints"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent, or not ours: the server is asked as if for the first time


def _open_shared(path: Path) -> io.BufferedReader | None:
    """Open `path` with a shared lock; None where it does not exist."""
    while True:
        try:
            handle = path.open("rb")
            fcntl.flock(handle, fcntl.LOCK_SH)
            if os.path.samestat(path.stat(), os.fstat(handle.fileno())):
                return handle
        except FileNotFoundError:
            return None
        handle.close()  # replaced between opening and locking


def _removed(path: Path) -> bool:
    """Remove a file unless it is in use. Returns whether it was removed."""
    try:
        with path.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except (BlockingIOError, FileNotFoundError):
        return False
    return True


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
