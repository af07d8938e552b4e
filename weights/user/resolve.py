"""Ask a server what it has under a user's reference: which file, how large, where."""

import hashlib
import json
from dataclasses import replace
from pathlib import PurePosixPath

import httpx
from huggingface_hub import constants

from weights import hub
from weights.errors import NotOnServer, Offline
from weights.http import ErrorHints, RemoteFile, RemoteMetadata, read_small, request_metadata
from weights.messages import quote_list
from weights.user.parse import SUFFIXES, CivitaiModel, HubRepository, Tokens, WebFile

RemoteSource = WebFile | CivitaiModel | HubRepository

MAX_BYTES = 15_000_000_000  # an SDXL checkpoint in fp32 is 13.9 GB
MAX_JSON_BYTES = 8 << 20
MOST_CANDIDATES = 10
PREFERRED = ("pytorch_lora_weights.safetensors", "trained_model.tar")  # diffusers', cog-sdxl's

WEB_HINTS = ErrorHints(
    denied="the link may have expired, or a token is missing: get a new link, or give"
    " hf_api_token or civitai_api_token",
    missing="check the address",
    changed="the server's file changes while it is fetched",
    other="give the address of the file itself",
)
HUB_HINTS = ErrorHints(
    denied="accept the repository's licence on its page and give an hf_api_token that may read it",
    missing="check what you wrote, and that the repository is public or the token may read it",
    changed="the hub's file is damaged: name another revision",
    other="check HF_ENDPOINT",
)


def resolve(
    client: httpx.Client,
    source: RemoteSource,
    key: str,
    tokens: Tokens,
    before: RemoteMetadata | None,
) -> tuple[RemoteFile, RemoteMetadata] | None:
    """Return the file that is there now; None if it is unchanged since `before`.

    `key` names the file's part on the disk. Raises TemporaryFailure where a retry may help, else a
    DownloadError.
    """
    if constants.is_offline_mode():
        raise Offline(f"{source.name}: HF_HUB_OFFLINE is set; unset it to fetch weights")
    if isinstance(source, HubRepository):
        return _resolve_on_hub(source, key, tokens, before)
    url = source.url if isinstance(source, WebFile) else _newest_version(client, source, tokens)
    file = RemoteFile(source.name, url, MAX_BYTES, WEB_HINTS, headers=_authorization(url, tokens))
    metadata = request_metadata(client, file, before)
    if metadata is None:
        return None
    if metadata.content_type.lower().startswith("text/html"):
        raise NotOnServer(
            f"{file.where}: a web page came, perhaps to log in, and not a file; give the address"
            " that downloads the file itself, and a token if it needs one"
        )
    if metadata.size_bytes == 0:
        raise NotOnServer(f"{file.where}: the file is empty; {WEB_HINTS.missing}")
    part_name = _part_name(f"{key}\n{metadata.validator}\n{metadata.size_bytes}")
    file = replace(
        file,
        size_bytes=metadata.size_bytes,
        validator=metadata.validator,
        part_name=part_name,
    )
    return file, metadata


def _resolve_on_hub(
    source: HubRepository, key: str, tokens: Tokens, before: RemoteMetadata | None
) -> tuple[RemoteFile, RemoteMetadata] | None:
    token = tokens.hub if constants.ENDPOINT.startswith("https://") else None
    repository = hub.list_files(source.repo, source.revision, token, HUB_HINTS)
    path = _choose(source, repository)
    file = repository.file(path)
    assert file.digest is not None
    digest = file.digest.hexdigest
    metadata = RemoteMetadata(file.size_bytes, digest, None, "", PurePosixPath(path).name)
    if metadata == before:
        return None
    # Not by the hash alone: the same file in two repositories is fetched under two locks.
    file = replace(file, limit_bytes=MAX_BYTES, part_name=_part_name(f"{key}\n{digest}"))
    return file, metadata


def _part_name(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()


def _choose(source: HubRepository, repository: hub.Repository) -> str:
    """Return the file that is named, or the only one that can be meant."""
    weights = sorted(path for path in repository.files if path.lower().endswith(SUFFIXES))
    at_root = [path for path in weights if "/" not in path]
    if source.file is not None and source.file in repository.files:
        return source.file
    if source.file is None and len(at_root) == 1:
        return at_root[0]
    if source.file is None:
        for path in PREFERRED:
            if path in at_root:
                return path
    wanted = f"{source.file} is not in" if source.file else "no single file can be meant of"
    raise NotOnServer(
        f"{source.name}: {wanted} {repository.where}; name one as {source.repo}:file. Its weights"
        f" and archives: {quote_list(weights, MOST_CANDIDATES)}"
    )


def _newest_version(client: httpx.Client, source: CivitaiModel, tokens: Tokens) -> str:
    """Return the download address of a model's newest version, by Civitai's public API."""
    url = f"https://civitai.com/api/v1/models/{source.model}"
    headers = _authorization(url, tokens)
    file = RemoteFile(source.name, url, MAX_JSON_BYTES, WEB_HINTS, headers=headers)
    try:
        version = int(json.loads(read_small(client, file))["modelVersions"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise NotOnServer(
            f"{file.where}: no version of this model; give the address of the download itself"
        ) from error
    return f"https://civitai.com/api/download/models/{version}"


def _authorization(url: str, tokens: Tokens) -> tuple[tuple[str, str], ...]:
    """Return the token for this address's host, if there is one and the connection is secret."""
    host = httpx.URL(url)
    home = httpx.URL(constants.ENDPOINT)
    token = None
    if (host.scheme, host.host, host.port) == ("https", "civitai.com", None):
        token = tokens.civitai
    elif (host.scheme, host.host, host.port) == ("https", home.host, home.port):
        token = tokens.hub
    return (("Authorization", f"Bearer {token}"),) if token else ()
