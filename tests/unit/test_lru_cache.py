"""The cache of last used values: its order, its sizes, and cancellations at any line."""

import itertools
from contextlib import suppress

from models import lru_cache
from models.lru_cache import LRUCache
from tests.miniature.isolation import Cancelled, failing_in


def test_the_value_used_longest_ago_makes_room():
    cache = LRUCache(2)
    for key in "ab":
        cache.add(key, key.upper())
    assert cache.get("a") == "A"
    cache.add("c", "C")
    assert [cache.get(key) for key in "abc"] == ["A", None, "C"]


def test_values_fit_by_their_sizes():
    cache = LRUCache(10, len)
    cache.add("small", "1234")
    cache.add("too large", "x" * 11)
    assert len(cache) == 1
    cache.add("medium", "123456")
    assert len(cache) == 2
    cache.add("large", "1234567")
    assert [cache.get(key) for key in ("small", "medium")] == [None, None]
    assert cache.get("large") == "1234567"


def test_a_cancellation_at_any_line_leaves_it_usable():
    for count in itertools.count(1):
        cache = LRUCache(10, len)
        cache.add("a", "1234")
        cache.add("b", "1234")
        with failing_in(lru_cache, None, count, Cancelled) as struck, suppress(Cancelled):
            cache.get("a")
            cache.add("c", "12345678")
        for k in range(20):
            cache.add(k, "123")
            assert cache.get(k) == "123"
        assert len(cache) == 3
        if not struck:
            break
    assert count > 20
