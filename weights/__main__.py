"""`script/weights`: list the catalog, fetch entries beforehand, write the lock file."""

import argparse
import sys

from weights import cache, lock
from weights.catalog import CATALOG, CatalogEntry, Edition, HubFiles, get_entry
from weights.edition import available_devices, requested_edition, resolve_edition
from weights.errors import WeightsError

HEADINGS = ("name", "edition", "files", "size", "licence", "commercial use", "present")
ENVIRONMENT = """\
environment:
  WEIGHTS_EDITION  full | miniature | auto (full where a CUDA GPU is used)
  WEIGHTS_CACHE    where downloads are kept (default ~/.cache/cog-stable-diffusion; in a
                   container, /src/.cache/cog-stable-diffusion)
  WEIGHTS_CACHE_BYTES  how much of users' weights is kept there (default 20000000000)
  WEIGHTS_ALLOW_HOSTS  inner hosts that requests may name, see weights/user/ssrf_guard.py
  WEIGHTS_MIRROR   base address that replaces the hub, see weights/download.py
  HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE  as in huggingface_hub
"""


def main(arguments: list[str]) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="script/weights",
        description=__doc__,
        epilog=ENVIRONMENT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="fetch these entries")
    parser.add_argument("--list", action="store_true", help="print the table of entries")
    parser.add_argument(
        "--lock", action="store_true", help="write revisions and hashes of NAMEs (default: all)"
    )
    options = parser.parse_args(arguments)
    if not (options.list or options.lock or options.names):
        parser.error("name an entry to fetch, or use --list or --lock")
    try:
        if options.list:
            print(table())
        elif options.lock:
            write_lock(options.names)
        else:
            prefetch(options.names)
    except WeightsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def table() -> str:
    """Return the catalog as aligned text, one line per entry."""
    rows: list[tuple[str, ...]] = [HEADINGS]
    for edition, entries in CATALOG.items():
        rows += [_row(entry, edition) for entry in entries.values()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def prefetch(names: list[str]) -> None:
    """Fetch `names`, or nothing at all if one of them is unknown. Prints each folder."""
    edition = requested_edition()
    if edition is None:
        edition = resolve_edition(cuda_available="cuda" in available_devices())
    for name in names:
        get_entry(name, edition)
    for name in names:
        print(f"{name} ({edition}): {cache.ensure(name, edition)}")


def write_lock(names: list[str]) -> None:
    """Resolve `names`, or every hub entry, and write them to the lock file."""
    from weights.download import resolve_lock  # here: --list needs no HTTP library

    hub_entries = [e for e in CATALOG[Edition.FULL].values() if isinstance(e.source, HubFiles)]
    chosen = [get_entry(name, Edition.FULL) for name in names] or hub_entries
    current = {entry.name for entry in hub_entries}
    locked = {
        name: entry
        for name, entry in lock.read_lock().items()
        if names and name in current  # a full run starts afresh
    }
    for entry in chosen:
        if isinstance(entry.source, HubFiles):
            locked[entry.name] = resolve_lock(entry)
            print(f"{entry.name}: {entry.source.repo}@{locked[entry.name].revision}")
        else:
            print(f"{entry.name}: the catalog holds its sha256 already")
    lock.write_lock(locked)
    print(f"wrote {lock.LOCK_PATH}")


def _row(entry: CatalogEntry, edition: Edition) -> tuple[str, ...]:
    return (
        entry.name,
        str(edition),
        str(len(cache.files_of(entry))),
        _readable(cache.size_bytes(entry)),
        entry.licence,
        "yes" if entry.commercial_use else "no",
        "yes" if cache.is_present(entry.name, edition) else "no",
    )


def _readable(size: int) -> str:
    """Bytes in decimal units, as disks and download tools count them."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
