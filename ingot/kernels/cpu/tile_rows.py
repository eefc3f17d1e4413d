"""Rows in the order tile registers load them: [16 rows together][step of K][part][row][64 bytes].

A tile lies in one piece, so loads stream; the rows of a last, incomplete group hold anything, which no result shows.
float32 becomes 32 high bfloat16 parts and their 32 low ones, or is rounded to 32 bfloat16 numbers; int8 becomes uint8
by adding 128.
"""

from __future__ import annotations

from dataclasses import dataclass

from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.gemm_tiles import ROW_BYTES, ROWS, TILE_BYTES, TileDot
from ingot.kernels.cpu.llvm import Function, Index, Value, vector
from ingot.plan.extent import Extent, ceil_div, product

_LANES = 16
_FLOATS, _WORDS, _BITS = (vector(t, _LANES) for t in ("float", "i16", "i32"))
_HALVES = vector("i16", 2 * _LANES)
_GRAIN_BYTES = 16384
INTERLEAVED = [half for i in range(_LANES) for half in (i, _LANES + i)]


@dataclass(frozen=True)
class TileRows:
    """Packed rows, the bytes of a group of 16, and an int32 sum per row where they were asked for."""

    handle: Handle
    group_bytes: int
    row_sums: Handle | None


def tile_rows(build: KernelBuilder, index: int, rows: Extent, depth: int, dot: TileDot, sums: bool = False,
              apart: bool = False, each: tuple[Extent, Extent] | None = None) -> TileRows:  # fmt: skip
    """Input `index`, [rows, depth], packed for `dot`; unsigned sums of the packed bytes of each row if wanted. apart:
    groups do not lie at multiples of 16 KB, which would have the same few places in a cache. each: how many
    matrices the rows are of, and the rows of one, which begins with a group and has an even number of groups."""
    dtype = build.node.input(index).dtype
    steps = -(-depth // dot.depth)
    group_bytes = (steps * dot.parts + (apart and steps * dot.parts % 16 == 0)) * TILE_BYTES
    source = build.input(index)
    groups = ceil_div(rows, ROWS) if each is None else product((each[0], groups_of(each[1])))
    target = build.temporary(product((groups, group_bytes)))
    totals = build.temporary(product((rows, 4))) if sums else None
    row_size, chunk = depth * ROW_BYTES * dot.source // dot.depth, ROW_BYTES * dot.source

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        def row(r: Value) -> None:
            group, within = _place(f, r, each)
            place = group * group_bytes + within * ROW_BYTES
            read, write = f.at(f.pointer(source), r * row_size), f.at(f.pointer(target), place)

            def step(k: Index, count: int, *total: Value) -> list[Value]:
                x, y = f.at(read, f.index(k) * chunk), f.at(write, f.index(k) * (dot.parts * TILE_BYTES))
                return _pack(f, dtype, dot, x, y, count, total)

            zero = [f.constant("<8 x i64>", 0)] if sums else []
            total = list(f.loop(0, depth // dot.depth, lambda k, *t: step(k, dot.depth, *t), zero))
            if depth % dot.depth:
                total = step(steps - 1, depth % dot.depth, *total)
            if totals is not None:
                summed = f.intrinsic("llvm.vector.reduce.add.v8i64", "i64", *total)
                f.store(f.cast("trunc", summed, "i32"), f.pointer(totals), r * 4)

        f.loop(begin, end, row)

    build.phase(rows, body, max(_GRAIN_BYTES // max(row_size, 1), 1))
    return TileRows(target, group_bytes, totals)


def groups_of(rows: Extent) -> Extent:
    """Groups of 16 that a matrix of `rows` rows takes, two by two."""
    return product((2, ceil_div(rows, 2 * ROWS)))


def _place(f: PhaseFunction, row: Value, each: tuple[Extent, Extent] | None) -> tuple[Value, Value]:
    """The group that a row belongs to, and its number there."""
    if each is None:
        return f.index(f.divide(row, ROWS)), f.index(f.remainder(row, ROWS))
    rows = f.extent(each[1])
    matrix, number = f.index(f.divide(row, rows)), f.index(f.remainder(row, rows))
    first = matrix * f.extent(groups_of(each[1]))
    return f.index(first + f.divide(number, ROWS)), f.index(f.remainder(number, ROWS))


def _pack(f: Function, dtype: str, dot: TileDot, read: Value, write: Value, count: int,
          total: tuple[Value, ...]) -> list[Value]:  # fmt: skip
    """One step of a row: `count` numbers, then zeros."""
    if dtype == "float32":
        there = [min(max(count - half * _LANES, 0), _LANES) for half in range(2)]
        halves = [loaded(f, _FLOATS, read, i * _LANES * 4, n, _LANES) for i, n in enumerate(there)]
        pack_floats(f, dot, halves[0], halves[1], write, TILE_BYTES)
        return []
    size = 2 if dtype == "bfloat16" else 1
    lanes = ROW_BYTES // size
    x = loaded(f, vector(f"i{8 * size}", lanes), read, 0, count, lanes, -0x80 if dtype == "int8" else 0)
    if dtype == "int8":
        x = f.binary("xor", x, -0x80)
    f.store(x, write)
    nothing = f.constant("<64 x i8>", 0)
    return [t + f.intrinsic("llvm.x86.avx512.psad.bw.512", "<8 x i64>", x, nothing) for t in total]


def pack_floats(f: Function, dot: TileDot, first: Value, second: Value, write: Value, apart: int) -> None:
    """32 numbers as bfloat16: rounded, or their high parts and `apart` bytes further their low ones."""
    if dot.parts == 1:
        f.store(_rounded_pair(f, first, second), write)
        return
    for place, x in ((0, first), (ROW_BYTES // 2, second)):
        for part, numbers in enumerate(rounded_parts(f, dot, x)):
            f.store(numbers, write, place + part * apart)


def rounded_parts(f: Function, dot: TileDot, x: Value) -> list[Value]:
    """16 numbers as the bfloat16 parts that stand for them."""
    high = _rounded(f, x)
    return [high] if dot.parts == 1 else [high, _rounded(f, x - _widened(f, high))]


def interleaved(f: Function, parts: int, first: Value, second: Value) -> list[Value]:
    """Two vectors of floats, lane by lane side by side, as bfloat16, or as the two parts whose sum they nearly are."""
    high = _side_by_side(f, first, second)
    if parts == 1:
        return [high]
    bits = f.bitcast(high, _BITS)
    lower = f.bitcast(f.binary("shl", bits, 16), _FLOATS)
    upper = f.bitcast(f.binary("and", bits, -0x10000), _FLOATS)
    return [high, _side_by_side(f, first - lower, second - upper)]


def _side_by_side(f: Function, first: Value, second: Value) -> Value:
    return f.shuffle(f.bitcast(_rounded_pair(f, first, second), _HALVES), None, INTERLEAVED)


def loaded(f: Function, type_: str, pointer: Value, offset: Index, there: int, lanes: int,
           other: int = 0) -> Value:  # fmt: skip
    """The first `there` of `lanes` numbers; the memory of the rest is not touched, they are `other`."""
    if there == lanes:
        return f.load(type_, pointer, offset)
    return f.load_masked(type_, pointer, f.first_lanes(there, lanes), offset, other)


def _rounded(f: Function, x: Value) -> Value:
    """The nearest bfloat16 numbers."""
    return f.intrinsic("llvm.x86.avx512bf16.cvtneps2bf16.512", vector("bfloat", _LANES), x)


def _rounded_pair(f: Function, first: Value, second: Value) -> Value:
    """The nearest bfloat16 numbers of two vectors as one."""
    return f.intrinsic("llvm.x86.avx512bf16.cvtne2ps2bf16.512", vector("bfloat", 2 * _LANES), second, first)


def _widened(f: Function, x: Value) -> Value:
    """bfloat16 to float32 by its bits."""
    bits = f.cast("zext", f.bitcast(x, _WORDS), "i32")
    return f.bitcast(f.binary("shl", bits, 16), _FLOATS)
