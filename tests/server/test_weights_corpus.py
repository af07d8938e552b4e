"""Every hostile or mistaken reference to weights, sent to the server as a user would."""

import re
from pathlib import Path

import pytest

from tests.helpers.fake_hub import COMMIT
from tests.helpers.fake_web import OTHER_PUBLIC, PUBLIC, Page
from tests.helpers.user_weight_fixtures import visible_lora, word_archive
from tests.helpers.weights_corpus import corpus
from tests.server.conftest import CogServer, are_alike, wait_for
from tests.server.internet import hub_pages

CASES = {case.name: case for case in corpus()}
PLAIN = {
    "prompt": "a large TOK circle on a blue background",
    "num_inference_steps": 2,
    "width": 64,
    "height": 64,
    "seed": 1,
}
GOOD = {
    "an address": "https://files.example/good/lora.safetensors",
    "an archive": "https://cdn.example/good/trained_model.tar",
    "the hub": "acme/good",
}


@pytest.fixture(scope="module")
def web(internet):
    """The internet's pages, good and bad."""
    pages = internet.web.pages
    pages["/good/lora.safetensors"] = Page(visible_lora(1))
    pages["/good/trained_model.tar"] = Page(word_archive("TOK", "yellow"))
    pages |= hub_pages("acme/good", {"lora.safetensors": visible_lora(2)}, COMMIT)
    for case in CASES.values():
        assert pages.keys().isdisjoint(case.pages) or "several" in case.reference, case.name
        pages |= case.pages
    return internet.web


@pytest.fixture(scope="module", autouse=True)
def unharmed(online_server, internet, web):
    """After all of it the worker is the same, its pictures too, and it did nothing that it should
    not: no place was written, asked or run but those that are meant for it."""
    server = online_server
    before = [server.predict(**PLAIN), *(use(server, name) for name in GOOD.values())]
    worker, tree = server.worker().pid, snapshot(server)
    internet.forget()
    yield
    wait_for(lambda: server.health()["status"] == "READY", "the server's rest")
    assert server.worker().pid == worker
    assert snapshot(server) == tree
    written = {Path(path) for (path,) in internet.events("write")}
    ours = (server.cache / "trained", server.temporary)
    strange = [path for path in written if not any(path.is_relative_to(place) for place in ours)]
    assert any(path.is_relative_to(ours[0]) for path in written)  # the record works
    assert [path for path in strange if "__pycache__" not in path.parts] == []
    assert internet.events("run") == []
    asked = {tuple(place) for place in internet.events("connect")}
    assert asked <= {(host, "443") for host in (PUBLIC, OTHER_PUBLIC, "huggingface.co")}
    # None where connections of earlier requests were still open
    assert {tuple(place) for place in internet.events("socket")} <= {("127.0.0.1", str(web.port))}
    assert internet.web.lookups == []
    after = [server.predict(**PLAIN), *(use(server, name) for name in GOOD.values())]
    for first, second in zip(before, after, strict=True):
        assert are_alike(first, second)


def use(server: CogServer, reference: str) -> dict:
    return server.predict(**PLAIN, replicate_weights=reference)


def snapshot(server: CogServer) -> dict[str, tuple[int, int]]:
    """Name, size and time of everything around the server but its log, cache and pictures."""
    found = {}
    folder = server.temporary.parent
    for path in folder.rglob("*"):
        name = path.relative_to(folder).parts
        kept = name[0] in ("server.log", "cache") or "outputs" in "/".join(name)
        if not kept and path.is_file():
            found["/".join(name)] = (path.lstat().st_size, path.lstat().st_mtime_ns)
        elif not kept:
            found["/".join(name)] = (0, 0)
    return found


@pytest.mark.parametrize("name", GOOD)
def test_good_weights_from_the_same_internet_change_the_picture(online_server, name):
    result = use(online_server, GOOD[name])
    assert result["status"] == "succeeded", result["error"]
    assert not are_alike(result, online_server.predict(**PLAIN))


@pytest.mark.parametrize("name", CASES)
def test_bad_weights_are_refused_with_the_reason(online_server, name):
    # Every second one the other way, as both read references.
    case, in_list = CASES[name], list(CASES).index(name) % 2
    inputs = {"loras": [case.reference]} if in_list else {"replicate_weights": case.reference}
    result = online_server.predict(**PLAIN, **inputs)
    assert result["status"] == "failed"
    error = result["error"]
    assert ("loras[0]" if in_list else "replicate_weights") in error
    assert re.search(case.fault, error), error
    for secret in ("hush", "secret@", "root:", str(online_server.temporary), "Traceback"):
        assert secret not in error
    assert len(error) < 1000
