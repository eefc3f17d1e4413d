"""Panels of a right operand known only at run time, packed into scratch block by block of K."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.kernels.cpu.build import PhaseFunction
from ingot.kernels.cpu.gemm import Gemm
from ingot.kernels.cpu.llvm import Function, Index, Value, lanes_of
from ingot.kernels.cpu.render import load, store


@dataclass(frozen=True)
class Right:
    """A row-major matrix at `pointer`: [depth, columns], or [columns, depth] where `transposed`."""

    pointer: Value
    dtype: str
    depth: Index
    columns: Index
    transposed: bool
    zero_point: int = 0


def packed_bytes(gemm: Gemm) -> int:
    """Scratch for one block of a panel; transposing writes whole squares."""
    steps = -(-gemm.depth // gemm.dot.lanes) * gemm.dot.lanes
    return steps * gemm.step_bytes


def pack_block(f: PhaseFunction, gemm: Gemm, right: Right, column: Value, first: Index, count: Index,
               target: Value) -> None:  # fmt: skip
    """Write steps [first, first + count) of the panel that begins at `column` to `target`."""
    if gemm.dot.group > 1:
        (_pack_scalars if right.transposed else _pack_pairs)(f, gemm, right, column, first, count, target)
    elif right.transposed:
        _pack_transposed(f, gemm, right, column, first, count, target)
    else:
        _pack_rows(f, gemm, right, column, first, count, target)


def _pack_rows(f: PhaseFunction, gemm: Gemm, right: Right, column: Value, first: Index, count: Index,
               target: Value) -> None:  # fmt: skip
    dot, size = gemm.dot, size_of(right.dtype)
    masks = _column_masks(f, gemm, right, column)
    base = f.at(right.pointer, (f.index(first) * right.columns + column) * size)

    def row(k: Value) -> None:
        source, place = f.at(base, k * right.columns * size), f.at(target, k * gemm.step_bytes)
        for j, mask in enumerate(masks):
            value = load(f, right.dtype, source, j * dot.lanes * size, dot.lanes, mask)
            store(f, dot.right, value, place, j * dot.right_bytes)

    f.loop(0, count, row)


def _column_masks(f: PhaseFunction, gemm: Gemm, right: Right, column: Value) -> list[Value | None]:
    lanes, vectors = gemm.dot.lanes, gemm.tile.vectors
    if isinstance(right.columns, int) and right.columns % gemm.width == 0:
        return [None] * vectors
    return [f.first_lanes(right.columns - (column + j * lanes), lanes) for j in range(vectors)]


def _pack_transposed(f: PhaseFunction, gemm: Gemm, right: Right, column: Value, first: Index, count: Index,
                     target: Value) -> None:  # fmt: skip
    """Squares of lanes × lanes; columns that do not exist repeat the last one."""
    dot, lanes, size = gemm.dot, gemm.dot.lanes, size_of(right.dtype)
    whole = isinstance(right.depth, int) and right.depth % lanes == 0 and gemm.depth % lanes == 0
    base = f.at(right.pointer, f.index(first) * size)
    last = f.index(right.columns) - 1
    existing = [f.index(f.minimum(column + i, last)) for i in range(gemm.width)]
    sources = [f.at(base, n * right.depth * size) for n in existing]

    def square(k: Value, mask: Value | None) -> None:
        for j in range(gemm.tile.vectors):
            parts = sources[j * lanes : (j + 1) * lanes]
            rows = [load(f, right.dtype, f.at(source, k * size), 0, lanes, mask) for source in parts]
            for i, value in enumerate(transposed(f, rows)):
                store(f, dot.right, value, f.at(target, k * gemm.step_bytes), i * gemm.step_bytes + j * dot.right_bytes)

    end = f.index(count)
    full = f.index(f.divide(end, lanes)) * lanes
    f.loop(0, full, lambda k: square(k, None), step=lanes)
    if not whole:
        f.loop(full, end, lambda k: square(k, f.first_lanes(end - k, lanes)), step=lanes)


def transposed(f: Function, rows: Sequence[Value]) -> list[Value]:
    """Columns of a square of vectors: halves are exchanged between rows 1, 2, 4 … apart."""
    rows, lanes = list(rows), lanes_of(rows[0].type)
    distance = 1
    while distance < lanes:
        low = [i + (lanes - distance if i & distance else 0) for i in range(lanes)]
        high = [i + (lanes if i & distance else distance) for i in range(lanes)]
        for i in (i for i in range(lanes) if not i & distance):
            a, b = rows[i], rows[i + distance]
            rows[i], rows[i + distance] = f.shuffle(a, b, low), f.shuffle(a, b, high)
        distance *= 2
    return rows


def _pack_pairs(f: PhaseFunction, gemm: Gemm, right: Right, column: Value, first: Index, count: Index,
                target: Value) -> None:  # fmt: skip
    """Centred int16 of two rows side by side; beyond the last row, where x is zero, it is repeated."""
    dot, lanes = gemm.dot, gemm.dot.lanes
    masks = _column_masks(f, gemm, right, column)
    mixed = [lane for i in range(lanes) for lane in (i, lanes + i)]

    def pair(step: Value) -> None:
        k = (f.index(first) + step) * 2
        rows = [k, f.index(f.minimum(k + 1, f.index(right.depth) - 1))]
        sources = [f.at(right.pointer, row * right.columns + column) for row in rows]
        for j, mask in enumerate(masks):
            words = [_centred(f, right, load(f, right.dtype, s, j * lanes, lanes, mask)) for s in sources]
            f.store(f.shuffle(words[0], words[1], mixed), f.at(target, step * gemm.step_bytes), j * dot.right_bytes)

    f.loop(0, count, pair)


def _centred(f: Function, right: Right, value: Value) -> Value:
    return f.cast("sext" if right.dtype == "int8" else "zext", value, "i16") - right.zero_point


def _pack_scalars(f: PhaseFunction, gemm: Gemm, right: Right, column: Value, first: Index, count: Index,
                  target: Value) -> None:  # fmt: skip
    """One by one: columns and depths that do not exist repeat the last ones."""
    group = gemm.dot.group

    def one(n: Value) -> None:
        existing = f.index(f.minimum(column + n, f.index(right.columns) - 1))
        source, place = f.at(right.pointer, existing * right.depth), f.at(target, n * (2 * group))

        def element(step: Value) -> None:
            for g in range(group):
                k = f.index(f.minimum((f.index(first) + step) * group + g, f.index(right.depth) - 1))
                value = _centred(f, right, f.load("i8", source, k))
                f.store(value, f.at(place, step * gemm.step_bytes), 2 * g)

        f.loop(0, count, element)

    f.loop(0, gemm.width, one)

