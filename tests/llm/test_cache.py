"""Blocks: owners are counted, prefixes are found, copies of keys do not meet."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingot.llm.cache import BlockPool, CacheCorrupt, block_keys, gone_before


def test_keys_are_chained() -> None:
    keys = block_keys([1, 2, 3, 4, 5], 2)
    assert len(keys) == 2 and block_keys([1, 2, 3, 4], 2) == keys
    assert block_keys([9, 2, 3, 4], 2)[1] != keys[1], "a block's key covers what is before it"
    assert block_keys([1, 2], 2, b"salt") != keys[:1]
    assert block_keys([1, 2, 3, 4, 5, 6], 2, known=keys) == block_keys([1, 2, 3, 4, 5, 6], 2)


def test_a_released_prefix_is_found_until_its_place_is_wanted() -> None:
    pool, keys = BlockPool(3, 2), block_keys([1, 2, 3, 4], 2)
    table = [pool.allocate(), pool.allocate()]
    for block, key in zip(table, keys, strict=True):
        pool.publish(block, key)
    pool.release(table)
    assert pool.free == 3 and pool.match(keys) == table
    pool.allocate()
    pool.allocate()
    assert pool.match(keys) == table[:1], "the tail goes before the head"
    pool.allocate()
    assert pool.match(keys) == [] and pool.free == 0


@given(st.lists(st.booleans(), max_size=12), st.integers(0, 20), st.integers(1, 4))
def test_a_prefix_reaches_as_far_as_what_its_window_sees(there: list[bool], window: int, size: int) -> None:
    """By trying every length: positions that the next token sees, its own left out, lie in blocks that are there."""
    pool, keys = BlockPool(max(len(there), 1), size), [bytes([place]) for place in range(len(there))]
    for key, known in zip(keys, there, strict=True):
        if known:
            pool.publish(pool.allocate(), key)

    def enough(count: int) -> bool:
        first = max(count * size + 1 - window, 0) if window else 0
        return all(there[position // size] for position in range(first, count * size))

    assert pool.reach(keys, window) == max(count for count in range(len(keys) + 1) if enough(count))
    seen = range(40 - window + 1 if window else 0, 41)
    assert gone_before(40, window, size) == max(seen[0], 0) // size


def test_shared_blocks() -> None:
    pool = BlockPool(2, 4)
    block = pool.allocate()
    assert not pool.shared(block)
    pool.acquire([block])
    assert pool.shared(block)
    pool.check_integrity([[block], [block]])
    with pytest.raises(CacheCorrupt, match="2 owners, 1 tables"):
        pool.check_integrity([[block]])
    pool.release([block])
    pool.release([block])
    with pytest.raises(CacheCorrupt, match="given back"):
        pool.release([block])


def test_the_first_block_of_a_key_stays() -> None:
    pool = BlockPool(2, 1)
    first, second = pool.allocate(), pool.allocate()
    pool.publish(first, b"key")
    pool.publish(second, b"key")
    assert pool.match([b"key"]) == [first]
    pool.release([first, second])
    pool.check_integrity([])
    pool.forget()
    assert pool.match([b"key"]) == []
    pool.check_integrity([])


@given(st.lists(st.tuples(st.sampled_from("allocate release share publish match".split()), st.integers(0, 7))))
def test_owners_are_always_those_of_the_tables(actions: list[tuple[str, int]]) -> None:
    pool, tables = BlockPool(5, 1), list[list[int]]()
    for action, number in actions:
        if action == "allocate" and pool.free:
            tables.append([pool.allocate()])
        elif action == "release" and tables:
            pool.release(tables.pop(number % len(tables)))
        elif action == "share" and tables:
            table = tables[number % len(tables)]
            pool.acquire(table)
            tables.append(list(table))
        elif action == "publish" and tables:
            pool.publish(tables[number % len(tables)][0], bytes([number]))
        elif action == "match":
            found = pool.match([bytes([number])])
            pool.acquire(found)
            tables += [found] if found else []
        pool.check_integrity(tables)
    for table in tables:
        pool.release(table)
    pool.check_integrity([])
    assert pool.free == 5
