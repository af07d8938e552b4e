"""The lock file: the commit, and every file's size and sha256, that downloads must match.

`script/weights --lock` writes it, people commit it. An entry that is locked is fetched without
asking the hub what the files should be, so a mirror is enough. Files at a plain URL are not in it:
the catalog itself holds their sha256.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from weights.catalog import CatalogEntry, HubFiles
from weights.errors import LockMismatch

LOCK_PATH = Path(__file__).with_name("weights.lock.json")
FORMAT_VERSION = 1


@dataclass(frozen=True)
class LockedFile:
    """What one file must be: exact size, sha256 in hexadecimal."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class LockedEntry:
    """One catalog entry, resolved: `revision` is the commit that `requested_revision` meant."""

    repo: str
    requested_revision: str
    revision: str
    files: dict[str, LockedFile]


def read_lock() -> dict[str, LockedEntry]:
    """Entries by catalog name; empty where there is no lock file. Raises LockMismatch."""
    try:
        content = json.loads(LOCK_PATH.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise LockMismatch(
            f"{LOCK_PATH} is not JSON ({error}): restore it from git or run script/weights --lock"
        ) from error
    if content.get("version") != FORMAT_VERSION:
        raise LockMismatch(
            f"{LOCK_PATH} has format version {content.get('version')!r}, this code reads"
            f" {FORMAT_VERSION}: run script/weights --lock"
        )
    return {
        name: LockedEntry(
            repo=entry["repo"],
            requested_revision=entry["requested_revision"],
            revision=entry["revision"],
            files={path: LockedFile(**file) for path, file in entry["files"].items()},
        )
        for name, entry in content["entries"].items()
    }


def write_lock(entries: dict[str, LockedEntry]) -> None:
    """Replace the lock file, sorted, so that its diff shows what changed and nothing else."""
    content = {
        "version": FORMAT_VERSION,
        "entries": {name: asdict(entry) for name, entry in entries.items()},
    }
    partial = LOCK_PATH.with_name(LOCK_PATH.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    partial.replace(LOCK_PATH)


def locked_entry(entry: CatalogEntry) -> LockedEntry | None:
    """What the lock says about `entry`; None where it says nothing.

    Raises LockMismatch where the catalog has moved on since the lock was written.
    """
    locked = read_lock().get(entry.name)
    if locked is None or not isinstance(entry.source, HubFiles):
        return None
    source = entry.source
    differences = [
        f"{what}: lock {in_lock!r}, catalog {in_catalog!r}"
        for what, in_lock, in_catalog in (
            ("repository", locked.repo, source.repo),
            ("revision", locked.requested_revision, source.revision),
            ("files", sorted(locked.files), sorted(source.files)),
        )
        if in_lock != in_catalog
    ]
    if differences:
        raise LockMismatch(
            f"{LOCK_PATH.name} does not fit the catalog's {entry.name} ({'; '.join(differences)}):"
            " run script/weights --lock and commit the result"
        )
    return locked
