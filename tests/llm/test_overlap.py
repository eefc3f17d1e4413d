"""While a step is computed elsewhere, clients are told of the one before."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest

from ingot.llm.batch import Batch, Floats
from ingot.llm.engine import Engine, EngineOptions
from ingot.llm.request import Event, Request
from tests.llm.fakes import FakeRunner
from tests.llm.test_engine import finish, greedy, tokens


@dataclass
class Elsewhere(FakeRunner):
    """Computes elsewhere: what its caller does meanwhile comes between."""

    meanwhile: Callable[[], None] = lambda: None

    def step(self, batch: Batch) -> Floats:
        logits = super().step(batch)
        self.meanwhile()
        return logits


@pytest.mark.parametrize("drafts", [0, 3])
def test_clients_are_told_while_the_next_step_is_computed(drafts: int) -> None:
    """In order, whoever ends, fails or is cancelled in between."""
    runner = Elsewhere(blocks=40, token_budget=24, poisoned=frozenset({49}), broken=frozenset({48}))
    engine, told = Engine(runner, None, EngineOptions(drafts=drafts)), [list[Event]() for _ in range(8)]
    tickets = [engine.submit(Request([n % 5, *range(n)], greedy(max_tokens=6 + n)), told[n].append) for n in range(8)]
    before = [0]
    said, runner.meanwhile = runner.meanwhile, lambda: (before.append(sum(map(len, told))), said())[0]
    while engine.step() or engine._posted:
        if len(tokens(told[7])) > 3:
            engine.cancel(tickets[7])
        engine.scheduler.check_integrity()
    assert any(later > earlier for earlier, later in pairwise(before))
    for number, events in enumerate(told):
        wanted = runner.greedy([number % 5, *range(number)], 6 + number)
        found = tokens(events)
        assert finish(events) in ("length", "error", "cancelled") and events[-1].finish
        assert found == wanted[: len(found)] and (len(found) == len(wanted) or finish(events) != "length")
    assert finish(told[7]) != "length" and finish(told[0]) == "length"
