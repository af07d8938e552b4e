"""The lock file: what `--lock` writes, and that later downloads must match it."""

import dataclasses
import hashlib
import json

import pytest

from tests.helpers import fake_hub
from tests.helpers.fake_hub import BIG, COMMIT, TOY, TOY_FILES, TOY_REPO, Misbehaviour, Workplace
from weights import __main__ as command
from weights import cache, errors, lock
from weights.catalog import CATALOG, Edition

workplace = fake_hub.workplace


def write_toy_lock() -> None:
    assert command.main(["--lock", "toy"]) == 0


def changed_lock(workplace: Workplace, **changes: object) -> None:
    """Replace fields of the toy's entry in the lock file."""
    content = json.loads(workplace.lock_path.read_text())
    content["entries"]["toy"] |= changes
    workplace.lock_path.write_text(json.dumps(content))


def test_the_lock_holds_commit_sizes_and_sha256(workplace: Workplace):
    write_toy_lock()
    assert json.loads(workplace.lock_path.read_text()) == {
        "version": 1,
        "entries": {
            "toy": {
                "repo": TOY_REPO,
                "requested_revision": "main",
                "revision": COMMIT,
                "files": {
                    file: {
                        "size_bytes": len(content),
                        "sha256": hashlib.sha256(content).hexdigest(),
                    }
                    for file, content in TOY_FILES.items()
                },
            }
        },
    }
    assert workplace.hub.served(BIG) == []  # the hub knows its sha256
    assert lock.locked_entry(TOY) is not None


def test_a_lock_of_wrong_small_files_is_not_written(workplace: Workplace):
    workplace.hub.misbehave["model_index.json"] = [Misbehaviour(replace_with=b"no" * 12)]
    assert command.main(["--lock", "toy"]) == 1
    assert not workplace.lock_path.exists()


def test_locking_one_entry_keeps_the_others(workplace: Workplace, monkeypatch: pytest.MonkeyPatch):
    other = dataclasses.replace(TOY, name="other")
    monkeypatch.setitem(CATALOG[Edition.FULL], "other", other)
    write_toy_lock()
    assert command.main(["--lock", "other"]) == 0
    assert set(lock.read_lock()) == {"toy", "other"}


def test_lock_without_names_locks_every_hub_entry(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
):
    for name in set(CATALOG[Edition.FULL]) - {"toy", "single"}:
        monkeypatch.delitem(CATALOG[Edition.FULL], name)
    assert command.main(["--lock"]) == 0
    assert set(lock.read_lock()) == {"toy"}  # "single" has its sha256 in the catalog


def test_a_locked_entry_is_the_locked_commit(workplace: Workplace):
    write_toy_lock()
    workplace.hub.forget()
    folder = cache.ensure("toy", Edition.FULL)
    assert folder.name == COMMIT
    assert {file: (folder / file).read_bytes() for file in TOY_FILES} == TOY_FILES
    assert workplace.hub.api_requests == [f"{TOY_REPO}/tree/{COMMIT}"]
    assert len(workplace.hub.requests) == len(TOY_FILES)


@pytest.mark.parametrize("file", [BIG, "model_index.json"])
def test_a_file_that_changed_since_the_lock_is_refused(workplace: Workplace, file: str):
    write_toy_lock()
    original = workplace.hub.repos[TOY_REPO][file]
    workplace.hub.repos[TOY_REPO][file] = bytes(len(original))
    with pytest.raises(errors.ChecksumMismatch, match=rf"{file} .*script/weights --lock"):
        cache.ensure("toy", Edition.FULL)
    assert not cache.is_present("toy", Edition.FULL)
    assert not (workplace.cache / "toy" / COMMIT / file).exists()
    workplace.hub.repos[TOY_REPO][file] = original
    cache.ensure("toy", Edition.FULL)


def test_what_is_cached_must_match_a_lock_that_came_later(workplace: Workplace):
    write_toy_lock()
    cache.ensure("toy", Edition.FULL)
    workplace.hub.repos[TOY_REPO][BIG] = new = bytes(len(TOY_FILES[BIG]))
    write_toy_lock()  # same commit name, same sizes, another content
    assert not cache.is_present("toy", Edition.FULL)
    workplace.hub.forget()
    folder = cache.ensure("toy", Edition.FULL)
    assert (folder / BIG).read_bytes() == new
    assert [request.path for request in workplace.hub.requests] == [BIG]


@pytest.mark.parametrize(
    "changes",
    [{"repo": "acme/other"}, {"requested_revision": "v2"}, {"files": {}}],
    ids=["repository", "revision", "files"],
)
def test_a_lock_that_the_catalog_has_left_behind_is_refused(
    workplace: Workplace, changes: dict[str, object]
):
    write_toy_lock()
    changed_lock(workplace, **changes)
    workplace.hub.forget()
    with pytest.raises(errors.LockMismatch, match=r"toy .*run script/weights --lock"):
        cache.ensure("toy", Edition.FULL)
    assert workplace.hub.requests == []
    write_toy_lock()  # the remedy works
    cache.ensure("toy", Edition.FULL)


@pytest.mark.parametrize("content", ["{", '{"version": 7}'])
def test_an_unreadable_lock_is_refused(workplace: Workplace, content: str):
    workplace.lock_path.write_text(content)
    with pytest.raises(errors.LockMismatch, match=r"script/weights --lock"):
        cache.ensure("toy", Edition.FULL)
    assert workplace.hub.requests == []
