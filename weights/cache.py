"""The only place on disk where weights are kept.

    $WEIGHTS_CACHE/                     by default see DEFAULT_CACHE
      sdxl-base/                        one folder per catalog entry ...
        462165984030.../                ... and revision, in the hub's layout: from_pretrained(path)
          model_index.json  unet/ ...   a file has its name only once its hash was right
          .partial/<digest>             bytes so far of files under way
          .complete.json                written last: size and sha256 of every file
        462165984030....lock            held by the process that downloads

The next start believes `.complete.json` and compares names and sizes, a few stat() calls, rather
than reading gigabytes again. Older revisions are never removed here: delete their folders.
Entries of the miniature edition are folders of this repository and are used where they are.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from weights.catalog import CatalogEntry, Edition, HubFiles, PackagedFiles, UrlFile, get_entry
from weights.errors import DownloadError, MissingPackaged
from weights.lock import LockedFile, locked_entry

MINIATURE_FOLDER = Path(__file__).parent / "miniature"
COMPLETE = ".complete.json"
# Under /src in a container: `cog predict` mounts the project there, so what one run has fetched
# outlives its container. The container's home does not.
DEFAULT_CACHE = (
    "/src/.cache/cog-stable-diffusion"
    if Path(__file__).parent.parent == Path("/src")
    else "~/.cache/cog-stable-diffusion"
)


def ensure(name: str, edition: Edition) -> Path:
    """The folder with the files of `name`, complete; downloads what is missing.

    Without a network request where everything is there. Safe to call from several processes and
    threads at once: one downloads, the others wait. Raises a WeightsError.
    """
    entry = get_entry(name, edition)
    if isinstance(entry.source, PackagedFiles):
        return _packaged_folder(entry.name, entry.source)
    folder = entry_folder(entry)
    if _is_complete(entry, folder):
        return folder
    from weights.download import download_entry  # here: a warm start needs no HTTP library

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"{name}: cannot make {folder.parent}: {error}; set WEIGHTS_CACHE to a folder that can"
            " be written"
        ) from error
    with one_at_a_time(folder.with_name(folder.name + ".lock"), name):
        if not _is_complete(entry, folder):
            (folder / COMPLETE).unlink(missing_ok=True)
            _write_marker(folder, download_entry(entry, folder))
    return folder


@contextmanager
def one_at_a_time(lock_path: Path, name: str) -> Iterator[None]:
    """Hold a lock against other threads and processes, saying so where it has to be waited for."""
    lock = FileLock(lock_path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Waiting for another process that downloads {name}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def is_present(name: str, edition: Edition) -> bool:
    """Whether `ensure` would return at once."""
    entry = get_entry(name, edition)
    if isinstance(entry.source, PackagedFiles):
        return (MINIATURE_FOLDER / entry.source.folder).is_dir()
    return _is_complete(entry, entry_folder(entry))


def cache_root() -> Path:
    """The folder that holds everything downloaded: WEIGHTS_CACHE or the default."""
    return Path(os.environ.get("WEIGHTS_CACHE") or DEFAULT_CACHE).expanduser().resolve()


def entry_folder(entry: CatalogEntry) -> Path:
    """Where the files of a downloaded or packaged entry are, or will be."""
    source = entry.source
    if isinstance(source, PackagedFiles):
        return MINIATURE_FOLDER / source.folder
    if isinstance(source, UrlFile):
        version = source.sha256[:16]
    else:
        locked = locked_entry(entry)
        version = locked.revision if locked is not None else source.revision
    return cache_root() / entry.name / version.replace("/", "--")


def files_of(entry: CatalogEntry) -> tuple[str, ...]:
    """The entry's files, relative to its folder."""
    source = entry.source
    if isinstance(source, HubFiles):
        return source.files
    if isinstance(source, UrlFile):
        return (source.filename,)
    folder = MINIATURE_FOLDER / source.folder
    return tuple(
        str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()
    )


def digests(folder: Path, part: str) -> frozenset[str]:
    """sha256 in hexadecimal of each of the weights' files of a part of an entry.

    `folder` is what `ensure` gave, `part` a folder in it, or "" for itself.
    """
    vouched = _read_marker(folder)
    if vouched is None:  # of this repository: a few megabytes
        files = (folder / part).glob("*.safetensors")
        return frozenset(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return frozenset(
        file.sha256
        for path, file in vouched.items()
        if path.rpartition("/")[0] == part and path.endswith(".safetensors")
    )


def size_bytes(entry: CatalogEntry) -> int:
    """Sum of the entry's files: stated by the catalog, measured for packaged ones."""
    if isinstance(entry.source, PackagedFiles):
        folder = entry_folder(entry)
        return sum((folder / file).stat().st_size for file in files_of(entry))
    return entry.source.size_bytes


def _packaged_folder(name: str, source: PackagedFiles) -> Path:
    folder = MINIATURE_FOLDER / source.folder
    if not folder.is_dir():
        raise MissingPackaged(
            f"{folder} is missing: the miniature {name} is part of the repository. Restore it with"
            " `git checkout weights/miniature`, or train it with the scripts in that folder"
        )
    return folder


def _is_complete(entry: CatalogEntry, folder: Path) -> bool:
    """Whether the marker vouches for every file that catalog and lock name, and sizes agree."""
    vouched = _read_marker(folder)
    if vouched is None or set(vouched) != set(files_of(entry)):
        return False
    locked = locked_entry(entry)
    if locked is not None and locked.files != vouched:
        return False
    for path, file in vouched.items():
        try:
            if (folder / path).stat().st_size != file.size_bytes:
                return False
        except FileNotFoundError:
            return False
    return True


def _read_marker(folder: Path) -> dict[str, LockedFile] | None:
    try:
        content = json.loads((folder / COMPLETE).read_text())
        return {path: LockedFile(**file) for path, file in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent, or not ours: the files are checked against their hashes again


def _write_marker(folder: Path, files: dict[str, LockedFile]) -> None:
    content = {"files": {path: asdict(file) for path, file in files.items()}}
    partial = folder / (COMPLETE + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(folder / COMPLETE)
