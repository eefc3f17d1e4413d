"""The batcher as a pure object: Triton's rules by example, and what must hold for any arrivals by hypothesis."""

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.server.batcher import Batcher, Entry, QueuePolicy, Rules
from ingot.server.request import Code, ServerError

MS = 1_000_000


def rows(batch: tuple[Entry, ...]) -> list[int]:
    return [entry.rows for entry in batch]


def tokens(batch: tuple[Entry, ...]) -> list[object]:
    return [entry.token for entry in batch]


def filled(rules: Rules, *sizes: int, now: int = 0) -> Batcher:
    batcher = Batcher(rules)
    for number, size in enumerate(sizes):
        batcher.push(size, "shape", number, now)
    return batcher


def test_everything_that_fits_runs_together() -> None:
    batcher = filled(Rules(max_rows=8), 3, 4, 2)
    assert rows(batcher.take(0).batch) == [3, 4]
    assert rows(batcher.take(0).batch) == [2]
    assert batcher.take(0).batch == ()


def test_the_largest_preferred_size_is_taken() -> None:
    assert rows(filled(Rules(max_rows=8, preferred=(2, 4)), 1, 1, 1, 1, 1).take(0).batch) == [1, 1, 1, 1]


def test_without_a_preferred_size_the_largest_possible() -> None:
    assert rows(filled(Rules(max_rows=8, preferred=(4,)), 1, 1, 1).take(0).batch) == [1, 1, 1]


def test_it_waits_only_where_a_delay_is_configured() -> None:
    batcher = filled(Rules(max_rows=8, preferred=(4,), max_delay=5 * MS), 1, 1)
    waiting = batcher.take(MS)
    assert waiting.batch == () and waiting.wake == 5 * MS
    assert rows(batcher.take(5 * MS).batch) == [1, 1]


def test_a_preferred_size_ends_the_wait() -> None:
    assert rows(filled(Rules(max_rows=8, preferred=(2,), max_delay=5 * MS), 1, 1).take(MS).batch) == [1, 1]


def test_a_new_shape_ends_a_batch_in_triton_mode() -> None:
    batcher = Batcher(Rules(max_rows=8, max_delay=5 * MS))
    for number, shape in enumerate("aab"):
        batcher.push(1, shape, number, 0)
    assert tokens(batcher.take(0).batch) == [0, 1]


def test_a_queue_of_exactly_n() -> None:
    batcher = Batcher(Rules(max_rows=1, policy=QueuePolicy(max_size=10)))
    for number in range(10):
        batcher.push(1, "s", number, 0)
    with pytest.raises(ServerError, match=r"^Exceeds maximum queue size$") as caught:
        batcher.push(1, "s", 10, 0)
    assert caught.value.code is Code.UNAVAILABLE and caught.value.reason == "REJECTED"
    batcher.take(0)
    batcher.push(1, "s", 11, 0)


def test_priorities() -> None:
    batcher = Batcher(Rules(max_rows=1, levels=3, default_level=2))
    for token, level in (("default", 0), ("low", 3), ("high", 1), ("beyond", 9)):
        batcher.push(1, "s", token, 0, level=level)
    assert [tokens(batcher.take(0).batch) for _ in range(4)] == [["high"], ["default"], ["low"], ["beyond"]]


@pytest.mark.parametrize("allowed", [True, False])
def test_a_clients_timeout_counts_where_it_is_allowed(allowed: bool) -> None:
    batcher = Batcher(Rules(max_rows=1, policy=QueuePolicy(allow_override=allowed)))
    batcher.push(1, "s", 0, 0, timeout_us=1000)
    taken = batcher.take(2 * MS)
    assert len(taken.rejected) == allowed and len(taken.batch) == (not allowed)


def test_delay_sets_a_late_request_back() -> None:
    batcher = Batcher(Rules(max_rows=1, policy=QueuePolicy("DELAY", default_timeout=MS)))
    batcher.push(1, "s", "late", 0)
    batcher.push(1, "s", "fresh", 2 * MS)
    assert tokens(batcher.take(2 * MS + 1).batch) == ["fresh"]
    assert tokens(batcher.take(2 * MS + 1).batch) == ["late"]


def test_a_cancelled_request_frees_its_place() -> None:
    batcher = Batcher(Rules(max_rows=1, policy=QueuePolicy(max_size=1)))
    entry = batcher.push(1, "s", 0, 0)
    assert batcher.cancel(entry) and not batcher.cancel(entry)
    batcher.push(1, "s", 1, 0)
    assert tokens(batcher.take(0).batch) == [1]


@dataclass(frozen=True)
class Straight:
    """A model that takes `base` and `row` for each row; measured at every size, or at none above `known`."""

    base: int = 2 * MS
    row: int = MS
    known: int = 1000

    def __call__(self, shape: Hashable, size: int) -> int:
        return self.base + size * self.row

    def bound(self, shape: Hashable, size: int) -> int:
        return self(shape, size)

    def warm(self, shape: Hashable, size: int) -> bool:
        return size <= self.known


linear = Straight()


DEADLINES = Rules(max_rows=16, policy=QueuePolicy(allow_override=True), slack=0)


def test_the_batch_still_meets_its_first_deadline() -> None:
    batcher = Batcher(DEADLINES, linear)
    for number in range(8):
        batcher.push(1, "s", number, 0, timeout_us=6000)
    assert len(batcher.take(0).batch) == 4  # 2 + 4 ms


def test_what_cannot_make_it_is_refused_before_it_runs() -> None:
    batcher = Batcher(DEADLINES, linear)
    batcher.push(1, "s", "late", 0, timeout_us=2500)
    batcher.push(1, "s", "fine", 0, timeout_us=9000)
    taken = batcher.take(0)
    assert tokens(taken.rejected) == ["late"] and tokens(taken.batch) == ["fine"]


def test_a_head_that_would_make_the_batch_small_is_passed_over() -> None:
    batcher = Batcher(DEADLINES, linear)
    batcher.push(1, "s", "tight", 0, timeout_us=3000)
    for number in range(12):
        batcher.push(1, "s", number, 0, timeout_us=20_000)
    assert tokens(batcher.take(0).batch) == list(range(12))


@pytest.mark.parametrize(
    ("latency", "expected"),
    [
        (Straight(), [12, 1]),  # batching pays: the largest size among the steps
        (Straight(base=0), [1, 1]),  # it does not: one at a time
        (Straight(base=0, known=1), [12, 1]),  # nobody knows yet: try
    ],
)
def test_batches_are_as_large_as_pays(latency: Straight, expected: list[int]) -> None:
    batcher = Batcher(Rules(max_rows=16), latency)
    for number in range(13):
        batcher.push(1, "s", number, 0)
    assert [len(batcher.take(0).batch) for _ in range(2)] == expected


def test_shapes_are_gathered_across_the_queue() -> None:
    batcher = Batcher(DEADLINES, linear)
    for number, shape in enumerate("abab"):
        batcher.push(1, shape, number, 0)
    assert tokens(batcher.take(0).batch) == [0, 2]


def test_without_a_deadline_nobody_starves() -> None:
    batcher = Batcher(Rules(max_rows=1, policy=QueuePolicy(allow_override=True)), linear)
    batcher.push(1, "s", "patient", 0)
    batcher.push(1, "s", "urgent", 2000 * MS, timeout_us=50_000)
    assert tokens(batcher.take(2000 * MS).batch) == ["patient"]


ARRIVALS = st.lists(
    st.tuples(st.integers(1, 6), st.sampled_from("ab"), st.integers(0, 3), st.sampled_from([0, 0, 3000, 8000])),
    max_size=30,
)
ANY_RULES = st.builds(
    Rules,
    max_rows=st.integers(4, 8),
    preferred=st.sampled_from([(), (4,), (2, 6)]),
    max_delay=st.sampled_from([0, MS]),
    levels=st.sampled_from([0, 2]),
    policy=st.builds(
        QueuePolicy, st.sampled_from(["REJECT", "DELAY"]), st.sampled_from([0, 5 * MS]), st.booleans(), st.just(0)
    ),
)


@settings(max_examples=200, deadline=None)
@given(ANY_RULES, ARRIVALS, st.booleans())
def test_every_request_leaves_exactly_once(
    rules: Rules, arrivals: list[tuple[int, str, int, int]], aware: bool
) -> None:
    batcher, left, now = Batcher(rules, linear if aware else None), [], 0
    pushed = []
    for size, shape, level, timeout in arrivals:
        now += MS // 3
        if size <= rules.max_rows:
            pushed.append(batcher.push(size, shape, None, now, level, timeout))
        if level == 0:
            left += check(batcher, rules, now)
    while len(batcher):
        now += MS
        left += check(batcher, rules, now)
    assert sorted(entry.order for entry in left) == [entry.order for entry in pushed]


def check(batcher: Batcher, rules: Rules, now: int) -> list[Entry]:
    taken = batcher.take(now)
    assert sum(rows(taken.batch)) <= rules.max_rows
    assert len({entry.shape for entry in taken.batch}) <= 1
    assert taken.batch or taken.wake is None or taken.wake > now
    return [*taken.batch, *taken.rejected]


def test_a_batch_lingers_for_those_who_were_in_the_last_one() -> None:
    batcher = Batcher(Rules(max_rows=16, linger=0.05), Straight(base=4 * MS, row=2 * MS))
    for number in range(8):
        batcher.push(1, "s", number, 0)
    assert len(batcher.take(0).batch) == 8
    batcher.push(1, "s", "first back", 20 * MS)
    waiting = batcher.take(20 * MS)
    assert not waiting.batch and waiting.wake == 21 * MS  # 5 % of 4 + 8 x 2 ms
    for number in range(7):
        batcher.push(1, "s", number, 20 * MS + number)
    assert len(batcher.take(20 * MS + 7).batch) == 8  # all are back
    batcher.push(1, "s", "alone", 50 * MS)
    assert batcher.take(50 * MS).wake == 51 * MS
    assert len(batcher.take(51 * MS).batch) == 1
    batcher.push(1, "s", "alone again", 60 * MS)
    assert len(batcher.take(60 * MS).batch) == 1  # nobody was with it the last time


def test_who_may_wait_for_company() -> None:
    batcher = Batcher(Rules(max_rows=16, linger=0.05, policy=QueuePolicy(allow_override=True)), linear)
    assert batcher.patient and not Batcher(Rules(max_rows=16), linear).patient
    urgent = batcher.push(1, "s", 0, 0, timeout_us=10_000)
    assert not batcher.patient
    batcher.cancel(urgent)
    assert batcher.patient
    batcher.closing()
    assert not batcher.patient


def test_a_size_that_did_not_pay_is_tried_again_ever_more_rarely() -> None:
    batcher, sizes = Batcher(Rules(max_rows=4), Straight(base=0)), []
    for number in range(2000):
        for _ in range(2):
            batcher.push(1, "s", number, 0)
        while len(batcher):
            sizes.append(len(batcher.take(0).batch))
    tried = [number for number, size in enumerate(sizes) if size == 2]
    gaps = [after - before for before, after in pairwise(tried)]
    assert set(sizes) == {1, 2} and 5 <= len(tried) <= 8
    assert all(after > 1.5 * before for before, after in pairwise(gaps))
