"""Keep the values that were used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LRUCache(Generic[K, V]):
    """The values used last, as many as fit into a size.

    A cancellation at any line leaves it usable, which cachetools' is not: its sizes and its order
    are kept beside the values, and could then disagree for good.
    """

    def __init__(self, max_size: int, size_of: Callable[[V], int] = lambda value: 1) -> None:
        self._max_size, self._size_of = max_size, size_of
        self._values: OrderedDict[K, V] = OrderedDict()  # last used last

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V | None:
        """Return a value, if it is still there."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def add(self, key: K, value: V) -> None:
        """Add a value in the place of those used longest ago; one too large alone is not kept."""
        if self._size_of(value) > self._max_size:
            return
        self._values[key] = value
        while sum(map(self._size_of, self._values.values())) > self._max_size:
            self._values.popitem(last=False)
