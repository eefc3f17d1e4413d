"""Moves → one phase: work items over the outer axes of every move, loops over the inner ones, lines or tiles last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ingot.kernels.cpu.build import KernelBuilder, PhaseFunction
from ingot.kernels.cpu.copying import (
    Place,
    copy_bytes,
    copy_tile,
    fill_line,
    largest_tile,
    multiply,
    reversed_line,
    strided_line,
    word,
)  # fmt: skip
from ingot.kernels.cpu.llvm import Function, Index, Value
from ingot.kernels.cpu.strided import STILL, UNIT, Axis, Move, guess, simplified
from ingot.plan.extent import Extent, add, product

ITEM_BYTES = 1024  # a work item is at least this long, so that finding its place costs nothing
CHUNK_BYTES = 32768  # fewer bytes are not worth a second thread


@dataclass(frozen=True)
class Nest:
    """A simplified move cut into work items: items count `outer` × `run`, `inner` is what one item does.

    `tile` > 0: the last two axes of run and inner are transposed by square tiles of that many rows.
    """

    move: Move
    outer: tuple[Axis, ...]
    run: Axis
    inner: tuple[Axis, ...]
    tile: int

    @property
    def items(self) -> Extent:
        """How many work items there are."""
        return product(axis.extent for axis in (*self.outer, self.run))

    @property
    def item_bytes(self) -> int:
        """About how many bytes an item moves."""
        return guess(product(axis.extent for axis in self.inner)) * self.move.element


@dataclass(frozen=True)
class Spot:
    """Pointers to the first source and target element of the axes still to come."""

    source: Value | None
    target: Value


def move_phase(build: KernelBuilder, moves: Sequence[Move]) -> None:
    """One phase that does all the moves, whose targets do not overlap."""
    nests = [_nest(build, simplified(move)) for move in moves]
    firsts: list[Extent] = [0]
    for nest in nests:
        firsts.append(add(firsts[-1], nest.items))

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        for nest, first in zip(nests, firsts, strict=False):
            if len(nests) == 1:
                low, high = begin, end
            else:
                low = f.index(f.maximum(begin - f.extent(first), 0))
                high = f.index(f.minimum(end - f.extent(first), f.extent(nest.items)))
            f.when(f.compare("slt", low, high), lambda n=nest, a=low, b=high: _emit_items(f, n, a, b))

    bytes_moved = sum(guess(nest.items) * nest.item_bytes for nest in nests)
    items = sum(guess(nest.items) for nest in nests)
    build.phase(firsts[-1], body, grain=_grain(nests, -(-CHUNK_BYTES * items // max(bytes_moved, 1))))


def _grain(nests: Sequence[Nest], grain: int) -> int:
    """A multiple of the tiles' rows where they are split between items."""
    rows = max((nest.tile for nest in nests if nest.tile and len(nest.inner) == 1), default=1)
    return -(-grain // rows) * rows


def _nest(build: KernelBuilder, move: Move) -> Nest:
    """Inner axes until an item is long enough, then the axis that runs, the others outside."""
    axes, tile = _with_tile(build, move)
    axes = axes or [Axis(1, UNIT, UNIT)]
    cut, size = len(axes), move.element
    while cut > 1 and size < ITEM_BYTES and size * guess(axes[cut - 1].extent) <= CHUNK_BYTES:
        cut -= 1
        size *= max(guess(axes[cut].extent), 1)
    cut = min(cut, len(axes) - 1) if tile else cut
    return Nest(move, tuple(axes[: cut - 1]), axes[cut - 1], tuple(axes[cut:]), tile)


def _with_tile(build: KernelBuilder, move: Move) -> tuple[list[Axis], int]:
    """The axes, with the source's contiguous one moved before the target's where these two make tiles."""
    axes = list(move.axes)
    if move.source is None or len(axes) < 2 or axes[-1].target != UNIT or axes[-1].source == UNIT:
        return axes, 0
    across = next((axis for axis in axes[:-1] if axis.source == UNIT), None)
    if across is None:
        return axes, 0
    shortest = min([e for e in (across.extent, axes[-1].extent) if isinstance(e, int)], default=1 << 30)
    tile = min(largest_tile(build.isa, move.element), 1 << max(shortest.bit_length() - 1, 0))
    if tile < 4:
        return axes, 0
    return [*(axis for axis in axes[:-1] if axis is not across), across, axes[-1]], tile


# code


def _emit_items(f: PhaseFunction, nest: Nest, begin: Value, end: Value) -> None:
    """Work items [begin, end), which are not none: a stretch of `run` for each combination of outer indices."""
    move = nest.move
    start = Spot(
        None if move.source is None else f.at(f.pointer(move.source), _bytes(f, move, move.source_offset)),
        f.at(f.pointer(move.target), _bytes(f, move, move.target_offset)),
    )
    axes = (nest.run, *nest.inner)
    if not nest.outer:
        _emit_axes(f, nest, axes, begin, end, start)
        return
    stretches(f, begin, end, f.extent(nest.run.extent),
              lambda q, low, high: _emit_axes(f, nest, axes, low, high, _outer_spot(f, nest, q, start)))  # fmt: skip


def stretches(f: Function, begin: Value, end: Value, length: Index,
              body: Callable[[Value, Index, Index], None]) -> None:  # fmt: skip
    """Items begin <= i < end (not none) of rows of `length` items: body(row, low, high) once for every row touched."""

    def stretch(row: Value) -> None:
        first = multiply(row, length)
        body(row, f.maximum(begin - first, 0), f.minimum(end - first, length))

    last = f.divide(end + (length - 1), length)
    f.loop(f.divide(begin, length), last, stretch)


def grain_of(count: Extent, moved: Extent) -> int:
    """Work items of a chunk worth a thread's while, where `count` items move so many bytes."""
    return -(-CHUNK_BYTES * max(guess(count), 1) // max(guess(moved), 1))


def _bytes(f: PhaseFunction, move: Move, elements: Extent) -> Index:
    return f.extent(product((elements, move.element)))


def _outer_spot(f: PhaseFunction, nest: Nest, row: Value, start: Spot) -> Spot:
    """Where the combination of outer indices number `row` begins."""
    spot, rest = start, row
    for position, axis in reversed(list(enumerate(nest.outer))):
        extent = f.extent(axis.extent)
        place = f.remainder(rest, extent) if position else rest
        rest = f.index(f.divide(rest, extent)) if position else rest
        spot = _moved(f, nest.move, spot, axis, place)
    return spot


def _moved(f: PhaseFunction, move: Move, spot: Spot, axis: Axis, steps: Index) -> Spot:
    source, target = _strides(f, move, axis)
    return Spot(
        None if spot.source is None else f.at(spot.source, multiply(steps, source)),
        f.at(spot.target, multiply(steps, target)),
    )


def _strides(f: PhaseFunction, move: Move, axis: Axis) -> tuple[Index, Index]:
    """Byte strides of an axis on both sides."""
    return f.extent(axis.source.times(move.element).extent), f.extent(axis.target.times(move.element).extent)


def _emit_axes(f: PhaseFunction, nest: Nest, axes: Sequence[Axis], low: Index, high: Index, spot: Spot) -> None:
    """Loops over the axes, the first of them from `low` to `high`."""
    if len(axes) == 1:
        _emit_line(f, nest.move, axes[0], low, high, spot)
    elif len(axes) == 2 and nest.tile:
        _emit_tiles(f, nest, axes, low, high, spot)
    else:
        extent = f.extent(axes[1].extent)
        f.loop(low, high, lambda i: _emit_axes(f, nest, axes[1:], 0, extent,
                                               _moved(f, nest.move, spot, axes[0], i)))  # fmt: skip


def _emit_line(f: PhaseFunction, move: Move, axis: Axis, low: Index, high: Index, spot: Spot) -> None:
    assert f.builder is not None
    isa, size, count = f.builder.isa, move.element, _difference(high, low)
    begin = _moved(f, move, spot, axis, low)
    if axis.target == UNIT and (axis.source == STILL or begin.source is None):
        element = _fill(f, move) if begin.source is None else f.load(word(size), begin.source, align=1)
        fill_line(f, isa, element, begin.target, count)
    elif begin.source is None:
        _strided_fill(f, move, axis, count, begin.target)
    elif axis.contiguous:
        copy_bytes(f, isa, begin.source, begin.target, multiply(count, size), size)
    elif axis.target == UNIT and axis.source.number == -1 and not axis.source.factors:
        reversed_line(f, isa, begin.source, begin.target, count, size)
    else:
        source, target = _strides(f, move, axis)
        strided_line(f, Place(begin.source, source), Place(begin.target, target), 0, count, size)


def _fill(f: PhaseFunction, move: Move) -> Value:
    return f.constant(word(move.element), move.fill)


def _difference(high: Index, low: Index) -> Index:
    return high if isinstance(low, int) and low == 0 else high - low


def _strided_fill(f: PhaseFunction, move: Move, axis: Axis, count: Index, target: Value) -> None:
    _, stride = _strides(f, move, axis)
    element = _fill(f, move)
    f.loop(0, count, lambda i: f.store(element, target, multiply(i, stride), align=1))


def _emit_tiles(f: PhaseFunction, nest: Nest, axes: Sequence[Axis], low: Index, high: Index, spot: Spot) -> None:
    """Square tiles over (across, along); the last ones are moved back to end with their axes, overlapping others.

    Two threads may so write the same element, with the same value.
    """
    across, along = axes
    rows, length = f.extent(across.extent), f.extent(along.extent)
    short = [e for e in (rows, length) if isinstance(e, Value)]
    fits = [f.compare("sge", e, nest.tile) for e in short]
    if not fits:
        _tiled(f, nest, axes, low, high, spot)
        return
    condition = fits[0] if len(fits) == 1 else f.binary("and", *fits)
    f.when(condition, lambda: _tiled(f, nest, axes, low, high, spot),
           lambda: _untiled(f, nest, axes, low, high, spot))  # fmt: skip


def _tiled(f: PhaseFunction, nest: Nest, axes: Sequence[Axis], low: Index, high: Index, spot: Spot) -> None:
    across, along = axes
    move, tile = nest.move, nest.tile
    source_row, _ = _strides(f, move, along)
    _, target_row = _strides(f, move, across)
    last_row, last_column = f.extent(across.extent) - tile, f.extent(along.extent) - tile
    assert spot.source is not None
    origin = spot.source

    def band(row: Value) -> None:
        j = f.minimum(row, last_row)
        source, target = f.at(origin, multiply(j, move.element)), f.at(spot.target, multiply(j, target_row))

        def square(column: Value) -> None:
            i = f.minimum(column, last_column)
            place = Place(f.at(source, multiply(i, source_row)), source_row)
            copy_tile(f, place, Place(f.at(target, multiply(i, move.element)), target_row), move.element, tile)

        f.loop(0, f.extent(along.extent), square, step=tile)

    f.loop(low, high, band, step=tile)


def _untiled(f: PhaseFunction, nest: Nest, axes: Sequence[Axis], low: Index, high: Index, spot: Spot) -> None:
    across, along = axes
    length = f.extent(along.extent)
    f.loop(low, high, lambda j: _emit_line(f, nest.move, along, 0, length,
                                           _moved(f, nest.move, spot, across, j)))  # fmt: skip
