"""The catalog's weights on the disk.

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
from weights.lock import LockedFile, locked_entry, write_json

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
    """Return the folder with all files of `name`; downloads what is missing.

    No request is made where everything is there. Several processes and threads may call this at
    once: one downloads, the others wait. Raises a WeightsError.
    """
    entry = get_entry(name, edition)
    folder = entry_folder(entry)
    if _is_complete(entry, folder):
        return folder
    if isinstance(entry.source, PackagedFiles):
        raise MissingPackaged(
            f"{folder} is missing: the miniature {name} is part of the repository. Restore it with"
            " `git checkout weights/miniature`, or train it with the scripts in that folder"
        )
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
            files = download_entry(entry, folder)
            marker = {"files": {path: asdict(file) for path, file in files.items()}}
            write_json(folder / COMPLETE, marker)
    return folder


@contextmanager
def one_at_a_time(lock_path: Path, name: str) -> Iterator[None]:
    """Hold a lock against other threads and processes; prints a line if it has to wait."""
    lock = FileLock(lock_path, thread_local=False)  # may be released by another thread
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
    """Return whether `ensure` would return at once."""
    entry = get_entry(name, edition)
    return _is_complete(entry, entry_folder(entry))


def cache_root() -> Path:
    """Return the folder of everything downloaded: WEIGHTS_CACHE or the default."""
    return Path(os.environ.get("WEIGHTS_CACHE") or DEFAULT_CACHE).expanduser().resolve()


def entry_folder(entry: CatalogEntry) -> Path:
    """Return where the files of an entry are, or will be."""
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
    """Return the entry's files, relative to its folder."""
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
    """Return the sha256 (hexadecimal) of each safetensors file of a part of an entry.

    `folder` is what `ensure` returned, `part` a folder in it, or "" for itself.
    """
    marker = _read_marker(folder) or {}
    files = list((folder / part).glob("*.safetensors"))
    known = [marker.get(str(file.relative_to(folder))) for file in files]
    return frozenset(
        locked.sha256 if locked else hashlib.sha256(file.read_bytes()).hexdigest()
        for file, locked in zip(files, known, strict=True)
    )


def size_bytes(entry: CatalogEntry) -> int:
    """Return the sum of the entry's files: the catalog's, or measured for packaged ones."""
    if isinstance(entry.source, PackagedFiles):
        folder = entry_folder(entry)
        return sum((folder / file).stat().st_size for file in files_of(entry))
    return entry.source.size_bytes


def _is_complete(entry: CatalogEntry, folder: Path) -> bool:
    """Return whether the marker has every file of catalog and lock, and sizes agree."""
    if isinstance(entry.source, PackagedFiles):
        return folder.is_dir()
    marker = _read_marker(folder)
    if marker is None or set(marker) != set(files_of(entry)):
        return False
    locked = locked_entry(entry)
    if locked is not None and locked.files != marker:
        return False
    return all(
        (folder / path).is_file() and (folder / path).stat().st_size == file.size_bytes
        for path, file in marker.items()
    )


def _read_marker(folder: Path) -> dict[str, LockedFile] | None:
    try:
        content = json.loads((folder / COMPLETE).read_text())
        return {path: LockedFile(**file) for path, file in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent, or not ours: the files are checked against their hashes again
