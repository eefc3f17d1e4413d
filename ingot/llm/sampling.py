"""From logits to tokens. What a request draws depends on its own logits, its seed and the place in its answer alone:
never on what else is in the batch, on chunks or on drafts, and not on where it is drawn (ingot/ir/ops_sample.py).

Order: bias, penalties, mask and min_tokens, temperature, top_k, top_p, min_p. Log-probabilities are from before that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ingot.ir.ops_sample import DRAW, EDIT, at_places, draw_of, edits_of, sample, start_of
from ingot.llm.batch import Array, Floats, Integers
from ingot.llm.request import Sampling, TokenLogprob


@dataclass(slots=True)
class Drawing:
    """How one answer is drawn, and what it drew so far. ends: the tokens that end it, not drawn before min_tokens. row:
    its draw with the counter's start; random: whether chance decides."""

    sampling: Sampling
    seed: int
    prompt: Array
    ends: frozenset[int] = frozenset()
    drawn: Counter[int] = field(default_factory=Counter)
    count: int = 0
    row: bytes = field(init=False, repr=False)
    random: bool = field(init=False)

    def __post_init__(self) -> None:
        asked = self.sampling
        drawn = draw_of(start_of(self.seed), asked.temperature, asked.top_k, asked.top_p, asked.min_p)
        self.row, self.random = drawn.packed().tobytes(), drawn.pace > 0

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

    def edited(self, place: int) -> bool:
        """Whether logits change before the token at a place is drawn."""
        return self.penalised or bool(self.sampling.logit_bias) or place < self.sampling.min_tokens

    def edits(self, place: int) -> Integers:
        """How logits change before the token at a place is drawn, after what was drawn so far: [E, EDIT] of Sample."""
        asked, kinds = self.sampling, np.fromiter(self.drawn, np.int64, len(self.drawn))
        biased = np.fromiter(asked.logit_bias, np.int64, len(asked.logit_bias))
        seen = np.union1d(kinds, self.prompt) if asked.repetition_penalty != 1 else kinds[:0]
        ends = np.array(sorted(self.ends), np.int64)[: None if place < asked.min_tokens else 0]
        tokens = np.unique(np.concatenate([biased, kinds, seen, ends]))
        added, divided, taken = np.zeros(len(tokens)), np.ones(len(tokens)), np.zeros(len(tokens))
        added[np.searchsorted(tokens, biased)] = np.fromiter(asked.logit_bias.values(), np.float64, len(biased))
        divided[np.searchsorted(tokens, seen)] = asked.repetition_penalty
        counts = np.fromiter(self.drawn.values(), np.float64, len(kinds))
        taken[np.searchsorted(tokens, kinds)] = asked.frequency_penalty * counts + asked.presence_penalty
        taken[np.searchsorted(tokens, ends)] = np.inf
        return edits_of(tokens, added, divided, taken)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The token of a row, None where its logits are no numbers, or where nothing is allowed."""

    token: int | None
    logprob: TokenLogprob | None = None


Row = tuple[Drawing, int, Array | None]
"""How a row is drawn: the answer's drawing, the token's place in the answer, a bit mask of the allowed tokens."""


def asked_of(rows: Sequence[Row]) -> dict[str, Integers]:
    """`draws`, `edits` and `masks` of the operator Sample for these rows."""
    if not rows:
        return {"draws": np.zeros((0, DRAW), np.int32), "edits": np.zeros((0, EDIT), np.int32),
                "masks": np.zeros((0, 0), np.int32)}  # fmt: skip
    draws = np.frombuffer(b"".join([drawing.row for drawing, _, _ in rows]), np.int32).reshape(-1, DRAW)
    draws = at_places(draws, np.array([place for _, place, _ in rows], np.uint64))
    changes = [
        (number, drawing.edits(place)) for number, (drawing, place, _) in enumerate(rows) if drawing.edited(place)
    ]
    end = 0
    for number, edits in changes:
        draws[number, 6:8] = end, end + len(edits)
        end += len(edits)
    masks = [(number, mask) for number, (_, _, mask) in enumerate(rows) if mask is not None]
    draws[[number for number, _ in masks], 8] = np.arange(1, len(masks) + 1)
    return {
        "draws": draws,
        "edits": np.concatenate([edits for _, edits in changes]) if changes else np.zeros((0, EDIT), np.int32),
        "masks": np.stack([mask for _, mask in masks]) if masks else np.zeros((0, 0), np.int32),
    }


def draw(logits_RV: Floats, rows: Sequence[tuple[Drawing, Array | None]]) -> list[Drawn]:
    """The next token for each row of logits; beside each row's drawing a bit mask of the allowed tokens, or None."""
    asked = asked_of([(drawing, drawing.count, mask) for drawing, mask in rows])
    found = sample(logits_RV, asked["draws"], asked["edits"], asked["masks"])
    tokens = [token if token >= 0 else None for token in found.tolist()]
    return [
        Drawn(token, _logprob(logits_RV[index], token, drawing.sampling.logprobs) if token is not None else None)
        for index, (token, (drawing, _)) in enumerate(zip(tokens, rows, strict=True))
    ]


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
