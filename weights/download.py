"""Download an entry of the catalog: from where, onto which disk, and is it right?

Sizes and hashes come from the lock file, or else from the hub (or, for a plain URL, the catalog).
A hub repository is downloaded by huggingface_hub, a plain URL by `weights.transfer`; where
`WEIGHTS_MIRROR` is set, all bytes come from that base address alone:

    {mirror}/{repo}/{commit}/{file}        a file of a hub repository
    {mirror}/{sha256}/{filename}           a file at a URL

So a mirror never vouches for itself, and with a lock the hub need not be reachable.
"""

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path

import httpx
from huggingface_hub import constants

from weights import hub, transfer
from weights.catalog import CatalogEntry, HubFiles, UrlFile
from weights.errors import DiskFull, NotOnServer, Offline
from weights.http import Digest, RemoteFile
from weights.lock import LockedEntry, LockedFile, locked_entry
from weights.retry import CATALOG_RETRIES

DISK_MARGIN_BYTES = 256 << 20  # left free for everything else that shares the disk


def download_entry(entry: CatalogEntry, folder: Path) -> dict[str, LockedFile]:
    """Bring every file of `entry` into `folder`. Returns size and sha256 by path.

    The caller holds the entry's lock. Files that were finished earlier stay. Raises a DownloadError
    or LockMismatch; then no file of the wrong content has its final name.
    """
    source = entry.source
    repository = None
    if isinstance(source, HubFiles):
        locked = locked_entry(entry)
        repository = hub.from_lock(locked) if locked is not None else hub.resolve(source)
        files = list(repository.files.values())
    elif isinstance(source, UrlFile):
        files = [_file_at_url(source)]
    else:
        raise TypeError(f"{entry.name} is part of the repository: nothing to download")
    folder.mkdir(parents=True, exist_ok=True)
    missing = [file for file in files if not file.matches(folder / file.path)]
    if missing:
        _fetch(missing, repository, folder, entry.name)
    shutil.rmtree(folder / transfer.PARTIAL_FOLDER, ignore_errors=True)
    return {file.path: _locked(folder / file.path, file) for file in files}


def resolve_lock(entry: CatalogEntry) -> LockedEntry:
    """Ask the hub what `entry` is today. Small files, which have no sha256 there, are fetched."""
    source = entry.source
    if not isinstance(source, HubFiles):
        raise TypeError(f"{entry.name} is not on the hub, so there is nothing to lock")
    repository = hub.resolve(source)
    large = {
        path: LockedFile(file.size_bytes, file.digest.hexdigest)
        for path, file in repository.files.items()
        if file.size_bytes is not None and file.digest is not None and file.digest.kind == "sha256"
    }
    small = [file for path, file in repository.files.items() if path not in large]
    with tempfile.TemporaryDirectory(prefix="weights-lock-") as temporary:
        folder = Path(temporary)
        if small:
            _fetch(small, repository, folder, entry.name)
        locked = large | {file.path: _locked(folder / file.path, file) for file in small}
    return LockedEntry(source.repo, source.revision, repository.commit, locked)


def check_disk(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise DiskFull unless `needed_bytes` and DISK_MARGIN_BYTES are free for `folder`."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes + DISK_MARGIN_BYTES:
        raise DiskFull(
            f"{what} needs {needed_bytes} bytes more and {DISK_MARGIN_BYTES} to spare, but the disk"
            f" of {folder} has {free_bytes} free: free some, or set WEIGHTS_CACHE to another disk"
        )


def _file_at_url(source: UrlFile) -> RemoteFile:
    return RemoteFile(
        path=source.filename,
        url=source.url,
        limit_bytes=source.size_bytes,
        hints=hub.CATALOG_HINTS,
        size_bytes=source.size_bytes,
        digest=Digest("sha256", source.sha256),
        part_name=source.sha256,
        mirror_path=f"{source.sha256}/{source.filename}",
    )


def _fetch(
    files: list[RemoteFile], repository: hub.Repository | None, folder: Path, label: str
) -> None:
    """Fetch `files` into `folder` and check them. `repository`: theirs on the hub, if any."""
    if constants.is_offline_mode():
        raise Offline(
            f"{label}: {files[0].path} from {files[0].url} and {len(files) - 1} more files are"
            " needed and HF_HUB_OFFLINE is set: unset it once, or copy the folder from a machine"
            f" that has it to {folder}"
        )
    mirror = os.environ.get("WEIGHTS_MIRROR", "").rstrip("/")
    staging = folder / transfer.PARTIAL_FOLDER
    parts = [transfer.partial_path(folder, file) for file in files]
    parts += [staging / file.path for file in files]
    have = sum(transfer.bytes_on_disk(part) for part in set(parts))
    needed = sum(file.size_bytes or 0 for file in files) - have
    check_disk(folder, needed, f"{label} ({files[0].url} …)")
    if repository is not None and not mirror:
        # What a process that was killed has finished is kept.
        paths = [file.path for file in files if not file.matches(staging / file.path)]
        if paths:
            hub.download(repository.repo, repository.commit, paths, staging)
        for file in files:
            _publish_checked(staging / file.path, file, folder)
        return
    with httpx.Client(timeout=transfer.TIMEOUT) as client:
        for file in files:
            if mirror:  # without the hub's token
                url = f"{mirror}/{file.mirror_path}"
                file = dataclasses.replace(file, url=url, headers=())
            part = transfer.download(client, file, folder, CATALOG_RETRIES)
            transfer.publish(part, folder / file.path)


def _publish_checked(path: Path, file: RemoteFile, folder: Path) -> None:
    if not path.is_file():
        raise NotOnServer(f"{file.where}: the repository has no such file; {file.hints.missing}")
    if not file.matches(path):
        size_bytes = path.stat().st_size
        path.unlink()
        raise transfer.wrong_bytes(file, size_bytes)
    transfer.publish(path, folder / file.path)


def _locked(path: Path, file: RemoteFile) -> LockedFile:
    """Return size and sha256 of a file that has passed its check."""
    digest = file.digest
    if digest is None or digest.kind != "sha256":
        digest = Digest.of(path, "sha256")
    return LockedFile(path.stat().st_size, digest.hexdigest)
