"""The only downloader: decides what to fetch from where, checks the disk, shows progress.

Sizes and hashes come from the lock file, or else from the hub (or, for a plain URL, the catalog);
bytes come from the hub or the URL, or, where `WEIGHTS_MIRROR` is set, from that base address alone:

    {mirror}/{repo}/{commit}/{file}        a file of a hub repository
    {mirror}/{sha256}/{filename}           a file at a URL

So a mirror never vouches for itself, and with a lock the hub need not be reachable. `weights.hub`
talks to the hub, `weights.transfer` moves one file.
"""

import dataclasses
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import httpx
from tqdm import tqdm

from weights import hub, retry, transfer
from weights.catalog import CatalogEntry, HubFiles, UrlFile
from weights.errors import DiskFull, Offline
from weights.http import Digest, RemoteFile
from weights.lock import LockedEntry, LockedFile, locked_entry
from weights.retry import RetryPolicy

DISK_MARGIN_BYTES = 256 << 20  # left free for everything else that shares the disk


def download_entry(entry: CatalogEntry, folder: Path) -> dict[str, LockedFile]:
    """Bring every file of `entry` into `folder`; what each one is, by its path.

    The caller holds the entry's lock. Raises a DownloadError or LockMismatch; files that were
    finished before it stay, and so do parts, from which the next call resumes.
    """
    files = _remote_files(entry)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [file for file in files if not transfer.matches(folder / file.path, file)]
    if missing:
        fetch_files(missing, folder, entry.name, retry.RETRY)
    shutil.rmtree(folder / transfer.PARTIAL_FOLDER, ignore_errors=True)
    return {file.path: _described(folder / file.path, file) for file in files}


def resolve_lock(entry: CatalogEntry) -> LockedEntry:
    """What `entry` is on the hub today. Small files, which have no sha256 there, are fetched."""
    source = entry.source
    if not isinstance(source, HubFiles):
        raise TypeError(f"{entry.name} is not on the hub, so there is nothing to lock")
    commit, files = _ask_hub(source)
    large = {
        file.path: LockedFile(file.size_bytes, file.digest.hexdigest)
        for file in files
        if file.size_bytes is not None and file.digest is not None and file.digest.kind == "sha256"
    }
    small = [file for file in files if file.path not in large]
    with tempfile.TemporaryDirectory(prefix="weights-lock-") as temporary:
        folder = Path(temporary)
        if small:
            fetch_files(small, folder, entry.name, retry.RETRY)
        locked = large | {file.path: _described(folder / file.path, file) for file in small}
    return LockedEntry(source.repo, source.revision, commit, locked)


def fetch_files(files: list[RemoteFile], folder: Path, label: str, policy: RetryPolicy) -> None:
    """Fetch `files` into `folder` one after another, with one progress bar called `label`."""
    if hub.is_offline():
        raise Offline(
            f"{label}: {files[0].path} from {files[0].url} and {len(files) - 1} more files are"
            " needed and HF_HUB_OFFLINE is set: unset it once, or copy the folder from a machine"
            f" that has it to {folder}"
        )
    total = sum(file.size_bytes or 0 for file in files)
    have = sum(transfer.bytes_on_disk(transfer.partial_path(folder, file)) for file in files)
    check_disk(folder, total - have, f"{label} ({files[0].url} …)")
    with (
        httpx.Client(timeout=transfer.TIMEOUT) as client,
        progress_bar(label, total, have) as bar,
    ):
        for file in files:
            bar.set_postfix_str(file.path)
            transfer.fetch_file(client, _mirrored(file), folder, policy, bar.update)


def progress_bar(label: str, total_bytes: int | None, have_bytes: int) -> "tqdm[NoReturn]":
    """A bar in bytes, on stderr, which becomes the prediction's log."""
    return tqdm(
        desc=label,
        total=total_bytes,
        initial=have_bytes,
        unit="B",
        unit_scale=True,
        file=sys.stderr,
    )


def check_disk(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise DiskFull unless `needed_bytes` and DISK_MARGIN_BYTES are free for `folder`."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes + DISK_MARGIN_BYTES:
        raise DiskFull(
            f"{what} needs {needed_bytes} bytes more and {DISK_MARGIN_BYTES} to spare, but the disk"
            f" of {folder} has {free_bytes} free: free some, or set WEIGHTS_CACHE to another disk"
        )


def _remote_files(entry: CatalogEntry) -> list[RemoteFile]:
    """The files of an entry with size, hash and address, from the best source there is."""
    source = entry.source
    if isinstance(source, UrlFile):
        return [
            RemoteFile(
                path=source.filename,
                url=source.url,
                size_bytes=source.size_bytes,
                limit_bytes=source.size_bytes,
                digest=Digest("sha256", source.sha256),
                validator=None,
                part_name=source.sha256,
                headers=(),
                mirror_path=f"{source.sha256}/{source.filename}",
                advice=hub.CATALOG_ADVICE,
            )
        ]
    if not isinstance(source, HubFiles):
        raise TypeError(f"{entry.name} is part of the repository: nothing to download")
    locked = locked_entry(entry)
    if locked is not None:
        return hub.locked_files(locked)
    return _ask_hub(source)[1]


def _ask_hub(source: HubFiles) -> tuple[str, list[RemoteFile]]:
    return retry.with_retries(lambda: hub.resolve(source), retry.RETRY, progress=lambda: 0)


def _mirrored(file: RemoteFile) -> RemoteFile:
    """The same file from WEIGHTS_MIRROR where that is set, without the hub's token."""
    mirror = os.environ.get("WEIGHTS_MIRROR", "").rstrip("/")
    if not mirror:
        return file
    return dataclasses.replace(file, url=f"{mirror}/{file.mirror_path}", headers=())


def _described(path: Path, file: RemoteFile) -> LockedFile:
    """Size and sha256 of a file that has passed its check."""
    digest = file.digest
    if digest is None or digest.kind != "sha256":
        digest = transfer.digest_of(path, "sha256")
    return LockedFile(path.stat().st_size, digest.hexdigest)
