"""Fetching the weights that somebody names: asked about, fetched where needed, kept in the cache.

`weights.references` reads what they wrote, `weights.offers` asks what is there, `weights.addresses`
says where this machine may connect to for them, `weights.transfer` moves the bytes and
`weights.trained_cache` keeps them. A file that is in the cache is asked about before it is used; if
that fails, the copy serves whoever made exactly this request before, and nobody else: an address
without its signature, or a repository without its token, is no key to somebody else's file.
"""

import hashlib
import os
import re
import shutil
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx

from weights import download, hub, retry, transfer
from weights import http as remote
from weights.errors import AccessDenied, DownloadError, NotOnServer, Offline, TransferFailed
from weights.http import RemoteFile
from weights.user import cache as trained_cache
from weights.user import resolve as offers
from weights.user import ssrf_guard as addresses
from weights.user.cache import CachedFile
from weights.user.parse import (
    HubRepository,
    InlineFile,
    LocalFile,
    Source,
    Tokens,
    WebFile,
    parse_operator_source,
    parse_source,
)
from weights.user.resolve import Offer, RemoteSource

__all__ = ["CachedFile", "Source", "Tokens", "fetch", "parse_operator_source", "parse_source"]

# Query parameters that change with every signature and say nothing about which file is meant.
_SIGNATURE = re.compile(
    r"x-(amz|goog|oss)-.*|awsaccesskeyid|googleaccessid|ossaccesskeyid|expires|signature|policy"
    r"|key-pair-id|token|__token__|hdnts|hdnea|hmac|sig",
    re.IGNORECASE,
)
# Azure's are so short that they count as such only next to its `sig`.
_AZURE = re.compile(r"s[eptvrs]|s[ir]|sip|spr|srt|sdd|sk(oid|tid|t|e|s|v)|saoid|suoid|scid")


def fetch(source: Source, tokens: Tokens) -> CachedFile:
    """The file that `source` means, for use as a context manager; its `path` stays until then.

    Raises a WeightsError that names the source; what arrived before a failure stays for the next
    call to resume.
    """
    try:
        return _fetch(source, tokens)
    except DownloadError as error:
        if source.name in str(error):
            raise
        # Behind a name or a redirect, and on the hub, only the place was known.
        raise type(error)(f"{source.name}: {error}") from error


def _fetch(source: Source, tokens: Tokens) -> CachedFile:
    if isinstance(source, LocalFile):
        digest = transfer.digest_of(source.path, "sha256").hexdigest
        return CachedFile(source.path, digest, source.path.name, source.path.open("rb"))
    if isinstance(source, InlineFile):
        return _keep_inline(source)
    key = _key(source)
    grant = _grant(source, key, tokens)
    # The copy is let go on every way out but those that return it: held, it cannot be evicted.
    with (
        trained_cache.fetching(key, source.name),
        _client(source) as client,
        ExitStack() as holding,
    ):
        known = trained_cache.recall(key)
        copy = trained_cache.held(known.digest, known.facts.file_name) if known else None
        if copy is not None:
            holding.enter_context(copy)
        before = known.facts if known is not None and copy is not None else None
        asking = partial(offers.ask, client, source, key, tokens, before)
        try:
            offer = retry.with_retries(asking, retry.FOR_PEOPLE, progress=lambda: 0)
        except (AccessDenied, NotOnServer, Offline, TransferFailed) as error:
            if known is None or copy is None or not trained_cache.is_granted(known, grant):
                raise
            print(f"{error} (the copy in the cache is used)", file=sys.stderr)
            holding.pop_all()
            return copy
        if offer is None:
            assert known is not None
            assert copy is not None
            trained_cache.remember(key, known.digest, known.facts, grant)
            holding.pop_all()
            return copy
        holding.close()  # an old version
        return _fetch_new(client, offer, key, grant)


def _fetch_new(client: httpx.Client, offer: Offer, key: str, grant: str) -> CachedFile:
    """Bring what is offered into the cache, unless its content is there already."""
    file = offer.file
    cached = None
    if file.digest is not None and file.digest.kind == "sha256":
        cached = trained_cache.held(file.digest.hexdigest, offer.facts.file_name)
    if cached is None:
        cached = trained_cache.keep(_download(client, file), offer.facts.file_name)
    trained_cache.remember(key, cached.digest, offer.facts, grant)
    return cached


def _download(client: httpx.Client, file: RemoteFile) -> Path:
    """The part with all of the file's bytes. Raises a DownloadError."""
    folder = trained_cache.folder()
    have = transfer.bytes_on_disk(transfer.partial_path(folder, file))
    if file.size_bytes is not None:
        if file.size_bytes > file.limit_bytes:
            raise remote.too_large(file)
        trained_cache.check_fits(file.size_bytes, file.where)
    else:  # as much as there is room for, lest a body without an end fill the disk
        free = shutil.disk_usage(folder).free - download.DISK_MARGIN_BYTES
        room = min(trained_cache.budget_bytes(), have + max(0, free))
        file = replace(file, limit_bytes=min(file.limit_bytes, room))
    _make_room((file.size_bytes or have) - have, file.where)
    with download.progress_bar(file.path, file.size_bytes, have) as bar:
        return transfer.fetch_part(client, file, folder, retry.FOR_PEOPLE, bar.update)


def _keep_inline(source: InlineFile) -> CachedFile:
    """Content that came in the request, as a file like the others."""
    digest = hashlib.sha256(source.content).hexdigest()
    with trained_cache.fetching(digest, source.name):
        copy = trained_cache.held(digest, source.file_name)
        if copy is not None:
            return copy
        trained_cache.check_fits(len(source.content), source.name)
        _make_room(len(source.content), source.name)
        part = trained_cache.folder() / transfer.PARTIAL_FOLDER / digest
        try:
            with part.open("wb") as file:
                file.write(source.content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DownloadError(f"{source.name}: cannot write {part}: {error}") from error
        return trained_cache.keep(part, source.file_name)


def _make_room(needed_bytes: int, what: str) -> None:
    """Keep the budget; where the disk has less than that, evict for its sake too."""
    folder = trained_cache.folder()
    left = trained_cache.evict(trained_cache.budget_bytes())
    free = shutil.disk_usage(folder).free
    missing = needed_bytes + download.DISK_MARGIN_BYTES - free
    if missing > 0:
        trained_cache.evict(max(0, left - missing))
    download.check_disk(folder, needed_bytes, what)


def _client(source: RemoteSource) -> httpx.Client:
    """Guarded where a stranger chooses the host; the hub and the operator choose their own."""
    if isinstance(source, HubRepository) or (isinstance(source, WebFile) and source.trusted):
        return httpx.Client(timeout=transfer.TIMEOUT)
    return addresses.guarded_client()


def _key(source: RemoteSource) -> str:
    """What names the same file every time: an address loses its signature."""
    if isinstance(source, HubRepository):
        return f"{hub.endpoint()} {source.repo} {source.revision} {source.file or ''}"
    if not isinstance(source, WebFile):
        return f"civitai {source.model}"
    url = httpx.URL(source.url)
    pairs = url.query.decode().split("&")
    names = [pair.partition("=")[0] for pair in pairs]
    azure = "sig" in names
    kept = [
        pair
        for pair, name in zip(pairs, names, strict=True)
        if not (_SIGNATURE.fullmatch(name) or (azure and _AZURE.fullmatch(name)))
    ]
    query = "&".join(kept).encode() or None
    return str(url.copy_with(query=query, fragment=None))


def _grant(source: RemoteSource, key: str, tokens: Tokens) -> str:
    """The exact request: signature and token included."""
    exact = source.url if isinstance(source, WebFile) else key
    return f"{exact}\n{tokens.hub}\n{tokens.civitai}"
