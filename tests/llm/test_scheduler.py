"""The scheduler alone, with its clock in the test's hand."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.llm.batch import Kind
from ingot.llm.pace import Pace
from ingot.llm.scheduler import Limits, Place, Scheduler, Step, Tokens, batch_of
from ingot.llm.tables import Cache
from tests.llm.fakes import FakeRunner


def scheduler(blocks: int = 16, size: int = 4, tokens: int = 16, sequences: int = 4, **limits: float) -> Scheduler:
    return Scheduler(Limits(tokens, sequences, **limits), Cache([Kind(blocks)], size))  # type: ignore[arg-type]


def prompt(identity: int, length: int, **more: object) -> Tokens:
    return Tokens(identity, [identity * 100 + place for place in range(length)], length, **more)  # type: ignore[arg-type]


def counts(step: Step) -> dict[int, int]:
    return {share.sequence.identity: share.count for share in step.shares}


def done(one: Scheduler, step: Step, now: float = 0.0) -> None:
    for share in step.shares:
        one.advance(share, [7] if share.draws else [], now)
    one.check_integrity()


def test_prompts_and_answers_share_a_step() -> None:
    one = scheduler()
    one.add(prompt(1, 5), 0.0)
    done(one, one.schedule(0.0))
    one.add(prompt(2, 30), 1.0)
    step = one.schedule(1.0)
    assert counts(step) == {1: 1, 2: 15}, "the answer goes on, the prompt takes the rest of the budget"
    assert [share.rows for share in step.shares] == [1, 0]
    done(one, step)
    assert counts(one.schedule(2.0)) == {1: 1, 2: 15}


def test_a_prefix_is_computed_once() -> None:
    one = scheduler()
    first, second = Tokens(1, list(range(9)), 9), Tokens(2, list(range(8)), 8)
    one.add(first, 0.0)
    done(one, one.schedule(0.0))
    one.add(second, 1.0)
    assert counts(one.schedule(1.0)) == {1: 1, 2: 4}, "the block with the last token is computed: its logits are wanted"
    assert second.tables[0].blocks[0] == first.tables[0].blocks[0] and second.cached == 4
    third = Tokens(3, list(range(8)), 8, salt=b"another tenant")
    one.add(third, 2.0)
    one.schedule(2.0)
    assert third.cached == 0


def test_a_fork_copies_the_block_that_it_writes() -> None:
    one = scheduler()
    parent = prompt(1, 6)
    one.add(parent, 0.0)
    done(one, one.schedule(0.0))
    child = one.fork(parent, 2, 8)
    one.check_integrity()
    step = one.schedule(1.0)
    assert len(step.copies) == 1, "one of the two copies; the other keeps the block"
    one_table, other_table = parent.tables[0].blocks, child.tables[0].blocks
    assert one_table[0] == other_table[0] and one_table[1] != other_table[1]
    one.check_integrity()


def test_the_lowest_gives_way_and_comes_back() -> None:
    one = scheduler(blocks=4)
    first, second = prompt(1, 7), prompt(2, 8)
    one.add(first, 0.0)
    one.add(second, 1.0)
    done(one, one.schedule(1.0))
    step = one.schedule(2.0)
    assert counts(step) == {1: 1} and second.place is Place.RUNNING, "it would need a third block, and keeps its two"
    done(one, step)
    assert counts(one.schedule(3.0)) == {1: 1}
    assert second.place is Place.WAITING and one.preemptions == 1 and second.tokens[-1] == 7
    one.end(first)
    step = one.schedule(4.0)
    assert counts(step) == {2: 5}, "its first block was still there"
    done(one, step)


def test_a_step_under_way_gives_blocks_back() -> None:
    """Alone in a window's pool with room for one chunk, a prompt whose step is under way waits for it: it was sent away
    for its own sake, again and again, when steps began behind one another."""
    one = Scheduler(Limits(8, 4), Cache([Kind(16), Kind(5, 6)], 4))
    one.add(prompt(1, 40), 0.0)
    computed, before = list[int](), None
    for _ in range(20):
        step = one.schedule(0.0)
        computed += [share.count for share in step.shares]
        if before is not None:
            done(one, before)
        before = step
    assert computed[:5] == [8] * 5 and set(computed[5:]) == {1} and one.preemptions == 0


def test_priority_then_arrival() -> None:
    one = scheduler(sequences=1)
    for identity, priority in ((1, 5), (2, 5), (3, 0)):
        one.add(prompt(identity, 3, priority=priority), float(identity))
    ran = []
    while not one.idle:
        step = one.schedule(9.0)
        ran.append(step.shares[0].sequence.identity)
        one.end(step.shares[0].sequence)
    assert ran == [3, 1, 2]


def test_clients_share_evenly() -> None:
    one = scheduler(sequences=1, tokens=64)
    for identity in range(8):
        one.add(prompt(identity, 10, client="greedy"), 0.0)
    for identity in (10, 11):
        one.add(prompt(identity, 10, client="modest"), 1.0)
    ran = []
    while len(ran) < 5:
        step = one.schedule(2.0)
        done(one, step)
        ran.append(step.shares[0].sequence.identity)
        one.end(step.shares[0].sequence)
    assert set(ran[:4]) == {0, 1, 10, 11}


def test_chunks_of_prompts_keep_answers_in_time() -> None:
    one = scheduler(blocks=256, tokens=1000, interval=0.05, least_chunk=8)
    for tokens in (10, 100, 500):
        one.pace.observe(tokens, 0.01 + tokens * 0.001)
    one.add(prompt(1, 4), 0.0)
    step = one.schedule(0.0)
    assert counts(step) == {1: 4}
    done(one, step, now=1.0)
    one.add(prompt(2, 900), 1.0)
    chunk = counts(one.schedule(1.0))[2]
    assert 30 <= chunk <= 40, "40 ms at a millisecond each, the answer's own token included"
    late = scheduler(blocks=256, tokens=1000, interval=0.005, least_chunk=8)
    late.pace = one.pace
    late.add(prompt(1, 4), 0.0)
    done(late, late.schedule(0.0), now=1.0)
    late.add(prompt(2, 900), 1.0)
    assert counts(late.schedule(1.0)) == {1: 1, 2: 8}, "however late, prompts end"
    alone = scheduler(blocks=256, tokens=1000, interval=0.005)
    alone.pace = one.pace
    alone.add(prompt(3, 900), 0.0)
    assert counts(alone.schedule(1.0)) == {3: 900}, "nobody waits for a next token"


def test_a_draft_takes_no_blocks_from_others() -> None:
    one = scheduler(blocks=4)
    first, second = prompt(1, 6), prompt(2, 7)
    for sequence in (first, second):
        one.add(sequence, 0.0)
    done(one, one.schedule(0.0))
    first.draft = [1, 2, 3]
    assert counts(one.schedule(1.0)) == {1: 1, 2: 1}, "the draft would need a third block"
    one.end(second)
    step = one.schedule(2.0)
    assert step.shares[0].rows == 4 and step.shares[0].drafts == 3
    one.advance(step.shares[0], [1, 9], 2.0)
    assert first.tokens[-2:] == [1, 9] and first.computed == len(first.tokens) - 1 and not first.draft


def test_batches() -> None:
    one = scheduler(tokens=7)
    one.add(prompt(1, 5), 0.0)
    one.add(prompt(2, 5), 0.0)
    step = one.schedule(0.0)
    batch = batch_of(step.shares, 4)
    assert batch.token_ids.tolist() == [100, 101, 102, 103, 104, 200, 201]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch.starts.tolist() == [0, 5, 7] and batch.lengths.tolist() == [5, 2] and batch.rows.tolist() == [4]
    assert batch.slots.tolist() == [[0, 1, 2, 3, 4, 8, 9]] and batch.tables.tolist() == [[[0, 1], [2, 3]]]
    assert {array.dtype for array in vars(batch).values()} == {np.dtype(np.int32)}


@pytest.mark.parametrize("fixed", [0.0, 0.02])
def test_the_pace_is_learned(fixed: float) -> None:
    pace = Pace()
    assert pace.tokens_within(1.0) is None and pace.seconds(5) is None
    for tokens in (1, 50, 3, 200):
        pace.observe(tokens, fixed + tokens * 0.001)
    assert pace.seconds(100) == pytest.approx(fixed + 0.1)
    assert pace.tokens_within(fixed + 0.0501) == 50
    assert pace.tokens_within(-1.0) == 0


@dataclass
class Run:
    """A drawn workload: (prompt length, answer length, forks, priority, step of arrival, step of cancellation)."""

    scheduler: Scheduler
    runner: FakeRunner
    wanted: dict[Tokens, int] = field(default_factory=dict)
    ended: Counter[int] = field(default_factory=Counter)
    identity: int = 1000

    def step(self, number: int, draft: int) -> None:
        for sequence in self.wanted:
            if draft and sequence.decoding:
                left = self.wanted[sequence] - len(sequence.tokens)
                sequence.draft = self.runner.greedy(sequence.tokens, min(draft, left - 1))[: number % 3]
                sequence.draft += [0] * (min(draft, left - 1) - len(sequence.draft))
        step = self.scheduler.schedule(float(number))
        self.runner.copy_blocks(step.copies)
        if step.shares:
            logits = self.runner.step(batch_of(step.shares, self.runner.block_size))
            self._postprocess(step, logits, float(number))
        self.scheduler.check_integrity()
        self.check_windows()

    def check_windows(self) -> None:
        """Nobody holds more of a kind than what its window, both its ends and a step's tokens touch."""
        cache = self.scheduler.cache
        for sequence in self.scheduler.running:
            for table, window in zip(sequence.tables, cache.windows, strict=True):
                reach = (window + self.scheduler.limits.tokens) // cache.size + 2
                assert not window or len(table.held) <= reach, (window, len(table.held), reach)

    def _postprocess(self, step: Step, logits: np.ndarray, now: float) -> None:
        row = 0
        for share in step.shares:
            drawn = [int(token) for token in logits[row : row + share.rows].argmax(axis=1)] if share.draws else []
            row += share.rows
            right = 0
            while right < share.drafts and drawn[right] == share.sequence.draft[right]:
                right += 1
            self.scheduler.advance(share, drawn[: right + 1], now)
            if len(share.sequence.tokens) >= self.wanted[share.sequence]:
                self.finish(share.sequence)

    def finish(self, sequence: Tokens) -> None:
        self.scheduler.end(sequence)
        self.ended[sequence.identity] += 1


requests = st.tuples(
    st.integers(1, 30), st.integers(1, 20), st.integers(0, 2), st.integers(0, 8), st.none() | st.integers(0, 30)
)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(requests, min_size=1, max_size=8), st.integers(13, 30), st.integers(1, 40), st.integers(0, 4),
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 9)), max_size=3),
)  # fmt: skip
def test_every_request_ends_with_its_own_answer(
    drawn: list[tuple[int, int, int, int, int | None]], blocks: int, budget: int, draft: int,
    windows: list[tuple[int, int]],
) -> None:  # fmt: skip
    """No block in two owners, none leaked, every request ends, and what it is told is what it would be told alone; with
    layers of several windows too, whose pools have as many blocks as one request needs, and some more or none."""
    budget = max(budget, 4)
    others = tuple(Kind(min(-(-(window + budget) // 4) + 1 + more, blocks), window) for window, more in windows)
    runner = FakeRunner(blocks=blocks, token_budget=budget, sequence_budget=4, others=others)
    run = Run(Scheduler(Limits(budget, 4), Cache(runner.kinds, 4)), runner)
    arriving = {}
    for identity, (length, answer, priority, arrival, cancelled) in enumerate(drawn):
        tokens = [(identity % 3) * 7 + place % 5 for place in range(length)]
        arriving[Tokens(identity, tokens, length, priority)] = (arrival, answer, cancelled)
    for number in range(2000):
        for sequence, (arrival, answer, cancelled) in arriving.items():
            if arrival == number:
                run.wanted[sequence] = sequence.prompt + answer
                run.scheduler.add(sequence, float(number))
            if cancelled == number and sequence in run.wanted and sequence.place is not Place.ENDED:
                run.finish(sequence)
        run.step(number, draft)
        if number > 40 and run.scheduler.idle:
            break
    assert run.ended == dict.fromkeys(range(len(drawn)), 1), "each ends once"
    run.scheduler.cache.check_integrity([])
    assert all(pool.free == kind.blocks for pool, kind in zip(run.scheduler.cache.pools, runner.kinds, strict=True))
    for sequence, length in run.wanted.items():
        answer = sequence.tokens[sequence.prompt :]
        assert answer == runner.greedy(sequence.tokens[: sequence.prompt], len(answer))
        assert len(sequence.tokens) <= length
