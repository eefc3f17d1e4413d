"""Tokens that a GPU's engine draws are those that the host draws of its logits; what a step's rows are asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ingot.errors import InputError
from ingot.ir.ops_sample import DRAW, EDIT, LANES, sample
from ingot.llm.batch import Batch, Wanted
from ingot.llm.build import build_llm
from ingot.llm.engine import Engine
from ingot.llm.request import Request, Sampling
from ingot.llm.runner import EngineRunner
from ingot.llm.sampling import Drawing, asked_of
from tests.llm import interpreted
from tests.llm.checkpoints import TOKENS, write_family
from tests.llm.test_cuda import OPTIONS
from tests.llm.test_engine import run, tokens
from tests.llm.test_families import batch_of

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0}, "nucleus": {"top_p": 0.8}, "few": {"top_k": 7, "temperature": 1.4},
    "floor": {"min_p": 0.2}, "biased": {"logit_bias": {3: 2.0, 9: -50.0}, "min_tokens": 3},
    "penalised": {"presence_penalty": 1.0, "repetition_penalty": 1.5, "top_p": 0.9},
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        interpreted.use(patch)
        yield build_llm(write_family(tmp_path_factory.mktemp("llama"), "llama"), OPTIONS)


@pytest.mark.slow
def test_the_host_draws_the_same(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities come with tokens; those of a prompt bring its logits to the host, which draws then."""
    interpreted.use(monkeypatch)
    told, likely, wants = [], [], []
    for more, here in (({}, False), ({"logprobs": 3}, False), ({"logprobs": 3}, True)):
        runner, wanted = EngineRunner(engine), list[str]()
        if here:
            monkeypatch.setattr("ingot.llm.engine.asked", lambda *_: None)
        begin = runner.begin

        def watched(batch: Batch, *what: Wanted, begin: Any = begin, wanted: list[str] = wanted) -> Any:
            wanted.extend(what)
            return begin(batch, *what)

        monkeypatch.setattr(runner, "begin", watched)
        requests = [Request([int(token) for token in TOKENS[: 2 + n]], Sampling(**kind, **more, seed=n, max_tokens=3))
                    for n, kind in enumerate(SAMPLINGS.values())]  # fmt: skip
        found = run(Engine(runner), *requests)
        told.append([tokens(events) for events in found])
        likely.append([each for events in found for event in events for each in event.logprobs])
        wants.append(set(wanted))
    assert told[0] == told[1] == told[2] and all(len(each) == 3 for each in told[0])
    assert likely[1] == likely[2] and len(likely[1]) == 3 * len(SAMPLINGS) and not likely[0]
    assert wants == [{"chosen"}, {"chosen", "likely"}, {"logits"}]


def test_a_step_that_draws_nothing_has_no_draws(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest tokens of a few rows come from a launch of their own; one row that is drawn, edited or masked is
    enough for the others'."""
    interpreted.use(monkeypatch)
    runner, given = EngineRunner(engine), list[int]()
    begin = runner.session.begin

    def watched(feeds: Any, *rest: Any) -> Any:
        given.append(len(feeds["draws"]))
        return begin(feeds, *rest)

    monkeypatch.setattr(runner.session, "begin", watched)
    batch = batch_of(runner, [(0, 0, TOKENS[:3]), (1, 0, TOKENS[3:5])])
    greedy, drawn = (asked_of([(Drawing(Sampling(temperature=heat, **more), 3, TOKENS[:1], frozenset()), 4, None)] * 5)
                     for heat, more in ((0.0, {}), (0.0, {"logit_bias": {3: 1e-9}})))  # fmt: skip
    masked = {**greedy, "draws": greedy["draws"] + np.eye(1, DRAW, 8, dtype=np.int32),
              "masks": np.full((1, -(-runner.vocabulary // 32)), -1, np.int32)}  # fmt: skip
    heated = {"draws": greedy["draws"] + np.eye(1, DRAW, 2, dtype=np.int32) * np.float32(1e9).view(np.int32)}
    told = [runner.choose(replace(batch, **asked)).tolist() for asked in ({}, greedy, drawn, masked, heated)]
    assert given == [0, 0, 5, 5, 5] and told[1:] == told[:1] * 4
    runner.choose(batch_of(runner, [(0, 0, TOKENS[:9])]))
    assert given[5:] == [12], "for many rows there are no steps of another kind"


def test_draws_that_do_not_fit_are_refused(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel would read or write outside of its memory."""
    interpreted.use(monkeypatch)
    runner = EngineRunner(engine)
    batch, edit = batch_of(runner, [(2, 0, TOKENS[:2])]), np.zeros((1, EDIT), np.int32)
    draws = np.zeros((len(batch.rows), DRAW), np.int32)

    def begun(**more: Any) -> None:
        runner.begin(Batch(**{**vars(batch), "draws": draws, **more}), "chosen")

    wrong = draws.copy()
    wrong[0, 7] = 2
    for more, message in (
        ({"draws": draws[:0].repeat(0, 0)}, ""), ({"draws": np.zeros((9, DRAW), np.int32)}, "9 draws"),
        ({"draws": wrong, "edits": edit}, "edits of draws must be within 0 and 1"),
        ({"edits": edit + runner.vocabulary}, "tokens of edits must be within"),
        ({"draws": draws + np.eye(1, DRAW, 8, dtype=np.int32)}, "masks of draws must be within 0 and 0"),
        ({"told": np.array([len(draws)], np.int32)}, "rows that are told of must be within 0"),
    ):  # fmt: skip
        if message:
            with pytest.raises(InputError, match=message):
                begun(**more)
        else:
            begun(**more)


def test_what_rows_are_asked_for() -> None:
    """Edits and masks belong to their rows; places are those that are given, ends are kept away before min_tokens."""

    def drawing(**asked: Any) -> Drawing:
        return Drawing(Sampling(temperature=0, **asked), 3, np.array([1, 4]), frozenset({6}))

    penalised = drawing(frequency_penalty=0.5, repetition_penalty=2.0, logit_bias={2: 1.0})
    for token in (5, 5, 2, *range(100, 200)):
        penalised.accept(token)
    mask = np.array([8], np.int32)
    rows = [
        (drawing(), 4, None),
        (drawing(min_tokens=2), 1, None),
        (drawing(min_tokens=2), 2, mask),
        (penalised, 103, None),
    ]
    asked = asked_of(rows)
    assert asked["draws"][:, 6:].tolist() == [[0, 0, 0], [0, 1, 0], [1, 1, 1], [1, 105, 0]]
    assert (asked["draws"][:3, :2] == asked_of([(drawing(), place, None) for place in (4, 1, 2)])["draws"][:, :2]).all()
    changed = {int(e[0]): e[1:].view(np.float32).tolist() for e in np.ascontiguousarray(asked["edits"])}
    assert changed[6] == [0, 1, np.inf] and changed[5] == [0, 2, 1.0] and changed[2] == [1, 2, 0.5]
    assert changed[1] == [0, 2, 0] and changed[150] == [0, 2, 0.5] and len(changed) == 105
    logits = np.zeros((4, LANES + 1), np.float32)
    logits[:, 6], logits[:, 3], logits[:, 7] = 3, 1, 2
    assert sample(logits, draws_RD=asked["draws"], edits=asked["edits"], masks=asked["masks"]).tolist() == [
        6, 7, 3, 6]  # fmt: skip
    assert asked_of([])["draws"].shape == (0, DRAW)
