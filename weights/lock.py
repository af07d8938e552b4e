"""The lock file: the commit, and every file's size and sha256, that downloads must match.

`script/weights --lock` writes it, people commit it. Files at a plain URL are not in it: the catalog
itself holds their sha256.
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
    """Exact size and sha256 (hexadecimal) of a file."""

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
    """Return entries by catalog name; none where there is no lock file. Raises LockMismatch."""
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
    entries = {}
    for name, entry in content["entries"].items():
        entry["files"] = {path: LockedFile(**file) for path, file in entry["files"].items()}
        entries[name] = LockedEntry(**entry)
    return entries


def write_lock(entries: dict[str, LockedEntry]) -> None:
    """Replace the lock file; it is sorted, so that its diff shows what changed and nothing else."""
    content = {
        "version": FORMAT_VERSION,
        "entries": {name: asdict(entry) for name, entry in entries.items()},
    }
    write_json(LOCK_PATH, content)


def write_json(path: Path, content: object) -> None:
    """Write a file that is never seen half written."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    partial.replace(path)


def locked_entry(entry: CatalogEntry) -> LockedEntry | None:
    """Return `entry` as locked; None if it is not. Raises LockMismatch if the catalog moved on."""
    locked = read_lock().get(entry.name)
    source = entry.source
    if locked is None or not isinstance(source, HubFiles):
        return None
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
