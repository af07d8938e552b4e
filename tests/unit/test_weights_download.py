"""Downloading from a hub that misbehaves: what is resumed, refused, repeated and left on disk."""

import errno
import hashlib
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import IO, NamedTuple

import pytest
from huggingface_hub import constants

from tests.helpers import fake_hub
from tests.helpers.fake_hub import (
    BIG,
    COMMIT,
    SINGLE,
    SINGLE_CONTENT,
    TOY_FILES,
    TOY_REPO,
    FakeHub,
    Misbehaviour,
    Workplace,
)
from weights import cache, errors, retry, transfer
from weights.catalog import Edition
from weights.read_ahead import read_ahead

workplace = fake_hub.workplace
BIG_BYTES = len(TOY_FILES[BIG])
SINGLE_PATH = f"files/{SINGLE}"
PART_NAME = hashlib.sha256(SINGLE_CONTENT).hexdigest()


def fetch() -> Path:
    return cache.ensure("toy", Edition.FULL)


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file that is not hidden, as diffusers would see it."""
    paths = [p for p in folder.rglob("*") if p.is_file()]
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in paths
        if not any(part.startswith(".") for part in p.relative_to(folder).parts)
    }


def hidden_files(root: Path) -> set[str]:
    return {p.name for p in root.rglob("*") if p.is_file() and "/." in str(p.relative_to(root))}


def partial_files(root: Path) -> list[Path]:
    return [p for p in root.rglob(f"{transfer.PARTIAL_FOLDER}/*") if p.is_file()]


def assert_final_name_absent(root: Path, name: str) -> None:
    assert not list(root.rglob(Path(name).name))
    assert not cache.is_present("toy", Edition.FULL)


def test_a_clean_download_is_the_hubs_layout_and_is_not_repeated(workplace: Workplace):
    folder = fetch()
    assert files_below(folder) == TOY_FILES
    assert partial_files(workplace.cache) == []
    assert workplace.hub.api_requests == [f"{TOY_REPO}/revision/main", f"{TOY_REPO}/tree/{COMMIT}"]
    workplace.hub.forget()
    assert fetch() == folder
    assert cache.is_present("toy", Edition.FULL)
    assert (workplace.hub.requests, workplace.hub.api_requests) == ([], [])


def test_files_are_read_ahead_of_their_use(workplace: Workplace, monkeypatch: pytest.MonkeyPatch):
    read: list[Path] = []
    opened = Path.open

    def watched(path: Path, *args: object, **options: object) -> IO[bytes]:
        if path.name not in (cache.COMPLETE, "weights.lock.json"):  # the cache's own
            read.append(path)
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", watched)
    read_ahead(["toy"], Edition.FULL).join()
    assert read == []  # nothing is there yet, and nothing is fetched
    assert (workplace.hub.requests, workplace.hub.api_requests) == ([], [])
    folder = fetch()
    (folder / BIG).unlink()
    monkeypatch.setattr(cache, "_is_complete", lambda *_: True)  # it goes just now
    read.clear()
    read_ahead(["toy", "toy"], Edition.FULL).join()
    assert sorted(read) == sorted(folder / name for name in TOY_FILES)


def test_a_file_at_an_address(workplace: Workplace):
    folder = cache.ensure("single", Edition.FULL)
    assert files_below(folder) == {SINGLE: SINGLE_CONTENT}
    assert len(workplace.hub.served(f"files/{SINGLE}")) == 1
    cache.ensure("single", Edition.FULL)
    assert len(workplace.hub.served(f"files/{SINGLE}")) == 1


@pytest.mark.parametrize(("entry", "file"), [("toy", BIG), ("single", f"files/{SINGLE}")])
def test_a_cut_connection_is_resumed_where_it_was_cut(workplace: Workplace, entry: str, file: str):
    workplace.hub.misbehave[file] = [Misbehaviour(cut_after=40_000)]
    cache.ensure(entry, Edition.FULL)
    first, second = workplace.hub.served(file)
    assert (first.range, first.status, first.bytes_sent) == (None, 200, 40_000)
    assert (second.range, second.status) == ("bytes=40000-", 206)
    size = BIG_BYTES if entry == "toy" else len(SINGLE_CONTENT)
    assert workplace.hub.bytes_sent(file) == size  # not one byte twice


def fetch_single() -> bytes:
    """The entry at a plain address, which is downloaded by ourselves."""
    return (cache.ensure("single", Edition.FULL) / SINGLE).read_bytes()


def test_a_download_that_gave_up_keeps_the_files_that_were_finished(workplace: Workplace):
    workplace.hub.misbehave[BIG] = [Misbehaviour(cut_after=0)] * 50
    with pytest.raises(errors.TransferFailed, match=rf"{TOY_REPO}.*gave up.*run again"):
        fetch()
    assert_final_name_absent(workplace.cache, BIG)
    workplace.hub.misbehave.clear()
    workplace.hub.forget()
    assert files_below(fetch()) == TOY_FILES
    assert {request.path for request in workplace.hub.requests} == {BIG}
    assert hidden_files(workplace.cache) == {cache.COMPLETE}


def test_a_file_at_an_address_that_gave_up_is_resumed_by_the_next_call(workplace: Workplace):
    tries = retry.CATALOG_RETRIES.tries
    workplace.hub.misbehave[SINGLE_PATH] = [Misbehaviour(cut_after=1_000)] * tries
    with pytest.raises(errors.TransferFailed, match=rf"{SINGLE} from .*gave up.*run again"):
        fetch_single()
    assert not cache.is_present("single", Edition.FULL)
    assert [p.stat().st_size for p in partial_files(workplace.cache)] == [1_000 * tries]
    workplace.hub.forget()
    assert fetch_single() == SINGLE_CONTENT
    (request,) = workplace.hub.served(SINGLE_PATH)
    assert request.range == f"bytes={1_000 * tries}-"


def test_a_server_that_ignores_range_restarts_the_file(workplace: Workplace):
    workplace.hub.misbehave[BIG] = [Misbehaviour(cut_after=9_000), Misbehaviour(ignore_range=True)]
    assert files_below(fetch()) == TOY_FILES
    assert [r.status for r in workplace.hub.served(BIG)] == [200, 200]


def test_progress_starts_the_count_of_failures_again(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(transfer, "PROGRESS_BYTES", 1_000)
    cuts = retry.CATALOG_RETRIES.tries + 3
    workplace.hub.misbehave[SINGLE_PATH] = [Misbehaviour(cut_after=2_000)] * cuts
    assert fetch_single() == SINGLE_CONTENT
    assert len(workplace.hub.served(SINGLE_PATH)) == cuts + 1
    workplace.hub.misbehave[BIG] = [Misbehaviour(cut_after=20_000)] * cuts
    assert files_below(fetch()) == TOY_FILES
    assert len(workplace.hub.served(BIG)) == cuts + 1


@pytest.mark.parametrize(
    "wrong",
    [b"x" * BIG_BYTES, b"x" * (BIG_BYTES + 5)],
    ids=["same size", "too long"],
)
def test_wrong_bytes_are_refused_and_nothing_is_left(workplace: Workplace, wrong: bytes):
    workplace.hub.misbehave[BIG] = [Misbehaviour(replace_with=wrong)] * 3
    with pytest.raises(errors.ChecksumMismatch, match=rf"{BIG}.*Try again") as caught:
        fetch()
    if len(wrong) == BIG_BYTES:
        assert hashlib.sha256(TOY_FILES[BIG]).hexdigest() in str(caught.value)
    assert len(workplace.hub.served(BIG)) == 1
    assert_final_name_absent(workplace.cache, BIG)
    workplace.hub.misbehave.clear()
    assert files_below(fetch()) == TOY_FILES


def test_wrong_bytes_in_a_small_file_are_refused_by_its_git_hash(workplace: Workplace):
    wrong = b"x" * len(TOY_FILES["model_index.json"])
    workplace.hub.misbehave["model_index.json"] = [Misbehaviour(replace_with=wrong)]
    with pytest.raises(errors.ChecksumMismatch, match=r"git-sha1"):
        fetch()
    assert_final_name_absent(workplace.cache, "model_index.json")


def write_part(workplace: Workplace, content: bytes) -> None:
    folder = workplace.cache / "single" / PART_NAME[:16] / transfer.PARTIAL_FOLDER
    folder.mkdir(parents=True)
    (folder / PART_NAME).write_bytes(content)


def test_a_spoilt_part_is_thrown_away_and_the_file_fetched_anew(workplace: Workplace):
    write_part(workplace, b"rubbish")
    assert fetch_single() == SINGLE_CONTENT
    assert [r.range for r in workplace.hub.served(SINGLE_PATH)] == ["bytes=7-", None]


@pytest.mark.parametrize("more", [0, 10], ids=["full length", "too long"])
def test_a_spoilt_part_of_any_length_does_not_block(workplace: Workplace, more: int):
    write_part(workplace, b"z" * (len(SINGLE_CONTENT) + more))
    assert fetch_single() == SINGLE_CONTENT
    assert [r.range for r in workplace.hub.served(SINGLE_PATH)] == [None]


def test_a_part_longer_than_the_servers_file_is_thrown_away(workplace: Workplace):
    short = Misbehaviour(replace_with=b"s" * 5_000)
    workplace.hub.misbehave[SINGLE_PATH] = [Misbehaviour(cut_after=9_000), short]
    assert fetch_single() == SINGLE_CONTENT
    assert [r.status for r in workplace.hub.requests] == [200, 416, 200]


class Refusal(NamedTuple):
    status: int
    error: type[errors.DownloadError]
    remedy: str


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(401, errors.AccessDenied, "HF_TOKEN"),
        Refusal(403, errors.AccessDenied, "licence"),
        Refusal(404, errors.NotOnServer, "weights/catalog.py"),
        Refusal(418, errors.DownloadError, "HF_ENDPOINT"),
    ],
    ids=lambda refusal: str(refusal.status),
)
@pytest.mark.parametrize("by", ["api", "file"])
def test_a_refusal_is_explained_at_once(workplace: Workplace, refusal: Refusal, by: str):
    bad = Misbehaviour(status=refusal.status)
    if by == "api":
        workplace.hub.api_misbehave = [bad]
    else:
        workplace.hub.misbehave[BIG] = [bad]
    with pytest.raises(errors.DownloadError) as caught:
        fetch()
    assert type(caught.value) is refusal.error
    message = str(caught.value)
    assert str(refusal.status) in message or refusal.status == 404
    assert workplace.hub.url in message
    assert TOY_REPO in message
    if by == "file":
        assert BIG in message
    if not (by == "api" and refusal.status == 418):
        assert refusal.remedy in message
    assert workplace.waits_s == []
    assert_final_name_absent(workplace.cache, BIG)


def test_a_gated_repository_opens_with_a_token(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
):
    workplace.hub.required_token = "secret"
    with pytest.raises(errors.AccessDenied, match=rf"{TOY_REPO}.*HF_TOKEN"):
        fetch()
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert files_below(fetch()) == TOY_FILES
    (request,) = workplace.hub.served(BIG)
    assert request.host.startswith("localhost")
    assert request.authorization is None  # the token stays with the hub when it redirects
    (request,) = workplace.hub.served("model_index.json")
    assert request.authorization == "Bearer secret"


def test_missing_repository_revision_and_file(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
):
    del workplace.hub.repos[TOY_REPO][BIG]
    with pytest.raises(errors.NotOnServer, match=rf"{BIG} is not in {TOY_REPO}@main"):
        fetch()
    del workplace.hub.repos[TOY_REPO]
    with pytest.raises(errors.WeightsError, match=rf"{TOY_REPO}@main"):
        fetch()


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("by", ["api", "file"])
def test_a_busy_server_is_given_the_time_it_asks_for(workplace: Workplace, status: int, by: str):
    bad = [Misbehaviour(status=status, headers=(("Retry-After", "7"),)), Misbehaviour(status=503)]
    if by == "api":
        workplace.hub.api_misbehave = bad
    else:
        workplace.hub.misbehave[BIG] = bad
    assert files_below(fetch()) == TOY_FILES
    asked, ours = workplace.waits_s
    assert asked == 7.0
    assert 2 <= ours <= 3  # the second failure in a row


def test_patience_ends(workplace: Workplace):
    workplace.hub.misbehave[BIG] = [Misbehaviour(status=503)] * 50
    with pytest.raises(errors.TransferFailed, match=r"503.*gave up after 6 failures"):
        fetch()
    waits = workplace.waits_s
    assert len(waits) == retry.CATALOG_RETRIES.tries - 1
    assert all(2**n <= wait <= 2**n + 1 for n, wait in enumerate(waits))
    workplace.hub.misbehave[BIG] = [
        Misbehaviour(status=429, headers=(("Retry-After", "86400"),)),
    ]
    waits.clear()
    with pytest.raises(errors.TransferFailed, match=r"429.*86400"):
        fetch()
    assert waits == []


def test_a_server_that_is_not_there(workplace: Workplace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WEIGHTS_MIRROR", "http://127.0.0.1:1")
    with pytest.raises(errors.TransferFailed, match=r"127.0.0.1:1/.*WEIGHTS_MIRROR"):
        fetch()
    fake_hub.use_endpoint(monkeypatch, "http://127.0.0.1:1")
    workplace.waits_s.clear()
    with pytest.raises(errors.TransferFailed, match=r"127.0.0.1:1"):
        fetch()
    assert len(workplace.waits_s) == retry.CATALOG_RETRIES.tries - 1


def test_retry_after_as_a_date():
    import email.utils
    import time

    import httpx

    date = email.utils.formatdate(time.time() + 50, usegmt=True)
    wait_s = retry.retry_after_s(httpx.Response(503, headers={"Retry-After": date}))
    assert wait_s is not None
    assert 45 < wait_s <= 50
    assert retry.retry_after_s(httpx.Response(503, headers={"Retry-After": "soon"})) is None


def test_a_disk_without_room_is_noticed_before_the_first_byte(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
):
    from weights import download

    usage = shutil.disk_usage(workplace.cache.parent)
    needed = sum(map(len, TOY_FILES.values())) + download.DISK_MARGIN_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(errors.DiskFull, match=rf"{needed - 1} free.*WEIGHTS_CACHE"):
        fetch()
    assert workplace.hub.requests == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert files_below(fetch()) == TOY_FILES


ROOM_BYTES = 30_000


class FullDisk:
    """A file on a disk with no more room."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.file, self.path = file, path
        self.tell = file.tell

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        left = ROOM_BYTES - self.file.tell()
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        return self.file.write(data[:left])


@pytest.mark.parametrize(
    ("entry", "file"), [("toy", BIG), ("single", SINGLE_PATH)], ids=["hub", "address"]
)
def test_a_disk_that_fills_up_on_the_way(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, entry: str, file: str
):
    real_open = Path.open

    def open_on_full_disk(self: Path, mode: str = "r", *args: object, **options: object):
        opened = real_open(self, mode, *args, **options)
        return FullDisk(opened, self) if mode in ("ab", "wb") else opened

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_on_full_disk)
        with pytest.raises(errors.DiskFull, match=r"the disk .*full.*WEIGHTS_CACHE"):
            cache.ensure(entry, Edition.FULL)
    assert not cache.is_present(entry, Edition.FULL)
    assert not list((workplace.cache / entry).rglob(Path(file).name))
    workplace.hub.forget()
    cache.ensure(entry, Edition.FULL)
    (request,) = workplace.hub.served(file)
    assert request.range == (None if entry == "toy" else f"bytes={ROOM_BYTES}-")


def test_a_cancelled_download_ends_at_once(workplace: Workplace):
    """Cancellation is an exception in the main thread, while huggingface_hub's threads go on."""
    held = Misbehaviour(hold_after=100_000)
    workplace.hub.misbehave[BIG] = [held]

    class Cancelled(BaseException):
        pass

    def cancel(*_: object) -> None:
        threading.Timer(0.5, held.release.set).start()  # the next bytes arrive
        raise Cancelled

    def when_held() -> None:
        while not workplace.hub.served(BIG):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, cancel)
    watcher = threading.Thread(target=when_held, daemon=True)
    try:
        watcher.start()
        with pytest.raises(Cancelled):
            fetch()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert_final_name_absent(workplace.cache, BIG)
    assert files_below(fetch()) == TOY_FILES


def test_offline_mode_forbids_downloads_and_allows_what_is_there(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("toy", "single"):
        with pytest.raises(errors.Offline, match=r"HF_HUB_OFFLINE"):
            cache.ensure(name, Edition.FULL)
    assert (workplace.hub.requests, workplace.hub.api_requests) == ([], [])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fetch()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert files_below(fetch()) == TOY_FILES


def serve_mirror(hub: FakeHub) -> str:
    for file, content in TOY_FILES.items():
        hub.plain[f"mirror/{TOY_REPO}/{COMMIT}/{file}"] = content
    hub.plain[f"mirror/{hashlib.sha256(SINGLE_CONTENT).hexdigest()}/{SINGLE}"] = SINGLE_CONTENT
    return f"{hub.url}/plain/mirror/"


def test_a_mirror_serves_the_bytes_and_gets_no_token(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("WEIGHTS_MIRROR", serve_mirror(workplace.hub))
    assert files_below(fetch()) == TOY_FILES
    assert files_below(cache.ensure("single", Edition.FULL)) == {SINGLE: SINGLE_CONTENT}
    assert len(workplace.hub.requests) == len(TOY_FILES) + 1
    assert all(r.path.startswith("mirror/") for r in workplace.hub.requests)
    assert all(r.authorization is None for r in workplace.hub.requests)


def test_a_mirror_does_not_vouch_for_itself(workplace: Workplace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WEIGHTS_MIRROR", serve_mirror(workplace.hub))
    workplace.hub.plain[f"mirror/{TOY_REPO}/{COMMIT}/{BIG}"] = b"m" * BIG_BYTES
    with pytest.raises(errors.ChecksumMismatch, match=r"/plain/mirror/"):
        fetch()
    assert_final_name_absent(workplace.cache, BIG)


def test_a_mirror_that_is_no_address(workplace: Workplace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WEIGHTS_MIRROR", "mirror.example/weights")
    with pytest.raises(errors.DownloadError, match=r"WEIGHTS_MIRROR"):
        fetch()
    assert workplace.waits_s == []


def test_a_damaged_cache_is_mended(workplace: Workplace):
    folder = fetch()
    (folder / BIG).write_bytes(b"short")
    assert not cache.is_present("toy", Edition.FULL)
    workplace.hub.forget()
    assert files_below(fetch()) == TOY_FILES
    assert [r.path for r in workplace.hub.requests] == [BIG]
    (folder / cache.COMPLETE).write_text("{")
    assert not cache.is_present("toy", Edition.FULL)
    workplace.hub.forget()
    fetch()
    assert workplace.hub.requests == []  # the files were right: hashed, not fetched


def test_a_cache_that_cannot_be_written(workplace: Workplace):
    workplace.cache.write_text("a file where the folder should be")
    with pytest.raises(errors.DownloadError, match=r"toy: cannot make .*set WEIGHTS_CACHE"):
        fetch()


def test_an_endpoint_that_is_not_a_hub(workplace: Workplace, monkeypatch: pytest.MonkeyPatch):
    workplace.hub.plain[f"api/models/{TOY_REPO}/revision/main"] = b"<html>please log in</html>"
    fake_hub.use_endpoint(monkeypatch, f"{workplace.hub.url}/plain")
    with pytest.raises(errors.DownloadError, match=rf"{TOY_REPO}@main.*check HF_ENDPOINT"):
        fetch()
    assert workplace.waits_s == []
