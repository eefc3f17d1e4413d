"""From logits to tokens. What a request draws depends on its own logits, its seed and the place in its answer alone:
never on what else is in the batch, on chunks or on drafts, and not on where it is drawn (ingot/ir/ops_sample.py).

Order: bias, penalties, mask and min_tokens, temperature, top_k, top_p, min_p. Log-probabilities are from before that
(ingot/ir/ops_likely.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ingot.ir.ops_likely import likely, log_probabilities, tokens_of
from ingot.ir.ops_sample import DRAW, EDIT, at_places, draw_of, edits_of, sample, start_of
from ingot.llm.batch import Array, Floats, Integers
from ingot.llm.request import Sampling, TokenLogprob


class _Edits:
    """A request's edits of logits, which grow with its answer."""

    def __init__(self, asked: Sampling, prompt: Array) -> None:
        biased = np.fromiter(asked.logit_bias, np.int64, len(asked.logit_bias))
        tokens = np.union1d(biased, prompt) if asked.repetition_penalty != 1 else np.unique(biased)
        added = np.array([asked.logit_bias.get(token, 0.0) for token in tokens.tolist()])
        divided = np.where(np.isin(tokens, prompt), asked.repetition_penalty, 1.0)
        self._asked, self._held = asked, edits_of(tokens, added, divided, np.zeros(len(tokens)))
        self._places = {token: place for place, token in enumerate(tokens.tolist())}
        self._counts = [0] * len(tokens)

    def accept(self, token: int) -> None:
        """It was drawn."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._counts):
            self._counts.append(0)
            if place == len(self._held):
                self._held = np.concatenate([self._held, np.zeros((place + 64, EDIT), np.int32)])
        self._counts[place] += 1
        asked, numbers = self._asked, self._held[place].view(np.float32)
        self._held[place, 0] = token
        numbers[2] = asked.repetition_penalty
        numbers[3] = asked.frequency_penalty * self._counts[place] + asked.presence_penalty

    def without(self, ends: Sequence[int]) -> Integers:
        """Those of the next token, which is to be none of some."""
        kept = self._held[: len(self._counts)]
        if not ends:
            return kept
        kept = kept[~np.isin(kept[:, 0], ends)]
        nothing = np.zeros(len(ends))
        return np.concatenate([kept, edits_of(np.array(ends), nothing, nothing + 1, nothing + np.inf)])


@dataclass(slots=True)
class Drawing:
    """How one answer is drawn, and how far it is. ends: the tokens that end it, not drawn before min_tokens. row: its
    draw with the counter's start; random: whether chance decides; penalised: whether what was drawn changes what will
    be."""

    sampling: Sampling
    seed: int
    prompt: Array
    ends: frozenset[int] = frozenset()
    count: int = 0
    row: bytes = field(init=False, repr=False)
    random: bool = field(init=False)
    penalised: bool = field(init=False)
    _edits: _Edits | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        asked = self.sampling
        drawn = draw_of(start_of(self.seed), asked.temperature, asked.top_k, asked.top_p, asked.min_p)
        self.row, self.random = drawn.packed().tobytes(), drawn.pace > 0
        self.penalised = bool(asked.presence_penalty or asked.frequency_penalty or asked.repetition_penalty != 1)
        if self.penalised or asked.logit_bias or asked.min_tokens:
            self._edits = _Edits(asked, self.prompt)

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""
        self.count += 1
        if self.penalised and self._edits is not None:
            self._edits.accept(token)

    def edits(self, place: int) -> Integers | None:
        """How logits change before the token at a place is drawn, after what was drawn so far: [E, EDIT] of Sample."""
        if self._edits is None:
            return None
        return self._edits.without(sorted(self.ends) if place < self.sampling.min_tokens else ())


@dataclass(frozen=True, slots=True)
class Drawn:
    """The token of a row, None where its logits are no numbers, or where nothing is allowed."""

    token: int | None
    logprob: TokenLogprob | None = None


Row = tuple[Drawing, int, Array | None]
"""How a row is drawn: the answer's drawing, the token's place in the answer, a bit mask of the allowed tokens."""


def asked_of(rows: Sequence[Row]) -> dict[str, Integers]:
    """`draws`, `edits` and `masks` of the operator Sample for these rows, `told` of the operator Likely."""
    held = np.frombuffer(b"".join([drawing.row for drawing, _, _ in rows]), np.int32).reshape(-1, DRAW)
    draws = at_places(held, np.array([place for _, place, _ in rows], np.uint64))
    edits, masks, end = [np.zeros((0, EDIT), np.int32)], list[Array](), 0
    for number, (drawing, place, mask) in enumerate(rows):
        if (own := drawing.edits(place)) is not None:
            draws[number, 6:8] = end, end + len(own)
            edits.append(own)
            end += len(own)
        if mask is not None:
            masks.append(mask)
            draws[number, 8] = len(masks)
    told = [number for number, (drawing, _, _) in enumerate(rows) if drawing.sampling.logprobs is not None]
    return {"draws": draws, "edits": np.concatenate(edits), "told": np.array(told, np.int32),
            "masks": np.stack(masks) if masks else np.zeros((0, 0), np.int32)}  # fmt: skip


def draw(logits_RV: Floats, rows: Sequence[tuple[Drawing, Array | None]]) -> list[Drawn]:
    """The next token for each row of logits; beside each row's drawing a bit mask of the allowed tokens, or None."""
    asked = asked_of([(drawing, drawing.count, mask) for drawing, mask in rows])
    tokens = sample(logits_RV, asked["draws"], asked["edits"], asked["masks"])
    words = likely(logits_RV, tokens, asked["told"])
    tops = [rows[row][0].sampling.logprobs or 0 for row in asked["told"].tolist()]
    found = logprobs_of(words, tokens[asked["told"]].tolist(), tops)
    return drawn_of(tokens, dict(zip(asked["told"].tolist(), found, strict=True)))


def drawn_of(tokens_R: Integers, logprobs: Mapping[int, TokenLogprob]) -> list[Drawn]:
    """What was drawn, -1 where nothing was, with log-probabilities by row where they are asked for."""
    return [
        Drawn(token, logprobs.get(row)) if token >= 0 else Drawn(None) for row, token in enumerate(tokens_R.tolist())
    ]


def logprobs_of(words_LW: Integers, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    """Tokens' log-probabilities, and as many of the likeliest ones', of the operator Likely's words."""
    own, others = (each.tolist() for each in log_probabilities(words_LW))
    names = tokens_of(words_LW).tolist()
    return [
        TokenLogprob(token, value, tuple(pair for pair in zip(name[:top], more, strict=False) if pair[0] >= 0))
        for token, top, value, name, more in zip(tokens, tops, own, names, others, strict=True)
    ]


def logprobs_after(logits_RV: Floats, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """The same of tokens that follow rows of logits, which are here."""
    words = likely(logits_RV, np.array(tokens, np.int32), np.arange(len(tokens), dtype=np.int32))
    return logprobs_of(words, tokens, [top] * len(tokens))
