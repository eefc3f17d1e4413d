"""Sample: tokens are drawn where the logits are. Three launches, each with some blocks for a row's lanes; one where
nothing is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ingot.ir.ops_sample import DRAW, LANES
from ingot.kernels import kernel
from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.ladder import Rung, only
from ingot.kernels.cuda.render import NARROW
from ingot.kernels.cuda.rows import power_of_two
from ingot.kernels.node import Node
from ingot.plan.extent import product

_MODULE, _INFO = "sample", 4
TILE, WARPS = 4096, 8  # tokens that a block has at once
_LED = 2048  # of a block where nothing is drawn
_FOUND = 4096  # of lanes among which the last of top_k is searched
WIDEST = 1 << 20  # tokens, whose counts have 20 bits
SHARES = ((Rung(1, 8), 64), (Rung(9, 128), 4), (Rung(129), 2))  # blocks of a row


def _applies(node: Node, target: Any) -> bool:
    edited = len(node.inputs) > 2 and node.inputs[2] is not None
    width = node.input(0).shape[1]
    return node.dtype in ("float32", *(() if edited else NARROW)) and isinstance(width, int) and width < WIDEST


@dataclass(frozen=True)
class _Memory:
    """What launches leave for each other."""

    high: Handle
    places: Handle
    info: Handle
    enough: Handle
    sums: Handle
    tickets: Handle
    before: Handle | None


@dataclass(frozen=True)
class _Form:
    """How a row is shared: blocks, lanes of each, tokens of a lane that a block has at once, with others or alone."""

    width: int
    shares: int
    mine: int
    deep: int
    alone: int
    high: int

    @property
    def first(self) -> str:
        """A block's first lane."""
        return f"tl.program_id(1) * {self.mine}"


@kernel("Sample", on="cuda", when=_applies)
def sample(build: CudaBuilder, node: Node) -> None:
    """Each row as its draw says, -1 where its logits are no numbers"""
    rows, draws = node.input(0).shape[0], node.input(1).shape[0]
    if draws != rows:
        with only(build, Rung(0, 0), draws):
            _likeliest(build)
    for rung, shares in SHARES:
        if rung.takes(rows):
            with only(build, rung, rows):
                _emit(build, rung, shares)


def _likeliest(build: CudaBuilder) -> None:
    """Of every row: its blocks' likeliest tokens, of which the last block to come takes the first."""
    rows, width = build.node.input(0).shape
    assert isinstance(width, int)
    parts = -(-width // _LED)
    keys, tickets = build.temporary(product((rows, parts, 8)), "int64"), build.counter(product((rows, 4)))
    f = build.function(warps=WARPS, stages=1)
    f.emit("row = tl.program_id(0)\npart = tl.program_id(1)")
    f.emit(f"key = {f.core(_MODULE, 'leader')}({f.pointer(build.input(0))}, row, part * {_LED}, {width}, {_LED})")
    own = f"{f.pointer(keys)} + row * {parts}"
    f.emit(f"tl.store({own} + part, key)")
    with last(f, tickets, "row", parts):
        f.emit(f"{f.core(_MODULE, 'elect')}({f.pointer(build.output())}, {own}, row, {parts}, {power_of_two(parts)})")
    f.launch(rows, parts)


def _emit(build: CudaBuilder, rung: Rung, shares: int) -> None:
    rows, width = build.node.input(0).shape
    assert isinstance(width, int)
    count, high = rung.cut(rows), power_of_two(-(-width // LANES))
    kinds = {"high": ("float32", LANES), "places": ("int32", LANES), "info": ("int32", _INFO), "enough": ("int64", 1),
             "sums": ("int64", LANES)}  # fmt: skip
    sizes = {"float32": 4, "int32": 4, "int64": 8}
    kept = {name: build.temporary(product((count, each, sizes[kind])), kind) for name, (kind, each) in kinds.items()}
    before = build.temporary(product((build.node.input(2).shape[0], 4)), "float32") if _has(build, 2) else None
    memory = _Memory(**kept, tickets=build.counter(product((count, 4))), before=before)
    mine = LANES // shares
    form = _Form(width, shares, mine, min(TILE // mine, high), min(TILE // LANES, high), high)
    for step in (_peaks, _weigh, _judge):
        writer = _Writer(build, build.function(warps=WARPS, stages=2), memory, form)
        writer.f.emit("row = tl.program_id(0)")
        writer.f.emit(f"draw = {writer.f.pointer(build.input(1))} + row * {DRAW}")
        step(writer)
        writer.f.launch(build.node.input(1).shape[0], shares)


def _has(build: CudaBuilder, index: int) -> bool:
    return len(build.node.inputs) > index and build.node.inputs[index] is not None


@contextmanager
def last(f: FunctionBuilder, tickets: Handle, row: str, shares: int) -> Iterator[None]:
    """What follows is done by that one of a row's `shares` blocks which is the last to come here."""
    place = f"{f.pointer(tickets)} + {row}"
    f.emit(f"tl.debug_barrier()\nticket = tl.atomic_add({place}, 1, sem='acq_rel')")
    with f.block(f"if ticket == {shares - 1}:"):
        f.emit(f"tl.store({place}, 0)\ntl.debug_barrier()")
        yield


@dataclass(frozen=True)
class _Writer:
    """One launch being written."""

    build: CudaBuilder
    f: FunctionBuilder
    memory: _Memory
    form: _Form

    def call(self, function: str, *arguments: Handle | str | int) -> str:
        """A call of one of cores/sample.py's functions."""
        written = [self.f.pointer(a) if isinstance(a, Handle) else str(a) for a in arguments]
        return f"{self.f.core(_MODULE, function)}({', '.join(written)})"

    def on_logits(self, result: str, function: str, *arguments: Handle | str | int) -> None:
        """The same on the row's logits, as its mask shows them; `result` is "name = " or nothing."""
        logits = self.build.input(0)
        if not _has(self.build, 3):
            self.f.emit(result + self.call(function, logits, logits, "draw", *arguments, 0))
            return
        masks = self.build.input(3)
        with self.f.block("if tl.load(draw + 8) > 0:"):
            self.f.emit(result + self.call(function, logits, masks, "draw", *arguments, 1))
        with self.f.block("else:"):
            self.f.emit(result + self.call(function, logits, masks, "draw", *arguments, 0))

    def edits(self, function: str, *arguments: str | int) -> None:
        """A call that changes logits, or undoes that."""
        if self.memory.before is not None:
            handles = self.build.input(0), self.build.input(2), self.memory.before
            self.f.emit(self.call(function, *handles, "draw", "row", *arguments))

    @contextmanager
    def last(self) -> Iterator[None]:
        """What follows is done by the block of a row that is the last to come here."""
        with last(self.f, self.memory.tickets, "row", self.form.shares):
            yield

    @contextmanager
    def open(self) -> Iterator[None]:
        """What follows is for rows without a token."""
        info = self.f.pointer(self.memory.info)
        self.f.emit(f"limit = tl.load({info} + row * {_INFO} + 1)")
        with self.f.block("if limit > 0:"):
            self.f.emit(f"best = tl.load({info} + row * {_INFO}).to(tl.float32, bitcast=True)")
            self.f.emit(f"pace = {self.f.core(_MODULE, 'pace_of')}(draw)")
            yield

    def share(self, limit: str) -> None:
        """The block's sums of lanes; what follows is done by the last one, which has all in `sums`."""
        form, place = self.form, f"{self.f.pointer(self.memory.sums)} + row * {LANES} + "
        self.on_logits("mine = ", "summed", "row", form.first, "best", "pace", limit, form.width, form.mine, form.deep)
        self.f.emit(f"tl.store({place}{form.first} + tl.arange(0, {form.mine}), mine)")

    def all_sums(self) -> None:
        """Those of all blocks."""
        place = f"{self.f.pointer(self.memory.sums)} + row * {LANES}"
        self.f.emit(f"sums = tl.load({place} + tl.arange(0, {LANES}), cache_modifier='.cg')")


def _peaks(w: _Writer) -> None:
    m, form = w.memory, w.form
    w.edits("edit", form.first, form.width, form.mine)
    w.on_logits("", "peaks", m.high, m.places, "row", form.first, form.width, form.mine, form.deep)
    with w.last():
        some = max(_FOUND // form.high, 1)
        w.on_logits("", "settle", w.build.output(), m.high, m.places, m.info, "row", form.width, some, form.high)


def _weigh(w: _Writer) -> None:
    m, form = w.memory, w.form
    with w.open():
        w.share("limit")
        with w.last():
            w.all_sums()
            w.on_logits("", "begin", w.build.output(), m.info, m.enough, "sums", "row", form.width, form.high)


def _judge(w: _Writer) -> None:
    m, form = w.memory, w.form
    with w.open():
        w.share(w.call("nearer", m.info, "draw", "row"))
        with w.last():
            w.all_sums()
            w.on_logits("", "finish", w.build.output(), m.info, m.enough, "sums", "row", form.width, form.alone,
                        form.high)  # fmt: skip
            w.edits("restore", form.width)
    if m.before is not None:
        with w.f.block("if (limit <= 0) & (tl.program_id(1) == 0):"):
            w.edits("restore", form.width)
