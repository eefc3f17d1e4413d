"""Requests, parameters and options that make no sense are refused by their names."""

import re
from typing import Any

import numpy as np
import pytest

from ingot.errors import ConfigError, InputError
from ingot.llm.engine import Engine
from ingot.llm.options import EngineOptions
from ingot.llm.request import Guide, Refused, Request, Sampling
from tests.llm.fakes import FakeRunner


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "the prompt is empty"),
        (Request([1] * 128), "the prompt has 128 tokens; the window holds 128, one of the answer among them"),
        (Request([1] * 129, Sampling(max_tokens=0)), "the prompt has 129 tokens; the window holds 128$"),
        (Request([1] * 129, pooling="last"), "the text has 129 tokens; the window holds 128$"),
        (Request([1, 50]), "token 50 is none of this model: they are 0 to 49"),
        (Request([-1]), "token -1"),
        (Request([1], Sampling(logit_bias={99: 1.0})), "token 99"),
        (Request([1], Sampling(guide=Guide("json_object"))), "without a tokenizer"),
    ],
)
def test_refusals(request_: Request, message: str) -> None:
    engine = Engine(FakeRunner())
    with pytest.raises(Refused, match=message):
        engine.submit(request_, lambda event: None)
    assert engine.open == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafts": -1}, "drafts must be 0 to 64, it is -1"), ({"drafts": 100000}, "drafts must be 0 to 64"),
        ({"requests": 0}, "requests must be at least 1, it is 0"), ({"interval": 0.0}, "interval must be at least"),
        ({"patience": float("nan")}, "patience must be at least 0.001, it is nan"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineOptions(**options)


def test_a_draft_model_must_know_the_same_tokens_and_as_long_a_text() -> None:
    options = EngineOptions(drafts=2)
    with pytest.raises(ConfigError, match="the draft engine has 7 tokens, the model 50"):
        Engine(FakeRunner(), options=options, draft=FakeRunner(vocabulary=7))
    with pytest.raises(ConfigError, match="context is 64 tokens, the model's 128: build the draft model with"):
        Engine(FakeRunner(), options=options, draft=FakeRunner(context=64))
    runner, draft = FakeRunner(), FakeRunner()
    Engine(runner, options=options, draft=draft).close()
    assert runner.closed and draft.closed


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"temperature": "hot"}, "temperature must be a number, it is 'hot'"),
        ({"temperature": None}, "temperature must be a number, it is None"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number, it is 1.5"),
        ({"max_tokens": -1}, "max_tokens must be at least 0, it is -1"),
        ({"min_tokens": float("inf")}, "min_tokens must be a whole number"),
        ({"n": "2"}, "n must be a whole number"), ({"seed": 1.5}, "seed must be a whole number"),
        ({"stop": 5}, "stop must be a text or several"), ({"stop": ("a", 5)}, "stop must be a text or several"),
        ({"stop_tokens": 5}, "stop_tokens must be ids of tokens"), ({"stop_tokens": ["x"]}, "must be ids of tokens"),
        ({"logit_bias": [4]}, "logit_bias must be a mapping"), ({"logit_bias": {"4": 1}}, "ids of tokens to numbers"),
        ({"logit_bias": {4: float("nan")}}, "logit_bias must be -100 to 100"),
        ({"guide": "[0-9]"}, "guide must be a Guide of ingot.llm.request"),
    ],
)  # fmt: skip
def test_parameters_that_make_no_sense(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Sampling(**asked)


def test_parameters_as_people_write_them() -> None:
    """A single text is one stop string, not its letters; lists, null and numpy's numbers are taken."""
    stops: list[Any] = ["END", ["a", "b"]]
    assert [Sampling(stop=stop).stop for stop in stops] == [("END",), ("a", "b")]
    written: dict[str, Any] = {
        "temperature": np.float32(0.5), "seed": np.int64(3), "max_tokens": np.int32(4), "stop": None,
        "stop_tokens": [7, np.int64(8)], "logit_bias": None,
    }  # fmt: skip
    asked = Sampling(**written)
    assert (type(asked.temperature), type(asked.seed), type(asked.max_tokens)) == (float, int, int)
    assert asked.stop_tokens == {7, 8} and asked.logit_bias == {} and asked.stop == ()
    with pytest.raises(InputError, match=r"json\.dumps makes one of a schema"):
        Guide("json_schema", {"type": "object"})  # type: ignore[arg-type]
