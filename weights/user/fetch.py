"""Fetch the weights that a user names: resolved, downloaded where needed, kept in the cache.

`weights.user.parse` reads the reference, `weights.user.resolve` asks the server what is there,
`weights.user.ssrf_guard` decides where this machine may connect to, `weights.transfer` moves the
bytes and `weights.user.cache` keeps them. The server is asked about a cached file before each use.
If that fails, the copy serves whoever made exactly this request before, and nobody else: an address
without its signature, or a repository without its token, does not open somebody else's file.
"""

import hashlib
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import httpx
from huggingface_hub import constants

from weights import download, transfer
from weights.errors import AccessDenied, DownloadError, NotOnServer, Offline, TransferFailed
from weights.http import Digest, RemoteFile, too_large
from weights.retry import USER_RETRIES, with_retries
from weights.user import cache, ssrf_guard
from weights.user.cache import CachedFile
from weights.user.parse import HubRepository, InlineFile, LocalFile, Source, Tokens, WebFile
from weights.user.resolve import RemoteSource, resolve

# Query parameters that change with every signature and say nothing about which file is meant.
_SIGNATURE = re.compile(
    r"x-(amz|goog|oss)-.*|awsaccesskeyid|googleaccessid|ossaccesskeyid|expires|signature|policy"
    r"|key-pair-id|token|__token__|hdnts|hdnea|hmac|sig",
    re.IGNORECASE,
)
# Azure's are so short that they count as such only next to its `sig`.
_AZURE = re.compile(r"s[eptvrs]|s[ir]|sip|spr|srt|sdd|sk(oid|tid|t|e|s|v)|saoid|suoid|scid")


def fetch(source: Source, tokens: Tokens) -> CachedFile:
    """Return the file that `source` means, for use as a context manager.

    Raises a WeightsError that names the source. What arrived before a failure is resumed by the
    next call.
    """
    if isinstance(source, LocalFile):
        digest = Digest.of(source.path, "sha256").hexdigest
        return CachedFile(source.path, digest, source.path.name, close=lambda: None)
    key = _key(source)
    slot = cache.Slot(key, source.name)
    try:
        if isinstance(source, InlineFile):
            return _keep_inline(source, slot)
        return _fetch(source, key, tokens, slot)
    except DownloadError as error:
        slot.close()
        if source.name in str(error):
            raise
        # Behind a name or a redirect, and on the hub, only the place was known.
        raise type(error)(f"{source.name}: {error}") from error
    except BaseException:
        slot.close()
        raise


def _fetch(source: RemoteSource, key: str, tokens: Tokens, slot: cache.Slot) -> CachedFile:
    entry = slot.entry()
    before = entry.metadata if entry is not None else None
    exact = source.url if isinstance(source, WebFile) else key
    request = f"{exact}\n{tokens.hub}\n{tokens.civitai}"
    with _client(source) as client:
        try:
            resolved = with_retries(
                lambda: resolve(client, source, key, tokens, before), USER_RETRIES
            )
        except (AccessDenied, NotOnServer, Offline, TransferFailed) as error:
            if entry is None or not entry.may_use(request):
                raise
            print(f"{error} (the copy in the cache is used)", file=sys.stderr)
            return slot.file(entry.digest, entry.metadata.file_name)
        if resolved is not None:
            file, metadata = resolved
            digest = slot.add(_download(client, file, slot.folder))
        else:
            assert entry is not None
            digest, metadata = entry.digest, entry.metadata
    slot.record(digest, metadata, request)
    return slot.file(digest, metadata.file_name)


def _download(client: httpx.Client, file: RemoteFile, folder: Path) -> Path:
    """Return the complete part of a file in `folder`. Raises a DownloadError."""
    part = transfer.partial_path(folder, file)
    for old in part.parent.glob("*"):
        if old != part:  # of another version
            old.unlink()
    have = transfer.bytes_on_disk(part)
    if file.size_bytes is not None:
        if file.size_bytes > file.limit_bytes:
            raise too_large(file)
        cache.check_budget(file.size_bytes, file.where)
    else:  # as much as there is room for, lest a body without an end fill the disk
        free = shutil.disk_usage(folder).free - download.DISK_MARGIN_BYTES
        room = min(cache.budget_bytes(), have + max(0, free))
        file = replace(file, limit_bytes=min(file.limit_bytes, room))
    _make_room((file.size_bytes or have) - have, file.where)
    return transfer.download(client, file, folder, USER_RETRIES)


def _keep_inline(source: InlineFile, slot: cache.Slot) -> CachedFile:
    """Keep content that came in the request as a file like the others."""
    digest = hashlib.sha256(source.content).hexdigest()
    cache.check_budget(len(source.content), source.name)
    _make_room(len(source.content), source.name)
    part = slot.path.with_suffix(".part")
    try:
        part.write_bytes(source.content)
        slot.add(part)
    except OSError as error:
        raise DownloadError(f"{source.name}: cannot write {part}: {error}") from error
    return slot.file(digest, source.file_name)


def _make_room(needed_bytes: int, what: str) -> None:
    """Keep the budget; where the disk has less than that, evict for its sake too."""
    left = cache.evict(cache.budget_bytes())
    missing = needed_bytes + download.DISK_MARGIN_BYTES - shutil.disk_usage(cache.root()).free
    if missing > 0:
        cache.evict(max(0, left - missing))
    download.check_disk(cache.root(), needed_bytes, what)


def _client(source: RemoteSource) -> httpx.Client:
    """Guard where a user chooses the host; the hub and the operator choose their own."""
    if isinstance(source, HubRepository) or (isinstance(source, WebFile) and source.trusted):
        return httpx.Client(timeout=transfer.TIMEOUT)
    return ssrf_guard.guarded_client()


def _key(source: RemoteSource | InlineFile) -> str:
    """Return what names the same file every time: an address loses its signature."""
    if isinstance(source, InlineFile):
        return hashlib.sha256(source.content).hexdigest()
    if isinstance(source, HubRepository):
        return f"{constants.ENDPOINT} {source.repo} {source.revision} {source.file or ''}"
    if not isinstance(source, WebFile):
        return f"civitai {source.model}"
    url = httpx.URL(source.url)
    pairs = [(pair.partition("=")[0], pair) for pair in url.query.decode().split("&")]
    is_azure = "sig" in dict(pairs)
    kept = [
        pair
        for name, pair in pairs
        if not (_SIGNATURE.fullmatch(name) or (is_azure and _AZURE.fullmatch(name)))
    ]
    return str(url.copy_with(query="&".join(kept).encode() or None, fragment=None))
