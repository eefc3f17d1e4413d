"""Sample: tokens are drawn where the logits are. Three launches, each with some blocks for a row's lanes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ingot.ir.ops_sample import LANES
from ingot.kernels import kernel
from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.ladder import Rung, restrict
from ingot.kernels.cuda.render import NARROW
from ingot.kernels.cuda.rows import power_of_two
from ingot.kernels.node import Node
from ingot.plan.extent import product

_MODULE, _INFO = "sample", 4
_TILE, _WARPS = 4096, 8  # tokens that a block has at once
_FOUND = 1024  # of lanes among which the last of top_k is searched
_SHARES = ((Rung(1, 8), 32), (Rung(9, 128), 8), (Rung(129), 2))  # blocks of a row


def _applies(node: Node, target: Any) -> bool:
    return node.dtype in ("float32", *NARROW) and isinstance(node.input(0).shape[1], int)


@dataclass(frozen=True)
class _Memory:
    """What launches leave for each other."""

    high: Handle
    places: Handle
    info: Handle
    enough: Handle
    sums: Handle
    tickets: Handle


@dataclass(frozen=True)
class _Form:
    """How a row is shared: blocks, lanes of each, tokens of a lane that a block has at once, alone or with others."""

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
    rows = node.input(0).shape[0]
    for rung, shares in _SHARES:
        if rung.takes(rows):
            first = len(build.launches)
            _emit(build, rung, shares)
            restrict(build, first, rung, rows)


def _emit(build: CudaBuilder, rung: Rung, shares: int) -> None:
    rows, width = build.node.input(0).shape
    assert isinstance(width, int)
    count, high = rung.cut(rows), power_of_two(-(-width // LANES))
    kinds = {"high": ("float32", LANES), "places": ("int32", LANES), "info": ("int32", _INFO), "enough": ("int64", 1),
             "sums": ("int64", LANES)}  # fmt: skip
    sizes = {"float32": 4, "int32": 4, "int64": 8}
    kept = {name: build.temporary(product((count, each, sizes[kind])), kind) for name, (kind, each) in kinds.items()}
    memory = _Memory(**kept, tickets=build.counter(product((count, 4))))
    mine = LANES // shares
    form = _Form(shares, mine, min(_TILE // mine, high), min(_TILE // LANES, high), high)
    for step in (_peaks, _weigh, _judge):
        f = build.function(warps=_WARPS, stages=2)
        f.emit("row = tl.program_id(0)")
        step(build, f, memory, form, width)
        f.launch(rows, shares)


def _call(f: FunctionBuilder, function: str, *arguments: Handle | str | int) -> str:
    """A call of one of cores/sample.py's functions."""
    written = [f.pointer(a) if isinstance(a, Handle) else str(a) for a in arguments]
    return f"{f.core(_MODULE, function)}({', '.join(written)})"


def _peaks(build: CudaBuilder, f: FunctionBuilder, m: _Memory, form: _Form, width: int) -> None:
    logits, some = build.input(0), max(_FOUND // form.high, 1)
    f.emit(_call(f, "peaks", logits, m.high, m.places, "row", form.first, width, form.mine, form.deep))
    with _last(f, m, form):
        f.emit(_call(f, "settle", logits, build.input(1), build.output(), m.high, m.places, m.info, "row", width, some,
                     form.high))  # fmt: skip


def _weigh(build: CudaBuilder, f: FunctionBuilder, m: _Memory, form: _Form, width: int) -> None:
    draws, info = build.input(1), m.info
    with f.block(f"if tl.load({f.pointer(info)} + row * {_INFO} + 1) > 0:"):
        _share(build, f, m, form, width, f"tl.load({f.pointer(info)} + row * {_INFO} + 1)")
        with _last(f, m, form):
            f.emit(_all_sums(f, m))
            f.emit(_call(f, "begin", build.input(0), draws, build.output(), info, m.enough, "sums", "row", width,
                         form.high))  # fmt: skip


def _judge(build: CudaBuilder, f: FunctionBuilder, m: _Memory, form: _Form, width: int) -> None:
    draws, info = build.input(1), m.info
    with f.block(f"if tl.load({f.pointer(info)} + row * {_INFO} + 1) > 0:"):
        _share(build, f, m, form, width, _call(f, "nearer", info, draws, "row"))
        with _last(f, m, form):
            f.emit(_all_sums(f, m))
            f.emit(_call(f, "finish", build.input(0), draws, build.output(), info, m.enough, "sums", "row", width,
                         form.alone, form.high))  # fmt: skip


def _share(build: CudaBuilder, f: FunctionBuilder, m: _Memory, form: _Form, width: int, limit: str) -> None:
    """The block's sums of lanes."""
    f.emit(f"best = tl.load({f.pointer(m.info)} + row * {_INFO}).to(tl.float32, bitcast=True)")
    f.emit(f"pace = {f.core(_MODULE, 'pace_of')}({f.pointer(build.input(1))} + row * {build.node.input(1).shape[1]})")
    call = _call(f, "summed", build.input(0), "row", form.first, "best", "pace", limit, width, form.mine, form.deep)
    f.emit(f"mine = {call}")
    f.emit(f"tl.store({f.pointer(m.sums)} + row * {LANES} + {form.first} + tl.arange(0, {form.mine}), mine)")


def _all_sums(f: FunctionBuilder, m: _Memory) -> str:
    load = f"tl.load({f.pointer(m.sums)} + row * {LANES} + tl.arange(0, {LANES}), cache_modifier='.cg')"
    return f"sums = {load}"


@contextmanager
def _last(f: FunctionBuilder, m: _Memory, form: _Form) -> Iterator[None]:
    """What follows is done by the block of a row that is the last to come here."""
    tickets = f.pointer(m.tickets)
    f.emit(f"tl.debug_barrier()\nticket = tl.atomic_add({tickets} + row, 1, sem='acq_rel')")
    with f.block(f"if ticket == {form.shares - 1}:"):
        f.emit(f"tl.store({tickets} + row, 0)\ntl.debug_barrier()")
        yield
