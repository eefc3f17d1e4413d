"""The loop over fakes: what a request is told is what it would be told alone, and what fails, fails alone."""

import queue
import random
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ingot.errors import EngineError
from ingot.llm.batch import Batch, Floats, Kind
from ingot.llm.engine import Engine
from ingot.llm.options import EngineOptions
from ingot.llm.request import Event, Guide, Overloaded, Refused, Request, Sampling
from ingot.llm.text import Text
from tests.llm.fakes import END, VOCABULARY, FakeRunner, Writer, byte_tokenizer

TEXT = Text.from_files(byte_tokenizer(), VOCABULARY)


def greedy(**asked: Any) -> Sampling:
    return Sampling(**{"temperature": 0, **asked})


def run(engine: Engine, *requests: Request) -> list[list[Event]]:
    """The events of each request, all submitted at once."""
    told = [list[Event]() for _ in requests]
    for request, events in zip(requests, told, strict=True):
        engine.submit(request, events.append)
    while engine.step() or engine._posted:
        engine.scheduler.check_integrity()
    engine.scheduler.cache.check_integrity([])
    assert engine.open == 0
    return told


def tokens(events: Sequence[Event], answer: int = 0) -> list[int]:
    return [token for event in events if event.answer == answer for token in event.tokens]


def text(events: Sequence[Event], answer: int = 0) -> str:
    return "".join(event.text for event in events if event.answer == answer)


def finish(events: Sequence[Event], answer: int = 0) -> str | None:
    finishes = [event.finish for event in events if event.answer == answer and event.finish]
    assert len(finishes) == 1, "each answer ends once"
    return finishes[0]


# -- tokens -----------------------------------------------------------------------------------------------------------
def test_batched_is_single() -> None:
    runner = FakeRunner(blocks=24, token_budget=24)
    requests = [Request([place % 7 for place in range(3 + 5 * one)], greedy(max_tokens=9)) for one in range(6)]
    for request, events in zip(requests, run(Engine(runner), *requests), strict=True):
        assert tokens(events) == runner.greedy(request.tokens, 9) and finish(events) == "length"
    assert max(sequences for _, sequences in runner.shapes) > 2, "they shared steps"


def stumbling(seed: int) -> Callable[[], float]:
    """A clock whose steps differ a thousandfold, so that drafts are found to pay and not to pay."""
    drawn, now = random.Random(seed), [0.0]

    def clock() -> float:
        now[0] += drawn.choice([0.0001, 0.001, 0.01, 0.1])
        return now[0]

    return clock


prompts = st.tuples(st.integers(0, 2), st.integers(1, 25), st.integers(1, 15), st.integers(1, 3))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(prompts, min_size=1, max_size=6), st.integers(12, 30), st.integers(4, 40),
    st.sampled_from(["", "ngrams", "model"]), st.booleans(), st.integers(0, 999),
    st.lists(st.integers(1, 14), max_size=2),
)  # fmt: skip
@example([(1, 23, 10, 2), (0, 1, 9, 3)], 13, 9, "model", False, 5, [])  # blocks came back after another draft had them
def test_batch_chunk_prefix_preemption_and_drafts_change_nothing(
    drawn: list[tuple[int, int, int, int]], blocks: int, budget: int, drafts: str, sampled: bool, seed: int,
    windows: list[int],
) -> None:  # fmt: skip
    """What is drawn, with seeds too, is what a request alone on an endless machine draws; where some layers have a
    window too."""

    def requests() -> list[Request]:
        return [
            Request(
                [first * 5 + place % 3 for place in range(length)],
                Sampling(temperature=1.5 if sampled else 0, seed=number, max_tokens=answer, n=count, top_p=0.9),
            )
            for number, (first, length, answer, count) in enumerate(drawn)
        ]

    def runner(**more: Any) -> FakeRunner:
        return FakeRunner(vocabulary=13, memory=2 if drafts else None, **more)

    alone = [run(Engine(runner()), request)[0] for request in requests()]
    others = tuple(Kind(min(-(-(window + budget) // 4) + 2, blocks), window) for window in windows)
    small = runner(blocks=blocks, token_budget=budget, sequence_budget=4, others=others)
    alike = tuple(Kind(blocks, 3) for _ in windows[1:])  # a draft's windows are its own
    draft = runner(blocks=blocks, drafting=True, others=alike) if drafts == "model" else None
    options = EngineOptions(drafts=3 if drafts else 0)
    engine = Engine(small, options=options, draft=draft, clock=stumbling(seed))
    together = run(engine, *requests())
    for request, one, other in zip(requests(), alone, together, strict=True):
        for answer in range(request.sampling.n):
            assert tokens(one, answer) == tokens(other, answer)
            assert finish(one, answer) == finish(other, answer) == "length"


@settings(deadline=None, max_examples=40)
@given(
    st.lists(prompts, min_size=1, max_size=6), st.integers(12, 30), st.integers(4, 40), st.integers(1, 14),
    st.sampled_from(["", "ngrams", "model"]), st.integers(0, 999),
)  # fmt: skip
def test_blocks_that_left_the_window_are_given_back(
    drawn: list[tuple[int, int, int, int]], blocks: int, budget: int, window: int, drafts: str, seed: int
) -> None:
    """None leaks, none has two owners (`run` checks both), and nothing that is told changes."""

    def requests() -> list[Request]:
        return [
            Request([first * 5 + place % 3 for place in range(length)], greedy(max_tokens=answer, n=count))
            for first, length, answer, count in drawn
        ]

    def runner(**more: int) -> FakeRunner:
        return FakeRunner(vocabulary=13, window=window, **more)  # type: ignore[arg-type]

    alone = [run(Engine(runner()), request)[0] for request in requests()]
    draft = FakeRunner(vocabulary=13, blocks=blocks, drafting=True) if drafts == "model" else None
    options = EngineOptions(drafts=3 if drafts else 0)
    small = runner(blocks=blocks, token_budget=budget, sequence_budget=4)
    engine = Engine(small, options=options, draft=draft, clock=stumbling(seed))
    together = run(engine, *requests())
    for request, one, other in zip(requests(), alone, together, strict=True):
        expected = runner().greedy(request.tokens, request.sampling.max_tokens or 0)
        for answer in range(request.sampling.n):
            assert tokens(one, answer) == tokens(other, answer) == expected


def test_a_window_makes_room_for_others() -> None:
    """Ten answers of 100 tokens in a cache of 30 blocks, each of which would fill 26 of them."""
    runner = FakeRunner(blocks=30, window=4)
    engine = Engine(runner)
    requests = [Request([number, number, number], greedy(max_tokens=100)) for number in range(10)]
    for request, events in zip(requests, run(engine, *requests), strict=True):
        assert tokens(events) == runner.greedy(request.tokens, 100)
    assert not engine.scheduler.preemptions and max(sequences for _, sequences in runner.shapes) == 10


def test_drafts_save_steps() -> None:
    plain, guessing = FakeRunner(memory=1, vocabulary=6), FakeRunner(memory=1, vocabulary=6)
    request = Request([0, 1, 2, 3, 4, 5], greedy(max_tokens=80))
    one = run(Engine(plain), request)[0]
    engine = Engine(guessing, options=EngineOptions(drafts=4), clock=lambda: guessing.steps * 0.001)
    other = run(engine, request)[0]
    assert tokens(one) == tokens(other)
    assert guessing.steps < plain.steps / 2, "a cycle is guessed"
    assert engine.counters.accepted > engine.counters.proposed / 2


def test_answers_of_one_request() -> None:
    runner = FakeRunner()
    events = run(Engine(runner), Request([1, 2, 3, 4, 5], Sampling(n=4, seed=3, max_tokens=6)))[0]
    answers = [tuple(tokens(events, answer)) for answer in range(4)]
    assert len(set(answers)) == 4 and all(finish(events, answer) == "length" for answer in range(4))
    assert sum(count for count, _ in runner.shapes) == 5 + 4 * 5, "the prompt was computed once"


def test_best_of() -> None:
    everything = Request([1, 2, 3], Sampling(n=5, seed=3, max_tokens=6, logprobs=0))
    events = run(Engine(FakeRunner()), everything)[0]
    likelihood = [sum(p.logprob for e in events if e.answer == answer for p in e.logprobs) for answer in range(5)]
    best = tokens(events, int(np.argmax(likelihood)))
    found = run(Engine(FakeRunner()), Request([1, 2, 3], Sampling(best_of=5, seed=3, max_tokens=6)))[0]
    assert tokens(found) == best and {event.answer for event in found} == {0}
    assert not any(event.logprobs for event in found)


def test_prefixes_are_counted() -> None:
    engine = Engine(FakeRunner())
    prompt = list(range(20))
    events = [run(engine, Request(prompt, greedy(max_tokens=3)))[0] for _ in range(2)]
    assert tokens(events[0]) == tokens(events[1])
    assert [each[-1].cached for each in events] == [0, 16]


# -- text -------------------------------------------------------------------------------------------------------------
def sing(song: str | bytes = "la la la, and so on.", prompt: str = "Sing\n", **asked: Any) -> list[Event]:
    runner = Writer(song=song.encode() if isinstance(song, str) else song)
    return run(Engine(runner, TEXT), Request(TEXT.encode(prompt), greedy(**asked)))[0]


def test_text_ends_with_the_end_token() -> None:
    events = sing()
    assert text(events) == "la la la, and so on." and finish(events) == "stop"
    assert tokens(events)[-1] == END and events[-1].stop == END


def test_characters_of_several_bytes_come_whole() -> None:
    events = sing("naïve 🦙 – fin")
    assert text(events) == "naïve 🦙 – fin"
    assert not any("\N{REPLACEMENT CHARACTER}" in event.text for event in events)
    broken = sing(b"ab\xff\xfecd\xe2\x82")
    assert text(broken) == "ab\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}cd\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("stop", "include", "expected"),
    [
        ((", and",), False, "la la la"),
        ((", and",), True, "la la la, and"),
        (("nothing", "la,"), False, "la la "),
        (("so on.x",), False, "la la la, and so on."),
    ],
)
def test_stop_strings(stop: tuple[str, ...], include: bool, expected: str) -> None:
    events = sing(stop=stop, include_stop=include)
    assert text(events) == expected and finish(events) == "stop"
    if expected != "la la la, and so on.":
        assert events[-1].stop in stop


def test_stop_tokens_and_eos() -> None:
    events = sing(stop_tokens=frozenset({ord(",")}))
    assert text(events) == "la la la" and finish(events) == "stop" and events[-1].stop == ord(",")
    ignored = sing(song="ab", ignore_eos=True, max_tokens=6)
    assert len(tokens(ignored)) == 6 and finish(ignored) == "length"
    late = sing(song="ab", min_tokens=5)
    assert tokens(late)[2] != END and len(tokens(late)) == 6


def test_the_window_ends_an_answer() -> None:
    runner = FakeRunner(context=20)
    events = run(Engine(runner), Request([1] * 15, greedy()))[0]
    assert len(tokens(events)) == 5 and finish(events) == "length"


# -- guided -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("drafts", [0, 3])
def test_guided_answers(drafts: int) -> None:
    import json

    schema = {
        "type": "object", "properties": {"name": {"enum": ["llama", "alpaca"]}, "age": {"type": "integer"}},
        "required": ["name", "age"], "additionalProperties": False,
    }  # fmt: skip
    engine = Engine(Writer(), TEXT, EngineOptions(drafts=drafts))
    prompt = TEXT.encode("Who?\n")
    guides = [
        Guide("json_schema", json.dumps(schema)), Guide("regex", "[a-c]{3}-[0-9]{2}"), Guide("choice", '["yes", "no"]'),
        Guide("grammar", 'start: "<" /[xyz]+/ ">"'),
    ]  # fmt: skip
    requests = [Request(prompt, Sampling(seed=one, guide=guide, max_tokens=60)) for one, guide in enumerate(guides)]
    found = run(engine, *requests, Request(prompt, greedy()))
    answer = json.loads(text(found[0]))
    assert answer["name"] in ("llama", "alpaca") and isinstance(answer["age"], int)
    assert re.fullmatch("[a-c]{3}-[0-9]{2}", text(found[1])) and finish(found[1]) == "stop"
    assert text(found[2]) in ("yes", "no")
    assert re.fullmatch("<[xyz]+>?", text(found[3]))
    assert text(found[4]) == "la la la, and so on.", "the others are not guided"


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (Guide("json_schema", '{"allOf": [{"type": "string"}, {"type": "integer"}]}'), "Unsatisfiable"),
        (Guide("json_schema", "{"), "cannot be used"),
        (Guide("json_schema", '{"$ref": "#"}'), "cannot be used: nothing can match it$"),
        (Guide("choice", "[]"), "an array of texts"),
        (Guide("regex", "[a"), "invalid regex"),
        (Guide("grammar", "start: unheard"), "unheard"),
    ],
)
def test_guides_that_cannot_be_met(guide: Guide, message: str) -> None:
    engine = Engine(Writer(), TEXT)
    with pytest.raises(Refused, match=message):
        engine.submit(Request([1], Sampling(guide=guide)), lambda event: None)
    assert engine.open == 0


# -- what goes wrong --------------------------------------------------------------------------------------------------
def test_too_many_requests() -> None:
    engine = Engine(FakeRunner(), options=EngineOptions(requests=1))
    engine.submit(Request([1]), lambda event: None)
    with pytest.raises(Overloaded, match="ask again later"):
        engine.submit(Request([1]), lambda event: None)


def test_logits_that_are_no_numbers_end_their_request_alone() -> None:
    runner = FakeRunner(poisoned=frozenset({49}))
    good, bad = Request([1, 2, 3], greedy(max_tokens=5)), Request([1, 2, 49], greedy(max_tokens=5, n=3))
    told = run(Engine(runner), good, bad)
    assert tokens(told[0]) == runner.greedy([1, 2, 3], 5)
    assert [finish(told[1], answer) for answer in range(3)] == ["error"] * 3
    assert "no numbers" in told[1][-1].error


def test_a_failing_step_ends_those_at_fault() -> None:
    runner = FakeRunner(broken=frozenset({49}))
    good, bad = Request([1, 2, 3], greedy(max_tokens=5)), Request([1, 49], greedy(max_tokens=5))
    engine = Engine(runner)
    told = run(engine, good, bad)
    assert tokens(told[0]) == runner.greedy([1, 2, 3], 5)
    assert finish(told[1]) == "error" and "the device is lost" in told[1][-1].error
    assert engine.counters.faults == 1


def test_damaged_weights_end_the_engine() -> None:
    """Nothing that is computed with them is right: health says so, others are not taken."""

    class Damaged(FakeRunner):
        def step(self, batch: Batch) -> Floats:
            raise EngineError("weight chunk 3 is damaged; copy or build it again")

    engine, events = Engine(Damaged()), queue.SimpleQueue[Event]()
    engine.start()
    try:
        engine.submit(Request([1, 2], greedy(max_tokens=3)), events.put)
        assert "weight chunk 3 is damaged" in events.get(timeout=60).error
        assert "weight chunk 3 is damaged" in engine.health
        with pytest.raises(Overloaded, match="weight chunk 3 is damaged"):
            engine.submit(Request([1]), events.put)
    finally:
        engine.close()


def test_cancelled_requests_end_at_once() -> None:
    engine = Engine(FakeRunner(sequence_budget=1))
    told = [list[Event](), list[Event](), list[Event]()]
    tickets = [engine.submit(Request([1, 2, 3], greedy(max_tokens=9)), events.append) for events in told]
    engine.step()
    engine.cancel(tickets[0])
    engine.cancel(tickets[2])
    engine.cancel(tickets[2])
    while engine.step():
        pass
    assert [finish(events) for events in told] == ["cancelled", "length", "cancelled"] and engine.open == 0
    engine.scheduler.check_integrity()


def test_a_client_that_fails_is_cancelled() -> None:
    engine = Engine(FakeRunner())

    def vanish(event: Event) -> None:
        raise ConnectionError("gone")

    engine.submit(Request([1, 2, 3], greedy(max_tokens=100)), vanish)
    for _ in range(4):
        engine.step()
    assert engine.open == 0 and engine.scheduler.idle


def test_more_requests_than_blocks() -> None:
    """Out of blocks: some wait, some give way, all end as if alone."""
    runner = FakeRunner(blocks=8, context=32, sequence_budget=8)
    engine = Engine(runner)
    requests = [Request([one, 2, 3, 4, 5, 6], greedy(max_tokens=20)) for one in range(8)]
    for request, events in zip(requests, run(engine, *requests), strict=True):
        assert tokens(events) == runner.greedy(request.tokens, 20)
    assert engine.scheduler.preemptions


# -- threads ----------------------------------------------------------------------------------------------------------
def wait_for(engine: Engine, *requests: Request, start: bool = False) -> list[list[Event]]:
    told, ended = [list[Event]() for _ in requests], [threading.Event() for _ in requests]

    def sink(place: int, event: Event) -> None:
        told[place].append(event)
        if event.finish:
            ended[place].set()

    for place, request in enumerate(requests):
        engine.submit(request, lambda event, place=place: sink(place, event))  # type: ignore[misc]
    if start:
        engine.start()
    assert all(each.wait(60) for each in ended)
    return told


def test_a_running_engine() -> None:
    runner = Writer()
    engine = Engine(runner, TEXT)
    engine.start()
    told = wait_for(engine, *[Request(TEXT.encode("Sing\n"), greedy(stop=("so",))) for _ in range(5)])
    assert [text(events) for events in told] == ["la la la, and "] * 5
    engine.close(patience=10)
    assert runner.closed and engine.open == 0
    with pytest.raises(Overloaded, match="ending"):
        engine.submit(Request([1]), lambda event: None)


def test_what_was_drawn_is_told_before_the_next_step_ends() -> None:
    heard = threading.Semaphore(0)

    class Listening(FakeRunner):
        def step(self, batch: Any) -> Any:
            assert self.steps == 0 or heard.acquire(timeout=60), "nobody was told of the step before"
            return super().step(batch)

    engine, told, ended = Engine(runner := Listening()), list[Event](), threading.Event()

    def sink(event: Event) -> None:
        told.append(event)
        heard.release()
        if event.finish:
            ended.set()

    engine.start()
    engine.submit(Request([1, 2], greedy(max_tokens=5)), sink)
    assert ended.wait(60)
    engine.close()
    assert tokens(told) == runner.greedy([1, 2], 5) and finish(told) == "length"


def test_a_fault_of_ours_fails_everybody_and_says_so() -> None:
    engine = Engine(FakeRunner())
    engine.scheduler.schedule = None  # type: ignore[assignment]
    told = wait_for(engine, Request([1]), start=True)
    assert told[0][-1].finish == "error" and "the engine has failed" in engine.health
    with pytest.raises(Overloaded, match="has failed"):
        engine.submit(Request([1]), lambda event: None)
    engine.close()


def test_a_hanging_step_is_noticed() -> None:
    release = threading.Event()

    class Hanging(FakeRunner):
        def step(self, batch: Any) -> Any:
            release.wait(60)
            return super().step(batch)

    engine = Engine(Hanging(), options=EngineOptions(patience=0.2))
    engine.start()
    told = wait_for(engine, Request([1], greedy(max_tokens=2)))
    assert "hangs" in told[0][-1].error and engine.health
    release.set()
    engine.close()


def test_closing_cancels_what_runs() -> None:
    engine = Engine(FakeRunner(blocks=256, context=1000))
    told = list[Event]()
    engine.start()
    engine.submit(Request([1], greedy(max_tokens=900)), told.append)
    engine.close()
    assert finish(told) in ("cancelled", "length") and engine.open == 0
