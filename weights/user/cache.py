"""The disk cache of users' weights: one folder for each address, in the folder `trained`.

    <sha256 of key>/weights      the file; has its name only once it is complete and on the disk
    <sha256 of key>/entry.json   what the server said of it
    <sha256 of key>/.partial/    bytes under way, see weights.transfer
    <sha256 of key>.lock         held by the process that fetches or uses the file (filelock)

The kernel releases the lock when its process dies. Eviction skips folders whose lock is held; the
time of last use is the folder's modification time. Files in use together may exceed the budget.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from weights import cache
from weights.errors import DiskFull, DownloadError, WrongSetting
from weights.http import Digest, RemoteMetadata
from weights.lock import write_json
from weights.transfer import publish

DEFAULT_BUDGET_BYTES = 20_000_000_000
MOST_FINGERPRINTS = 16

# What this process has hashed, by path: inode and size at that time, and the sha256.
_verified: dict[Path, tuple[int, int, str]] = {}


@dataclass(frozen=True)
class CachedFile:
    """A file that stays where it is until `close`, or the end of a `with` block."""

    path: Path
    digest: str  # sha256, hexadecimal
    file_name: str  # the original one; "" where it has none
    close: Callable[[], object]  # release the file

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
class Entry:
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


class Slot:
    """The folder of one key, locked until `close`. Raises DownloadError if it cannot be made."""

    def __init__(self, key: str, name: str) -> None:
        self.folder = root() / _hash(key)
        self._held = ExitStack()
        try:
            root().mkdir(parents=True, exist_ok=True)
            self._held.enter_context(cache.one_at_a_time(self.folder.with_suffix(".lock"), name))
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            self.close()
            raise DownloadError(
                f"{name}: cannot make {self.folder}: {error}; set WEIGHTS_CACHE to a folder that"
                " can be written"
            ) from error

    def close(self) -> None:
        """Let others use and evict the folder."""
        self._held.close()

    @property
    def path(self) -> Path:
        """Return where the file is, or will be."""
        return self.folder / "weights"

    def entry(self) -> Entry | None:
        """Return what the folder holds; None where the file is missing or damaged.

        At its first use in this process the file is hashed.
        """
        try:
            content = json.loads((self.folder / "entry.json").read_text())
            metadata = RemoteMetadata(**content["metadata"])
            entry = Entry(content["digest"], metadata, tuple(content["fingerprints"]))
            status = self.path.stat()
        except (OSError, ValueError, KeyError, TypeError):
            return None  # absent, or not ours: the server is asked as if for the first time
        expected = (status.st_ino, status.st_size, entry.digest)
        if _verified.get(self.path) != expected:
            if Digest.of(self.path, "sha256").hexdigest != entry.digest:
                print(f"{self.path} is damaged and will be fetched again", file=sys.stderr)
                return None
            _verified[self.path] = expected
        return entry

    def add(self, part: Path) -> str:
        """Take a complete part into the folder, then evict. Returns its sha256."""
        digest = Digest.of(part, "sha256").hexdigest
        publish(part, self.path)
        status = self.path.stat()
        _verified[self.path] = (status.st_ino, status.st_size, digest)
        evict(budget_bytes())
        return digest

    def record(self, digest: str, metadata: RemoteMetadata, request: str) -> None:
        """Write down what the folder holds, and that the server has answered `request`."""
        before = self.entry()
        fingerprints: tuple[str, ...] = (_hash(request),)
        if before is not None and before.digest == digest:
            fingerprints += tuple(old for old in before.fingerprints if old not in fingerprints)
        entry = Entry(digest, metadata, fingerprints[:MOST_FINGERPRINTS])
        write_json(self.folder / "entry.json", asdict(entry))

    def file(self, digest: str, file_name: str) -> CachedFile:
        """Return the file, whose `close` closes this slot."""
        os.utime(self.folder)
        return CachedFile(self.path, digest, file_name, self.close)


def root() -> Path:
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


def check_budget(size_bytes: int, what: str) -> None:
    """Raise DiskFull for a file that is larger than the whole budget."""
    if size_bytes > budget_bytes():
        raise DiskFull(
            f"{what} has {size_bytes} bytes, more than the cache may have ({budget_bytes()}): set"
            " WEIGHTS_CACHE_BYTES higher"
        )


def evict(most_bytes: int) -> int:
    """Remove folders, least recently used first, until `most_bytes` are left in all.

    What is in use stays. Returns the bytes that are left.
    """
    folders = [path for path in root().iterdir() if path.is_dir()]
    sizes = {path: _size_bytes(path) for path in folders}
    left = sum(sizes.values())
    for path in sorted(folders, key=_last_use):
        if left <= most_bytes:
            break
        try:
            with FileLock(path.with_suffix(".lock"), timeout=0):
                shutil.rmtree(path, ignore_errors=True)
                left -= sizes[path]
        except Timeout:
            continue  # in use
    return left


def _size_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue  # its process has just moved it
    return total


def _last_use(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
