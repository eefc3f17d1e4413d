"""Likely: the likeliest tokens and the sums of weights, where the logits are. Two launches, each with some blocks for a
row's lanes; without rows there is none."""

from __future__ import annotations

from typing import Any

from ingot.ir.ops_likely import LIKELY, PACE
from ingot.ir.ops_sample import LANES
from ingot.kernels import kernel
from ingot.kernels.cuda import sample
from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.ladder import Rung, only
from ingot.kernels.cuda.render import NARROW
from ingot.kernels.cuda.rows import power_of_two
from ingot.kernels.node import Node
from ingot.plan.extent import product

_MODULE = "likely"


def _applies(node: Node, target: Any) -> bool:
    width = node.input(0).shape[1]
    return node.dtype in ("float32", *NARROW) and isinstance(width, int) and width < sample.WIDEST


@kernel("Likely", on="cuda", when=_applies)
def likely(build: CudaBuilder, node: Node) -> None:
    """Lanes' peaks, the last block of a row finds the first tokens; then shares of the sum, the last block adds up"""
    told = node.input(2).shape[0]
    for rung, shares in sample.SHARES:
        if rung.takes(told):
            with only(build, rung, told):
                _emit(build, rung, shares)


def _emit(build: CudaBuilder, rung: Rung, shares: int) -> None:
    told, width = build.node.input(2).shape[0], build.node.input(0).shape[1]
    assert isinstance(width, int)
    count, deep = rung.cut(told), power_of_two(-(-width // LANES))
    high, places = (build.temporary(product((count, LANES, 4)), kind) for kind in ("float32", "int32"))
    sums, known = build.temporary(product((count, shares, 8)), "int64"), build.temporary(product((count, 4)), "int32")
    tickets, mine = build.counter(product((count, 4))), LANES // shares
    rows = min(sample.TILE // mine, deep)
    lane = f"tl.program_id(1) * {mine}"

    f = _begun(build)
    high_, places_ = (f"{f.pointer(each)} + place * {LANES}" for each in (high, places))
    with f.block("if there:"):
        peaks = f.core("sample", "peaks")
        f.emit(f"{peaks}(logits, logits, logits, {high_}, {places_}, 0, {lane}, {width}, {mine}, {rows}, 0)")
        with sample.last(f, tickets, "place", shares):
            f.emit(f"{f.core(_MODULE, 'likeliest')}(logits, words, {f.pointer(known)} + place, {high_}, {places_}, "
                   f"{width}, {deep})")  # fmt: skip
    with f.block("else:"):
        f.emit(f"{f.core(_MODULE, 'nothing')}(words)")
    f.launch(told, shares)

    f = _begun(build)
    own = f"{f.pointer(sums)} + place * {shares}"
    with f.block("if there:"):
        f.emit(f"{f.core(_MODULE, 'share')}(logits, words, {own} + tl.program_id(1), {lane}, {PACE}, {width}, {mine}, "
               f"{rows})")  # fmt: skip
        with sample.last(f, tickets, "place", shares):
            f.emit(f"{f.core(_MODULE, 'add_up')}(logits, words, {f.pointer(known)} + place, {own}, token, {shares})")
    f.launch(told, shares)


def _begun(build: CudaBuilder) -> FunctionBuilder:
    """A launch for the told row number `place`: its logits, its token and whether there is one, its words."""
    f = build.function(warps=sample.WARPS, stages=2)

    def at(handle: Handle) -> str:
        return f.pointer(handle)

    f.emit(f"place = tl.program_id(0)\nrow = tl.load({at(build.input(2))} + place)")
    f.emit(f"token = tl.load({at(build.input(1))} + tl.maximum(row, 0))\nthere = (row >= 0) & (token >= 0)")
    f.emit(f"logits = {at(build.input(0))} + row * {build.node.input(0).shape[1]}")
    f.emit(f"words = {at(build.output())} + place * {LIKELY}")
    return f
