"""An internet for the worker of a server under test: whose names, and what the worker did there."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.fake_hub import git_blob_id
from tests.helpers.fake_web import NAMES, OTHER_PUBLIC, PUBLIC, FakeWeb, Page, running_web
from tests.helpers.hostile_references import NOT_PUBLIC

ROOT = Path(__file__).parents[2]
MAX_BYTES = 1_000_000  # of a file that the worker fetches
INNER_NAMES = {
    "localhost": ["127.0.0.1"],
    "inner.example": ["192.168.0.7"],
    "metadata.google.internal": ["169.254.169.254"],
    **{f"not-public-{k}.example": answer for k, answer in enumerate(NOT_PUBLIC)},
}


@dataclass(frozen=True)
class Internet:
    """The fake web, and a record of what the worker of `environment` does."""

    web: FakeWeb
    certificate: Path
    record: Path

    def environment(self) -> dict[str, str]:
        """For the server's process."""
        settings = {
            "dns": self.web.dns,
            "routes": self.web.routes,
            "record": str(self.record),
            "max_bytes": MAX_BYTES,
        }
        here = Path(__file__).parent / "fake_names"
        return {
            "FAKE_NAMES": json.dumps(settings),
            "PYTHONPATH": f"{here}{os.pathsep}{ROOT}",
            "SSL_CERT_FILE": str(self.certificate),
            "HF_HUB_OFFLINE": "0",
        }

    def events(self, what: str) -> list[list[str]]:
        """The details of everything recorded of a kind: connect, socket, write, run."""
        lines = map(json.loads, self.record.read_text().splitlines())
        return [details for kind, *details in lines if kind == what]

    def forget(self) -> None:
        """Start the record afresh."""
        os.truncate(self.record, 0)
        self.web.seen.clear()


@contextmanager
def running_internet(certificate: Path, folder: Path) -> Iterator[Internet]:
    """The names of the certificate lead to one https server, at public addresses."""
    record = folder / "record"
    record.touch()
    with running_web(certificate) as web:
        web.routes |= {PUBLIC: web.port, OTHER_PUBLIC: web.port}
        web.dns |= {name: [[PUBLIC]] for name in NAMES}
        web.dns |= {name: [answer] for name, answer in INNER_NAMES.items()}
        web.dns["cdn.example"] = [[OTHER_PUBLIC]]
        web.dns["rebinding.example"] = [[PUBLIC], ["127.0.0.1"]]
        yield Internet(web, certificate, record)


def hub_pages(repo: str, files: dict[str, bytes], commit: str) -> dict[str, Page]:
    """A repository as huggingface.co answers for its main branch."""
    siblings = [
        {"rfilename": name, "size": len(content), "blobId": git_blob_id(content)}
        for name, content in files.items()
    ]
    listing = json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode()
    pages = {f"/{repo}/resolve/{commit}/{name}": Page(content) for name, content in files.items()}
    return {f"/api/models/{repo}/revision/main": Page(listing, ranges=False), **pages}
