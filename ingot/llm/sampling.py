"""From logits to tokens. What a request draws depends on its own logits, its seed and the place in its answer alone:
never on what else is in the batch, on chunks or on drafts, and not on where it is drawn (ingot/ir/ops_sample.py).

Order: bias, penalties, mask and min_tokens, temperature, top_k, top_p, min_p. Log-probabilities are from before that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ingot.ir.ops_sample import DRAW, EDIT, Draw, adjusted, at_places, draw_of, edits_of, sampled, start_of
from ingot.llm.batch import Array, Floats, Integers
from ingot.llm.request import Sampling, TokenLogprob


@dataclass(slots=True)
class Drawing:
    """How one answer is drawn, and what it drew so far. ends: the tokens that end it, not drawn before min_tokens."""

    sampling: Sampling
    seed: int
    prompt: Array
    ends: frozenset[int] = frozenset()
    drawn: Counter[int] = field(default_factory=Counter)
    count: int = 0
    _row: Integers = field(init=False, repr=False)

    def __post_init__(self) -> None:
        asked = self.sampling
        self._row = draw_of(start_of(self.seed), asked.temperature, asked.top_k, asked.top_p, asked.min_p).packed()

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

    def edits(self) -> Integers:
        """How logits change before the next token is drawn, [E, EDIT] of the operator Sample."""
        if not self.adjusted:
            return np.zeros((0, EDIT), np.int32)
        asked, kinds = self.sampling, np.fromiter(self.drawn, np.int64, len(self.drawn))
        biased = np.fromiter(asked.logit_bias, np.int64, len(asked.logit_bias))
        seen = np.union1d(kinds, self.prompt) if asked.repetition_penalty != 1 else kinds[:0]
        ends = np.array(sorted(self.ends), np.int64)[: None if self.count < asked.min_tokens else 0]
        tokens = np.unique(np.concatenate([biased, kinds, seen, ends]))
        added, divided, taken = np.zeros(len(tokens)), np.ones(len(tokens)), np.zeros(len(tokens))
        added[np.searchsorted(tokens, biased)] = np.fromiter(asked.logit_bias.values(), np.float64, len(biased))
        divided[np.searchsorted(tokens, seen)] = asked.repetition_penalty
        counts = np.fromiter(self.drawn.values(), np.float64, len(kinds))
        taken[np.searchsorted(tokens, kinds)] = asked.frequency_penalty * counts + asked.presence_penalty
        taken[np.searchsorted(tokens, ends)] = np.inf
        return edits_of(tokens, added, divided, taken)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is all that is wanted."""
        return self.sampling.temperature == 0 and self.sampling.logprobs is None and not self.adjusted


@dataclass(frozen=True, slots=True)
class Drawn:
    """The token of a row, None where its logits are no numbers, or where nothing is allowed."""

    token: int | None
    logprob: TokenLogprob | None = None


def draws_of(drawings: Sequence[Drawing], places: Sequence[int] | None = None) -> Integers:
    """How rows are drawn, [R, DRAW] of the operator Sample: at some places of their answers, or the next ones."""
    if not drawings:
        return np.zeros((0, DRAW), np.int32)
    rows = np.stack([drawing._row for drawing in drawings])
    counts = np.array([drawing.count for drawing in drawings] if places is None else places, np.uint64)
    return at_places(rows, counts)


def draw(logits_RV: Floats, rows: Sequence[tuple[Drawing, Array | None]]) -> list[Drawn]:
    """One token for each row of logits; beside each row's drawing a bit mask of the allowed tokens, or None."""
    draws_RD = draws_of([drawing for drawing, _ in rows])
    tokens = [_token(*row) for row in zip(logits_RV, draws_RD, rows, strict=True)]
    return [
        Drawn(token, _logprob(logits_RV[index], token, drawing.sampling.logprobs) if token is not None else None)
        for index, (token, (drawing, _)) in enumerate(zip(tokens, rows, strict=True))
    ]


def _token(logits_V: Floats, draw_D: Integers, row: tuple[Drawing, Array | None]) -> int | None:
    """Of one row; None where logits are no numbers, or nothing is allowed."""
    edits, mask = row[0].edits(), row[1]
    if mask is not None or len(edits):
        logits_V = adjusted(logits_V, edits, mask)
    token = sampled(logits_V, Draw.read(draw_D))
    return token if token >= 0 else None


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
