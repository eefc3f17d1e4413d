"""Passes over a contiguous run of elements: whole vectors, several at once where that pays, then what is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ingot.kernels.cpu.build import KernelBuilder, PhaseFunction
from ingot.kernels.cpu.llvm import Index, Value, lanes_of, vector
from ingot.kernels.cpu.pointwise import nothing
from ingot.kernels.cpu.reduce_kinds import Combine, across, combined, identity, together
from ingot.kernels.cpu.render import register_element
from ingot.plan.extent import Extent, ceil_div, product

UNROLL = 4
Read = Callable[[Index, int, "Value | None"], Value]
"""(place, lanes, mask) -> the elements there, ready to be combined"""
Visit = Callable[[Index, int, "Value | None"], object]
"""(place, lanes, mask) emits what happens to the elements there"""
Columns = Callable[[PhaseFunction, Index, Index, int, int, "Value | None"], None]
"""(f, row, column, lanes, parts, mask) emits what happens to `parts` vectors of columns"""


@dataclass(frozen=True)
class Fold:
    """How elements combine, in which type, how many at a time; tails under a mask or one by one."""

    combine: Combine
    dtype: str
    lanes: int
    masked: bool
    parts: int = UNROLL

    def add(self, f: PhaseFunction, total: Value, x: Value) -> Value:
        """Both combined."""
        return combined(f, self.combine, self.dtype, total, x)

    def nothing(self, f: PhaseFunction, lanes: int) -> Value:
        """What combines to nothing."""
        return f.constant(vector(register_element(self.dtype), lanes), identity(self.combine, self.dtype))


def fold_of(combine: Combine, dtype: str, lanes: int, masked: bool, size: Index) -> Fold:
    """A fold for runs of a size: short ones are not unrolled."""
    long = not isinstance(size, int) or size >= 2 * UNROLL * lanes
    return Fold(combine, dtype, lanes, masked, UNROLL if long else 1)


def total_of(f: PhaseFunction, fold: Fold, size: Index, read: Read) -> Value:
    """The elements [0, size) combined into a scalar."""
    return closed(f, fold, continued(f, fold, size, opened(f, fold), read))


def opened(f: PhaseFunction, fold: Fold) -> tuple[Value, ...]:
    """Partial results before the first element: vectors, and a scalar where tails go one by one."""
    return (*[fold.nothing(f, fold.lanes)] * fold.parts, *[fold.nothing(f, 1)] * (not fold.masked))


def closed(f: PhaseFunction, fold: Fold, partial: Sequence[Value]) -> Value:
    """Partial results as one scalar."""
    total = across(f, fold.combine, fold.dtype, together(f, fold.combine, fold.dtype, partial[: fold.parts]))
    return total if fold.masked else fold.add(f, total, partial[fold.parts])


def continued(f: PhaseFunction, fold: Fold, size: Index, partial: Sequence[Value], read: Read) -> tuple[Value, ...]:
    """Partial results with the elements [0, size) of one more run."""
    vectors, rest, lanes = tuple(partial[: fold.parts]), tuple(partial[fold.parts :]), fold.lanes

    def several(place: Index, *totals: Value) -> list[Value]:
        return [fold.add(f, total, read(place + k * lanes, lanes, None)) for k, total in enumerate(totals)]

    done: Index = 0
    if fold.parts > 1:
        step = lanes * fold.parts
        done = f.index(f.divide(size, step)) * step
        vectors = f.loop(0, done, several, vectors, step)
    whole = f.index(f.divide(size, lanes)) * lanes
    vectors = (*f.loop(done, whole, several, vectors[:1], lanes), *vectors[1:])
    if isinstance(size, int) and size % lanes == 0:
        return (*vectors, *rest)
    if rest:
        return (*vectors, *f.loop(whole, size, lambda i, total: (fold.add(f, total, read(i, 1, None)),), rest))

    def last() -> tuple[Value, ...]:
        mask = f.first_lanes(f.index(size) - whole, lanes)
        return (f.select(mask, fold.add(f, vectors[0], read(whole, lanes, mask)), vectors[0]),)

    return (*f.when(f.compare("slt", whole, size), last, unchanged=vectors[:1]), *vectors[1:])


def visit(f: PhaseFunction, size: Index, lanes: int, masked: bool, body: Visit) -> None:
    """body at every vector of [0, size), then at what is left."""
    whole = f.index(f.divide(size, lanes)) * lanes
    f.loop(0, whole, lambda i: emitted(body(i, lanes, None)), step=lanes)
    if isinstance(size, int) and size % lanes == 0:
        return
    if masked:
        mask = f.first_lanes(f.index(size) - whole, lanes)
        f.when(f.compare("slt", whole, size), lambda: emitted(body(whole, lanes, mask)))
    else:
        f.loop(whole, size, lambda i: emitted(body(i, 1, None)))


def emitted(_: object) -> None:
    """What a body that carries nothing returns."""


def spread(f: PhaseFunction, value: Value, lanes: int) -> Value:
    """A scalar in all lanes; a vector as it is."""
    return value if lanes_of(value.type) == lanes else f.splat(value, lanes)


def columns_phase(build: KernelBuilder, rows: Extent, columns: Extent, lanes: int, masked: bool, grain: int,
                  emit: Columns) -> None:  # fmt: skip
    """A phase whose work items are blocks of columns, at least `grain` elements of a row: emit for all columns of all
    rows, several vectors at once where they are all there, otherwise vector by vector."""
    parts = min(UNROLL, -(-columns // lanes)) if isinstance(columns, int) else UNROLL
    width = max(parts, 1) * lanes
    blocks = ceil_div(columns, width)

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        count = f.extent(blocks)
        each(f, begin, end, lambda i: _column_block(
            f, f.extent(columns), f.divide(i, count), f.index(f.remainder(i, count)) * width, lanes, parts, masked, emit
        ))  # fmt: skip

    items = product((rows, blocks))
    build.phase(items, body if items != 0 else nothing, grain // width)


def _column_block(f: PhaseFunction, size: Index, row: Index, column: Value, lanes: int, parts: int, masked: bool,
                  emit: Columns) -> None:  # fmt: skip
    width, step = parts * lanes, lanes if masked else 1

    def rest() -> None:
        f.loop(column, f.minimum(column + width, size), lambda c: emit(
            f, row, c, step, 1, f.first_lanes(size - c, step) if masked else None), step=step)  # fmt: skip

    if isinstance(size, int) and size % width == 0:
        emit(f, row, column, lanes, parts, None)
    else:
        whole = f.compare("sle", column + width, size)
        f.when(whole, lambda: emit(f, row, column, lanes, parts, None), rest)


def each(f: PhaseFunction, begin: Value, end: Value, item: Callable[[Value], None]) -> None:
    """item(i) for every work item."""
    f.loop(begin, end, item)
