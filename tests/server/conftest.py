"""Cog's real server on the miniature weights, and a receiver for what it sends by itself.

A server takes 10 to 20 seconds to start, so `server` is one for the whole session; a test that
breaks its server starts another.
"""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar

import httpx
import psutil
import pytest
from PIL import Image

from tests.helpers import fake_web
from tests.helpers.comparison import nearly_equal
from tests.server.internet import Internet, running_internet

ROOT = Path(__file__).parents[2]
PATIENCE = 240.0  # seconds, for whatever must happen sooner or later on a machine that is busy
TERMINAL = {"succeeded", "failed", "canceled"}
STARTED = {"READY", "BUSY", "SETUP_FAILED"}
LOG_LINES_SHOWN = 80
ASYNC = {"Prefer": "respond-async"}


T = TypeVar("T")


def wait_for(condition: Callable[[], T | None], what: str, seconds: float = PATIENCE) -> T:
    """The first true value of `condition()`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.02)
    return value


class CogServer:
    """`script/serve` on a free port, with a log file and a temporary folder of its own."""

    def __init__(self, folder: Path, options: tuple[str, ...], **environment: str) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.cache = folder / "cache"
        self.log = folder / "server.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [ROOT / "script" / "serve", *options],
                cwd=folder,
                env=_environment(
                    PORT=str(port),
                    TMPDIR=str(self.temporary),
                    WEIGHTS_CACHE=str(self.cache),
                    **environment,
                ),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE, trust_env=False
        )

    def stop(self) -> None:
        """End the server and everything it has started, at once: its own end takes seconds."""
        self.client.close()
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        self.process.kill()
        self.process.wait()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()

    def worker(self) -> psutil.Process:
        """The process that runs predict.py."""
        (worker,) = psutil.Process(self.process.pid).children()
        return worker

    def health(self) -> dict:
        """The health-check's document; its status is DOWN while nothing listens."""
        if self.process.poll() is not None:
            raise AssertionError(f"the server ended with status {self.process.returncode}")
        try:
            return self.client.get("/health-check").json()
        except httpx.TransportError:
            return {"status": "DOWN"}

    def wait_until_started(self) -> str:
        """READY or SETUP_FAILED."""
        wait_for(lambda: self.health()["status"] in STARTED, "the server's start")
        return self.health()["status"]

    def predict(self, **inputs: object) -> dict:
        """A prediction's document, made while the caller waits."""
        return self.post(inputs).json()

    def post(self, inputs: dict[str, object]) -> httpx.Response:
        return self.post_body({"input": inputs})

    def post_body(self, body: dict[str, object]) -> httpx.Response:
        """Ask, and ask again while the server is busy: it still is for moments after a reply."""
        return wait_for(lambda: self._unless_busy("POST", "", body, {}), "a free slot")

    def put(self, name: str, inputs: dict[str, object], webhook: str | None = None) -> dict:
        """Begin the prediction `name` and do not wait for it."""
        body = {"input": inputs} | ({} if webhook is None else {"webhook": webhook})
        response = wait_for(
            lambda: self._unless_busy("PUT", f"/{name}", body, ASYNC), "a free slot"
        )
        assert response.status_code == 202, response.text
        return response.json()

    def _unless_busy(
        self, method: str, path: str, body: dict, headers: dict
    ) -> httpx.Response | None:
        response = self.client.request(method, f"/predictions{path}", json=body, headers=headers)
        return None if response.status_code == 409 else response

    @contextmanager
    def long_run(self, name: str, webhook: str, **inputs: object) -> Iterator[None]:
        """A prediction of 500 steps under way; canceled at the end if it still runs."""
        self.put(name, {"num_inference_steps": 500, **inputs}, webhook)
        try:
            wait_for(lambda: last_step(self.state(name).get("logs", "")) > 0, "the first step")
            yield
        finally:
            self.cancel(name)
            wait_for(lambda: self.health()["status"] != "BUSY", "the end of the long run")

    def state(self, name: str) -> dict:
        """A running prediction as it stands."""
        response = self.client.put(f"/predictions/{name}", json={"input": {}}, headers=ASYNC)
        assert response.status_code == 202, response.text
        return response.json()

    def cancel(self, name: str) -> httpx.Response:
        return self.client.post(f"/predictions/{name}/cancel")

    def log_lines(self) -> list[tuple[str, str]]:
        """The server's log so far: (level, message)."""
        whole = self.log.read_text(encoding="utf-8", errors="replace").rpartition("\n")[0]
        return [_log_line(line) for line in whole.splitlines()]

    def log_tail(self) -> str:
        lines = [f"{level}: {message}" for level, message in self.log_lines()]
        return "\n".join(lines[-LOG_LINES_SHOWN:])


def _log_line(line: str) -> tuple[str, str]:
    """What coglet writes is JSON; anything else is from before it runs, or from below it."""
    try:
        entry = json.loads(line)
        return entry["level"], entry["fields"].get("message", "")
    except (ValueError, TypeError, KeyError):
        return "OTHER", line


def _environment(**changes: str) -> dict[str, str]:
    """Ours without what would make Cog behave otherwise, on the miniature and with no network."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(
            ("COG_", "LOG_", "KUBERNETES_", "WEBHOOK_", "OTEL_", "WEIGHTS_", "HF_", "CIVITAI_")
        )
        and name.lower() not in ("http_proxy", "https_proxy", "all_proxy", "host")
    }
    fixed = {"WEIGHTS_EDITION": "miniature", "DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
    return {**kept, **fixed, **changes}


def last_step(logs: str) -> int:
    """How far the progress bar of a prediction's log has come."""
    return max((int(step) for step in re.findall(r"\| (\d+)/\d+ \[", logs)), default=0)


def png_bytes(uri: str) -> bytes:
    """The file inside a data URI."""
    prefix = "data:image/png;base64,"
    assert uri.startswith(prefix), uri[:40]
    return base64.b64decode(uri.removeprefix(prefix), validate=True)


def open_png(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    assert image.format == "PNG"
    return image.convert("RGB")


def picture(uri: str) -> Image.Image:
    """The picture inside a data URI."""
    return open_png(png_bytes(uri))


def are_alike(first: dict, second: dict) -> bool:
    """Whether two predictions' pictures are equal, to one step of 255."""
    assert first["status"] == second["status"] == "succeeded", (first, second)
    return nearly_equal(*([picture(uri) for uri in reply["output"]] for reply in (first, second)))


@dataclass(frozen=True)
class Received:
    """One request that the receiver got."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """Takes webhooks (POST) and uploads (PUT, answered with a place of its own choosing)."""

    def __init__(self) -> None:
        self.requests: list[Received] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self._take()

            def do_PUT(self) -> None:
                self._take()

            def _take(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver.requests.append(Received(self.command, self.path, headers, body))
                self.send_response(200)
                if self.command == "PUT":
                    name = self.path.rpartition("/")[2]
                    self.send_header("Location", f"{receiver.url}/stored/{name}?signature=1")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Nothing on stderr."""

        return Handler

    def hook(self, name: str) -> str:
        """A webhook address for the prediction `name` alone."""
        return f"{self.url}/hooks/{name}"

    def states(self, name: str) -> list[dict]:
        """What the webhook of `name` has been told so far."""
        path = f"/hooks/{name}"
        return [json.loads(r.body) for r in self.requests if (r.method, r.path) == ("POST", path)]

    def outcome(self, name: str) -> dict:
        """The final state of `name`; waits for it."""

        def final() -> dict | None:
            return next((s for s in self.states(name) if s["status"] in TERMINAL), None)

        return wait_for(final, f"the final webhook of {name}")

    def uploads(self) -> dict[str, bytes]:
        """File name → content."""
        puts = [r for r in self.requests if r.method == "PUT"]
        return {r.path.rpartition("/")[2]: r.body for r in puts}

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(scope="session")
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@contextmanager
def serving(folder: Path, *options: str, **environment: str) -> Iterator[CogServer]:
    """A started server, whatever came of its setup; none of its processes outlives the block."""
    server = CogServer(folder, options, **environment)
    try:
        server.wait_until_started()
        yield server
    except (AssertionError, TimeoutError):
        print(server.log_tail())
        raise
    finally:
        server.stop()


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[CogServer]:
    with serving(tmp_path_factory.mktemp("server")) as server:
        assert server.health()["status"] == "READY"
        yield server


certificate = fake_web.certificate


@pytest.fixture(scope="session")
def internet(certificate, tmp_path_factory) -> Iterator[Internet]:
    with running_internet(certificate, tmp_path_factory.mktemp("internet")) as internet:
        yield internet


@pytest.fixture(scope="session")
def online_server(internet, tmp_path_factory) -> Iterator[CogServer]:
    """A server with the fake internet and a home of its own."""
    folder = tmp_path_factory.mktemp("online")
    home = folder / "home"
    home.mkdir()
    with serving(folder, HOME=str(home), **internet.environment()) as server:
        assert server.health()["status"] == "READY"
        yield server


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Show the logs of a failed test's servers."""
    report = yield
    if report.when == "call" and report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, CogServer):
                report.sections.append((f"log of {name}", value.log_tail()))
    return report
