"""The Hugging Face hub: which files a repository has, and the download of the catalog's.

huggingface_hub does the transfer: files in parallel, chunks by hf_xet, cuts resumed. Its variables
keep their meaning (`HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`, `HF_XET_*`); it reads most of them
when it is imported. It does not compare hashes: `weights.download` does.
"""

import errno
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
from huggingface_hub import (
    HfApi,
    constants,
    get_session,
    get_token,
    hf_hub_url,
    set_client_factory,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from tqdm import tqdm

from weights.catalog import HubFiles
from weights.errors import (
    AccessDenied,
    ChecksumMismatch,
    DiskFull,
    DownloadError,
    NotOnServer,
    Offline,
)
from weights.http import Digest, ErrorHints, RemoteFile
from weights.lock import LockedEntry
from weights.retry import CATALOG_RETRIES, TemporaryFailure, raise_if_busy, with_retries

METADATA_TIMEOUT_S = 30.0
CATALOG_HINTS = ErrorHints(
    denied="accept the repository's licence on its page and set HF_TOKEN to a token that may read"
    " it",
    missing="correct the entry in weights/catalog.py, or see that the mirror has the file",
    changed="the server's file has changed: set WEIGHTS_MIRROR or HF_ENDPOINT to another server, or"
    " renew the lock with script/weights --lock",
    other="check HF_ENDPOINT, WEIGHTS_MIRROR",
)


@dataclass(frozen=True)
class Repository:
    """The files of a repository at one commit, by path."""

    where: str  # for messages
    repo: str
    commit: str
    files: Mapping[str, RemoteFile]
    hints: ErrorHints

    def file(self, path: str) -> RemoteFile:
        """Return one file. Raises NotOnServer where it is missing, or has no size or hash."""
        file = self.files.get(path)
        if file is None:
            raise NotOnServer(f"{path} is not in {self.where}: {self.hints.missing}")
        if file.size_bytes is None or file.digest is None:
            raise NotOnServer(f"{path}: {self.where} gives no size or hash; check HF_ENDPOINT")
        return file


def resolve(source: HubFiles) -> Repository:
    """Return the catalog's files at the commit behind `source.revision`. Raises a DownloadError."""
    repository = with_retries(
        lambda: list_files(source.repo, source.revision, get_token(), CATALOG_HINTS),
        CATALOG_RETRIES,
    )
    files = {path: repository.file(path) for path in source.files}
    return Repository(repository.where, source.repo, repository.commit, files, repository.hints)


def from_lock(locked: LockedEntry) -> Repository:
    """Return an entry's files as the lock file has them, without a request."""
    files = {
        path: _remote_file(
            locked.repo,
            locked.revision,
            path,
            file.size_bytes,
            Digest("sha256", file.sha256),
            CATALOG_HINTS,
        )
        for path, file in locked.files.items()
    }
    return Repository("the lock file", locked.repo, locked.revision, files, CATALOG_HINTS)


def list_files(repo: str, revision: str, token: str | None, hints: ErrorHints) -> Repository:
    """Return everything in a repository, by one request.

    Without `token` none is sent, not even one that huggingface_hub would find by itself. Raises
    TemporaryFailure where a retry may help, else a DownloadError.
    """
    where = f"{repo}@{revision} on {constants.ENDPOINT}"
    try:
        info = HfApi(endpoint=constants.ENDPOINT, token=token or False).model_info(
            repo, revision=revision, files_metadata=True, timeout=METADATA_TIMEOUT_S
        )
    except (OSError, httpx.RequestError) as error:  # HfHubHTTPError is an OSError
        raise _translated(error, where, hints) from error
    except ValueError as error:  # a web page instead of JSON, or an impossible repository name
        raise DownloadError(
            f"{where}: {error}; check HF_ENDPOINT and the repository's name"
        ) from error
    if info.sha is None:
        raise NotOnServer(f"{where}: the server names no commit; check HF_ENDPOINT")
    files = {}
    for each in info.siblings or ():
        digest = None  # large files (git LFS) have a sha256, small ones only their git blob id
        if each.lfs is not None:
            digest = Digest("sha256", each.lfs.sha256)
        elif each.blob_id is not None:
            digest = Digest("git-sha1", each.blob_id)
        path = each.rfilename
        files[path] = _remote_file(repo, info.sha, path, each.size, digest, hints, token)
    return Repository(where, repo, info.sha, files, hints)


def _remote_file(
    repo: str,
    commit: str,
    path: str,
    size_bytes: int | None,
    digest: Digest | None,
    hints: ErrorHints,
    token: str | None = None,
) -> RemoteFile:
    return RemoteFile(
        path=path,
        url=hf_hub_url(repo, path, revision=commit, endpoint=constants.ENDPOINT),
        limit_bytes=size_bytes or 0,
        hints=hints,
        size_bytes=size_bytes,
        digest=digest,
        part_name=digest.hexdigest if digest else "",
        headers=((("Authorization", f"Bearer {token}"),) if token else ()),
        mirror_path=f"{repo}/{commit}/{path}",
    )


def download(repo: str, commit: str, paths: list[str], folder: Path) -> None:
    """Download files of a repository into `folder`; sizes are checked, hashes are not.

    Files that an earlier call has finished are kept. Raises a DownloadError.
    """
    for stale in folder.rglob("*.incomplete"):  # of a process that was killed: never continued
        stale.unlink()
    with_retries(lambda: _download(repo, commit, paths, folder), CATALOG_RETRIES)


def _download(repo: str, commit: str, paths: list[str], folder: Path) -> None:
    where = f"{repo}@{commit} on {constants.ENDPOINT}"
    stop = threading.Event()

    def snapshot() -> None:
        snapshot_download(  # type: ignore[call-overload]  # of tqdm_class: a partial is allowed
            repo,
            revision=commit,
            local_dir=folder,
            allow_patterns=paths,
            endpoint=constants.ENDPOINT,
            token=get_token() or False,
            tqdm_class=partial(_StoppableBar, stop=stop),
        )

    # In a thread, because snapshot_download waits for its own: a request that is cancelled, by an
    # exception in this thread, would wait for gigabytes.
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(snapshot)
        try:
            future.result()
        except (OSError, httpx.RequestError) as error:
            raise _translated(error, where, CATALOG_HINTS) from error
        except RuntimeError as error:  # hf_xet's
            raise TemporaryFailure(f"{where}: {error}") from error
        finally:
            stop.set()


class _StoppableBar(tqdm):  # type: ignore[type-arg]
    """A progress bar whose next update can end the download that it belongs to."""

    def __init__(self, *args: object, stop: threading.Event, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[call-overload]
        self._stop = stop

    def update(self, n: float | None = 1) -> bool | None:
        """As tqdm's, or raise KeyboardInterrupt, which huggingface_hub does not retry."""
        if self._stop.is_set():
            raise KeyboardInterrupt
        return super().update(n)


def _translated(
    error: OSError | httpx.RequestError, where: str, hints: ErrorHints
) -> DownloadError | TemporaryFailure:
    """Return our error for one of huggingface_hub's."""
    if isinstance(error, LocalEntryNotFoundError):  # it looks on the disk when the hub refuses
        cause = error.__cause__
        if isinstance(cause, OSError | httpx.RequestError):
            return _translated(cause, where, hints)
    if isinstance(error, httpx.RequestError):
        return TemporaryFailure(f"{where}: {type(error).__name__}: {error}")
    if isinstance(error, OfflineModeIsEnabled):
        return Offline(f"{where}: HF_HUB_OFFLINE is set; unset it to download")
    if isinstance(error, HfHubHTTPError):
        status, path = error.response.status_code, error.response.request.url.path
        if isinstance(error, GatedRepoError) or status in (401, 403):
            remedy = f"{hints.denied}, and check the repository's name"
            return AccessDenied(f"{where} answered {status} for {path}: {remedy}")
        if status == 404:
            return NotOnServer(f"{where} does not exist, or has no {path}: {hints.missing}")
        return DownloadError(f"{where} answered {status} for {path}: {hints.other}")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(
            f"{where}: the disk is full ({error.filename or error}); free some and run again, or"
            " set WEIGHTS_CACHE to another disk"
        )
    if str(error).startswith("Consistency check failed"):
        detail = str(error).splitlines()[0]
        return ChecksumMismatch(f"{where}: {detail} Try again; if it persists, {hints.changed}")
    return DownloadError(f"{where}: {error}; {hints.other}")


def _client_factory() -> httpx.Client:
    """Make a client like huggingface_hub's that leaves waiting for busy servers to our retries."""
    hooks = {**_HOOKS, "response": [*_HOOKS["response"], raise_if_busy]}
    return httpx.Client(event_hooks=hooks, follow_redirects=True, timeout=None)


_HOOKS = get_session().event_hooks  # offline mode, request ids
set_client_factory(_client_factory)
