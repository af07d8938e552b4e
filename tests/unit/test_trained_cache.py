"""The cache of weights that people bring: asked, resumed, shared, evicted, mended."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import fake_web
from tests.helpers.fake_web import FakeWeb, Page
from weights import download, errors, transfer
from weights.user import cache
from weights.user import fetch as fetching
from weights.user.cache import CachedFile
from weights.user.fetch import fetch
from weights.user.parse import Tokens, WebFile, parse_source

web = fake_web.web
certificate = fake_web.certificate

CONTENT = random.Random(3).randbytes(200_000)
OTHER = random.Random(4).randbytes(200_000)  # as long: only a validator tells them apart
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PATH = "/lora.safetensors"
URL = "https://files.example" + PATH
NO_TOKENS = Tokens(hub=None, civitai=None)
PATIENCE_S = 60.0


def get(reference: str = URL, tokens: Tokens = NO_TOKENS) -> CachedFile:
    return fetch(parse_source(reference, "lora_weights"), tokens)


def folders() -> dict[str, Path]:
    """The folders of the cache by the sha256 of their files."""
    found = cache.root().glob("*/weights")
    return {hashlib.sha256(path.read_bytes()).hexdigest(): path.parent for path in found}


def files() -> set[str]:
    return set(folders())


def parts() -> list[Path]:
    return list(cache.root().glob(f"*/{transfer.PARTIAL_FOLDER}/*"))


def put(web: FakeWeb, name: str, size: int) -> str:
    """Fetch a file of `size` bytes called `name`; its digest."""
    web.pages[f"/{name}"] = Page(random.Random(name).randbytes(size))
    with get(f"https://files.example/{name}") as file:
        return file.digest


def age(digest: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(folders()[digest], (then, then))


# --- asking ---------------------------------------------------------------------------------------


def test_a_file_is_fetched_once_and_asked_about_every_time(web: FakeWeb):
    web.pages[PATH] = Page(CONTENT)
    for _ in range(3):
        with get() as file:
            assert (file.digest, file.path.read_bytes()) == (SHA256, CONTENT)
    assert len(web.downloads()) == 1
    assert len(web.seen) == 4
    assert parts() == []


@pytest.mark.parametrize(
    "page",
    [
        Page(etag='"1"', conditional=False),
        Page(etag='W/"1"'),
        Page(etag=None, last_modified="Tue, 01 Sep 2026 10:00:00 GMT"),
        Page(etag='"1"', ranges=False, conditional=False),
    ],
    ids=["ignores conditions", "weak", "date", "ignores ranges"],
)
def test_every_validator_spares_the_download(web: FakeWeb, page: Page):
    page.content = CONTENT
    web.pages[PATH] = page
    get().close()
    get().close()
    assert len([s for s in web.seen if s.headers.get("range") is None]) == 1


def test_without_a_validator_equal_size_is_no_proof(web: FakeWeb):
    web.pages[PATH] = Page(CONTENT, etag=None)
    get().close()
    web.pages[PATH] = Page(OTHER, etag=None)
    with get() as file:
        assert file.path.read_bytes() == OTHER


def test_a_changed_file_is_fetched_anew(web: FakeWeb):
    web.pages[PATH] = Page(CONTENT)
    get().close()
    web.pages[PATH] = Page(OTHER)
    with get() as file:
        assert file.path.read_bytes() == OTHER
    web.pages[PATH] = Page(CONTENT)
    get().close()
    assert files() == {SHA256}


SAME_KEY = [
    "?X-Amz-Algorithm=A&X-Amz-Date=1&X-Amz-Expires=9&X-Amz-Signature=a",
    "?x-goog-signature=b",
    "?Expires=1&Signature=c&Key-Pair-Id=d",
    "?Policy=e&Signature=f",
    "?sv=1&sr=b&se=2&sp=r&sig=g",
    "?token=h",
    "?hdnts=i",
    "#fragment",
]
OTHER_KEY = ["?v=2", "?versionId=3", "?st=1", "?token=h&v=4", "?response-content-type=x"]


@pytest.mark.parametrize(
    ("path", "disposition", "name"),
    [
        ("/loras/style.safetensors?sig=1", None, "style.safetensors"),
        ("/a%20b.safetensors", None, "a b.safetensors"),
        ("/", None, ""),
        ("/1", 'attachment; filename="style.safetensors"', "style.safetensors"),
        ("/1", "attachment; filename*=UTF-8''st%C3%BCck.pt", "stück.pt"),
        ("/1", 'attachment; filename="../../etc/x.tar"', "x.tar"),
        ("/1", r'attachment; filename="C:\\x.tar"', "x.tar"),
        ("/1", "attachment", "1"),
        ("/1", "attachment; filename*=nonsense''%ff%", "ÿ%"),
    ],
)
def test_a_file_keeps_the_name_it_has_where_it_comes_from(
    web: FakeWeb, path: str, disposition: str | None, name: str
):
    headers = (("Content-Disposition", disposition),) if disposition else ()
    web.pages[path.partition("?")[0]] = web.pages[path] = Page(CONTENT, headers=headers)
    for _ in range(2):  # fetched, and from the cache
        with get("https://files.example" + path) as file:
            assert file.file_name == name


def test_the_file_itself_may_name_itself(web: FakeWeb):
    for parameter, name in (
        ("", ""),
        (";name=a/TOK%20x.pt", "TOK x.pt"),
        (";filename=b.tar", "b.tar"),
    ):
        with get(f"data:application/x{parameter};base64,AAAA") as file:
            assert file.file_name == name


def test_the_key_is_the_address_without_its_signature():
    def key(url: str) -> str:
        return fetching._key(WebFile("x", url, trusted=False))

    assert {key(URL + suffix) for suffix in SAME_KEY} == {key(URL)}
    assert len({key(URL + suffix) for suffix in OTHER_KEY} | {key(URL)}) == len(OTHER_KEY) + 1
    assert key("HTTPS://FILES.example:443" + PATH) == key(URL)
    assert key("https://files.example/LORA.safetensors") != key(URL)


def test_a_new_signature_is_no_new_file(web: FakeWeb):
    web.pages[PATH] = Page(CONTENT)
    for suffix in SAME_KEY:
        get(URL + suffix).close()
    assert len(web.downloads()) == 1


@pytest.mark.parametrize("failure", ["403", "404", "503", "name", "offline"])
def test_whoever_asked_before_gets_the_copy_when_asking_fails(
    web: FakeWeb, failure: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    web.pages[PATH] = Page(CONTENT)
    get(f"{URL}?sig=mine").close()
    if failure == "name":
        del web.dns["files.example"]
    elif failure == "offline":
        monkeypatch.setattr(fake_web.constants, "HF_HUB_OFFLINE", True)
    else:
        web.pages[PATH] = Page(status=int(failure))
    capsys.readouterr()
    with get(f"{URL}?sig=mine") as file:
        assert file.path.read_bytes() == CONTENT
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.rstrip().endswith("(the copy in the cache is used)")
    assert "mine" not in said
    for stranger in (URL, f"{URL}?sig=other"):  # the copy is no way round the server's refusal
        with pytest.raises(errors.DownloadError):
            get(stranger)


def test_a_name_that_turns_inward_ends_the_service_from_the_cache(web: FakeWeb):
    web.pages[PATH] = Page(CONTENT)
    get().close()
    web.dns["files.example"] = [["10.0.0.1"]]
    with pytest.raises(errors.RefusedAddress):
        get()


# --- resuming -------------------------------------------------------------------------------------


def test_a_cut_body_is_resumed(web: FakeWeb):
    web.pages[PATH] = Page(CONTENT, cuts=[70_000])
    with get() as file:
        assert file.path.read_bytes() == CONTENT
    first, second = web.downloads()
    assert (first.headers.get("range"), second.headers["range"]) == (None, "bytes=70000-")
    assert second.headers["if-range"] == web.pages[PATH].tag()


def test_what_arrived_before_giving_up_is_used_next_time(web: FakeWeb):
    web.pages[PATH] = Page(CONTENT, cuts=[50_000, 50_000, 50_000])
    with pytest.raises(errors.TransferFailed, match=r"gave up after 3.*run again to resume"):
        get()
    assert files() == set()
    assert [part.stat().st_size for part in parts()] == [150_000]
    get(f"{URL}?sig=new").close()
    assert web.downloads()[-1].headers["range"] == "bytes=150000-"


def test_a_part_of_an_older_version_is_not_continued(web: FakeWeb):
    web.pages[PATH] = Page(OTHER, cuts=[50_000] * 3)
    with pytest.raises(errors.TransferFailed):
        get()
    web.pages[PATH] = Page(CONTENT)
    with get() as file:
        assert file.path.read_bytes() == CONTENT


@pytest.mark.parametrize("believes", [True, False], ids=["If-Range works", "If-Range is ignored"])
def test_a_file_that_changes_on_the_way_is_never_mixed(web: FakeWeb, believes: bool):
    after = Page(OTHER, if_range=believes)
    web.pages[PATH] = Page(CONTENT, cuts=[70_000], then=after)
    with get() as file:
        assert file.path.read_bytes() == OTHER


def test_without_a_validator_a_cut_body_starts_again(web: FakeWeb):
    web.pages[PATH] = Page(CONTENT, etag=None, cuts=[70_000])
    with get() as file:
        assert file.path.read_bytes() == CONTENT
    assert [seen.headers.get("range") for seen in web.downloads()] == [None, None]


def test_a_body_without_a_length_is_taken_whole(web: FakeWeb):
    web.pages[PATH] = Page(CONTENT, framing="chunked", ranges=False)
    with get() as file:
        assert file.path.read_bytes() == CONTENT


# --- several processes ----------------------------------------------------------------------------


@pytest.fixture
def plain_web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Over http, for processes of their own, in which no lookup can be replaced."""
    fake_web.use_own_cache(tmp_path / "cache", [], monkeypatch)
    with fake_web.running_web(None) as web:
        monkeypatch.setenv("WEIGHTS_ALLOW_HOSTS", f"http://127.0.0.1:{web.port}")
        yield web


def start(web: FakeWeb, output: Path) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    with output.with_suffix(".out").open("wb") as out, output.with_suffix(".err").open("wb") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.fake_web", f"http://127.0.0.1:{web.port}{PATH}"],
            env={**os.environ, "PYTHONPATH": str(root)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_processes_fetch_once(plain_web: FakeWeb, tmp_path: Path):
    plain_web.pages[PATH] = page = Page(CONTENT, hold_after=100_000)
    outputs = [tmp_path / "first", tmp_path / "second"]
    processes = [start(plain_web, output) for output in outputs]
    try:
        wait_until(lambda: any("Waiting for" in o.with_suffix(".err").read_text() for o in outputs))
        page.release.set()
        assert [process.wait(PATIENCE_S) for process in processes] == [0, 0]
    finally:
        page.release.set()
        for process in processes:
            process.kill()
            process.wait()
    expected = str(folders()[SHA256] / "weights")
    assert [output.with_suffix(".out").read_text() for output in outputs] == [expected] * 2
    assert len(plain_web.downloads()) == 1


def test_a_killed_process_leaves_a_part_that_is_resumed(plain_web: FakeWeb, tmp_path: Path):
    plain_web.pages[PATH] = page = Page(CONTENT, hold_after=100_000)
    process = start(plain_web, tmp_path / "killed")
    try:
        wait_until(lambda: [part.stat().st_size for part in parts()] == [100_000])
        process.send_signal(signal.SIGKILL)
        assert process.wait(PATIENCE_S) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
        page.release.set()
    assert files() == set()
    with get(f"http://127.0.0.1:{plain_web.port}{PATH}") as file:
        assert file.path.read_bytes() == CONTENT
    assert plain_web.downloads()[-1].headers["range"] == "bytes=100000-"


def test_a_file_that_another_process_uses_is_not_evicted(web: FakeWeb):
    digest = put(web, "a", 1_000)
    folder = folders()[digest]
    code = (
        "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire();"
        "print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder.with_suffix(".lock"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as user:
        assert user.stdout is not None
        user.stdout.readline()
        assert cache.evict(0) > 1_000
        assert folder.exists()
        user.kill()  # the kernel takes the lock back
        user.wait()
    assert cache.evict(0) == 0
    assert not folder.exists()


# --- eviction -------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first(web: FakeWeb, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WEIGHTS_CACHE_BYTES", "35000")
    a, b, c = (put(web, name, 10_000) for name in "abc")
    for digest, seconds in ((a, 300), (b, 200), (c, 100)):
        age(digest, seconds)
    get("https://files.example/a").close()  # used again: now b is the oldest
    d = put(web, "d", 10_000)
    assert files() == {a, c, d}
    e = put(web, "e", 22_000)
    assert files() == {d, e}
    web.seen.clear()
    assert put(web, "b", 10_000) == b
    assert len(web.downloads()) == 1


def test_a_file_in_use_stays_though_the_budget_is_spent(
    web: FakeWeb, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WEIGHTS_CACHE_BYTES", "15000")
    web.pages["/a"] = Page(b"a" * 10_000)
    with get("https://files.example/a") as held:
        age(held.digest, 1_000)
        b = put(web, "b", 10_000)
        assert held.path.read_bytes() == b"a" * 10_000
        assert files() == {held.digest, b}
    cache.evict(15_000)
    assert files() == {b}


def test_a_file_larger_than_the_budget_is_refused(web: FakeWeb, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WEIGHTS_CACHE_BYTES", "999")
    web.pages[PATH] = Page(CONTENT)
    with pytest.raises(errors.DiskFull, match=r"200000 bytes.*999.*WEIGHTS_CACHE_BYTES"):
        get()
    assert web.downloads() == []
    with pytest.raises(errors.DiskFull):
        get("data:;base64," + "AAAA" * 400)
    for wrong in ("20GB", "-1", "1.5"):
        monkeypatch.setenv("WEIGHTS_CACHE_BYTES", wrong)
        with pytest.raises(errors.WrongSetting, match="WEIGHTS_CACHE_BYTES"):
            get()


def test_a_body_without_a_length_ends_where_the_room_does(
    web: FakeWeb, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WEIGHTS_CACHE_BYTES", "150000")
    web.pages[PATH] = Page(CONTENT, framing="chunked", ranges=False)
    with pytest.raises(errors.TooLarge, match="more than 150000 bytes"):
        get()
    assert sum(part.stat().st_size for part in parts()) <= 150_000


def test_parts_count_and_go_like_files(web: FakeWeb):
    web.pages[PATH] = Page(CONTENT, cuts=[50_000, 50_000, 50_000])
    with pytest.raises(errors.TransferFailed):
        get()
    (part,) = parts()
    then = time.time() - 100
    os.utime(part.parents[1], (then, then))
    a = put(web, "a", 1_000)
    assert cache.evict(200_000) > 150_000
    assert cache.evict(20_000) < 20_000
    assert (parts(), files()) == ([], {a})


def test_a_disk_with_little_room_is_cleared_first(web: FakeWeb, monkeypatch: pytest.MonkeyPatch):
    a = put(web, "a", 50_000)
    web.pages[PATH] = Page(CONTENT)
    usage = shutil.disk_usage(cache.root())
    free = download.DISK_MARGIN_BYTES + len(CONTENT) - 50_000

    def disk_usage(_: object):
        return usage._replace(free=free + (0 if a in files() else 50_000))

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    get().close()
    assert files() == {SHA256}
    free -= 1
    cache.evict(0)
    with pytest.raises(errors.DiskFull, match="WEIGHTS_CACHE"):
        get()


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["same size", "short", "gone"])
def test_a_damaged_file_is_fetched_again(
    web: FakeWeb, damage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    web.pages[PATH] = Page(CONTENT)
    with get() as file:
        path = file.path
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"x" * (len(CONTENT) if damage == "same size" else 10))
    monkeypatch.setattr(cache, "_verified", {})  # a new process
    with get() as file:
        assert file.path.read_bytes() == CONTENT
    assert len(web.downloads()) == 2
    assert ("is damaged" in capsys.readouterr().err) is (damage != "gone")


def test_content_is_hashed_once_per_process(web: FakeWeb, monkeypatch: pytest.MonkeyPatch):
    web.pages[PATH] = Page(CONTENT)
    get().close()
    monkeypatch.setattr(cache, "_verified", {})
    hashed = []

    class Counting(cache.Digest):
        @classmethod
        def of(cls, path, kind):
            hashed.append(path)
            return super().of(path, kind)

    monkeypatch.setattr(cache, "Digest", Counting)
    for _ in range(3):
        get().close()
    assert len(hashed) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"digest": 1}', json.dumps({"digest": "x"})])
def test_a_damaged_entry_is_no_obstacle(web: FakeWeb, text: str):
    web.pages[PATH] = Page(CONTENT)
    get().close()
    entry = folders()[SHA256] / "entry.json"
    entry.write_text(text)
    get().close()
    assert files() == {SHA256}
    assert json.loads(entry.read_text())["digest"] == SHA256


def test_a_cache_that_cannot_be_written(web: FakeWeb, tmp_path: Path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(errors.DownloadError, match=r"cannot make .*WEIGHTS_CACHE"):
        get()
