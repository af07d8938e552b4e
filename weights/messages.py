"""Parts of error messages that every package of the container shares."""

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


def quote(text: str) -> str:
    """Return a name that came from a user, safe to print: escaped, and at most 120 characters."""
    return repr(text if len(text) <= 120 else text[:100] + "…")


def quote_list(names: Iterable[str], most: int = 8) -> str:
    """Return the first `most` names, quoted, and how many more there are."""
    names = list(names)
    shown = ", ".join(quote(name) for name in names[:most]) or "nothing at all"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


@contextmanager
def disk_full_raises(error: Callable[[], Exception]) -> Iterator[None]:
    """Raise `error()` in place of an OSError that says that the disk or the quota is full."""
    try:
        yield
    except OSError as found:
        if found.errno in (errno.ENOSPC, errno.EDQUOT):
            raise error() from found
        raise
