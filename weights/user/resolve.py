"""What a server has to offer for something that somebody named: which file, how large, where."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import httpx

from weights import http as remote
from weights import hub
from weights.errors import NotOnServer, Offline
from weights.http import Advice, Facts, RemoteFile
from weights.user.parse import SUFFIXES, CivitaiModel, HubRepository, Tokens, WebFile

RemoteSource = WebFile | CivitaiModel | HubRepository

MAX_BYTES = 15_000_000_000  # an SDXL checkpoint in fp32 is 13.9 GB
MAX_ANSWER_BYTES = 8 << 20  # of JSON
MOST_CANDIDATES = 10
PREFERRED = ("pytorch_lora_weights.safetensors", "trained_model.tar")  # diffusers', cog-sdxl's

WEB_ADVICE = Advice(
    denied="the link may have expired, or a token is missing: get a new link, or give"
    " hf_api_token or civitai_api_token",
    missing="check the address",
    changed="the server's file changes while it is fetched",
    other="give the address of the file itself",
)
HUB_ADVICE = Advice(
    denied="accept the repository's licence on its page and give an hf_api_token that may read it",
    missing="check what you wrote, and that the repository is public or the token may read it",
    changed="the hub's file is damaged: name another revision",
    other="check HF_ENDPOINT",
)


@dataclass(frozen=True)
class Offer:
    """What to fetch, and how to tell later whether it is still the same."""

    file: RemoteFile
    facts: Facts


def ask(
    client: httpx.Client,
    source: RemoteSource,
    key: str,
    tokens: Tokens,
    before: Facts | None,
) -> Offer | None:
    """What is there now; None: what was there `before`.

    `key` names the source's part on the disk. Raises TemporaryFailure where trying again may help,
    else a DownloadError.
    """
    if hub.is_offline():
        raise Offline(f"{source.name}: HF_HUB_OFFLINE is set; unset it to fetch weights")
    if isinstance(source, HubRepository):
        return _ask_hub(source, key, tokens, before)
    url = source.url if isinstance(source, WebFile) else _newest_version(client, source, tokens)
    file = _web_file(source.name, url, tokens, MAX_BYTES)
    facts = remote.ask(client, file, before)
    if facts is None:
        return None
    if facts.content_type.lower().startswith("text/html"):
        raise NotOnServer(
            f"{file.where}: a web page came, perhaps to log in, and not a file; give the address"
            " that downloads the file itself, and a token if it needs one"
        )
    if facts.size_bytes == 0:
        raise NotOnServer(f"{file.where}: the file is empty; {WEB_ADVICE.missing}")
    part = f"{key}\n{facts.validator}\n{facts.size_bytes}"
    file = replace(
        file,
        size_bytes=facts.size_bytes,
        validator=facts.validator,
        part_name=hashlib.sha256(part.encode()).hexdigest(),
    )
    return Offer(file, facts)


def _ask_hub(source: HubRepository, key: str, tokens: Tokens, before: Facts | None) -> Offer | None:
    token = tokens.hub if hub.endpoint().startswith("https://") else None
    listing = hub.list_files(source.repo, source.revision, token, HUB_ADVICE)
    chosen = _choose(source, listing)
    file = hub.remote_file(listing, chosen, token, HUB_ADVICE)
    assert file.digest is not None
    name = PurePosixPath(chosen).name
    facts = Facts(file.size_bytes, file.digest.hexdigest, None, "", name)
    if facts == before:
        return None
    # Not by the hash alone: the same file in two repositories is fetched under two locks.
    part = hashlib.sha256(f"{key}\n{file.digest.hexdigest}".encode()).hexdigest()
    file = replace(file, limit_bytes=MAX_BYTES, part_name=part)
    return Offer(file, facts)


def _choose(source: HubRepository, listing: hub.Listing) -> str:
    """The file that is named, or the only one that can be meant."""
    weights = sorted(path for path in listing.files if path.lower().endswith(SUFFIXES))
    at_root = [path for path in weights if "/" not in path]
    if source.file is not None and source.file in listing.files:
        return source.file
    if source.file is None and len(at_root) == 1:
        return at_root[0]
    if source.file is None:
        for path in PREFERRED:
            if path in at_root:
                return path
    listed = ", ".join(weights[:MOST_CANDIDATES]) or "none"
    more = f" and {len(weights) - MOST_CANDIDATES} more" if len(weights) > MOST_CANDIDATES else ""
    wanted = f"{source.file} is not in" if source.file else "no single file can be meant of"
    raise NotOnServer(
        f"{source.name}: {wanted} {listing.where}; name one as {source.repo}:file. Its weights and"
        f" archives: {listed}{more}"
    )


def _newest_version(client: httpx.Client, source: CivitaiModel, tokens: Tokens) -> str:
    """The download address of a model's newest version, by Civitai's public API."""
    url = f"https://civitai.com/api/v1/models/{source.model}"
    file = _web_file(source.name, url, tokens, MAX_ANSWER_BYTES)
    try:
        version = int(json.loads(remote.read(client, file))["modelVersions"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise NotOnServer(
            f"{file.where}: no version of this model; give the address of the download itself"
        ) from error
    return f"https://civitai.com/api/download/models/{version}"


def _web_file(name: str, url: str, tokens: Tokens, limit_bytes: int) -> RemoteFile:
    """A file of which nothing is known yet."""
    return RemoteFile(
        path=name,
        url=url,
        size_bytes=None,
        limit_bytes=limit_bytes,
        digest=None,
        validator=None,
        part_name="",
        headers=_authorization(url, tokens),
        mirror_path="",
        advice=WEB_ADVICE,
    )


def _authorization(url: str, tokens: Tokens) -> tuple[tuple[str, str], ...]:
    """The token for this address's host, if there is one and the connection is secret."""
    host = httpx.URL(url)
    home = httpx.URL(hub.endpoint())
    token = None
    if (host.scheme, host.host, host.port) == ("https", "civitai.com", None):
        token = tokens.civitai
    elif (host.scheme, host.host, host.port) == ("https", home.host, home.port):
        token = tokens.hub
    return (("Authorization", f"Bearer {token}"),) if token else ()
