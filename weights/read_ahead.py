"""Weights' files, on their way from the disk into memory before anybody asks for them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from weights.cache import entry_folder, files_of, is_present
from weights.catalog import Edition, get_entry

_BLOCK_BYTES = 8 << 20


def read_ahead(names: Sequence[str], edition: Edition) -> threading.Thread:
    """Have the system keep the entries' files in its page cache, in the background.

    A start imports libraries for some ten seconds and then waits for gigabytes; a disk can read
    them meanwhile. What is not there yet is left to `cache.ensure`.
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
            continue  # whoever needs the file will say what is wrong with it
