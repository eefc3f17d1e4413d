"""What a request asks for, and what it is told: parameters with their limits, events, refusals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from ingot.errors import InputError

MOST_STOPS, LONGEST_STOP, MOST_LOGPROBS, MOST_ANSWERS = 64, 1024, 20, 128
Pooling = Literal["mean", "last"]
Finish = Literal["stop", "length", "cancelled", "error", "tool_calls"]


@dataclass(frozen=True)
class Guide:
    """What the answer must match: a JSON schema, any JSON, a regular expression or a Lark grammar."""

    kind: Literal["json_schema", "json_object", "regex", "grammar", "choice"]
    text: str = ""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. temperature 0 takes the likeliest token. None: no such limit.

    max_tokens: None means as many as the window holds. seed: None takes a fresh one. logprobs: that many likeliest
    tokens beside each one drawn. best_of: draw so many, give back the `n` likeliest.
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
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN is in no range
                raise InputError(f"{name} must be {_range(low, high)}, it is {value}")
        if self.top_p <= 0 or self.repetition_penalty <= 0:
            raise InputError("top_p and repetition_penalty must be greater than 0")
        if self.best_of is not None and self.best_of < self.n:
            raise InputError(f"best_of must be at least n ({self.n}), it is {self.best_of}")
        if len(self.stop) > MOST_STOPS:
            raise InputError(f"at most {MOST_STOPS} stop strings, there are {len(self.stop)}")
        if any(not stop or len(stop) > LONGEST_STOP for stop in self.stop):
            raise InputError(f"a stop string has 1 to {LONGEST_STOP} characters")
        if any(not -100 <= bias <= 100 for bias in self.logit_bias.values()):
            raise InputError("logit_bias must be -100 to 100")

    @property
    def answers(self) -> int:
        """Sequences that are drawn."""
        return max(self.n, self.best_of or self.n)


_RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 100), "top_k": (1, math.inf), "top_p": (0, 1), "min_p": (0, 1),
    "repetition_penalty": (0, 100), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2),
    "seed": (-(1 << 63), (1 << 64) - 1), "max_tokens": (1, math.inf), "min_tokens": (0, math.inf),
    "logprobs": (0, MOST_LOGPROBS), "prompt_logprobs": (0, MOST_LOGPROBS), "n": (1, MOST_ANSWERS),
    "best_of": (1, MOST_ANSWERS),
}  # fmt: skip


def _range(low: float, high: float) -> str:
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
    if request.pooling is not None and len(tokens) > longest:
        raise Refused(f"the text has {len(tokens)} tokens; the window holds {longest}")
    if request.pooling is None and len(tokens) >= longest:
        raise Refused(f"the prompt has {len(tokens)} tokens; the window holds {longest}, one of the answer among them")
    named = (*tokens, *asked.logit_bias, *asked.stop_tokens)
    wrong = next((token for token in named if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise Refused(f"token {wrong} is none of this model: they are 0 to {vocabulary - 1}")
