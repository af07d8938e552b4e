"""What people may name as weights, where this machine goes for it, and what it believes there."""

import base64
import hashlib
import ipaddress
import json
import logging
from pathlib import Path

import pytest

from tests.helpers import fake_hub, fake_web
from tests.helpers.fake_hub import COMMIT
from tests.helpers.fake_web import OTHER_PUBLIC, PUBLIC, FakeWeb, Page
from tests.helpers.hostile_references import (
    BAD_ANSWERS,
    BAD_PLACES,
    CONTENT,
    NOT_PUBLIC,
    REFERENCES,
    WITH_BLANKS,
)
from weights import errors, hub
from weights.user import cache, parse, resolve, ssrf_guard
from weights.user.cache import CachedFile
from weights.user.fetch import fetch
from weights.user.parse import (
    CivitaiModel,
    HubRepository,
    InlineFile,
    LocalFile,
    Tokens,
    WebFile,
    parse_operator_source,
    parse_source,
)

web = fake_web.web
certificate = fake_web.certificate
workplace = fake_hub.workplace

URL = "https://files.example/lora.safetensors"
NO_TOKENS = Tokens(hub=None, civitai=None)


def get(reference: str, tokens: Tokens = NO_TOKENS) -> CachedFile:
    return fetch(parse_source(reference, "lora_weights"), tokens)


def redirect(*places: str) -> dict[str, Page]:
    """/lora.safetensors → places[0]; the path of each leads to the next."""
    paths = ["/lora.safetensors", *(f"/hop{n}" for n in range(1, len(places)))]
    return {
        path: Page(status=302, headers=(("Location", place),))
        for path, place in zip(paths, places, strict=True)
    }


# --- what a reference means -----------------------------------------------------------------------

HUB = {
    "acme/lora": ("acme/lora", "main", None),
    " acme/lora\n": ("acme/lora", "main", None),
    "acme/lora:a/b.safetensors": ("acme/lora", "main", "a/b.safetensors"),
    "acme/lora@v1.0": ("acme/lora", "v1.0", None),
    "acme/lora@refs/pr/1:x.tar": ("acme/lora", "refs/pr/1", "x.tar"),
    "https://huggingface.co/acme/lora": ("acme/lora", "main", None),
    "https://huggingface.co/acme/lora/": ("acme/lora", "main", None),
    "https://hf.co/acme/lora/tree/v2": ("acme/lora", "v2", None),
    "https://huggingface.co/acme/lora/blob/main/a/b.tar": ("acme/lora", "main", "a/b.tar"),
    "https://huggingface.co/acme/lora/resolve/refs%2Fpr%2F1/x%20y.zip?download=true": (
        ("acme/lora", "refs/pr/1", "x y.zip")
    ),
}


@pytest.mark.parametrize("reference", HUB)
def test_references_to_the_hub(reference: str):
    assert parse_source(reference, "lora_weights") == HubRepository("lora_weights", *HUB[reference])


def test_pages_of_civitai():
    download = "https://civitai.com/api/download/models/22?type=Model&format=SafeTensor"
    page = "https://civitai.com/models/11/some-title"
    assert parse_source(page, "x") == CivitaiModel("x", 11)
    expected = WebFile("x", "https://civitai.com/api/download/models/22", trusted=False)
    assert parse_source(page + "?modelVersionId=22", "x") == expected
    assert parse_source(download, "x") == WebFile("x", download, trusted=False)


def test_the_file_itself(web: FakeWeb):
    text = "data:application/octet-stream;base64," + base64.b64encode(CONTENT).decode()
    source = parse_source(text, "lora_weights")
    assert source == InlineFile("lora_weights", "", CONTENT)
    for _ in range(2):
        with fetch(source, NO_TOKENS) as file:
            assert file.path.read_bytes() == CONTENT
            assert file.digest == hashlib.sha256(CONTENT).hexdigest()
    assert "AAAA" not in repr(source)


@pytest.mark.parametrize(
    "reference", [*REFERENCES, *WITH_BLANKS, "https://files.example/" + "a" * 9000]
)
def test_everything_else_is_refused(reference: str):
    with pytest.raises(errors.InvalidSource, match=r"^lora_weights='[^?#]*': .*; ") as caught:
        parse_source(reference, "lora_weights")
    assert "secret@" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "reference",
    [
        "http://files.example/x?X-Amz-Signature=hush",
        "https://user:hush@10.0.0.1/x",
        "user:hush@files.example",
        "https://10.0.0.1/x#hush",
        "data:hush",
        "x" * 300 + "hush",
    ],
)
def test_refusals_and_sources_tell_no_secret(reference: str):
    with pytest.raises(errors.InvalidSource) as caught:
        parse_source(reference, "lora_weights")
    assert "hush" not in str(caught.value)
    assert "hush" not in repr(parse_source(f"{URL}?sig=hush", "x"))
    assert "hush" not in repr(Tokens("hush", "hush"))


@pytest.mark.parametrize("token", ["", "x yz", "a\r\nHost: b", "é"])
def test_a_token_that_is_none(token: str):
    with pytest.raises(errors.InvalidSource, match="hf_api_token") as caught:
        Tokens(hub=token, civitai=None)
    assert token == "" or token not in str(caught.value)


def test_inline_files_have_a_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parse, "MAX_INLINE_BYTES", 30)
    parse_source("data:;base64," + base64.b64encode(b"x" * 30).decode(), "x")
    with pytest.raises(errors.InvalidSource, match="more than 30 bytes"):
        parse_source("data:;base64," + base64.b64encode(b"x" * 33).decode(), "x")


def test_the_operator_may_name_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "lora.tar"
    file.write_bytes(CONTENT)
    for text in (str(file), f"file:{file}", f"file://{file}"):
        assert parse_operator_source(text) == LocalFile("COG_WEIGHTS", file)
    with fetch(parse_operator_source(str(file)), NO_TOKENS) as local:
        assert (local.path, local.digest) == (file, hashlib.sha256(CONTENT).hexdigest())
    assert file.exists()
    monkeypatch.chdir(tmp_path)
    assert parse_operator_source("lora.tar") == LocalFile("COG_WEIGHTS", Path("lora.tar"))
    url = "http://10.0.0.1/lora.tar"
    assert parse_operator_source(url) == WebFile("COG_WEIGHTS", url, trusted=True)
    assert isinstance(parse_operator_source("acme/lora"), HubRepository)
    for wrong in ("/no/such/file", "./no", "file:///no", "s3://bucket/x", "no-such.tar", "a\0b"):
        with pytest.raises(errors.InvalidSource, match=r"^COG_WEIGHTS="):
            parse_operator_source(wrong)


# --- where this machine goes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *((a, True) for a in ("8.8.8.8", "100.63.255.255", "172.32.0.1", "2606:4700::1111")),
        *((a, True) for a in ("::ffff:8.8.8.8", "64:ff9b::808:808", "2a00:1450::1")),
        *((a, False) for a in ("100.127.255.255", "172.31.0.1", "0.1.2.3", "192.0.0.192")),
        *((a, False) for a in ("240.0.0.1", "203.0.113.9", "::ffff:10.0.0.1", "2002:808:808::")),
        *((a, False) for a in ("fc00::1", "3fff::1", "100::1", "5f00::1", "64:ff9b::7f00:1")),
    ],
)
def test_public_addresses(address: str, public: bool):
    assert ssrf_guard.is_public(ipaddress.ip_address(address)) is public


def test_a_public_address_is_fetched_from_exactly_where_it_was_checked(
    web: FakeWeb, monkeypatch: pytest.MonkeyPatch
):
    for name in ("HTTPS_PROXY", "ALL_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # would fail, and would look names up itself
    web.pages["/lora.safetensors"] = Page(CONTENT)
    with get(URL) as file:
        assert file.path.read_bytes() == CONTENT
        assert file.digest == hashlib.sha256(CONTENT).hexdigest()
    assert set(web.connected) == {(PUBLIC, 443)}
    assert len(web.lookups) == len(web.connected)  # one lookup each, and it was the one checked
    assert {seen.host for seen in web.seen} == {"files.example"}
    assert set(web.server_names) == {"files.example"}
    assert {seen.headers["accept-encoding"] for seen in web.seen} == {"identity"}


@pytest.mark.parametrize("answer", NOT_PUBLIC)
def test_a_name_with_any_address_that_is_not_public(web: FakeWeb, answer: list[str]):
    web.dns["files.example"] = [answer]
    with pytest.raises(
        errors.RefusedAddress, match=r"files\.example.*WEIGHTS_ALLOW_HOSTS"
    ) as caught:
        get(URL)
    assert not any(address in str(caught.value) for address in answer)
    assert (web.connected, web.waits_s) == ([], [])


def test_an_answer_that_changes_after_the_check(web: FakeWeb):
    web.pages["/lora.safetensors"] = Page(CONTENT)
    web.dns["files.example"] = [[PUBLIC], ["127.0.0.1"]]  # question, then download
    with pytest.raises(errors.RefusedAddress):
        get(URL)
    assert web.connected == [(PUBLIC, 443)]
    assert web.downloads() == []


def test_another_address_is_tried_where_one_is_dead(web: FakeWeb):
    web.pages["/lora.safetensors"] = Page(CONTENT)
    web.dns["files.example"] = [["2606::dead", PUBLIC]]
    get(URL).close()
    assert web.connected[:2] == [("2606::dead", 443), (PUBLIC, 443)]


def test_a_certificate_for_another_name(web: FakeWeb):
    web.dns["files.test"] = [[PUBLIC]]
    with pytest.raises(errors.TransferFailed, match="CERTIFICATE_VERIFY_FAILED"):
        get("https://files.test/lora.safetensors")
    assert web.seen == []


def test_a_name_that_does_not_exist(web: FakeWeb):
    with pytest.raises(errors.TransferFailed, match=r"nowhere\.example cannot be looked up"):
        get("https://nowhere.example/x")
    assert len(web.waits_s) == 2


@pytest.mark.parametrize("place", BAD_PLACES)
def test_redirects_are_checked_like_the_first_address(web: FakeWeb, place: str):
    web.dns["inner.example"] = [["192.168.0.7"]]
    web.pages |= redirect(place)
    with pytest.raises(errors.RefusedAddress):
        get(URL)
    assert web.connected == [(PUBLIC, 443)]
    assert web.waits_s == []


def test_redirects_end(web: FakeWeb):
    web.pages |= redirect(*(f"/hop{n}" for n in range(1, 6)), "/end")
    web.pages["/end"] = Page(CONTENT)
    with pytest.raises(errors.DownloadError, match="more than 5 redirects"):
        get(URL)
    web.pages |= redirect(*(f"/hop{n}" for n in range(1, 5)), "/end")
    get(URL).close()
    for broken in ("https://[broken/", "https://0177.0.0.1/x", "https://１２７.0.0.1/"):
        web.pages |= redirect(broken.encode().decode("latin-1"))
        web.connected.clear()
        with pytest.raises(errors.DownloadError):
            get("https://files.example/lora.safetensors?v=2")
        assert set(web.connected) == {(PUBLIC, 443)}


def test_tokens_go_to_their_host_alone(web: FakeWeb, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.NOTSET, "httpx")
    tokens = Tokens(hub="hub-secret", civitai="civitai-secret")
    versions = json.dumps({"modelVersions": [{"id": 22}, {"id": 21}]}).encode()
    web.pages["/api/v1/models/11"] = Page(versions)
    signed = "https://cdn.example/22.safetensors?X-Amz-Signature=hush"
    web.pages["/api/download/models/22"] = Page(status=307, headers=(("Location", signed),))
    web.pages["/22.safetensors"] = Page(CONTENT)
    web.pages["/datasets/acme/loras/resolve/main/a.tar"] = Page(CONTENT)
    get("https://civitai.com/models/11", tokens).close()
    get("https://huggingface.co/datasets/acme/loras/resolve/main/a.tar", tokens).close()
    get("https://files.example/22.safetensors", tokens).close()
    sent = {(seen.host, seen.headers.get("authorization")) for seen in web.seen}
    assert sent == {
        ("civitai.com", "Bearer civitai-secret"),
        ("cdn.example", None),
        ("huggingface.co", "Bearer hub-secret"),
        ("files.example", None),
    }
    assert {ip for ip, _ in web.connected} == {PUBLIC, OTHER_PUBLIC}
    assert not any(word in caplog.text for word in ("hush", "hub-secret", "civitai-secret"))
    kept = "".join(path.read_text() for path in cache.root().rglob("*.json"))
    assert not any(word in kept for word in ("hush", "secret", "files.example"))


def test_no_token_over_http(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://hub.example")
    tokens = Tokens(hub="hub-secret", civitai="civitai-secret")
    for url in ("http://civitai.com/x", "http://hub.example/x"):
        assert resolve._authorization(url, tokens) == ()
    monkeypatch.setattr(hub.constants, "ENDPOINT", "https://hub.example")
    for url in (
        "https://civitai.com.example/x",
        "https://civitai.com:444/x",
        "https://x.hub.example",
    ):
        assert resolve._authorization(url, tokens) == ()
    assert resolve._authorization("https://hub.example/x", tokens) != ()


def test_the_operator_may_allow_hosts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fake_web.use_own_cache(tmp_path / "cache", [], monkeypatch)
    with fake_web.running_web(None) as web:
        web.pages["/lora.safetensors"] = Page(CONTENT)
        place = f"127.0.0.1:{web.port}"
        monkeypatch.setenv("WEIGHTS_ALLOW_HOSTS", f"files.internal, http://{place}")
        get(f"http://{place}/lora.safetensors").close()
        for wrong in (f"http://127.0.0.1:{web.port + 1}/x", "http://127.0.0.1/x"):
            with pytest.raises(errors.InvalidSource):
                parse_source(wrong, "x")
        monkeypatch.setenv("WEIGHTS_ALLOW_HOSTS", place)  # the address, but not without TLS
        with pytest.raises(errors.InvalidSource, match="only https"):
            parse_source(f"http://{place}/lora.safetensors", "x")
        parse_source(f"https://{place}/lora.safetensors", "x")
        monkeypatch.delenv("WEIGHTS_ALLOW_HOSTS")
        with fetch(parse_operator_source(f"http://{place}/lora.safetensors"), NO_TOKENS) as file:
            assert file.path.read_bytes() == CONTENT
    for wrong in ("ftp://a", "a/b", "http://", "a b"):
        monkeypatch.setenv("WEIGHTS_ALLOW_HOSTS", wrong)
        with pytest.raises(errors.WrongSetting, match="WEIGHTS_ALLOW_HOSTS"):
            parse_source(URL, "x")


# --- what it believes there -----------------------------------------------------------------------


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_answers_that_are_not_believed(web: FakeWeb, monkeypatch: pytest.MonkeyPatch, case: str):
    page, error, message = BAD_ANSWERS[case]
    monkeypatch.setattr(resolve, "MAX_BYTES", 1_000_000)
    web.pages["/lora.safetensors"] = page
    with pytest.raises(error, match=message) as caught:
        get(f"{URL}?sig=hush")
    assert "hush" not in str(caught.value)
    assert not list(cache.root().rglob("weights"))


def test_a_trickle_is_cut_off(web: FakeWeb, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ssrf_guard, "PACE_WINDOW_S", 0.1)
    web.pages["/lora.safetensors"] = Page(CONTENT, drip_s=0.01)
    with pytest.raises(errors.TransferFailed, match="ReadTimeout"):
        get(URL)
    monkeypatch.setattr(ssrf_guard, "READ_TIMEOUT_S", 0.1)
    monkeypatch.setattr(ssrf_guard, "PACE_WINDOW_S", 60.0)
    web.pages["/lora.safetensors"] = held = Page(CONTENT, hold_after=0)
    with pytest.raises(errors.TransferFailed, match="ReadTimeout"):
        get(URL)
    held.release.set()


def test_a_fetch_has_an_end(web: FakeWeb, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ssrf_guard, "LONGEST_FETCH_S", 0.2)
    web.pages["/lora.safetensors"] = Page(CONTENT, drip_s=0.01)
    with pytest.raises(errors.TransferFailed, match="longer than 0 s"):
        get(URL)


# --- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def fake(workplace: fake_hub.Workplace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fake_web.use_own_cache(tmp_path / "cache", workplace.waits_s, monkeypatch)
    return workplace.hub


def test_the_hubs_file_is_chosen(fake: fake_hub.FakeHub):
    repos = {
        "acme/one": {"x.safetensors": b"1", "sub/y.safetensors": b"2", "README.md": b""},
        "acme/usual": {"a.zip": b"a", "pytorch_lora_weights.safetensors": b"3"},
        "acme/old": {"a.zip": b"a", "trained_model.tar": b"4"},
        "acme/many": {f"{n:02}.safetensors": b"5" for n in range(12)},
        "acme/none": {"model.bin": b"6"},
    }
    fake.repos |= repos
    for reference, content in {
        "acme/one": b"1",
        "acme/usual": b"3",
        f"acme/old@{COMMIT}": b"4",
        "acme/one:sub/y.safetensors": b"2",
        "https://huggingface.co/acme/many/blob/main/07.safetensors": b"5",
    }.items():
        with get(reference) as file:
            assert file.path.read_bytes() == content, reference
    listed = r"many@main.*acme/many:file.*: '00\.safetensors', .*, '09\.safetensors' and 2 more$"
    with pytest.raises(errors.NotOnServer, match=listed):
        get("acme/many")
    with pytest.raises(errors.NotOnServer, match="archives: nothing at all"):
        get("acme/none")
    with pytest.raises(errors.NotOnServer, match=r"z\.tar is not in acme/one@main.*x\.safetensors"):
        get("acme/one:z.tar")
    with pytest.raises(errors.NotOnServer, match=r"acme/absent@main.*check what you wrote"):
        get("acme/absent")
    with pytest.raises(errors.NotOnServer, match="acme/one@v9"):
        get("acme/one@v9")


def test_the_hub_gets_no_token_that_was_not_given_nor_any_over_http(
    fake: fake_hub.FakeHub, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "operators-own")
    fake.repos["acme/one"] = {"x.safetensors": CONTENT}
    get("acme/one", Tokens(hub="hub-secret", civitai=None)).close()
    assert {request.authorization for request in fake.requests} == {None}
    fake.required_token = "operators-own"
    with pytest.raises(errors.AccessDenied, match="give an hf_api_token") as caught:
        get("acme/one:x.safetensors")
    assert "operators-own" not in str(caught.value)


def test_a_file_of_the_hub_is_held_to_its_hash_and_resumed(fake: fake_hub.FakeHub):
    fake.repos["acme/one"] = {"x.safetensors": CONTENT}
    bad = fake_hub.Misbehaviour(replace_with=b"x" * len(CONTENT))
    fake.misbehave["x.safetensors"] = [bad]
    with pytest.raises(errors.ChecksumMismatch, match="sha256"):
        get("acme/one")
    fake.forget()
    fake.misbehave["x.safetensors"] = [fake_hub.Misbehaviour(cut_after=5_000)]
    get("acme/one").close()
    assert [request.range for request in fake.served("x.safetensors")] == [None, "bytes=5000-"]
    fake.forget()
    get("acme/one").close()
    assert (len(fake.api_requests), fake.requests) == (1, [])


def test_offline_mode_forbids_asking(fake: fake_hub.FakeHub, monkeypatch: pytest.MonkeyPatch):
    fake.repos["acme/one"] = {"x.safetensors": CONTENT}
    get("acme/one").close()
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    get("acme/one").close()
    for reference in ("acme/two", URL):
        with pytest.raises(errors.Offline, match="HF_HUB_OFFLINE"):
            get(reference)


def test_the_hubs_file_has_a_limit(fake: fake_hub.FakeHub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resolve, "MAX_BYTES", 1_000)
    fake.repos["acme/one"] = {"x.safetensors": CONTENT}
    with pytest.raises(errors.TooLarge, match="1000 bytes"):
        get("acme/one")
    assert fake.requests == []
