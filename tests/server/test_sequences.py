"""Sequences as a pure object: slots, order, idle time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.server.batcher import Entry
from ingot.server.request import SequencePlace, ServerError
from ingot.server.sequences import SequenceBatcher, SequenceRules

MS = 1_000_000


def push(batcher: SequenceBatcher, identity: int, step: str = "", now: int = 0) -> Entry:
    place = SequencePlace(identity, "s" in step, "e" in step)
    return batcher.push(1, "shape", (identity, step), now, place=place)


def run(batcher: SequenceBatcher, now: int = 0) -> list[int]:
    batch = batcher.take(now).batch
    batcher.finished(batch, now)
    return [entry.token.run.identity for entry in batch]


def test_one_request_of_each_sequence_at_a_time() -> None:
    batcher = SequenceBatcher(SequenceRules("m", slots=4, max_rows=4))
    for identity, step in ((1, "s"), (1, ""), (2, "s")):
        push(batcher, identity, step)
    batch = batcher.take(0).batch
    assert [entry.token.run.identity for entry in batch] == [1, 2]
    assert batcher.take(0).batch == ()
    batcher.finished(batch, 0)
    assert run(batcher) == [1]


def test_sequences_beyond_the_slots_wait_for_an_end() -> None:
    batcher = SequenceBatcher(SequenceRules("m", slots=1, max_rows=4))
    push(batcher, 1, "s")
    push(batcher, 2, "s")
    assert run(batcher) == [1] and run(batcher) == []
    push(batcher, 1, "e")
    assert run(batcher) == [1] and run(batcher) == [2]


def test_an_idle_sequence_loses_its_slot() -> None:
    batcher = SequenceBatcher(SequenceRules("m", slots=1, idle=MS))
    push(batcher, 1, "s")
    assert run(batcher) == [1]
    push(batcher, 2, "s", now=2 * MS)
    assert run(batcher, 2 * MS) == [2]
    with pytest.raises(ServerError, match="must specify the START flag"):
        push(batcher, 1, now=2 * MS)


def test_a_start_begins_anew_after_what_is_queued() -> None:
    batcher = SequenceBatcher(SequenceRules("m", slots=1))
    first, second, anew = push(batcher, 1, "s"), push(batcher, 1), push(batcher, 1, "s")
    assert first.token.run is second.token.run and anew.token.run is not first.token.run
    assert [run(batcher) for _ in range(3)] == [[1], [1], [1]]


def test_when_closing_nobody_waits_for_a_slot() -> None:
    batcher = SequenceBatcher(SequenceRules("m", slots=1, max_rows=4, max_delay=MS))
    push(batcher, 1, "s")
    push(batcher, 2, "s")
    batcher.closing()
    assert run(batcher) == [1, 2] and len(batcher) == 0


STEPS = st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["s", "", "", "e", "se"]), st.booleans()), max_size=40)


@settings(max_examples=200, deadline=None)
@given(STEPS, st.integers(1, 3), st.integers(1, 4))
def test_each_request_runs_once_and_in_its_sequences_order(
    steps: list[tuple[int, str, bool]], slots: int, rows: int
) -> None:
    batcher = SequenceBatcher(SequenceRules("m", slots=slots, max_rows=rows, idle=10**15))
    accepted: list[Entry] = []
    ran: list[Entry] = []
    for identity, step, work in steps:
        try:
            accepted.append(push(batcher, identity, step))
        except ServerError:
            assert "s" not in step
        if work:
            batch = batcher.take(0).batch
            assert len({id(entry.token.run) for entry in batch}) == len(batch) <= rows
            ran += batch
            batcher.finished(batch, 0)
    batcher.closing()
    while len(batcher):
        batch = batcher.take(0).batch
        assert batch
        ran += batch
        batcher.finished(batch, 0)
    assert sorted(entry.order for entry in ran) == [entry.order for entry in accepted]
    for sequence in {id(entry.token.run) for entry in ran}:
        orders = [entry.order for entry in ran if id(entry.token.run) == sequence]
        assert orders == sorted(orders)
