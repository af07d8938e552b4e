"""An internet on this machine: https servers that misbehave, and the names that lead to them.

`web.dns` says what a name resolves to, `web.routes` which of those addresses lead to the server;
everything else is recorded and unreachable. So tests go the whole way of a stranger's address:
lookup, check, connection, TLS, redirects.
"""

import hashlib
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.helpers import fake_names
from tests.helpers.background_server import serving
from weights import retry
from weights.user import cache, ssrf_guard

PUBLIC = "93.184.216.34"
OTHER_PUBLIC = "2606:2800:220:1::1"
NAMES = (
    "files.example",
    "cdn.example",
    "rebinding.example",
    "civitai.com",
    "huggingface.co",
)  # in the server's certificate


@dataclass
class Page:
    """What one path answers; the rest of the fields are misbehaviour."""

    content: bytes = b""
    etag: str | None = "by content"
    last_modified: str | None = None
    status: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    conditional: bool = True  # answers If-None-Match
    ranges: bool = True
    if_range: bool = True  # answers If-Range
    announced: int | None = None  # Content-Length, when it is a lie
    framing: str = "length"  # or "chunked", "none"
    cuts: list[int] = field(default_factory=list)  # next answers end after so many bytes
    then: "Page | None" = None  # takes this one's place after a cut
    drip_s: float | None = None  # one byte each, with this pause
    endless: bool = False
    hold_after: int | None = None
    release: threading.Event = field(default_factory=threading.Event)

    def tag(self) -> str | None:
        if self.etag != "by content":
            return self.etag
        return f'"{hashlib.sha256(self.content).hexdigest()[:16]}"'


@dataclass(frozen=True)
class Seen:
    """One request as the server saw it."""

    host: str
    path: str  # with query
    headers: dict[str, str]

    @property
    def is_question(self) -> bool:
        """About the file, not for it."""
        return self.headers.get("range") == "bytes=0-0"


@dataclass
class FakeWeb:
    """Set `pages`, `dns` and `routes` before; look at `seen`, `lookups` and `connected` after."""

    port: int = 0
    pages: dict[str, Page] = field(default_factory=dict)
    dns: dict[str, list[list[str]]] = field(default_factory=dict)  # successive answers
    routes: dict[str, int] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    lookups: list[str] = field(default_factory=list)
    connected: list[tuple[str, int]] = field(default_factory=list)
    server_names: list[str | None] = field(default_factory=list)  # SNI
    waits_s: list[float] = field(default_factory=list)

    def downloads(self, path: str | None = None) -> list[Seen]:
        return [s for s in self.seen if not s.is_question and path in (None, s.path)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: FakeWeb

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.web.seen.append(Seen(headers.get("host", ""), self.path, headers))
        page = self.web.pages.get(self.path, self.web.pages.get(self.path.partition("?")[0]))
        if page is None:
            page = Page(status=404)
        with suppress(OSError):  # the client has gone
            self._answer(page, headers)

    def _answer(self, page: Page, headers: dict[str, str]) -> None:
        tag = page.tag()
        body, status, extra = page.content, page.status or 200, list(page.headers)
        if page.status is None:
            if tag:
                extra.append(("ETag", tag))
            if page.last_modified:
                extra.append(("Last-Modified", page.last_modified))
            unchanged = tag is not None and headers.get("if-none-match") == tag
            if page.conditional and unchanged:
                return self._send(304, extra)
            wanted = headers.get("range")
            current = not page.if_range or headers.get("if-range") in (None, tag)
            if wanted and page.ranges and current:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                body = body[int(first) : int(last) + 1 if last else None]
                status = 206
                end = int(first) + len(body) - 1
                total = len(page.content) if page.announced is None else page.announced
                extra.append(("Content-Range", f"bytes {first}-{end}/{total}"))
        question = headers.get("range") == "bytes=0-0"
        if page.framing == "chunked" and status == 200:
            return self._send_chunks(page, body, extra)
        if page.framing != "none" or status != 200:
            lie = page.announced if status == 200 else None
            extra.append(("Content-Length", str(len(body) if lie is None else lie)))
        self._send(status, extra)
        if page.drip_s is not None and not question:
            for byte in body:
                self.wfile.write(bytes([byte]))
                time.sleep(page.drip_s)
            return None
        if page.cuts and not question:
            body = body[: page.cuts.pop(0)]
            if page.then is not None:
                self.web.pages[self.path] = page.then
        self.wfile.write(body[: page.hold_after])
        if page.hold_after is not None and not question:
            page.release.wait(60)
            self.wfile.write(body[page.hold_after :])
        return None

    def _send_chunks(self, page: Page, body: bytes, extra: list[tuple[str, str]]) -> None:
        self._send(200, [*extra, ("Transfer-Encoding", "chunked")])
        while True:
            self.wfile.write(f"{len(body):x}\r\n".encode() + body + b"\r\n")
            if not page.endless:
                break
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Connection", "close")
        if status == 304 or (status >= 300 and not any(n == "Content-Length" for n, _ in headers)):
            self.send_header("Content-Length", "0")
        self.end_headers()
        self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that refuses our certificate is part of the tests."""


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for NAMES, in one file, made for this run."""
    folder = tmp_path_factory.mktemp("tls")
    names = ",".join(f"DNS:{name}" for name in NAMES)
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *(
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=test",
                "-keyout",
                "key.pem",
                "-out",
                "cert.pem",
            ),
            *("-addext", f"subjectAltName={names}"),
            *("-addext", "keyUsage=digitalSignature,keyCertSign"),
        ],
        stdin=subprocess.DEVNULL,
        cwd=folder,
        check=True,
        capture_output=True,
    )
    both = folder / "both.pem"
    both.write_text((folder / "cert.pem").read_text() + (folder / "key.pem").read_text())
    return both


@contextmanager
def running_web(certificate: Path | None) -> Iterator[FakeWeb]:
    """A server until the block ends; over http where there is no certificate."""
    web = FakeWeb()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"web": web}))
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        context.sni_callback = lambda _, name, __: web.server_names.append(name)
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    web.port = server.server_address[1]
    with serving(server):
        yield web


@pytest.fixture
def web(certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWeb]:
    """https://files.example and others; an empty cache; no settings, and no real waiting."""
    with running_web(certificate) as web:
        web.dns |= {
            "files.example": [[PUBLIC]],
            "cdn.example": [[OTHER_PUBLIC]],
            "civitai.com": [[PUBLIC]],
            "huggingface.co": [[PUBLIC]],
        }
        web.routes |= {PUBLIC: web.port, OTHER_PUBLIC: web.port}
        _use_names(web, monkeypatch)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        use_own_cache(tmp_path / "cache", web.waits_s, monkeypatch)
        yield web


def use_own_cache(folder: Path, waits_s: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, no settings of whoever runs the tests, no waiting between tries."""
    monkeypatch.setenv("WEIGHTS_CACHE", str(folder))
    for name in ("WEIGHTS_ALLOW_HOSTS", "WEIGHTS_CACHE_BYTES", "WEIGHTS_MIRROR", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(retry, "sleep", waits_s.append)
    monkeypatch.setattr(cache, "_verified", {})


def _use_names(web: FakeWeb, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and addresses are the fake web's; only the lookup and the connection are replaced."""
    lookup = fake_names.lookup(web.dns, web.lookups.append)
    connect = fake_names.connect(web.dns, web.routes, web.connected.append)
    monkeypatch.setattr(ssrf_guard.socket, "getaddrinfo", lookup)
    monkeypatch.setattr(ssrf_guard.socket, "create_connection", connect)


if __name__ == "__main__":  # a process of its own, for tests that race or kill one
    from weights.user.fetch import fetch
    from weights.user.parse import Tokens, parse_source

    with fetch(parse_source(sys.argv[1], "lora_weights"), Tokens(None, None)) as file:
        sys.stdout.write(str(file.path))
