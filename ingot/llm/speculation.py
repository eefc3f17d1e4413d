"""Drafts: tokens that an answer will probably have, checked in one step; how many pay follows from measured times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ingot.errors import ConfigError
from ingot.llm.batch import Runner
from ingot.llm.cache import BlockPool
from ingot.llm.pace import Pace
from ingot.llm.scheduler import Share, Tokens, batch_of

_KEPT = 0.95  # of what is known about acceptance, with each later observation
_AGAIN = 64  # steps after which drafts that did not pay are tried again


class Drafter(Protocol):
    """What proposes: `propose` sets the drafts of decoding sequences, for which blocks are there."""

    def propose(self, wanted: Sequence[tuple[Tokens, int]]) -> None:
        """Set `draft` of each sequence to at most so many tokens."""
        ...

    def forget(self, sequence: Tokens) -> None:
        """The sequence has ended."""
        ...


@dataclass
class Ngrams:
    """What followed the last tokens when they came before (prompt lookup)."""

    longest: int = 4
    shortest: int = 2
    _places: dict[int, dict[tuple[int, ...], int]] = field(default_factory=dict)
    _read: dict[int, int] = field(default_factory=dict)

    def propose(self, wanted: Sequence[tuple[Tokens, int]]) -> None:
        for sequence, most in wanted:
            sequence.draft = self._continued(sequence, most)

    def _continued(self, sequence: Tokens, most: int) -> list[int]:
        tokens, places = sequence.tokens, self._index(sequence)
        for length in range(min(self.longest, len(tokens) - 1), self.shortest - 1, -1):
            place = places.get(tuple(tokens[-length:]))
            if place is not None:
                return tokens[place : place + most]
        return []

    def _index(self, sequence: Tokens) -> dict[tuple[int, ...], int]:
        """The place after each run of tokens that something follows, the last one of equal runs."""
        tokens, places = sequence.tokens, self._places.setdefault(sequence.identity, {})
        for place in range(self._read.get(sequence.identity, 1), len(tokens)):
            for length in range(self.shortest, min(self.longest, place) + 1):
                places[tuple(tokens[place - length : place])] = place
        self._read[sequence.identity] = len(tokens)
        return places

    def forget(self, sequence: Tokens) -> None:
        self._places.pop(sequence.identity, None)
        self._read.pop(sequence.identity, None)


@dataclass
class _Computed:
    """What a draft model has of a sequence: `length` tokens of it, then `draft`; the first `count` are computed, in
    `blocks`: each with how often it had been taken then, as one that came back after another had it holds nothing."""

    blocks: list[tuple[int, int]] = field(default_factory=list)
    count: int = 0
    length: int = 0
    draft: list[int] = field(default_factory=list)


@dataclass
class DraftModel:
    """A smaller model of the same vocabulary: its likeliest tokens.

    Its keys and values lie in blocks of the same numbers as those of the target's first kind, for all of its own kinds
    of layers, so that nothing is allocated twice; `pool` is the target's.
    """

    runner: Runner
    pool: BlockPool
    _known: dict[int, _Computed] = field(default_factory=dict)

    def propose(self, wanted: Sequence[tuple[Tokens, int]]) -> None:
        for sequence, _ in wanted:
            sequence.draft = []
        late = [pair for pair in wanted if pair[1] > 0]
        for sequence, _ in late:
            self._catch_up(sequence)
        while late:
            self._step(self._shares(late))
            late = [(sequence, most) for sequence, most in late if len(sequence.draft) < most]
        for sequence, _ in wanted:
            if sequence.identity in self._known:
                self._known[sequence.identity].draft = list(sequence.draft)

    def _catch_up(self, sequence: Tokens) -> None:
        """Find how much of what was computed still holds: drafts were wrong, blocks were given back."""
        known, size = self._known.setdefault(sequence.identity, _Computed()), self.runner.block_size
        right = _common(known.draft, sequence.tokens[known.length :])
        blocks = [(block, self.pool.taken[block]) for block in sequence.tables[0].blocks]
        same = _common(known.blocks, blocks)
        known.count = min(known.count, known.length + right, same * size, len(sequence.tokens) - 1)
        known.blocks, known.length = blocks, len(sequence.tokens)

    def _shares(self, late: Sequence[tuple[Tokens, int]]) -> list[Share]:
        shares, room = list[Share](), self.runner.token_budget
        for sequence, _ in late[: self.runner.sequence_budget]:
            start = self._known[sequence.identity].count
            missing = len(sequence.tokens) + len(sequence.draft) - start
            count = min(missing, room)
            if count < 1:
                break
            drafts = min(max(start + count - len(sequence.tokens), 0), count)
            shares.append(Share(sequence, start, count, int(count == missing), drafts, count == missing))
            room -= count
        return shares

    def _step(self, shares: Sequence[Share]) -> None:
        batch, row = batch_of(shares, self.runner.block_size, 1), 0
        chosen = self.runner.begin(batch, "chosen").result()["chosen"]
        for share in shares:
            self._known[share.sequence.identity].count += share.count
            if share.draws:
                share.sequence.draft.append(max(int(chosen[row]), 0))
                row += 1

    def forget(self, sequence: Tokens) -> None:
        self._known.pop(sequence.identity, None)


def drafter_of(drafts: int, draft: Runner | None, runner: Runner, longest: int, pool: BlockPool) -> Drafter | None:
    """What proposes drafts, if there are to be any. ConfigError for a draft model that does not know the same tokens,
    cannot follow texts of `longest` of them, or has fewer blocks than the pool."""
    if draft is None:
        return Ngrams() if drafts else None
    if draft.vocabulary != runner.vocabulary:
        raise ConfigError(f"the draft engine has {draft.vocabulary} tokens, the model {runner.vocabulary}: a draft "
                          "model must be of the same vocabulary; take another one, or none")  # fmt: skip
    if draft.context < longest or draft.block_size != runner.block_size:
        raise ConfigError(f"the draft engine's context is {draft.context} tokens, the model's {longest}: build the "
                          f"draft model with --context {longest} or more")  # fmt: skip
    least = min(kind.blocks for kind in draft.kinds)
    if drafts and least < pool.blocks:
        raise ConfigError(f"the draft model has {least} blocks where the model has {pool.blocks}, and needs as many "
                          "for all of its layers: open it with as many `blocks`, and `alike`")  # fmt: skip
    return DraftModel(draft, pool) if drafts else None


def _common(one: Sequence[object], other: Sequence[object]) -> int:
    """The length of what both begin with."""
    places = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in places if a != b), min(len(one), len(other)))


@dataclass
class Gain:
    """How many drafts a sequence pay off, from the steps' measured times and the share of drafts that were right."""

    most: int
    proposing: Pace = field(default_factory=Pace)
    _proposed: float = 1.0
    _accepted: float = 0.6
    _unpaid: int = 0

    @property
    def acceptance(self) -> float:
        """The chance that a draft is right if those before it are."""
        return min(self._accepted / self._proposed, 0.99)

    def observe(self, proposed: int, accepted: int) -> None:
        """Of so many drafts of a sequence the first `accepted` were right; those after a wrong one tell nothing."""
        tried = min(accepted + 1, proposed)
        self._proposed = self._proposed * _KEPT + tried
        self._accepted = self._accepted * _KEPT + accepted

    def length(self, sequences: int, pace: Pace) -> int:
        """Drafts for each of so many answers that give the most tokens a second; 0 if none does."""
        best = max(range(self.most + 1), key=lambda count: self._rate(count, sequences, pace))
        self._unpaid = 0 if best else self._unpaid + 1
        if self._unpaid >= _AGAIN:
            self._unpaid = 0
            return 1
        return best

    def _rate(self, drafts: int, sequences: int, pace: Pace) -> float:
        """Tokens a second, up to a factor; without measurements as if steps cost the same whatever they hold."""
        right = self.acceptance
        tokens = float(np.sum(right ** np.arange(drafts + 1)))
        seconds = pace.seconds(sequences * (1 + drafts)) or 1.0
        return tokens / (seconds + ((self.proposing.seconds(sequences * drafts) or 0.0) if drafts else 0.0))
