"""Which tokens the next step computes. No phases: what a sequence has computed chases what it knows, under one budget.

A step may be made while the one before is under way: a token that is being drawn there is known to come, and computed
next without anybody having seen it. Pure: the clock is passed in, nothing waits. Order: priority, then the client that
was served least (Sheng et al., Fairness in Serving Large Language Models, 2024), then arrival.
"""

from __future__ import annotations

import enum
import heapq
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ingot.llm.batch import Batch, Copy, Integers
from ingot.llm.cache import block_keys
from ingot.llm.pace import Pace
from ingot.llm.tables import Cache, Table, tables_of


class Place(enum.Enum):
    """Where a sequence is."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()


@dataclass(eq=False, slots=True)
class Tokens:
    """One sequence: what it knows (prompt, answer, proposed `draft`), what is computed, and the blocks that hold it.

    `whole`: the logits of its prompt are wanted too, so nothing of it is taken from the cache. `silent`: nothing is
    drawn, hidden states are wanted in the place of logits. most: tokens at which it ends, at the latest. under_way: its
    share of the last step that it is part of, while nobody has told what came of it.
    """

    identity: int
    tokens: list[int]
    prompt: int
    priority: int = 0
    client: str = ""
    salt: bytes = b""
    whole: bool = False
    silent: bool = False
    arrival: float = 0.0
    computed: int = 0
    cached: int = 0
    draft: list[int] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    place: Place = Place.WAITING
    last: float = -math.inf
    most: float = math.inf
    under_way: Share | None = None

    @property
    def rank(self) -> tuple[int, float, int]:
        """Who goes first: the smaller one."""
        return self.priority, self.arrival, self.identity

    @property
    def coming(self) -> bool:
        """Whether its next token is being drawn."""
        return self.under_way is not None and self.under_way.draws

    @property
    def known(self) -> int:
        """Its tokens, the one that is being drawn with them."""
        return len(self.tokens) + self.coming

    @property
    def decoding(self) -> bool:
        """Whether the last token alone is to be computed."""
        return self.known - self.computed == 1 and self.computed >= self.prompt


@dataclass(frozen=True, slots=True)
class Share:
    """`count` tokens of a sequence from `start` on, the last `drafts` of them proposed; logits of the last `rows`.

    draws: whether the last logits are those of a token to come, and not of a prompt's middle. row: the place of its
    first row among all of the step (of a silent one's, among its states). carried: the row of the step before by which
    its first token is drawn; None: it is known.
    """

    sequence: Tokens
    start: int
    count: int
    rows: int
    drafts: int
    draws: bool
    row: int = 0
    carried: int | None = None


@dataclass(frozen=True)
class Step:
    """What one step computes; `copies`: blocks that are copied before, because another sequence reads them too."""

    shares: tuple[Share, ...]
    copies: tuple[Copy, ...] = ()
    preempted: int = 0

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return sum(share.count for share in self.shares)


@dataclass(frozen=True)
class Limits:
    """What a step may hold. interval: seconds in which an answer that has begun should get its next token;
    least_chunk: tokens of prompts that a step takes however late it is, so that they end."""

    tokens: int
    sequences: int
    interval: float = 0.05
    least_chunk: int = 16


class Scheduler:
    """Sequences between their arrival and their end. Not thread-safe: one loop owns it."""

    def __init__(self, limits: Limits, cache: Cache) -> None:
        self.limits, self.cache, self.pace = limits, cache, Pace()
        self.running: list[Tokens] = []
        self.waiting = 0
        self.preemptions = 0
        self._queues: dict[tuple[int, str], list[tuple[tuple[int, float, int], Tokens]]] = {}
        self._served: defaultdict[str, float] = defaultdict(float)

    # -- in and out ---------------------------------------------------------------------------------------------------
    def add(self, sequence: Tokens, now: float) -> None:
        """A sequence arrives. A client that comes back does not catch up on what it did not ask for."""
        if self.idle:
            self._served.clear()
        sequence.arrival = now
        clients = {client for _, client in self._queues} | {each.client for each in self.running}
        if sequence.client not in clients:
            least = min((self._served[client] for client in clients), default=0.0)
            self._served[sequence.client] = max(self._served[sequence.client], least)
        self._enqueue(sequence)

    def fork(self, parent: Tokens, identity: int, token: int) -> Tokens:
        """Another sequence, whose last token is this one: it owns the same blocks, until one of the two writes."""
        child = Tokens(
            identity, [*parent.tokens[:-1], token], parent.prompt, parent.priority, parent.client, parent.salt,
            arrival=parent.arrival, computed=parent.computed, cached=parent.cached,
            tables=self.cache.fork(parent.tables), keys=list(parent.keys), place=Place.RUNNING, last=parent.last,
            most=parent.most,
        )  # fmt: skip
        self.running.append(child)
        return child

    def reserve(self, sequence: Tokens, drafts: int) -> int:
        """Blocks for so many drafts, as far as free ones suffice; returns how many drafts have a place."""
        return self.cache.reserve(sequence.tables, sequence.computed, len(sequence.tokens), drafts)

    def end(self, sequence: Tokens) -> None:
        """It wants no more, wherever it is; idempotent."""
        if sequence.place is Place.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence.place is Place.WAITING:
            self.waiting -= 1
        sequence.place = Place.ENDED

    def advance(self, share: Share, drawn: Sequence[int], now: float) -> None:
        """The share was computed; `drawn` are the tokens that follow it, of which all but the last were its drafts."""
        sequence, end = share.sequence, share.start + share.count
        self.lose(share)
        sequence.draft = []
        sequence.tokens += drawn
        if drawn:
            sequence.last = now
        if sequence.place is not Place.RUNNING:
            return  # it gave its blocks back, and will be computed again
        if share.drafts:
            end = sequence.computed = len(sequence.tokens) - 1 if drawn else end
        if end // self.cache.size > share.start // self.cache.size:
            self._publish(sequence, share.start, end)
        self.cache.slide(sequence.tables, end)

    def lose(self, share: Share) -> None:
        """Nothing more is to be told of the share: its step has ended."""
        if share.sequence.under_way is share:
            share.sequence.under_way = None

    def check_integrity(self) -> None:
        """CacheCorrupt unless every block is owned by exactly the sequences that name it."""
        self.cache.check_integrity([sequence.tables for sequence in self.running])

    @property
    def idle(self) -> bool:
        """Whether nobody waits or runs."""
        return not self.running and not self.waiting

    # -- one step -----------------------------------------------------------------------------------------------------
    def schedule(self, now: float) -> Step:
        """The step that begins at `now`: answers first, then prompts that have begun, then those that wait; empty if
        there is none. It counts as computed from here on; `advance` says what it drew, before the next but one."""
        making = _Making(self.limits.tokens, self.limits.sequences)
        order = sorted((each for each in self.running if each.known < each.most), key=_rank)
        answers = [sequence for sequence in order if sequence.decoding]
        for sequence in sorted(answers, key=lambda each: each.last):
            self._take(making, sequence, 1 + len(sequence.draft))
        if making.shares:
            making.tokens = min(making.tokens, self._chunk(making, now))
        for sequence in order:
            if not sequence.decoding:
                self._take(making, sequence, sequence.known - sequence.computed)
        if not making.preempted:
            self._admit(making)
        self.preemptions += making.preempted
        for share in making.shares:
            share.sequence.computed, share.sequence.under_way = share.start + share.count, share
            self._served[share.sequence.client] += share.count
        return Step(tuple(making.shares), tuple(making.copies), making.preempted)

    def _chunk(self, making: _Making, now: float) -> int:
        """Tokens of prompts beside answers: what keeps the earliest answer's next token in time."""
        told = (now if share.sequence.coming else share.sequence.last for share in making.shares)
        latest = min(told) + self.limits.interval
        within = self.pace.tokens_within(latest - now)
        if within is None:
            return making.tokens
        planned = sum(share.count for share in making.shares)
        return max(within - planned, self.limits.least_chunk)

    def _take(self, making: _Making, sequence: Tokens, wanted: int) -> bool:
        """Plan up to `wanted` tokens of a running sequence, if there is room and it has or gets the blocks."""
        count = min(wanted, making.tokens)
        if count < 1 or making.sequences < 1 or sequence.place is not Place.RUNNING:
            return False
        if sequence.draft and not self._provide(making, sequence, sequence.computed + count):
            count = 1  # nobody is sent away for the sake of a guess
        while not self._provide(making, sequence, sequence.computed + count):
            victim = max((each for each in self.running if each not in making.planned), key=_rank)
            if victim is sequence and (making.shares or len(self.running) > 1 or sequence.under_way):
                return False  # others go on, and give blocks back when they end; its own step does by windows
            self._preempt(victim)
            making.preempted += 1
            if victim is sequence:
                return False
        making.add(sequence, count)
        return True

    def _provide(self, making: _Making, sequence: Tokens, length: int) -> bool:
        """Blocks of its own for everything from what is computed to `length`; False: nothing was changed."""
        copies = self.cache.provide(sequence.tables, sequence.computed, length)
        if copies:
            making.copies += copies
        return copies is not None

    def _preempt(self, sequence: Tokens) -> None:
        """It gives its blocks back and waits; what it knows is computed again, as far as the cache has lost it."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.computed, sequence.draft = 0, []
        self._enqueue(sequence)

    def _admit(self, making: _Making) -> None:
        while making.tokens > 0 and making.sequences > 0 and len(self.running) < self.limits.sequences:
            sequence = self._first()
            if sequence is None or not self._enter(sequence, making):
                return
            heapq.heappop(self._queues[sequence.priority, sequence.client])
            self.waiting -= 1
            sequence.place = Place.RUNNING
            self.running.append(sequence)
            self._take(making, sequence, len(sequence.tokens) - sequence.computed)

    def _enter(self, sequence: Tokens, making: _Making) -> bool:
        """Give it all blocks of what it knows, its known prefix computed, if there are enough and some to spare."""
        keys, length = list[bytes](), len(sequence.tokens)
        if not sequence.whole:
            sequence.keys = block_keys(sequence.tokens, self.cache.size, sequence.salt, sequence.keys)
            keys = sequence.keys[: (length - 1) // self.cache.size]  # the last token's logits are wanted
        entered = self.cache.enter(keys, length, making.tokens, bool(making.shares or self.running))
        if entered is None:
            return False
        sequence.tables, sequence.computed = entered
        sequence.cached = max(sequence.cached, min(sequence.computed, sequence.prompt))
        return True

    # -- queues and blocks --------------------------------------------------------------------------------------------
    def _enqueue(self, sequence: Tokens) -> None:
        sequence.place = Place.WAITING
        self.waiting += 1
        heapq.heappush(self._queues.setdefault((sequence.priority, sequence.client), []), (sequence.rank, sequence))

    def _first(self) -> Tokens | None:
        """Who is to enter next."""
        best = min(self._heads(), default=None)
        return None if best is None else self._queues[best[0], best[2]][0][1]

    def _heads(self) -> Iterator[tuple[int, float, str]]:
        for (priority, client), queue in list(self._queues.items()):
            while queue and queue[0][1].place is not Place.WAITING:
                heapq.heappop(queue)
            if queue:
                yield priority, self._served[client], client
            else:
                del self._queues[priority, client]

    def _release(self, sequence: Tokens) -> None:
        self.cache.release(sequence.tables)
        sequence.tables = []

    def _publish(self, sequence: Tokens, start: int, end: int) -> None:
        """Make the blocks that became full and computed between these tokens findable."""
        size = self.cache.size
        if end // size > len(sequence.keys):
            sequence.keys = block_keys(sequence.tokens[: end // size * size], size, sequence.salt, sequence.keys)
        self.cache.publish(sequence.tables, sequence.keys, start, end)


@dataclass
class _Making:
    """A step in the making: room that is left, and what is planned."""

    tokens: int
    sequences: int
    shares: list[Share] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    planned: set[Tokens] = field(default_factory=set)
    preempted: int = 0
    rows: int = 0
    states: int = 0

    def add(self, sequence: Tokens, count: int) -> None:
        """Plan the next `count` tokens of a sequence."""
        missing = sequence.known - sequence.computed
        drafts, ends = max(count - missing, 0), count >= missing
        rows = 1 + drafts if ends else 0
        if sequence.whole and sequence.computed < sequence.prompt:
            rows = count
        place, before = self.states if sequence.silent else self.rows, sequence.under_way
        carried = before.row + before.rows - 1 if before is not None and before.draws else None
        draws = ends and not sequence.silent
        self.shares.append(Share(sequence, sequence.computed, count, rows, drafts, draws, place, carried))
        self.states += rows * sequence.silent
        self.rows += rows * (not sequence.silent)
        self.planned.add(sequence)
        self.tokens -= count
        self.sequences -= 1


def _rank(sequence: Tokens) -> tuple[int, float, int]:
    return sequence.rank


# -- for the runner ---------------------------------------------------------------------------------------------------
def batch_of(shares: Sequence[Share], size: int, kinds: int | None = None) -> Batch:
    """What a runner is given for a step. kinds: so many of the sequences' first tables; None: all."""
    counts = np.array([share.count for share in shares], np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    firsts = np.array([share.start for share in shares], np.int32)
    owner, positions = np.repeat(np.arange(len(shares)), counts), _runs(firsts, counts)
    held = [share.sequence.tables for share in shares]
    tables = tables_of(held, kinds or len(held[0]))
    tokens = [token for share in shares for token in _tokens_of(share)]
    carried = [(int(start), share.carried) for start, share in zip(starts, shares, strict=False)
               if share.carried is not None and share.start == len(share.sequence.tokens)]  # fmt: skip
    wanted = np.array([share.rows for share in shares], np.int32)
    silent = np.array([share.sequence.silent for share in shares], np.int32)
    rows, states = (_runs(starts[1:] - each, each) for each in (wanted * (1 - silent), wanted * silent))
    return Batch(
        np.array(tokens, np.int32), positions, tables[:, owner, positions // size] * size + positions % size, starts,
        firsts + counts, tables, rows, states, np.array(carried, np.int32).reshape(-1, 2),
    )  # fmt: skip


def _runs(firsts: Integers, counts: Integers) -> Integers:
    """firsts[0], firsts[0] + 1, … counts[0] of them, then the same of the next."""
    before = np.cumsum(counts) - counts
    return (np.arange(counts.sum()) + np.repeat(firsts - before, counts)).astype(np.int32)


def _tokens_of(share: Share) -> list[int]:
    tokens, end = share.sequence.tokens, share.start + share.count
    if end <= len(tokens):
        return tokens[share.start : end]
    if share.carried is not None:
        return [0]
    drafts = share.sequence.draft[max(share.start - len(tokens), 0) : max(end - len(tokens), 0)]
    return tokens[share.start : end] + drafts
