"""From logits to tokens. What a request draws depends on its own logits, its seed and the place in its answer alone:
never on what else is in the batch, on chunks or on drafts.

Order: bias, penalties, mask and min_tokens, temperature, top_k, top_p, min_p. Log-probabilities are from before that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ingot.llm.batch import Array, Floats
from ingot.llm.request import Sampling, TokenLogprob

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniform(seed: int, place: int) -> float:
    """A number in [0, 1) for a place of an answer: SplitMix64 (Steele, Lea, Flood 2014): any can be drawn alone."""
    with np.errstate(over="ignore"):
        mixed = _mixed(np.uint64(seed & (1 << 64) - 1)) + np.uint64(place + 1) * _GOLDEN
        return float(_mixed(mixed) >> np.uint64(11)) * 2.0**-53


def _mixed(value: np.uint64) -> np.uint64:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@dataclass(slots=True)
class Drawing:
    """How one answer is drawn, and what it drew so far. ends: the tokens that end it, not drawn before min_tokens."""

    sampling: Sampling
    seed: int
    prompt: Array
    ends: frozenset[int] = frozenset()
    drawn: Counter[int] = field(default_factory=Counter)
    count: int = 0

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""
        self.count += 1
        if self.penalised:
            self.drawn[token] += 1

    @property
    def penalised(self) -> bool:
        """Whether what was drawn changes what will be."""
        asked = self.sampling
        return bool(asked.presence_penalty or asked.frequency_penalty or asked.repetition_penalty != 1)

    @property
    def adjusted(self) -> bool:
        """Whether logits change before a token is drawn."""
        return self.penalised or bool(self.sampling.logit_bias) or self.count < self.sampling.min_tokens

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is all that is wanted."""
        return self.sampling.temperature == 0 and self.sampling.logprobs is None and not self.adjusted

    @property
    def truncated(self) -> bool:
        """Whether only some tokens may be drawn."""
        asked = self.sampling
        return asked.top_k is not None or asked.top_p < 1 or asked.min_p > 0


@dataclass(frozen=True, slots=True)
class Drawn:
    """The token of a row, None where its logits are no numbers, or where nothing is allowed."""

    token: int | None
    logprob: TokenLogprob | None = None


def draw(logits_RV: Floats, rows: Sequence[tuple[Drawing, Array | None]]) -> list[Drawn]:
    """One token for each row of logits; beside each row's drawing a bit mask of the allowed tokens, or None."""
    if not rows:
        return []
    best = logits_RV.argmax(axis=1)  # the place of a NaN, if there is one
    usable = np.isfinite(logits_RV[np.arange(len(rows)), best])
    tokens = [
        None if not fine else int(first) if _plain(*row) else _careful(logits, *row)
        for fine, first, row, logits in zip(usable, best, rows, logits_RV, strict=True)
    ]
    return [
        Drawn(token, _logprob(logits_RV[index], token, drawing.sampling.logprobs) if token is not None else None)
        for index, (token, (drawing, _)) in enumerate(zip(tokens, rows, strict=True))
    ]


def _plain(drawing: Drawing, mask: Array | None) -> bool:
    return drawing.sampling.temperature == 0 and mask is None and not drawing.adjusted


def _careful(logits_V: Floats, drawing: Drawing, mask: Array | None) -> int | None:
    """A token of one row; None if nothing is allowed."""
    if mask is not None or drawing.adjusted:
        logits_V = _adjusted(logits_V, drawing, mask)
        if logits_V.max() == -np.inf:
            return None
    asked = drawing.sampling
    if asked.temperature == 0:
        return int(logits_V.argmax())
    number = uniform(drawing.seed, drawing.count)
    if not drawing.truncated:
        return _inverse(_weights(logits_V, float(logits_V.max()), asked.temperature), number)
    candidates, weights = _candidates(logits_V, asked)
    return int(candidates[_inverse(weights, number)])


def _adjusted(logits_V: Floats, drawing: Drawing, mask: Array | None) -> Floats:
    asked, changed = drawing.sampling, logits_V.copy()
    for token, bias in asked.logit_bias.items():
        changed[token] += bias
    if drawing.penalised:
        drawn = np.fromiter(drawing.drawn, np.int64, len(drawing.drawn))
        if asked.repetition_penalty != 1:
            seen = np.union1d(drawn, drawing.prompt)
            scores = changed[seen]
            changed[seen] = np.where(scores > 0, scores / asked.repetition_penalty, scores * asked.repetition_penalty)
        counts = np.fromiter(drawing.drawn.values(), np.float32, len(drawn))
        changed[drawn] -= asked.frequency_penalty * counts + asked.presence_penalty
    if drawing.count < asked.min_tokens:
        changed[list(drawing.ends)] = -np.inf
    if mask is not None:
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(changed)]
        changed[: len(allowed)][allowed == 0] = -np.inf
        changed[len(allowed) :] = -np.inf
    return changed


def _weights(logits: Floats, best: float, temperature: float) -> Array:
    """Probabilities up to a factor; however small the temperature, the best has 1."""
    return np.exp((logits.astype(np.float64) - best) / temperature)


def _inverse(weights: Array, number: float) -> int:
    """The place where the running sum passes `number` of the whole."""
    sums = np.cumsum(weights)
    place = int(np.searchsorted(sums, number * sums[-1], side="right"))
    return place if place < len(sums) else int(np.flatnonzero(weights)[-1])


def _candidates(logits_V: Floats, asked: Sampling) -> tuple[Array, Array]:
    """The tokens that top_k, top_p and min_p leave, in their own order, and their weights."""
    best, highest = float(logits_V.max()), logits_V
    if asked.top_k is not None and asked.top_k < len(logits_V):
        highest = np.partition(logits_V, -asked.top_k)[-asked.top_k :]
    values = np.sort(highest)[::-1]  # values alone: numpy sorts them with the processor's vectors
    count = _kept(_weights(values, best, asked.temperature), asked)
    found = np.flatnonzero(logits_V >= values[count - 1])
    if len(found) > count:  # of equal ones the first
        equal = logits_V[found] == values[count - 1]
        found = np.delete(found, np.flatnonzero(equal)[count - len(found) :])
    return found, _weights(logits_V[found], best, asked.temperature)


def _kept(weights: Array, asked: Sampling) -> int:
    """How many of these, from the likeliest on, top_p and min_p leave: always one."""
    before = np.cumsum(weights) - weights
    return max(int(((before < asked.top_p * weights.sum()) & (weights >= asked.min_p)).sum()), 1)


def _best(logits_V: Floats, count: int) -> Array:
    """The highest places, highest first; of equal ones the first."""
    found = np.arange(len(logits_V)) if count == len(logits_V) else np.argpartition(logits_V, -count)[-count:]
    return found[np.lexsort((found, -logits_V[found]))]


# -- log-probabilities ------------------------------------------------------------------------------------------------
def logprob_of(logits_V: Floats, token: int, top: int) -> TokenLogprob:
    """A token's log-probability and the `top` likeliest ones'."""
    best = float(logits_V.max())
    total = best + float(np.log(np.exp(logits_V.astype(np.float64) - best).sum()))
    others = _best(logits_V, min(top, len(logits_V))) if top else ()
    return TokenLogprob(
        token, float(logits_V[token]) - total, tuple((int(each), float(logits_V[each]) - total) for each in others)
    )


def _logprob(logits_V: Floats, token: int, top: int | None) -> TokenLogprob | None:
    return None if top is None else logprob_of(logits_V, token, top)
