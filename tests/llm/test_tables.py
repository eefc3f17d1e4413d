"""A sequence's tables: what each kind of layers keeps, gives back and finds again; all kinds or none."""

from __future__ import annotations

import pytest

from ingot.llm.batch import Kind
from ingot.llm.cache import CacheCorrupt, block_keys
from ingot.llm.tables import Cache, Table, tables_of

KEYS = block_keys(list(range(64)), 4)


def entered(cache: Cache, length: int, keys: list[bytes] | None = None, chunk: int = 8) -> tuple[list[Table], int]:
    found = cache.enter(keys or [], length, chunk, False)
    assert found is not None
    return found


def test_a_window_takes_a_prompt_chunk_by_chunk() -> None:
    """A prompt of ten blocks in a pool of five: the others hold it whole."""
    cache = Cache([Kind(10), Kind(5, 6)], 4)
    tables, known = entered(cache, 40)
    assert known == 0 and [len(table.blocks) for table in tables] == [10, 2]
    held = []
    for end in range(8, 41, 8):
        assert cache.provide(tables, end - 8, end) == []
        cache.publish(tables, KEYS, end - 8, end)
        cache.slide(tables, end)
        held.append(len(tables[1].held))
        cache.check_integrity([tables])
    assert held == [2, 2, 2, 2, 2] and len(tables[0].held) == len(tables[1].blocks) == 10
    numbers = tables_of([tables], 2)
    assert numbers[1, 0, :8].tolist() == [tables[1].blocks[8]] * 8, "what is gone is read from its own blocks"
    cache.release(tables)
    assert [pool.free for pool in cache.pools] == [10, 5]


def test_all_kinds_or_none() -> None:
    """Where one kind lacks blocks nothing is taken from the others."""
    cache = Cache([Kind(8), Kind(4, 8)], 4)
    first, _ = entered(cache, 8)
    second, _ = entered(cache, 8)
    assert cache.enter([], 4, 8, False) is None and [pool.free for pool in cache.pools] == [4, 0]
    assert cache.provide(first, 8, 9) is None and len(first[0].blocks) == 2
    assert cache.reserve(first, 7, 8, 3) == 0, "a draft needs a place in every kind"
    cache.release(second)
    assert cache.provide(first, 8, 9) == [] and [len(table.blocks) for table in first] == [3, 3]
    assert cache.usage == 0.75, "of the pool that is fullest"


def test_forks_copy_in_every_kind() -> None:
    cache = Cache([Kind(6), Kind(6, 5)], 4)
    parent, _ = entered(cache, 6)
    child = cache.fork(parent)
    assert cache.provide(parent, 6, 7) == [(0, child[0].blocks[1], parent[0].blocks[1]),
                                           (1, child[1].blocks[1], parent[1].blocks[1])]  # fmt: skip
    assert cache.provide(child, 6, 7) == []
    cache.check_integrity([parent, child])
    with pytest.raises(CacheCorrupt):
        cache.check_integrity([parent])


def computed(cache: Cache, length: int) -> list[Table]:
    """A sequence that was computed in chunks of 8."""
    tables, known = entered(cache, length, KEYS[: (length - 1) // 4])
    for start in range(known, length, 8):
        end = min(start + 8, length)
        assert cache.provide(tables, start, end) == []
        cache.publish(tables, KEYS, start, end)
        cache.slide(tables, end)
    return tables


def test_a_prefix_is_what_every_kind_still_has() -> None:
    cache = Cache([Kind(16), Kind(16, 6), Kind(16, 13)], 4)
    cache.release(computed(cache, 40))
    tables, known = entered(cache, 40, KEYS[:9])
    assert known == 36 and [table.gone for table in tables] == [0, 7, 6]
    assert cache.found == 36 and [len(table.held) for table in tables] == [10, 3, 4]
    cache.release(tables)
    cache.pools[1]._forget(cache.pools[1].match(KEYS[7:8])[0])
    assert cache.known(KEYS[:9]) == 7, "a token behind 8 or 9 blocks would see the one that is lost"
    cache.pools[2]._forget(cache.pools[2].match(KEYS[4:5])[0])
    assert cache.known(KEYS[:9]) == 4, "and one behind 7 blocks sees the fifth, where 13 positions are seen"
    assert cache.known(KEYS[:3]) == 3
    cache.pools[0].forget()
    assert cache.known(KEYS[:9]) == 0, "whatever the windows have"


def test_a_prefix_that_slid_away_is_found_until_its_place_is_wanted() -> None:
    """Of a window's blocks the oldest goes first; the end of a long prompt is found when its beginning is lost."""
    cache = Cache([Kind(16), Kind(5, 6)], 4)
    cache.release(computed(cache, 40))
    assert cache.known(KEYS[:2]) == 0 and cache.known(KEYS[:9]) == 9
    tables, known = entered(cache, 40, KEYS[:9])
    assert known == 36 and len(tables[1].held) == 3
    cache.check_integrity([tables])
