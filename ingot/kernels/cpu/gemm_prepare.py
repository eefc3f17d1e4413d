"""The left operand of a product in the form its dot wants: a phase that widens, centres or pads it row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.gemm_dot import NARROW, SHORT, Dot
from ingot.kernels.cpu.llvm import Function, Index, Value, vector
from ingot.kernels.cpu.render import MEMORY, widen
from ingot.kernels.cpu.render_narrow import encode_bfloat16
from ingot.plan.extent import Extent, add, ceil_div, product

Convert = Callable[[Function, Value], Value]
_GRAIN_BYTES = 16384


@dataclass(frozen=True)
class Prepared:
    """A matrix of rows `pitch` elements apart; `row_sums` holds an int32 per row where they were asked for."""

    handle: Handle
    pitch: Extent
    row_sums: Handle | None = None


def needs_preparation(dtype: str, depth: Extent, dot: Dot) -> bool:
    """Whether rows of K values of a dtype cannot be read as they are."""
    whole = isinstance(depth, int) and depth % dot.group == 0
    return dtype != dot.left or not whole


def prepared(build: KernelBuilder, index: int, rows: Extent, depth: Extent, dot: Dot, zero_point: int = 0,
             sums: bool = False, columns: Extent | None = None) -> Prepared:  # fmt: skip
    """Input `index`, seen as [rows, depth], as `dot.left` in rows padded with zeros to whole groups.

    int16 values are centred on the zero point; int8 becomes uint8 by adding 128. With `columns` the input is
    [rows / columns, depth, columns]: its matrices are transposed on the way.
    """
    dtype, lanes = build.node.input(index).dtype, build.isa.lanes
    source, pitch = build.input(index), product((ceil_div(depth, lanes), lanes))
    pitch = add(pitch, lanes)  # rows that lie a power of two apart would share cache sets
    target = build.temporary(product((rows, pitch, size_of(dot.left))))
    totals = build.temporary(product((rows, 4))) if sums else None
    convert = _conversion(dtype, dot.left, zero_point)

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        count = f.extent(depth)

        def row(r: Value) -> None:
            first = r * count
            if columns is not None:
                width = f.extent(columns)
                first = f.index(f.divide(r, width) * (width * count) + f.remainder(r, width))
            read = f.at(f.pointer(source), first * size_of(dtype))
            write = f.at(f.pointer(target), r * f.extent(pitch) * size_of(dot.left))
            copied = _copy_row(f, read, write, count, f.extent(pitch), lanes, (dtype, dot.left), convert, sums,
                               1 if columns is None else f.extent(columns))
            if totals is not None:
                f.store(copied[0], f.pointer(totals), r * 4)

        f.loop(begin, end, row)

    grain = max(_GRAIN_BYTES // (depth * size_of(dot.left)), 1) if isinstance(depth, int) and depth else 1
    build.phase(rows, body, grain)
    return Prepared(target, pitch, totals)


def _copy_row(f: PhaseFunction, read: Value, write: Value, count: Index, pitch: Index, lanes: int,
              dtypes: tuple[str, str], convert: Convert, summed: bool, stride: Index) -> tuple[Value, ...]:  # fmt: skip
    """Convert `count` elements `stride` apart, fill up to `pitch` with zeros; returns the unsigned sum if wanted."""
    source, target = dtypes

    def step(width: int) -> Callable[..., list[Value]]:
        def body(k: Value, *total: Value) -> list[Value]:
            value = convert(f, f.load(vector(MEMORY[source], width), read, k * stride * size_of(source)))
            f.store(value, write, k * size_of(target))
            return [t + f.cast("zext", value, "i32") for t in total]

        return body

    def start(width: int) -> list[Value]:
        return [f.constant(vector("i32", width), 0)] if summed else []

    whole = f.index(f.divide(count, lanes)) * lanes if stride == 1 else f.index(0)
    many = f.loop(0, whole, step(lanes), start(lanes), step=lanes)
    few = f.loop(whole, count, step(1), start(1))

    def fill(k: Value) -> None:
        f.store(f.constant(MEMORY[target], 0), write, k * size_of(target))

    f.loop(count, pitch, fill)
    name = f"llvm.vector.reduce.add.v{lanes}i32"
    return tuple(f.intrinsic(name, "i32", a) + b for a, b in zip(many, few, strict=True))


def _conversion(source: str, target: str, zero_point: int) -> Convert:
    if source in NARROW and target == "float32":
        return lambda f, x: widen(f, x, source)
    if source in SHORT and target == "int16":
        extend = "sext" if source == "int8" else "zext"
        return lambda f, x: f.cast(extend, x, "i16") - zero_point
    if source == "float32" and target == "bfloat16":
        return encode_bfloat16
    if source == "int8" and target == "uint8":
        return lambda f, x: f.binary("xor", x, -0x80)
    assert source == target
    return lambda f, x: x
