"""Read weights' files into the system's page cache before they are loaded."""

import threading
from collections.abc import Sequence
from pathlib import Path

from weights.cache import entry_folder, files_of, is_present
from weights.catalog import Edition, get_entry

_BLOCK_BYTES = 8 << 20


def read_ahead(names: Sequence[str], edition: Edition) -> threading.Thread:
    """Read the entries' files in the background.

    A start imports libraries for some ten seconds and then waits for gigabytes; a disk can read
    them meanwhile. Missing files are left to `cache.ensure`.
    """
    files = [
        entry_folder(entry) / file
        for entry in (get_entry(name, edition) for name in dict.fromkeys(names))
        if is_present(entry.name, edition)
        for file in files_of(entry)
    ]
    thread = threading.Thread(target=_read, args=(files,), name="read ahead", daemon=True)
    thread.start()
    return thread


def _read(files: Sequence[Path]) -> None:
    block = bytearray(_BLOCK_BYTES)
    for path in files:
        try:
            with path.open("rb", buffering=0) as file:
                while file.readinto(block):
                    pass
        except OSError:
            continue  # loading it will raise an error that explains it
