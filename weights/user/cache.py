"""The disk cache of weights that people bring, in the folder `trained` of the cache.

    files/<sha256>             content; has its name only once it is complete and on the disk
    index/<sha256 of key>.json what an address held when it was last asked
    .partial/<name>            bytes under way, see weights.transfer
    locks/<2 digits>.lock      held by the process that fetches; 256, so none need be removed

Who uses a file holds a shared lock (flock) on it, which the kernel takes back when the process
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from filelock import FileLock

from weights import cache
from weights.errors import DiskFull, DownloadError, WrongSetting
from weights.http import Facts
from weights.transfer import PARTIAL_FOLDER

DEFAULT_BUDGET_BYTES = 20_000_000_000
STALE_PART_S = 900.0  # no transfer is silent for so long: it would have been given up
OLD_PART_S = 86_400.0  # nobody comes back for it
MOST_GRANTS = 16

# What this process has read and found right, by path: inode and size at that time.
_verified: dict[Path, tuple[int, int]] = {}


class CachedFile:
    """A file that stays where it is until `close`, or the end of a `with` block."""

    def __init__(self, path: Path, digest: str, file_name: str, handle: io.BufferedReader) -> None:
        self.path = path
        self.digest = digest  # sha256, hexadecimal
        self.file_name = file_name  # where it comes from; "" where it has none
        self._handle = handle  # carries the shared lock

    def close(self) -> None:
        """Let the file go."""
        self._handle.close()

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
class Remembered:
    """What an address held. `grants` are hashes of the exact requests that a server has answered:
    only they get the file when the server cannot be asked."""

    digest: str
    facts: Facts
    grants: tuple[str, ...]


def folder() -> Path:
    """Where all of this is."""
    return cache.cache_root() / "trained"


def budget_bytes() -> int:
    """WEIGHTS_CACHE_BYTES or the default. Raises WrongSetting."""
    text = os.environ.get("WEIGHTS_CACHE_BYTES", "").strip()
    if not text:
        return DEFAULT_BUDGET_BYTES
    if not (text.isascii() and text.isdigit()):
        raise WrongSetting(f"WEIGHTS_CACHE_BYTES={text!r}: give a whole number of bytes")
    return int(text)


@contextmanager
def fetching(key: str, name: str) -> Iterator[None]:
    """For one process at a time per key; makes the folders. Raises DownloadError."""
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


def held(digest: str, file_name: str) -> CachedFile | None:
    """The file with this content, protected from eviction; None where there is none.

    Read and compared with its name at its first use in this process; thrown away if it differs.
    """
    path = folder() / "files" / digest
    handle = _shared(path)
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


def keep(part: Path, file_name: str) -> CachedFile:
    """Take a complete part into the cache under its content's hash, then evict what is too much."""
    with part.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    file = held(digest, file_name)
    if file is not None:
        part.unlink()
    else:
        path = folder() / "files" / digest
        handle = part.open("rb")
        fcntl.flock(handle, fcntl.LOCK_SH)  # before it has its name: never there unprotected
        os.utime(part)
        part.replace(path)
        _sync_folder(path.parent)
        status = os.fstat(handle.fileno())
        _verified[path] = (status.st_ino, status.st_size)
        file = CachedFile(path, digest, file_name, handle)
    evict(budget_bytes())
    return file


def check_fits(size_bytes: int, what: str) -> None:
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
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # its process has just taken it away
            found.append((status.st_mtime_ns, path, status.st_size))
        left = sum(size for _, _, size in found)
        for used_ns, path, size in sorted(found):
            idle_s = time.time() - used_ns / 1e9 if path.parent.name == PARTIAL_FOLDER else None
            if idle_s is not None and idle_s < STALE_PART_S:
                continue
            too_old = idle_s is not None and idle_s > OLD_PART_S
            if (left > most_bytes or too_old) and _removed(path):
                left -= size
        for entry in (folder() / "index").glob("*.json"):
            remembered = _read(entry)
            if remembered is None or not (folder() / "files" / remembered.digest).exists():
                entry.unlink(missing_ok=True)
        return left


def recall(key: str) -> Remembered | None:
    """What is known of `key`, whether or not the file is still there."""
    return _read(folder() / "index" / f"{_hash(key)}.json")


def remember(key: str, digest: str, facts: Facts, grant: str) -> None:
    """Write down that `key` holds the content `digest`, and who may have it unasked."""
    before = recall(key)
    grants: tuple[str, ...] = (_hash(grant),)
    if before is not None and before.digest == digest:
        grants += tuple(old for old in before.grants if old not in grants)
    path = folder() / "index" / f"{_hash(key)}.json"
    content = {"digest": digest, "facts": asdict(facts), "grants": grants[:MOST_GRANTS]}
    partial = path.with_suffix(".writing")  # the caller holds the key's lock
    partial.write_text(json.dumps(content) + "\n")
    partial.replace(path)


def is_granted(remembered: Remembered, grant: str) -> bool:
    """Whether exactly this request has been answered before."""
    return _hash(grant) in remembered.grants


def _read(path: Path) -> Remembered | None:
    try:
        content = json.loads(path.read_text())
        return Remembered(content["digest"], Facts(**content["facts"]), tuple(content["grants"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent, or not ours: the server is asked as if for the first time


def _shared(path: Path) -> io.BufferedReader | None:
    """`path` open, with a shared lock; None where it does not exist."""
    while True:
        try:
            handle = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(handle, fcntl.LOCK_SH)
        try:
            if os.path.samestat(path.stat(), os.fstat(handle.fileno())):
                return handle
        except FileNotFoundError:
            pass
        handle.close()  # removed or replaced between opening and locking


def _removed(path: Path) -> bool:
    """Remove a file unless somebody uses it."""
    try:
        with path.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except (BlockingIOError, FileNotFoundError):
        return False
    return True


def _sync_folder(path: Path) -> None:
    """A new name survives a power cut once its folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
