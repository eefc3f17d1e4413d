"""While a step is computed elsewhere, the next one is begun and clients are told of the one before; what they are told
is what they would be told without."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ingot.llm.batch import Batch, Begun, Kind, Wanted
from ingot.llm.engine import Engine
from ingot.llm.options import EngineOptions
from ingot.llm.request import Event, Guide, Request, Sampling, TokenLogprob
from ingot.llm.scheduler import Limits, Place, Scheduler, Tokens, batch_of
from ingot.llm.tables import Cache
from tests.llm.fakes import END, VOCABULARY, Distant, FakeRunner, Writer
from tests.llm.test_engine import TEXT, finish, greedy, run, text, tokens


def likely(events: Sequence[Event], answer: int = 0) -> list[TokenLogprob]:
    """The answer's log-probabilities, where they are asked for."""
    return [each for event in events if event.answer == answer for each in event.logprobs]


def prompt(number: int, length: int = 3) -> list[int]:
    return [(number * 5 + place * place) % 11 for place in range(length)]


@pytest.mark.parametrize("drafts", [0, 3])
def test_clients_are_told_while_the_next_step_is_computed(drafts: int) -> None:
    """In order, whoever ends, fails or is cancelled in between."""
    runner = Distant(blocks=40, token_budget=24, poisoned=frozenset({49}), broken=frozenset({48}))
    engine, told = Engine(runner, None, EngineOptions(drafts=drafts)), [list[Event]() for _ in range(8)]
    tickets = [engine.submit(Request([n % 5, *range(n)], greedy(max_tokens=6 + n)), told[n].append) for n in range(8)]
    heard = [0]
    while engine.step() or engine._posted:
        heard.append(sum(map(len, told)))
        if len(tokens(told[7])) > 3:
            engine.cancel(tickets[7])
        engine.scheduler.check_integrity()
    assert any(later > earlier for earlier, later in pairwise(heard))
    assert runner.most == (1 if drafts else 2), "drafts are guessed from what was drawn"
    for number, events in enumerate(told):
        wanted = runner.greedy([number % 5, *range(number)], 6 + number)
        found = tokens(events)
        assert finish(events) in ("length", "error", "cancelled") and events[-1].finish
        assert found == wanted[: len(found)] and (len(found) == len(wanted) or finish(events) != "length")
    assert finish(told[7]) != "length" and finish(told[0]) == "length"


@pytest.mark.parametrize("kind", ["", "drawn", "biased", "likely"])
def test_no_step_waits_for_the_host(kind: str) -> None:
    """Answers that end by their length cost no step more, one that a token ends costs one."""
    one, other = FakeRunner(), Distant()
    requests = [Request(prompt(n), _sampling(kind, n, 9)) for n in range(4)]
    alone, ahead = run(Engine(one), *requests), run(Engine(other), *requests)
    assert [(tokens(e), likely(e)) for e in alone] == [(tokens(e), likely(e)) for e in ahead]
    assert all(len(likely(e)) == 9 * (kind == "likely") for e in ahead)
    assert other.steps == one.steps and other.most == 2
    last = one.greedy(prompt(0), 5)[-1]
    first = one.greedy(prompt(0), 5).index(last) + 1
    ending, late = FakeRunner(eos=frozenset({last})), Distant(eos=frozenset({last}))
    for runner in (ending, late):
        events = run(Engine(runner), Request(prompt(0), greedy(max_tokens=30)))[0]
        assert finish(events) == "stop" and len(tokens(events)) == first
    assert late.steps == ending.steps + 1


KINDS = ("drawn", "two", "told", "biased", "penalised", "likely", "whole")
asked = st.tuples(
    st.integers(0, 4), st.integers(1, 25), st.integers(1, 15), st.sampled_from(["", "", *KINDS]),
    st.none() | st.integers(1, 40),
)  # fmt: skip


def _sampling(kind: str, number: int, length: int) -> Sampling:
    plain = greedy(max_tokens=length, seed=number)
    return {
        "": plain, "drawn": replace(plain, temperature=1.5, top_p=0.9), "two": replace(plain, n=2, temperature=1.0),
        "told": replace(plain, min_tokens=4, presence_penalty=0.5, logprobs=1),
        "likely": replace(plain, temperature=0.9, logprobs=3), "whole": replace(plain, prompt_logprobs=0, logprobs=2),
        "biased": replace(plain, temperature=0.8, min_tokens=3, logit_bias={2: 3.0, 5: -100.0}),
        "penalised": replace(plain, temperature=1.0, top_k=9, frequency_penalty=0.7, repetition_penalty=1.3),
    }[kind]  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(
    st.lists(asked, min_size=1, max_size=7), st.integers(12, 30), st.integers(4, 40), st.sampled_from([0, 0, 5, 9]),
    st.booleans(), st.booleans(), st.lists(st.integers(1, 5), max_size=2),
)  # fmt: skip
@example(  # one of two answers is copied from, breaks and ends; its block is another's when the copy's step comes again
    [(0, 18, 9, "", None), (0, 7, 8, "", None), (3, 14, 3, "", None), (1, 6, 7, "two", None),
     *[(0, 1, 1, "", None)] * 3], 15, 40, 0, False, True, [],
)  # fmt: skip
def test_nothing_that_is_told_changes(
    drawn: Sequence[tuple[int, int, int, str, int | None]], blocks: int, budget: int, window: int, ends: bool,
    bad: bool, windows: list[int],
) -> None:  # fmt: skip
    """Ends, chunks, prefixes, blocks that run out, windows, cancellation, draws and logits of the host, tokens that
    break a step or poison logits: answers are those of a runner that is waited for, and no block is lost."""
    more: dict[str, Any] = {
        "vocabulary": 13, "window": window, "eos": frozenset({3, 7}) if ends else frozenset(),
        "broken": frozenset({12}) if bad else frozenset(), "poisoned": frozenset({11}) if bad else frozenset(),
    }  # fmt: skip
    requests = [Request(prompt(first, length), _sampling(kind, number, answer))
                for number, (first, length, answer, kind, _) in enumerate(drawn)]  # fmt: skip
    alone = [run(Engine(FakeRunner(**more)), request)[0] for request in requests]
    others = tuple(Kind(min(-(-(each + 2 * budget) // 4) + 1, blocks), each) for each in windows)
    runner = Distant(blocks=blocks, token_budget=budget, sequence_budget=4, others=others, **more)
    engine, told = Engine(runner), [list[Event]() for _ in requests]
    tickets = [engine.submit(request, events.append) for request, events in zip(requests, told, strict=True)]
    steps = 0
    while engine.step() or engine._posted:
        engine.scheduler.check_integrity()
        steps += 1
        for ticket, (*_, cancelled) in zip(tickets, drawn, strict=True):
            if cancelled == steps:
                engine.cancel(ticket)
    engine.scheduler.cache.check_integrity([])
    assert engine.open == 0 and not runner.untold and not runner.queue
    for request, expected, events in zip(requests, alone, told, strict=True):
        for answer in range(request.sampling.n):
            one, other = tokens(expected, answer), tokens(events, answer)
            ended = finish(events, answer)
            assert other == one if ended == finish(expected, answer) else ended == "cancelled"
            assert other == one[: len(other)] and likely(events, answer) == likely(expected, answer)[: len(other)]


def test_what_depends_on_the_host_waits_for_it() -> None:
    """A guided answer among plain ones: both go on, and what is guided fits."""

    @dataclass
    class Singer(Distant, Writer):
        """Writer's song, elsewhere."""

    runner = Singer(blocks=256, context=512, vocabulary=VOCABULARY, eos=frozenset({END}))
    engine = Engine(runner, TEXT)
    begin = TEXT.encode("Who?\n")
    guided = Request(begin, Sampling(seed=1, guide=Guide("regex", "[a-c]{3}-[0-9]{2}"), max_tokens=60))
    found = run(engine, Request(begin, greedy()), guided, Request(begin, greedy(stop=(" and",))))
    assert text(found[0]) == "la la la, and so on." and text(found[2]) == "la la la,"
    assert re.fullmatch("[a-c]{3}-[0-9]{2}", text(found[1])) and finish(found[1]) == "stop"
    assert runner.most == 2, "once it has ended, steps run ahead"


def test_a_step_that_cannot_be_begun_behind_another_is_begun_after_it() -> None:
    """Memory may be short for a second step at once: nobody's answer ends for that, nothing is computed twice."""

    class Short(Distant):
        def begin(self, batch: Batch, *wanted: Wanted) -> Begun:
            if self.untold:
                raise MemoryError("one step at a time")
            return super().begin(batch, *wanted)

    runner = Short()
    requests = [Request(prompt(n), greedy(max_tokens=5)) for n in range(3)]
    for request, events in zip(requests, run(engine := Engine(runner), *requests), strict=True):
        assert tokens(events) == runner.greedy(request.tokens, 5) and finish(events) == "length"
    assert not engine.counters.faults and runner.most == 1 and runner.steps == 5


def test_a_failed_step_takes_the_next_one_along() -> None:
    """What it did not draw was read by the next: both are computed again, without the request at fault."""
    runner = Distant(broken=frozenset({49}))
    told = [list[Event](), list[Event]()]
    engine = Engine(runner)
    engine.submit(Request([1, 2, 3], greedy(max_tokens=12)), told[0].append)
    engine.step()
    engine.step()
    engine.submit(Request([1, 49], greedy(max_tokens=5)), told[1].append)
    while engine.step() or engine._posted:
        engine.scheduler.check_integrity()
    assert tokens(told[0]) == runner.greedy([1, 2, 3], 12) and engine.counters.faults == 1
    assert finish(told[1]) == "error" and "the device is lost" in told[1][-1].error


def test_closing_with_a_step_under_way() -> None:
    engine, told = Engine(runner := Distant()), list[Event]()
    engine.submit(Request([1, 2], greedy(max_tokens=50)), told.append)
    for _ in range(5):
        engine.step()
    assert runner.untold == 1
    engine.close()
    assert finish(told) == "cancelled" and not runner.untold and runner.closed and engine.scheduler.idle


# -- the scheduler alone ----------------------------------------------------------------------------------------------
def test_a_step_is_made_while_the_one_before_is_under_way() -> None:
    one = Scheduler(Limits(16, 4), Cache([Kind(16)], 4))
    first, second = Tokens(1, [5, 6, 7], 3, most=5), Tokens(2, [5, 8], 2)
    one.add(first, 0.0)
    one.add(second, 0.0)
    step = one.schedule(0.0)
    following = one.schedule(0.0)
    assert [(s.start, s.count, s.row, s.carried) for s in following.shares] == [(3, 1, 0, 0), (2, 1, 1, 1)]
    batch = batch_of(following.shares, 4)
    assert batch.carried.tolist() == [[0, 0], [1, 1]] and batch.positions.tolist() == [3, 2]
    assert {array.dtype for array in vars(batch).values()} == {np.dtype(np.int32)}
    for share in step.shares:
        one.advance(share, [9], 1.0)
    last = one.schedule(1.0)
    assert [s.sequence.identity for s in last.shares] == [2], "the first one's fifth token is being drawn, its last"
    assert batch_of(following.shares, 4).carried.tolist() == [], "known by now, should it be computed again"
    assert batch_of(following.shares, 4).token_ids.tolist() == [9, 9]
    one.check_integrity()


def test_who_gives_way_under_way_keeps_what_was_drawn() -> None:
    one = Scheduler(Limits(16, 4), Cache([Kind(4)], 4))
    first, second = Tokens(1, list(range(7)), 7), Tokens(2, list(range(10, 17)), 7)
    one.add(first, 0.0)
    one.add(second, 1.0)
    shares = one.schedule(1.0).shares
    under_way = one.schedule(1.0).shares
    for share in shares:
        one.advance(share, [2], 2.0)
    step = one.schedule(2.0)
    assert second.place is Place.WAITING and step.preempted and len(step.shares) == 1
    one.advance(under_way[1], [3], 2.0)
    assert second.tokens[-2:] == [2, 3] and not second.computed and second.under_way is None
    one.check_integrity()
