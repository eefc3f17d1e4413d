"""Ranks of a group: sums and parts of all, whatever their size; who ends or lags behind is named."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.errors import GraphError
from ingot.ir.ops import infer, meaning
from ingot.ir.ops_table import TensorType
from ingot.runtime import group as groups
from ingot.runtime.group import GroupLost, SharedGroup, member, shared_groups

Array = np.ndarray[Any, Any]


def together(ranks: int, work: Callable[[SharedGroup], Any], patience: float = 60.0) -> list[Any]:
    """What every rank's thread returns, or the error it raised."""

    def guarded(group: SharedGroup) -> Any:
        try:
            return work(group)
        except GroupLost as error:
            return error
        finally:
            group.close()

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(guarded, shared_groups(ranks, patience)))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), min_size=1, max_size=4),
    st.sampled_from([np.float32, np.int32, np.float16, ml_dtypes.bfloat16]),
)  # fmt: skip
def test_sums_and_parts_of_all(ranks: int, shapes: list[tuple[int, int]], dtype: Any) -> None:
    random = np.random.default_rng(ranks)
    parts = [[random.uniform(-9, 9, shape).astype(dtype) for shape in shapes] for _ in range(ranks)]
    found = together(ranks, lambda g: [(g.all_reduce(x), g.all_gather(x)) for x in parts[g.rank]])
    for number in range(len(shapes)):
        whole = np.stack([mine[number] for mine in parts])
        total = whole[0].astype(np.float32)
        for one in whole[1:]:
            total = total + one.astype(np.float32)
        for rank in range(ranks):
            summed, gathered = found[rank][number]
            assert summed.dtype == gathered.dtype == whole.dtype
            assert np.array_equal(summed, total.astype(dtype))
            assert np.array_equal(gathered, whole)


def test_more_than_a_slot_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_SLOT", 64)
    parts = np.random.default_rng(0).standard_normal((3, 7, 50)).astype(np.float32)
    for summed, gathered in together(3, lambda g: (g.all_reduce(parts[g.rank]), g.all_gather(parts[g.rank]))):
        assert np.array_equal(summed, parts[0] + parts[1] + parts[2])
        assert np.array_equal(gathered, parts)


def test_what_is_told_is_heard() -> None:
    words = [b"", b"step", bytes(200_000)]
    found = together(3, lambda g: [g.hear() for _ in words] if g.rank else [g.tell(word) for word in words])
    assert found[1] == found[2] == words


def test_a_rank_that_ends_is_named_by_all() -> None:
    found = together(3, lambda g: None if g.rank == 1 else [g.all_reduce(np.ones(4)) for _ in range(2)])
    assert found[1] is None
    assert all(isinstance(found[rank], GroupLost) for rank in (0, 2))
    assert "has ended" in str(found[0])


def test_a_rank_that_does_not_answer_is_not_waited_for() -> None:
    first, second = shared_groups(2, patience=0.05)
    with pytest.raises(GroupLost, match=r"rank 1 has not answered for 0.05 s"):
        first.all_reduce(np.ones(4))
    with pytest.raises(GroupLost, match="rank 1 has not answered"):
        first.all_gather(np.ones(4))
    with pytest.raises(GroupLost, match="rank 0"):
        second.all_reduce(np.ones(4))
        second.all_reduce(np.ones(4))
    second.close()
    second.close()


def test_ranks_that_do_not_compute_the_same() -> None:
    found = together(2, lambda g: g.all_reduce(np.ones(4 + g.rank)))
    assert any("do not compute the same" in str(error) for error in found)
    assert all(isinstance(error, GroupLost) for error in found)


def test_numpy_meanings_are_the_group_s() -> None:
    def work(group: SharedGroup) -> tuple[Array, Array]:
        x = np.full((2, 3), group.rank + 1, np.float32)
        with member(group):
            return meaning("AllReduce")(x, ranks=2)[0], meaning("AllGather")(x, ranks=2)[0]

    for summed, gathered in together(2, work):
        assert (summed == 3).all()
        assert gathered.shape == infer("AllGather", [TensorType("float32", (2, 3))], {"ranks": 2})[0].shape == (2, 2, 3)
    x = np.ones(3, np.float32)
    assert np.array_equal(meaning("AllReduce")(x, ranks=1)[0], x)
    with pytest.raises(GraphError, match="a group of 2 ranks, there is none"):
        meaning("AllReduce")(x, ranks=2)
