"""A server on this machine that speaks the hub's protocol and misbehaves on demand.

It answers `/api/models/{repo}/revision/{revision}`, `/api/models/{repo}/tree/{revision}` and
`/{repo}/resolve/{revision}/{file}` as the hub does: large files (here *.safetensors) are LFS files
with a sha256 and are redirected to another host name, small ones have a git blob id and are served
in place. Everything below `/plain/` is an ordinary web server: the mirror and the addresses of
single files. Misbehaviour is for GET alone: clients ask for metadata with HEAD first.
"""

import hashlib
import json
import os
import random
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, file_download

from tests.helpers.background_server import serving
from weights import lock, retry
from weights.catalog import CATALOG, CatalogEntry, Edition, HubFiles, UrlFile

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Misbehaviour:
    """What happens to one request for a file instead of serving it properly."""

    status: int | None = None  # answer this and no content
    headers: tuple[tuple[str, str], ...] = ()
    cut_after: int | None = None  # close the connection after this many bytes
    replace_with: bytes | None = None  # serve these bytes instead
    ignore_range: bool = False  # serve the whole file with 200
    hold_after: int | None = None  # after this many bytes wait for `release`
    release: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Request:
    """One request for a file's content, as the server saw it."""

    path: str
    range: str | None
    authorization: str | None
    host: str
    status: int
    bytes_sent: int


@dataclass
class FakeHub:
    """Set `repos`, `plain` and `misbehave` before a request, read `requests` afterwards."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    plain: dict[str, bytes] = field(default_factory=dict)
    misbehave: dict[str, list[Misbehaviour]] = field(default_factory=lambda: defaultdict(list))
    api_misbehave: list[Misbehaviour] = field(default_factory=list)
    required_token: str | None = None
    requests: list[Request] = field(default_factory=list)
    api_requests: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def served(self, path: str) -> list[Request]:
        """The requests for the content of `path` that were answered with content."""
        with self.lock:
            return [r for r in self.requests if r.path == path and r.status in (200, 206)]

    def bytes_sent(self, path: str) -> int:
        """How many bytes of `path` left the server, over all requests."""
        return sum(request.bytes_sent for request in self.served(path))

    def forget(self) -> None:
        """Start the record afresh."""
        with self.lock:
            self.requests.clear()
            self.api_requests.clear()


def is_lfs(file: str) -> bool:
    """Whether the hub would store this file with git LFS."""
    return file.endswith(".safetensors")


def git_blob_id(content: bytes) -> str:
    """Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            return self._answer_api(path.removeprefix("/api/models/"))
        if path.startswith("/api/"):  # huggingface_hub asks for more than models
            return self._send(404, ())
        if path.startswith("/plain/"):
            name = path.removeprefix("/plain/")
            return self._answer_file(name, self.hub.plain.get(name), with_body)
        if path.startswith("/cdn/"):
            _, _, owner, repo, file = path.split("/", 4)
            return self._answer_file(file, self.hub.repos[f"{owner}/{repo}"][file], with_body)
        repo, _, rest = path.lstrip("/").partition("/resolve/")
        file = rest.partition("/")[2]
        content = self.hub.repos.get(repo, {}).get(file)
        if self._refuses():
            return self._send(401, (("X-Error-Code", "GatedRepo"),))
        if content is not None and is_lfs(file):
            return self._redirect(repo, file, content)
        return self._answer_file(file, content, with_body)

    def _refuses(self) -> bool:
        token = self.hub.required_token
        return token is not None and self.headers.get("Authorization") != f"Bearer {token}"

    def _answer_api(self, rest: str) -> None:
        kind = "tree" if "/tree/" in rest else "revision"
        repo, _, revision = rest.partition(f"/{kind}/")
        with self.hub.lock:
            self.hub.api_requests.append(rest)
            bad = self.hub.api_misbehave.pop(0) if self.hub.api_misbehave else None
        if bad is not None and bad.status is not None:
            return self._send(bad.status, bad.headers)
        if self._refuses():
            return self._send(401, (("X-Error-Code", "GatedRepo"),))
        if repo not in self.hub.repos:
            return self._send(404, (("X-Error-Code", "RepoNotFound"),))
        if revision not in ("main", COMMIT):
            return self._send(404, (("X-Error-Code", "RevisionNotFound"),))
        if kind == "tree":
            return self._answer_tree(repo)
        siblings = []
        for file, content in self.hub.repos[repo].items():
            sibling = {"rfilename": file, "size": len(content), "blobId": git_blob_id(content)}
            if is_lfs(file):
                sha256 = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            siblings.append(sibling)
        body = json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()
        return self._send(200, (("Content-Type", "application/json"),), body)

    def _answer_tree(self, repo: str) -> None:
        entries = []
        for file, content in self.hub.repos[repo].items():
            entry = {"type": "file", "path": file, "size": len(content)}
            entry["oid"] = git_blob_id(content)
            if is_lfs(file):
                oid = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        body = json.dumps(entries).encode()
        return self._send(200, (("Content-Type", "application/json"),), body)

    def _redirect(self, repo: str, file: str, content: bytes) -> None:
        port = self.server.server_address[1]
        self._send(
            302,
            (
                ("Location", f"http://localhost:{port}/cdn/{repo}/{file}"),
                ("X-Repo-Commit", COMMIT),
                ("X-Linked-Size", str(len(content))),
                ("X-Linked-ETag", f'"{hashlib.sha256(content).hexdigest()}"'),
            ),
        )

    def _answer_file(self, file: str, content: bytes | None, with_body: bool) -> None:
        if not with_body:  # the request for metadata before the one for content
            return self._describe(file, content)
        with self.hub.lock:
            planned = self.hub.misbehave[file]
            bad = planned.pop(0) if planned else Misbehaviour()
        if bad.status is not None:
            self._record(file, bad.status, 0)
            return self._send(bad.status, bad.headers)
        if content is None:
            self._record(file, 404, 0)
            return self._send(404, (("X-Error-Code", "EntryNotFound"),))
        total = content if bad.replace_with is None else bad.replace_with
        start = self._range_start()
        status, body = 200, total
        headers = [("ETag", f'"{hashlib.sha256(total).hexdigest()}"'), ("Accept-Ranges", "bytes")]
        headers.append(("X-Repo-Commit", COMMIT))
        # Announced, so that no client waits for the rest after a cut, or reuses the connection.
        headers.append(("Connection", "close"))
        if start and not bad.ignore_range:
            if start >= len(total):
                self._record(file, 416, 0)
                return self._send(416, (("Content-Range", f"bytes */{len(total)}"),))
            status, body = 206, total[start:]
            headers.append(("Content-Range", f"bytes {start}-{len(total) - 1}/{len(total)}"))
        self._send(status, tuple(headers), body, send_body=False)
        body = body if bad.cut_after is None else body[: bad.cut_after]
        # Recorded before the client can see the end and look here.
        self._record(file, status, len(body))
        try:
            self.wfile.write(body[: bad.hold_after])
            if bad.hold_after is not None:
                bad.release.wait(timeout=60)
                self.wfile.write(body[bad.hold_after :])
        except OSError:  # the client was killed
            pass
        return None

    def _describe(self, file: str, content: bytes | None) -> None:
        if content is None:
            return self._send(404, (("X-Error-Code", "EntryNotFound"),))
        headers = (("ETag", f'"{git_blob_id(content)}"'), ("X-Repo-Commit", COMMIT))
        return self._send(200, headers, content, send_body=False)

    def _range_start(self) -> int:
        value = self.headers.get("Range", "")
        return int(value.removeprefix("bytes=").partition("-")[0]) if value else 0

    def _record(self, file: str, status: int, sent: int) -> None:
        with self.hub.lock:
            self.hub.requests.append(
                Request(
                    path=file,
                    range=self.headers.get("Range"),
                    authorization=self.headers.get("Authorization"),
                    host=self.headers.get("Host", ""),
                    status=status,
                    bytes_sent=sent,
                )
            )

    def _send(
        self,
        status: int,
        headers: tuple[tuple[str, str], ...],
        body: bytes = b"",
        send_body: bool = True,
    ) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if send_body:
            self.wfile.write(body)


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A hub that listens until the block ends."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    with serving(server):
        yield hub


# --- two catalog entries that live on it, and what a test of them needs ---------------------------

CHUNK_BYTES = 10_000  # huggingface_hub writes so much at once, and resumes there
TOY_REPO = "acme/toy"
BIG = "unet/diffusion_pytorch_model.safetensors"
TOY_FILES: dict[str, bytes] = {
    "model_index.json": b'{"_class_name": "Toy"}\n',
    "unet/config.json": b'{"channels": 3}\n',
    "tokenizer/vocab.json": b'{"a": 0}\n',
    "tokenizer_2/vocab.json": b'{"a": 0}\n',  # the same content twice, as in SDXL
    BIG: random.Random(0).randbytes(300_000),
}
TOY = CatalogEntry(
    name="toy",
    source=HubFiles(
        repo=TOY_REPO,
        revision="main",
        files=tuple(TOY_FILES),
        size_bytes=sum(map(len, TOY_FILES.values())),
    ),
    licence="MIT",
    commercial_use=True,
)
SINGLE = "detector.bin"
SINGLE_CONTENT = random.Random(1).randbytes(50_000)


def single_entry(hub: FakeHub) -> CatalogEntry:
    """One file at a plain address."""
    source = UrlFile(
        url=f"{hub.url}/plain/files/{SINGLE}",
        filename=SINGLE,
        sha256=hashlib.sha256(SINGLE_CONTENT).hexdigest(),
        size_bytes=len(SINGLE_CONTENT),
    )
    return CatalogEntry(name="single", source=source, licence="MIT", commercial_use=False)


@dataclass
class Workplace:
    """The hub with both entries on it, and everything else that a test looks at."""

    hub: FakeHub
    cache: Path
    lock_path: Path
    waits_s: list[float]  # between our tries; huggingface_hub's own waits are left out

    def environment(self) -> dict[str, str]:
        """For a process of its own."""
        here = {"HF_ENDPOINT": self.hub.url, "WEIGHTS_CACHE": str(self.cache)}
        return {**os.environ, **here, "PYTHONPATH": str(Path(__file__).parents[2])}


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT does when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workplace]:
    """A hub, an empty cache, no lock file, no token, no proxy, and no real waiting."""
    with running_hub() as hub:
        here = Workplace(hub, tmp_path / "cache", tmp_path / "weights.lock.json", [])
        hub.repos[TOY_REPO] = dict(TOY_FILES)
        hub.plain[f"files/{SINGLE}"] = SINGLE_CONTENT
        single = single_entry(hub)
        monkeypatch.setitem(CATALOG[Edition.FULL], TOY.name, TOY)
        monkeypatch.setitem(CATALOG[Edition.FULL], single.name, single)
        monkeypatch.setattr(lock, "LOCK_PATH", here.lock_path)
        use_endpoint(monkeypatch, hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(retry, "sleep", here.waits_s.append)
        monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK_BYTES)
        monkeypatch.setenv("WEIGHTS_CACHE", str(here.cache))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WEIGHTS_MIRROR", "WEIGHTS_EDITION"):
            monkeypatch.delenv(name, raising=False)
        yield here


if __name__ == "__main__":  # a process of its own, for tests that race or kill one
    from weights.cache import ensure

    constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES
    CATALOG[Edition.FULL][TOY.name] = TOY
    sys.stdout.write(str(ensure(TOY.name, Edition.FULL)))
