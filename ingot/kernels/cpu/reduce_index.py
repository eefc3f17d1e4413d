"""Reduce to the place of the largest or smallest element on an axis: first or last of equals; NaN beats all numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.ir.elementwise import FLOATS, NARROW_FLOATS
from ingot.kernels import kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Function, Index, Value, bits_of, lanes_of, vector
from ingot.kernels.cpu.pointwise_dims import (
    BYTES_PER_MICROSECOND,
    CYCLES_PER_MICROSECOND,
    can_mask,
    traffic,
    typical,
)
from ingot.kernels.cpu.reduce import GRAIN, ROW_CYCLES, Axes, axes_of, offset_of
from ingot.kernels.cpu.reduce_kinds import halves, identity
from ingot.kernels.cpu.render import MEMORY, load, register_element
from ingot.kernels.cpu.render_convert import convert
from ingot.kernels.cpu.results import Results, can_finish, put, results_of, row_of
from ingot.kernels.cpu.rows import columns_phase, each
from ingot.kernels.node import Node

KINDS = ("argmax", "argmin")


@dataclass(frozen=True)
class Search:
    """Elements of type `dtype`, compared in type `compared`, `lanes` at a time; `last` of equals or the first."""

    largest: bool
    last: bool
    dtype: str
    compared: str
    lanes: int
    masked: bool
    axes: Axes
    source: Handle
    results: Results

    @property
    def index(self) -> str:
        """LLVM type of a place: as wide as what is compared."""
        return f"i{bits_of(register_element(self.compared))}"


@dataclass(frozen=True)
class Best:
    """The best elements so far and where they are."""

    value: Value
    place: Value

    @property
    def both(self) -> tuple[Value, ...]:
        """As loops carry it."""
        return self.value, self.place


def compared_dtype(dtype: str) -> str:
    """A signed or floating type with the same order."""
    if dtype in NARROW_FLOATS:
        return "float32"
    if dtype in ("float32", "float64", "int64"):
        return dtype
    return "int64" if dtype in ("uint32", "uint64") else "int32"


def ordered(f: Function, x: Value, dtype: str, target: str) -> Value:
    """The element in a type that compares as it does; uint64 with its range moved."""
    wide = convert(f, x, dtype, target)
    return f.binary("xor", wide, -(1 << 63)) if dtype == "uint64" else wide


def _read(f: PhaseFunction, search: Search, offset: Index, lanes: int, mask: Value | None) -> Value:
    x = load(f, search.dtype, f.pointer(search.source), offset * size_of(search.dtype), lanes, mask)
    return ordered(f, x, search.dtype, search.compared)


def _start(f: Function, search: Search, lanes: int) -> Best:
    worst = identity("max" if search.largest else "min", search.compared)
    value = f.constant(vector(register_element(search.compared), lanes), worst)
    return Best(value, f.constant(vector(search.index, lanes), 0))


def _better(f: Function, search: Search, x: Value, best: Value) -> Value:
    """Whether an element that comes later wins."""
    order = ("g" if search.largest else "l") + ("e" if search.last else "t")
    if search.compared not in FLOATS:
        return f.compare("s" + order, x, best)
    wins = f.binary("or", f.compare("o" + order, x, best), f.compare("uno", x, x))
    return wins if search.last else f.binary("and", wins, f.compare("ord", best, best))


def _step(f: Function, search: Search, best: Best, x: Value, place: Value, mask: Value | None = None) -> Best:
    wins = _better(f, search, x, best.value)
    wins = wins if mask is None else f.binary("and", wins, mask)
    return Best(f.select(wins, x, best.value), f.select(wins, place, best.place))


def _place(f: Function, search: Search, first: Index, lanes: int, consecutive: bool) -> Value:
    """Places first, first + 1, … in the lanes, or `first` in all."""
    number = f.cast("trunc", f.index(first), search.index)
    type_ = vector(search.index, lanes)
    if not consecutive or lanes == 1:
        return f.splat(number, lanes)
    return f.splat(number, lanes) + Value(f, type_, f"<{', '.join(f'{search.index} {i}' for i in range(lanes))}>")


def _across(f: Function, search: Search, best: Best) -> Best:
    """The winner of all lanes; of equals the first (last) place."""
    value, place = best.both
    while lanes_of(value.type) > 1:
        value, place = _duel(f, search, halves(f, value), halves(f, place))
    return Best(value, place)


def _duel(f: Function, search: Search, values: Sequence[Value], places: Sequence[Value]) -> tuple[Value, Value]:
    (a, b), (a_place, b_place) = values, places
    if search.compared in FLOATS:
        better = _strictly(f, search, b, a)
        worse = _strictly(f, search, a, b)
    else:
        order = "sgt" if search.largest else "slt"
        better, worse = f.compare(order, b, a), f.compare(order, a, b)
    later = f.compare("sgt" if search.last else "slt", b_place, a_place)
    wins = f.select(better, better, f.select(worse, 0, later))
    return f.select(wins, b, a), f.select(wins, b_place, a_place)


def _strictly(f: Function, search: Search, x: Value, y: Value) -> Value:
    ahead = f.compare("ogt" if search.largest else "olt", x, y)
    nan = f.binary("and", f.compare("uno", x, x), f.compare("ord", y, y))
    return f.binary("or", ahead, nan)


def _emit_row(f: PhaseFunction, search: Search, item: Value) -> None:
    base, lanes = f.index(offset_of(f, search.axes, item)), search.lanes
    size = f.extent(search.axes.count)
    whole = f.index(f.divide(size, lanes)) * lanes

    def step(i: Index, best: Sequence[Value], count: int, mask: Value | None = None) -> tuple[Value, ...]:
        x = _read(f, search, base + i, count, mask)
        return _step(f, search, Best(*best), x, _place(f, search, i, count, True), mask).both

    best = f.loop(0, whole, lambda i, *best: step(i, best, lanes), _start(f, search, lanes).both, lanes)
    if search.masked:
        mask = f.first_lanes(f.index(size) - whole, lanes)
        best = f.when(f.compare("slt", whole, size), lambda: step(whole, best, lanes, mask), unchanged=best)
    winner = _across(f, search, Best(*best)).both
    if not search.masked:
        winner = f.loop(whole, size, lambda i, *best: step(i, best, 1), winner)
    put(f, search.results, row_of(f, search.results, item, 1), 0, f.cast("sext", winner[1], "i64"), 1)


def _emit_columns(f: PhaseFunction, search: Search, row: Index, column: Index, lanes: int, parts: int,
                  mask: Value | None) -> None:  # fmt: skip
    base = f.index(offset_of(f, search.axes, row)) + column
    best = _start(f, search, lanes).both * parts
    for extent, stride in search.axes.reduced:
        gap = f.extent(stride)

        def step(i: Value, *best: Value, gap: Index = gap) -> list[Value]:
            place, found = _place(f, search, i, lanes, False), list[Value]()
            for k in range(parts):
                x = _read(f, search, base + i * gap + k * lanes, lanes, mask)
                found += _step(f, search, Best(*best[2 * k : 2 * k + 2]), x, place).both
            return found

        best = f.loop(0, f.extent(extent), step, best)
    target = row_of(f, search.results, row, lanes)
    for k, place in enumerate(best[1::2]):
        put(f, search.results, target, column + k * lanes, f.cast("sext", place, "i64"), lanes, mask)


def _applies(node: Node, isa: Isa) -> bool:
    if node.attributes["kind"] not in KINDS or node.input(0).dtype not in MEMORY:
        return False
    return can_finish(node, 1, axes_of(node).column_axes, "int64")


def _cost(node: Node, isa: Isa) -> float:
    axes = axes_of(node)
    work = 4 * typical(node.input(0).elements) / isa.lanes + ROW_CYCLES * typical(axes.rows)
    return 0.2 + max(work / CYCLES_PER_MICROSECOND, traffic(node) / BYTES_PER_MICROSECOND)


def _search(build: KernelBuilder, node: Node) -> Search:
    axes, dtype = axes_of(node), node.input(0).dtype
    compared = compared_dtype(dtype)
    lanes = build.isa.lanes * 32 // bits_of(register_element(compared))
    results = results_of(build, node, 1, axes.column_axes, "int64")
    masked = can_mask(build.isa, [dtype, *results.dtypes, results.dtype])
    last = bool(node.attributes.get("select_last_index", 0))
    largest = node.attributes["kind"] == "argmax"
    return Search(largest, last, dtype, compared, lanes, masked, axes, build.input(0), results)


@kernel("Reduce", on="cpu", when=_applies, cost=_cost)
def reduce_index(build: KernelBuilder, node: Node) -> None:
    """A work item is a row's result or a vector of columns."""
    search = _search(build, node)
    columns, rows = search.axes.columns, search.axes.rows
    grain = GRAIN // (typical(search.axes.count) + 1)
    if columns is None:
        build.phase(rows, lambda f, begin, end: each(f, begin, end, lambda i: _emit_row(f, search, i)), grain)
        return
    columns_phase(build, rows, columns, search.lanes, search.masked, grain,
                  lambda f, row, column, *how: _emit_columns(f, search, row, column, *how))  # fmt: skip
