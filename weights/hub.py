"""What the Hugging Face hub says about files: commit, size, hash, address. It fetches no content.

`HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` are huggingface_hub's own; it reads the first and the
last when it is imported.
"""

import httpx
from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

from weights.catalog import HubFiles
from weights.errors import AccessDenied, DownloadError, NotOnServer, Offline
from weights.lock import LockedEntry
from weights.retry import TemporaryFailure, is_temporary, retry_after_s
from weights.transfer import Digest, RemoteFile

METADATA_TIMEOUT_S = 30.0


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids every request."""
    return bool(constants.is_offline_mode())


def resolve(source: HubFiles) -> tuple[str, list[RemoteFile]]:
    """Ask the hub for the commit behind `source.revision` and for each file's size and hash.

    Large files (git LFS) have a sha256; small ones only their git blob id, which is a sha1.
    Raises TemporaryFailure where trying again may help, else a DownloadError.
    """
    where = f"{source.repo}@{source.revision} on {constants.ENDPOINT}"
    try:
        info = HfApi(endpoint=constants.ENDPOINT).model_info(
            source.repo,
            revision=source.revision,
            files_metadata=True,
            timeout=METADATA_TIMEOUT_S,
        )
    except OfflineModeIsEnabled as error:
        raise Offline(f"{where}: HF_HUB_OFFLINE is set; unset it to download") from error
    except HfHubHTTPError as error:
        raise _explain(error, where) from error
    except httpx.RequestError as error:
        raise TemporaryFailure(f"{where}: {type(error).__name__}: {error}") from error
    except ValueError as error:  # a web page instead of JSON, or an impossible repository name
        raise DownloadError(
            f"{where}: {error}; check HF_ENDPOINT and weights/catalog.py"
        ) from error
    commit = info.sha
    if commit is None:
        raise NotOnServer(f"{where}: the server names no commit; check HF_ENDPOINT")
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    remote_files = []
    for path in source.files:
        sibling = siblings.get(path)
        if sibling is None:
            raise NotOnServer(f"{path} is not in {where}: correct the entry in weights/catalog.py")
        if sibling.lfs is not None:
            digest = Digest("sha256", sibling.lfs.sha256)
        elif sibling.blob_id is not None:
            digest = Digest("git-sha1", sibling.blob_id)
        else:
            raise NotOnServer(f"{path}: {where} gives no hash for it; check HF_ENDPOINT")
        if sibling.size is None:
            raise NotOnServer(f"{path}: {where} gives no size for it; check HF_ENDPOINT")
        remote_files.append(_remote_file(source.repo, commit, path, sibling.size, digest))
    return commit, remote_files


def locked_files(locked: LockedEntry) -> list[RemoteFile]:
    """The same list from the lock file, without a request."""
    return [
        _remote_file(
            locked.repo, locked.revision, path, file.size_bytes, Digest("sha256", file.sha256)
        )
        for path, file in locked.files.items()
    ]


def _remote_file(repo: str, commit: str, path: str, size_bytes: int, digest: Digest) -> RemoteFile:
    token = get_token()  # HF_TOKEN, or what `hf auth login` stored
    return RemoteFile(
        path=path,
        url=hf_hub_url(repo, path, revision=commit, endpoint=constants.ENDPOINT),
        size_bytes=size_bytes,
        digest=digest,
        headers=((("Authorization", f"Bearer {token}"),) if token else ()),
        mirror_path=f"{repo}/{commit}/{path}",
    )


def _explain(error: HfHubHTTPError, where: str) -> DownloadError | TemporaryFailure:
    """Our error for an answer that huggingface_hub does not accept."""
    status = error.response.status_code
    if isinstance(error, GatedRepoError) or status in (401, 403):
        return AccessDenied(
            f"{where} answered {status}: accept the repository's licence on its page, set HF_TOKEN"
            " to a token that may read it, and check the repository's name"
        )
    if status == 404:
        return NotOnServer(f"{where} does not exist: correct the entry in weights/catalog.py")
    if is_temporary(status):
        return TemporaryFailure(f"{where} answered {status}", retry_after_s(error.response))
    return DownloadError(f"{where} answered {status}: {error}")
