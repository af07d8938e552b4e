"""Requests for one file over https: its metadata, its content, and errors in our words.

Redirects are followed here, one request at a time, so that a client which checks addresses checks
every hop, and the body of a redirect, which could be endless, is never read. httpx makes the next
request and leaves `Authorization` out where scheme, host or port differ.
"""

import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path, PurePosixPath
from typing import Literal

import httpcore
import httpx

from weights.errors import AccessDenied, DownloadError, NotOnServer, TooLarge
from weights.retry import TemporaryFailure, raise_if_busy

MOST_REDIRECTS = 5


@dataclass(frozen=True)
class Digest:
    """A hexadecimal hash; git-sha1 is git's blob id: sha1 of `blob <size>\\0` and the content."""

    kind: Literal["sha256", "git-sha1"]
    hexdigest: str

    @classmethod
    def of(cls, path: Path, kind: Literal["sha256", "git-sha1"]) -> "Digest":
        """Hash a file as it is on the disk."""
        hasher = hashlib.sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
        if kind == "git-sha1":
            hasher.update(b"blob %d\0" % path.stat().st_size)
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                hasher.update(chunk)
        return cls(kind, hasher.hexdigest())


@dataclass(frozen=True)
class ErrorHints:
    """Remedies for a refusal, which depend on who named the file."""

    denied: str  # 401, 403
    missing: str  # 404, 410
    changed: str  # other bytes than announced
    other: str  # any other refusal, and addresses that are none


@dataclass(frozen=True)
class RemoteFile:
    """One file to fetch, and what proves it right."""

    path: str  # inside its folder
    url: str = field(repr=False)  # may hold a signature
    limit_bytes: int  # more than this is never taken
    hints: ErrorHints
    size_bytes: int | None = None  # None: the server does not say beforehand
    digest: Digest | None = None  # None: nobody but the server knows what it should be
    validator: str | None = None  # for If-Range, where there is no digest: a strong ETag or a date
    part_name: str = ""  # names its part, see weights.transfer
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # may hold a token
    mirror_path: str = ""  # below WEIGHTS_MIRROR

    @property
    def where(self) -> str:
        """Return path and address for messages: no signature, no token."""
        return f"{self.path} from {re.sub('[?#].*', '', self.url, flags=re.DOTALL)}"

    def matches(self, path: Path) -> bool:
        """Return whether the file at `path` is this one, as far as size and hash are known."""
        return (
            path.is_file()
            and self.size_bytes in (None, path.stat().st_size)
            and (self.digest is None or Digest.of(path, self.digest.kind) == self.digest)
        )


@dataclass(frozen=True)
class RemoteMetadata:
    """A file by a server's headers."""

    size_bytes: int | None
    etag: str | None
    last_modified: str | None
    content_type: str
    file_name: str  # without folders; from the address where the server does not say

    @property
    def validator(self) -> str | None:
        """Return what If-Range may carry: no weak ETag (RFC 9110 §13.1.5)."""
        if self.etag is not None and not self.etag.startswith("W/"):
            return self.etag
        return self.last_modified

    def is_unchanged(self, before: "RemoteMetadata") -> bool:
        """Return whether the server vouches for the same content.

        Equal size alone is no proof: two LoRAs of one rank have it in common.
        """
        if self.size_bytes != before.size_bytes:
            return False
        if self.etag is not None or before.etag is not None:
            return self.etag == before.etag
        return self.last_modified is not None and self.last_modified == before.last_modified


def request_metadata(
    client: httpx.Client, file: RemoteFile, before: RemoteMetadata | None
) -> RemoteMetadata | None:
    """Return the metadata of `file` now; None if it is unchanged since `before`.

    One request, for one byte; not HEAD, because a signed address is signed for GET alone. Raises
    TemporaryFailure where a retry may help, else a DownloadError.
    """
    headers = {"Range": "bytes=0-0"}
    if before is not None and before.etag is not None:
        headers["If-None-Match"] = before.etag
    if before is not None and before.last_modified is not None:
        headers["If-Modified-Since"] = before.last_modified
    with opened(client, file, headers, also=() if before is None else (304,)) as response:
        if response.status_code == 304:
            return None
        metadata = RemoteMetadata(
            size_bytes=_whole_size(response),
            etag=response.headers.get("ETag"),
            last_modified=response.headers.get("Last-Modified"),
            content_type=response.headers.get("Content-Type", ""),
            file_name=_file_name(response.headers.get("Content-Disposition", ""), file.url),
        )
    return None if before is not None and metadata.is_unchanged(before) else metadata


def read_small(client: httpx.Client, file: RemoteFile) -> bytes:
    """Return all of a small file. Raises TemporaryFailure or a DownloadError."""
    content = b""
    with opened(client, file, {}, also=()) as response:
        for chunk in response.iter_raw():
            content += chunk
            if len(content) > file.limit_bytes:
                raise too_large(file)
    return content


@contextmanager
def opened(
    client: httpx.Client, file: RemoteFile, headers: dict[str, str], also: tuple[int, ...]
) -> Iterator[httpx.Response]:
    """Get `file`; the response has its body unread and the status 200, 206 or one of `also`.

    Failures within the block are translated too: TemporaryFailure or a DownloadError.
    """
    # Both log whole addresses, and the signature in an address is a secret.
    for library in ("httpx", "httpcore"):
        logging.getLogger(library).setLevel(logging.WARNING)
    sent = {**dict(file.headers), **headers, "Accept-Encoding": "identity"}
    try:
        response = _follow(client, client.build_request("GET", file.url, headers=sent))
        with closing(response):
            if response.status_code not in also:
                _check_status(response, file)
            yield response
    except (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.TooManyRedirects) as error:
        raise DownloadError(f"{file.where}: {error}; {file.hints.other}") from error
    except (
        *(httpx.RequestError, httpcore.NetworkError, httpcore.TimeoutException),
        httpcore.ProtocolError,
    ) as error:
        raise TemporaryFailure(f"{file.where}: {type(error).__name__}: {error}") from error


def too_large(file: RemoteFile) -> TooLarge:
    """Return the error for a file that has, or announces, more than its limit."""
    return TooLarge(
        f"{file.where}: more than {file.limit_bytes} bytes, the most that is fetched;"
        f" {file.hints.other}"
    )


def _follow(client: httpx.Client, request: httpx.Request) -> httpx.Response:
    """Return the first response that is no redirect."""
    for _ in range(MOST_REDIRECTS + 1):
        response = client.send(request, stream=True, follow_redirects=False)
        if response.next_request is None:
            return response
        response.close()
        request = response.next_request
    raise httpx.TooManyRedirects(f"more than {MOST_REDIRECTS} redirects")


def _check_status(response: httpx.Response, file: RemoteFile) -> None:
    status = response.status_code
    if status in (200, 206):
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":  # decompressed, a small response can have any size
            raise DownloadError(
                f"{file.where}: comes packed ({encoding[:20]!r}) against our request;"
                f" {file.hints.other}"
            )
        return
    answered = f"{file.where}: the server answered {status}"
    try:
        raise_if_busy(response)
    except TemporaryFailure as failure:
        raise TemporaryFailure(answered, failure.retry_after_s) from None
    if status in (401, 403):
        raise AccessDenied(f"{answered}; {file.hints.denied}")
    if status in (404, 410):
        raise NotOnServer(f"{answered}; {file.hints.missing}")
    raise DownloadError(f"{answered}; {file.hints.other}")


def _file_name(disposition: str, url: str) -> str:
    """Return the server's name for the file (RFC 6266), or the end of the requested address.

    Not of the address that redirects lead to: stores name files by their hashes.
    """
    header = Message()
    header["Content-Disposition"] = disposition
    named = header.get_filename() if disposition.isprintable() else None
    return PurePosixPath((named or httpx.URL(url).path).replace("\\", "/")).name


def _whole_size(response: httpx.Response) -> int | None:
    """Return the size in bytes of the whole file, whether the response is all of it or a range."""
    if response.status_code == 206:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        total = response.headers.get("Content-Length", "")
    return int(total) if total.isascii() and total.isdigit() else None
