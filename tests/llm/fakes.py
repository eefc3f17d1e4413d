"""A runner without weights: its logits are a function of the tokens that it finds in the blocks, so that a block in
two owners, a lost copy or a wrong slot changes the answer or fails at once."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ingot.ir.ops_likely import likely
from ingot.ir.ops_sample import DRAW, sample
from ingot.llm.batch import Batch, Begun, Copy, Floats, Integers, Kind, Wanted


@dataclass
class Later:
    """A step whose result is computed when it is asked for, once."""

    compute: Callable[[], Mapping[str, Any]]
    asked: bool = False

    def result(self) -> Mapping[str, Any]:
        assert not self.asked, "asked twice"
        self.asked = True
        return self.compute()


def drawn(logits: Floats, batch: Batch) -> Integers:
    """The tokens that the batch's draws make of them."""
    draws = batch.draws if len(batch.draws) else np.zeros((len(logits), DRAW), np.int32)
    return np.asarray(sample(logits, draws, batch.edits, batch.masks))


@dataclass
class FakeRunner:
    """`memory`: of how many last tokens the logits are a function (None: of all); `window`: the same, and no more are
    read; `others`: kinds of layers beside those, which must find the same tokens in blocks of theirs. `broken`: tokens
    that make a step raise; `poisoned`: tokens after which logits are NaN; `drafting`: two sequences may write one token
    to one slot."""

    vocabulary: int = 50
    block_size: int = 4
    blocks: int = 64
    token_budget: int = 64
    sequence_budget: int = 16
    context: int = 128
    eos: frozenset[int] = frozenset()
    memory: int | None = None
    broken: frozenset[int] = frozenset()
    poisoned: frozenset[int] = frozenset()
    drafting: bool = False
    hidden: int = 0
    window: int = 0
    others: tuple[Kind, ...] = ()
    ahead: bool = False
    draws: bool = False
    steps: int = 0
    closed: bool = False
    shapes: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kinds = (Kind(self.blocks, self.window), *self.others)
        self.kept = [np.full((kind.blocks, self.block_size, 2), -1, np.int32) for kind in self.kinds]

    def logits_of(self, context: Any) -> Floats:
        """What follows these tokens."""
        context = np.asarray(context, np.int32)
        memory = self.window or self.memory
        seen = context if memory is None else context[-memory:]
        seed = zlib.crc32(seen.tobytes())
        logits = (np.random.default_rng(seed).standard_normal(self.vocabulary) * 3).astype(np.float32)
        return logits * np.float32("nan") if int(context[-1]) in self.poisoned else logits

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """What an answer of so many tokens must be."""
        known = list(prompt)
        for _ in range(count):
            known.append(int(self.logits_of(known).argmax()))
        return known[len(prompt) :]

    def step(self, batch: Batch) -> Floats:
        self.steps += 1
        tokens, sequences = len(batch.token_ids), len(batch.lengths)
        assert 0 < tokens <= self.token_budget and sequences <= self.sequence_budget
        self.shapes.append((tokens, sequences))
        for kept, slots in zip(self.kept, np.broadcast_to(batch.slots, (len(self.kinds), tokens)), strict=True):
            written = set(zip(slots.tolist(), batch.token_ids.tolist(), batch.positions.tolist(), strict=True))
            assert len(set(slots.tolist())) == len(written), "two tokens in one slot"
            assert self.drafting or len(written) == tokens, "one token twice"
            kept.reshape(-1, 2)[slots] = np.stack([batch.token_ids, batch.positions], 1)
        if self.broken & set(batch.token_ids.tolist()):
            raise RuntimeError("the device is lost")
        owner = np.repeat(np.arange(sequences), np.diff(batch.starts))
        rows = [self.logits_of(self._context(batch, int(row), int(owner[row]))) for row in batch.rows]
        return np.stack(rows) if rows else np.zeros((0, self.vocabulary), np.float32)

    def begin(self, batch: Batch, *wanted: Wanted) -> Begun:
        """Computed when its result is asked for."""
        assert not len(batch.carried), "tokens that are drawn elsewhere"
        return Later(lambda: self.computed(batch, wanted))

    def computed(self, batch: Batch, wanted: Sequence[Wanted]) -> dict[str, Any]:
        """What is wanted of a step."""
        logits, owner = self.step(batch), np.repeat(np.arange(len(batch.lengths)), np.diff(batch.starts))
        found: dict[str, Any] = {"logits": logits, "chosen": drawn(logits, batch)}
        found["likely"] = likely(logits, found["chosen"], batch.told)
        if "hidden" in wanted:
            found["hidden"] = np.stack([
                self.state_of(self._context(batch, int(row), int(owner[row]))) for row in batch.states
            ])  # fmt: skip
        return {name: found[name] for name in wanted}

    def state_of(self, context: Any) -> Floats:
        """The hidden state of the last of these tokens."""
        context = np.asarray(context, np.int32)
        state = np.random.default_rng(zlib.crc32(context.tobytes())).standard_normal(self.hidden).astype(np.float32)
        return state * np.float32("nan") if int(context[-1]) in self.poisoned else state

    def _context(self, batch: Batch, row: int, sequence: int) -> Any:
        end = int(batch.positions[row]) + 1
        assert end <= batch.lengths[sequence]
        tables = np.broadcast_to(batch.tables, (len(self.kinds), *batch.tables.shape[-2:]))
        seen = [self._seen(kept, table[sequence], max(end - kind.window, 0) if kind.window else 0, end)
                for kind, kept, table in zip(self.kinds, self.kept, tables, strict=True)]  # fmt: skip
        assert all((each == seen[0][len(seen[0]) - len(each) :]).all() for each in seen), "kinds differ"
        return seen[0]

    def _seen(self, kept: Integers, table: Integers, first: int, end: int) -> Any:
        places = np.arange(first, end)
        found = kept[table[places // self.block_size], places % self.block_size]
        assert (found[:, 1] == places).all(), "a block that is not this sequence's"
        return found[:, 0]

    def copy_blocks(self, copies: Sequence[Copy]) -> None:
        for kind, source, target in copies:
            self.kept[kind][target] = self.kept[kind][source]

    def close(self) -> None:
        self.closed = True


@dataclass
class Distant(FakeRunner):
    """Computes elsewhere, as late as it may: in the order in which steps were begun, when a result is asked for or
    blocks are copied; `carried` tokens are what the step before chose there."""

    ahead: bool = True
    draws: bool = True
    most: int = 0
    untold: int = 0
    queue: deque[Elsewhere] = field(default_factory=deque)
    before: Elsewhere | None = None

    def begin(self, batch: Batch, *wanted: Wanted) -> Begun:
        assert not len(batch.carried) or self.before is not None
        self.before = Elsewhere(self, batch, wanted, self.before)
        self.queue.append(self.before)
        self.untold += 1
        self.most = max(self.most, self.untold)
        assert self.untold <= 2, "more than one step ahead"
        return self.before

    def catch_up(self, last: Elsewhere | None = None) -> None:
        """Compute what was begun, up to a step."""
        while self.queue and not (last is not None and last.done):
            self.queue.popleft().compute()

    def copy_blocks(self, copies: Sequence[Copy]) -> None:
        self.catch_up()
        super().copy_blocks(copies)


@dataclass(eq=False)
class Elsewhere:
    """A step of a `Distant` runner."""

    runner: Distant
    batch: Batch
    wanted: Sequence[Wanted]
    before: Elsewhere | None
    found: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None
    done: bool = False
    told: bool = False

    def compute(self) -> None:
        """On the device: nothing is raised here."""
        before, self.before, self.done = self.before, None, True
        ids = self.batch.token_ids.copy()
        if len(self.batch.carried):
            assert before is not None and before.done
            chosen = before.found.get("chosen", np.zeros(len(before.batch.rows), np.int32))
            ids[self.batch.carried[:, 0]] = chosen[self.batch.carried[:, 1]]
        try:
            self.found = self.runner.computed(replace(self.batch, token_ids=ids), [*self.wanted, "chosen"])
        except Exception as error:  # noqa: BLE001 - raised where the result is asked for
            self.error = error

    def result(self) -> Mapping[str, Any]:
        assert not self.told, "asked twice"
        self.runner.catch_up(self)
        self.told = True
        self.runner.untold -= 1
        if self.error is not None:
            raise self.error
        return {name: self.found[name] for name in self.wanted}


# -- text and engines -------------------------------------------------------------------------------------------------
END = 256  # the token after those of the 256 bytes
VOCABULARY = 257


def byte_tokenizer() -> dict[str, bytes]:
    """tokenizer.json of a tokenizer whose tokens are bytes, and one that ends."""
    import tokenizers

    letters = _byte_letters()
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={letter: byte for byte, letter in letters.items()} | {"<end>": END}, merges=[])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return {"tokenizer.json": tokenizer.to_str().encode()}


def _byte_letters() -> dict[int, str]:
    """GPT-2's letters of bytes: those that can be printed stand for themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}


@dataclass
class Writer(FakeRunner):
    """A runner that continues every text with `song`, byte by byte, whatever was asked; then it ends."""

    vocabulary: int = VOCABULARY
    eos: frozenset[int] = frozenset({END})
    song: bytes = b"la la la, and so on."
    blocks: int = 256
    context: int = 512
    prompt_end: int = ord("\n")

    def logits_of(self, context: Any) -> Floats:
        tokens = [int(token) for token in context]
        if self.poisoned & set(tokens):
            return np.full(self.vocabulary, np.nan, np.float32)
        begun = len(tokens) - 1 - tokens[::-1].index(self.prompt_end) if self.prompt_end in tokens else len(tokens) - 1
        written = len(tokens) - 1 - begun
        logits = (np.random.default_rng(len(tokens)).standard_normal(self.vocabulary)).astype(np.float32)
        logits[self.song[written] if written < len(self.song) else END] = 20.0
        return logits
