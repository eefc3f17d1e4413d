"""What a request asks for, and what it is told: parameters with their limits, events, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, Literal, cast

from ingot.errors import InputError

MOST_STOPS, LONGEST_STOP, MOST_LOGPROBS, MOST_ANSWERS = 64, 1024, 20, 128
Pooling = Literal["mean", "last"]
Finish = Literal["stop", "length", "cancelled", "error", "tool_calls"]


@dataclass(frozen=True)
class Guide:
    """What the answer must match: a JSON schema, any JSON, a regular expression or a Lark grammar."""

    kind: Literal["json_schema", "json_object", "regex", "grammar", "choice"]
    text: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InputError(f"the text of a guide is a string (json.dumps makes one of a schema), not {self.text!r}")


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. temperature 0 takes the likeliest token. None: no such limit. InputError for a value that
    makes no sense.

    max_tokens: None means as many as the window holds; 0 none, for `prompt_logprobs` alone. seed: None takes a fresh
    one. logprobs: that many likeliest tokens beside each one drawn; prompt_logprobs: beside each of the prompt.
    best_of: draw so many, give back the `n` likeliest. stop: a single text is one stop string.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    ignore_eos: bool = False
    include_stop: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    best_of: int | None = None
    guide: Guide | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in _RANGES and not (value is None and each.default is None):
                value = _number(each.name, value)
            elif each.name in _KINDS:
                value = _KINDS[each.name](value)
            object.__setattr__(self, each.name, value)
        if self.top_p <= 0 or self.repetition_penalty <= 0:
            raise InputError("top_p and repetition_penalty must be greater than 0")
        if self.best_of is not None and self.best_of < self.n:
            raise InputError(f"best_of must be at least n ({self.n}), it is {self.best_of}")
        if len(self.stop) > MOST_STOPS:
            raise InputError(f"at most {MOST_STOPS} stop strings, there are {len(self.stop)}")
        if any(not stop or len(stop) > LONGEST_STOP for stop in self.stop):
            raise InputError(f"a stop string has 1 to {LONGEST_STOP} characters")
        if self.guide is not None and not isinstance(self.guide, Guide):
            raise InputError(f"guide must be a Guide of ingot.llm.request, as Guide('regex', '[0-9]+'): {self.guide!r}")

    @property
    def answers(self) -> int:
        """Sequences that are drawn."""
        return max(self.n, self.best_of or self.n)


_RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 100), "top_k": (1, math.inf), "top_p": (0, 1), "min_p": (0, 1),
    "repetition_penalty": (0, 100), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2),
    "seed": (-(1 << 63), (1 << 64) - 1), "max_tokens": (0, math.inf), "min_tokens": (0, math.inf),
    "logprobs": (0, MOST_LOGPROBS), "prompt_logprobs": (0, MOST_LOGPROBS), "n": (1, MOST_ANSWERS),
    "best_of": (1, MOST_ANSWERS),
}  # fmt: skip
_REAL = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def _number(name: str, value: Any) -> float:
    (low, high), kind = _RANGES[name], cast(Any, Real if name in _REAL else Integral)
    if not isinstance(value, kind):
        raise InputError(f"{name} must be a {'' if name in _REAL else 'whole '}number, it is {value!r}")
    if not low <= value <= high:  # NaN is in no range
        raise InputError(f"{name} must be {between(low, high)}, it is {value}")
    return float(value) if name in _REAL else int(value)


def _texts(stop: Any) -> tuple[str, ...]:
    """A single text is one stop string, and not its letters."""
    found = (stop,) if isinstance(stop, str) else tuple(stop or ()) if isinstance(stop, Iterable | None) else (stop,)
    if not all(isinstance(each, str) for each in found):
        raise InputError(f"stop must be a text or several, it is {stop!r}")
    return found


def _ids(tokens: Any) -> frozenset[int]:
    found = tuple(tokens or ()) if isinstance(tokens, Iterable | None) else (None,)
    if not all(isinstance(each, Integral) for each in found):
        raise InputError(f"stop_tokens must be ids of tokens, several whole numbers, it is {tokens!r}")
    return frozenset(map(int, found))


def _bias(bias: Any) -> Mapping[int, float]:
    found = {} if bias is None else bias
    if not isinstance(found, Mapping) or not all(isinstance(t, Integral) for t in found):
        raise InputError(f"logit_bias must be a mapping from ids of tokens to numbers, it is {bias!r}")
    if not all(isinstance(each, Real) and -100 <= float(each) <= 100 for each in found.values()):
        raise InputError("logit_bias must be -100 to 100")
    return {int(token): float(each) for token, each in found.items()}


_KINDS: Mapping[str, Callable[[Any], Any]] = {"stop": _texts, "stop_tokens": _ids, "logit_bias": _bias}


def between(low: float, high: float) -> str:
    """A range in words."""
    return f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"


@dataclass(frozen=True)
class Request:
    """A prompt of tokens and how it is answered. priority: lower ones first; clients of one priority share evenly.

    salt: prefixes are reused only among requests of one salt. pooling: no answer, but the mean of the hidden states, or
    that of the last token.
    """

    tokens: Sequence[int]
    sampling: Sampling = Sampling()
    priority: int = 0
    client: str = ""
    salt: bytes = b""
    pooling: Pooling | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability before any adjustment, and the likeliest tokens in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """News of one answer of a request: text that is certain now, its tokens, and at the end why it ended. vector: where
    the request has `pooling`."""

    answer: int
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    stop: str | int | None = None
    error: str = ""
    cached: int = 0
    vector: tuple[float, ...] | None = None


class Refused(InputError):
    """A request that is not taken: what is wrong with it and what would be right."""


class Overloaded(Refused):
    """A request that is not taken now: too many wait."""


def check(request: Request, vocabulary: int, longest: int) -> None:
    """Refused unless the prompt is one, leaves room for an answer, and names tokens that there are."""
    tokens, asked = request.tokens, request.sampling
    if not tokens:
        raise Refused("the prompt is empty")
    answer = request.pooling is None and asked.max_tokens != 0
    if len(tokens) + answer > longest:
        what, among = "prompt" if request.pooling is None else "text", ", one of the answer among them" * answer
        raise Refused(f"the {what} has {len(tokens)} tokens; the window holds {longest}{among}")
    named = (*tokens, *asked.logit_bias, *asked.stop_tokens)
    wrong = next((token for token in named if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise Refused(f"token {wrong} is none of this model: they are 0 to {vocabulary - 1}")
