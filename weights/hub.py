"""What the Hugging Face hub says about files: commit, size, hash, address. It fetches no content.

`HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` are huggingface_hub's own; it reads the first and the
last when it is imported.
"""

from dataclasses import dataclass

import httpx
from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoSibling

from weights.catalog import HubFiles
from weights.errors import AccessDenied, DownloadError, NotOnServer, Offline
from weights.http import Advice, Digest, RemoteFile
from weights.lock import LockedEntry
from weights.retry import TemporaryFailure, is_temporary, retry_after_s

METADATA_TIMEOUT_S = 30.0
CATALOG_ADVICE = Advice(
    denied="accept the repository's licence on its page and set HF_TOKEN to a token that may read"
    " it",
    missing="correct the entry in weights/catalog.py, or see that the mirror has the file",
    changed="the server's file has changed: set WEIGHTS_MIRROR or HF_ENDPOINT to another server, or"
    " renew the lock with script/weights --lock",
    other="check HF_ENDPOINT, WEIGHTS_MIRROR",
)


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit, by path."""

    where: str  # for messages
    repo: str
    commit: str
    files: dict[str, RepoSibling]


def endpoint() -> str:
    """The hub's base address: HF_ENDPOINT or https://huggingface.co."""
    return constants.ENDPOINT


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids every request."""
    return bool(constants.is_offline_mode())


def resolve(source: HubFiles) -> tuple[str, list[RemoteFile]]:
    """Ask the hub for the commit behind `source.revision` and for each file's size and hash.

    Raises TemporaryFailure where trying again may help, else a DownloadError.
    """
    token = get_token()  # HF_TOKEN, or what `hf auth login` stored
    listing = list_files(source.repo, source.revision, token, CATALOG_ADVICE)
    files = [remote_file(listing, path, token, CATALOG_ADVICE) for path in source.files]
    return listing.commit, files


def list_files(repo: str, revision: str, token: str | None, advice: Advice) -> Listing:
    """One request for everything in a repository; errors as in `resolve`.

    Without `token` none is sent, not even one that huggingface_hub would find by itself.
    """
    where = f"{repo}@{revision} on {constants.ENDPOINT}"
    try:
        info = HfApi(endpoint=constants.ENDPOINT, token=token or False).model_info(
            repo, revision=revision, files_metadata=True, timeout=METADATA_TIMEOUT_S
        )
    except OfflineModeIsEnabled as error:
        raise Offline(f"{where}: HF_HUB_OFFLINE is set; unset it to download") from error
    except HfHubHTTPError as error:
        raise _explain(error, where, advice) from error
    except httpx.RequestError as error:
        raise TemporaryFailure(f"{where}: {type(error).__name__}: {error}") from error
    except ValueError as error:  # a web page instead of JSON, or an impossible repository name
        raise DownloadError(
            f"{where}: {error}; check HF_ENDPOINT and the repository's name"
        ) from error
    if info.sha is None:
        raise NotOnServer(f"{where}: the server names no commit; check HF_ENDPOINT")
    files = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    return Listing(where, repo, info.sha, files)


def remote_file(listing: Listing, path: str, token: str | None, advice: Advice) -> RemoteFile:
    """One file of a listing. Raises NotOnServer where it is not in it, or not described.

    Large files (git LFS) have a sha256; small ones only their git blob id, which is a sha1.
    """
    found = listing.files.get(path)
    if found is None:
        raise NotOnServer(f"{path} is not in {listing.where}: {advice.missing}")
    if found.lfs is not None:
        digest = Digest("sha256", found.lfs.sha256)
    elif found.blob_id is not None:
        digest = Digest("git-sha1", found.blob_id)
    else:
        raise NotOnServer(f"{path}: {listing.where} gives no hash for it; check HF_ENDPOINT")
    if found.size is None:
        raise NotOnServer(f"{path}: {listing.where} gives no size for it; check HF_ENDPOINT")
    return _remote_file(listing.repo, listing.commit, path, found.size, digest, token, advice)


def locked_files(locked: LockedEntry) -> list[RemoteFile]:
    """The same list from the lock file, without a request."""
    token = get_token()
    return [
        _remote_file(
            locked.repo,
            locked.revision,
            path,
            file.size_bytes,
            Digest("sha256", file.sha256),
            token,
            CATALOG_ADVICE,
        )
        for path, file in locked.files.items()
    ]


def _remote_file(
    repo: str,
    commit: str,
    path: str,
    size_bytes: int,
    digest: Digest,
    token: str | None,
    advice: Advice,
) -> RemoteFile:
    return RemoteFile(
        path=path,
        url=hf_hub_url(repo, path, revision=commit, endpoint=constants.ENDPOINT),
        size_bytes=size_bytes,
        limit_bytes=size_bytes,
        digest=digest,
        validator=None,
        part_name=digest.hexdigest,
        headers=((("Authorization", f"Bearer {token}"),) if token else ()),
        mirror_path=f"{repo}/{commit}/{path}",
        advice=advice,
    )


def _explain(error: HfHubHTTPError, where: str, advice: Advice) -> DownloadError | TemporaryFailure:
    """Our error for an answer that huggingface_hub does not accept."""
    status = error.response.status_code
    if isinstance(error, GatedRepoError) or status in (401, 403):
        return AccessDenied(
            f"{where} answered {status}: {advice.denied}, and check the repository's name"
        )
    if status == 404:
        return NotOnServer(f"{where} does not exist: {advice.missing}")
    if is_temporary(status):
        return TemporaryFailure(f"{where} answered {status}", retry_after_s(error.response))
    return DownloadError(f"{where} answered {status}: {error}")
