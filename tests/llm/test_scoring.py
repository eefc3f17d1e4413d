"""Prompts whose own log-probabilities are wanted, and nothing behind them."""

import numpy as np
import pytest

from ingot.llm.answers import Ticket
from ingot.llm.engine import Engine
from ingot.llm.request import Event, Request
from tests.llm.fakes import FakeRunner
from tests.llm.test_engine import finish, greedy, run, tokens


def test_logprobs_of_prompts() -> None:
    runner = FakeRunner(token_budget=4)
    engine = Engine(runner)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    run(engine, Request(prompt, greedy(max_tokens=1)))
    ticket = engine.submit(Request(prompt, greedy(max_tokens=1, prompt_logprobs=2)), lambda event: None)
    while engine.step():
        pass
    assert sorted(ticket.prompt_logprobs) == list(range(1, 8)), "though the prompt was in the cache"
    for place, found in ticket.prompt_logprobs.items():
        logits = runner.logits_of(prompt[:place])
        expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        assert found.token == prompt[place] and found.logprob == pytest.approx(expected[prompt[place]], abs=1e-5)


@pytest.mark.parametrize("draws", [False, True])
def test_prompts_of_which_nothing_follows(draws: bool) -> None:
    """max_tokens 0: the prompt's own log-probabilities, of one that fills the window too; beside answers, in chunks."""
    runner = FakeRunner(token_budget=16, draws=draws)
    prompts = [[place % 7 for place in range(count)] for count in (1, 5, 128)]
    asked = greedy(max_tokens=0, prompt_logprobs=1, n=2)
    engine, tickets = Engine(runner), list[Ticket]()
    told = [list[Event]() for _ in prompts]
    for prompt, events in zip(prompts, told, strict=True):
        tickets.append(engine.submit(Request(prompt, asked), events.append))
    (answer,) = run(engine, Request([1, 2, 3], greedy(max_tokens=9)))
    assert tokens(answer) == runner.greedy([1, 2, 3], 9)
    alone = Engine(FakeRunner())
    for prompt, events, ticket in zip(prompts, told, tickets, strict=True):
        assert [tokens(events, n) for n in range(2)] == [[], []]
        assert [finish(events, n) for n in range(2)] == ["length", "length"]
        assert sorted(ticket.prompt_logprobs) == list(range(1, len(prompt)))
        if len(prompt) < 128:
            other = alone.submit(Request(prompt, greedy(max_tokens=1, prompt_logprobs=1)), lambda event: None)
            while alone.step():
                pass
            assert other.prompt_logprobs == ticket.prompt_logprobs


def test_nothing_is_computed_where_nothing_is_wanted() -> None:
    runner = FakeRunner()
    (events,) = run(Engine(runner), Request([1] * 128, greedy(max_tokens=0, n=3, logprobs=1)))
    assert [finish(events, n) for n in range(3)] == ["length"] * 3 and not tokens(events) and not runner.steps
