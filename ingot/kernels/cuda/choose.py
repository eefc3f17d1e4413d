"""Choose: the place of a row's highest number; few rows are shared among blocks."""

from __future__ import annotations

from typing import Any

from ingot.kernels import kernel
from ingot.kernels.cuda.build import CudaBuilder
from ingot.kernels.cuda.ladder import Rung, restrict
from ingot.kernels.cuda.render import NARROW
from ingot.kernels.node import Node
from ingot.plan.extent import product

_BLOCK, _FAR, _WORD = 2048, 2147483647, 4
_SHARES = ((Rung(1, 16), 32), (Rung(17), 1))  # blocks of a row
_LOW, _HIGH = 'float("-inf")', 'float("inf")'


def _applies(node: Node, target: Any) -> bool:
    return node.dtype in ("float32", *NARROW) and isinstance(node.input(0).shape[1], int)


@kernel("Choose", on="cuda", when=_applies)
def choose(build: CudaBuilder, node: Node) -> None:
    """The first of the highest, -1 where that is no finite number"""
    rows = node.input(0).shape[0]
    for rung, shares in _SHARES:
        if rung.takes(rows):
            first = len(build.launches)
            _emit(build, node, rung, shares)
            restrict(build, first, rung, rows)


def _emit(build: CudaBuilder, node: Node, rung: Rung, shares: int) -> None:
    rows, width = node.input(0).shape
    assert isinstance(width, int)
    share = -(-width // (shares * _BLOCK)) * _BLOCK
    f = build.function(warps=8, stages=2)
    f.emit(f"row = tl.program_id(0)\npart = tl.program_id(1)\nplaces = tl.arange(0, {_BLOCK})")
    f.emit(f"best = tl.full(({_BLOCK},), {_LOW}, tl.float32)\nat = tl.full(({_BLOCK},), {_FAR}, tl.int32)")
    f.wait()
    with f.block(f"for start in range(0, {share}, {_BLOCK}):"):
        f.emit(f"column = part * {share} + start + places")
        load = f"{f.pointer(build.input(0))} + row * {width} + column, column < {width}, other={_LOW}"
        f.emit(f"x = tl.load({load}).to(tl.float32)\nx = tl.where(x == x, x, {_HIGH})")
        f.emit("at = tl.where(x > best, column, at)\nbest = tl.maximum(best, x)")
    f.emit(f"peak = tl.max(best, 0)\nplace = tl.min(tl.where(best == peak, at, {_FAR}), 0)")
    result = f.pointer(build.output())
    if shares == 1:
        f.emit(f"tl.store({result} + row, tl.where(tl.abs(peak) < {_HIGH}, place, -1))")
    else:
        _join(build, f, result, rung, shares)
    f.launch(rows, shares)


def _join(build: CudaBuilder, f: Any, result: str, rung: Rung, shares: int) -> None:
    """The last block of a row compares what all have found."""
    count = rung.cut(build.node.input(0).shape[0])
    peaks, places = (f.pointer(build.temporary(product((count, shares, _WORD)), kind)) for kind in ("float32", "int32"))
    tickets = f.pointer(build.counter(product((count, _WORD))))
    f.emit(f"tl.store({peaks} + row * {shares} + part, peak)\ntl.store({places} + row * {shares} + part, place)")
    f.emit(f"tl.debug_barrier()\nticket = tl.atomic_add({tickets} + row, 1, sem='acq_rel')")
    with f.block(f"if ticket == {shares - 1}:"):
        f.emit(f"tl.store({tickets} + row, 0)\nall = row * {shares} + tl.arange(0, {shares})")
        f.emit(f"found = tl.load({peaks} + all, cache_modifier='.cg')\nwhole = tl.max(found, 0)")
        f.emit(f"where = tl.load({places} + all, cache_modifier='.cg')")
        f.emit(f"first = tl.min(tl.where(found == whole, where, {_FAR}), 0)")
        f.emit(f"tl.store({result} + row, tl.where(tl.abs(whole) < {_HIGH}, first, -1))")
