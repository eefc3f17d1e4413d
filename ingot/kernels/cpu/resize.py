"""Resize: nearest copies elements by a table; linear and cubic are weighted sums of rows, one axis after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ingot.ir.ops import complete
from ingot.kernels import Ports, kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.copying import copy_bytes, multiply
from ingot.kernels.cpu.gather import offset_of
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value, vector
from ingot.kernels.cpu.moving import grain_of, move_phase, stretches
from ingot.kernels.cpu.pad import bits_of
from ingot.kernels.cpu.render import MEMORY, load, store
from ingot.kernels.cpu.render_convert import convert, integer_range
from ingot.kernels.cpu.resize_tables import Resized, Table, resized_axes, table_of
from ingot.kernels.cpu.strided import (
    STILL,
    Axis,
    Move,
    Stride,
    element_size,
    guess,
    layouts_with_blocked,
    movable,
    move_cost,
    row_major,
    stored_input,
    stored_shape,
)
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

SINGLE = ("float32", "float16", "bfloat16")
DOUBLE = ("float64", "int8", "uint8", "int16", "uint16", "int32", "uint32")  # halves stay halves
UNROLLED_TAPS = 4


def _settings(node: Node) -> dict[str, Any]:
    return complete("Resize", node.attributes)


def _axes(node: Node) -> list[Resized]:
    return resized_axes(node, _settings(node))


def _known(node: Node) -> bool:
    """Whether every axis' table is static or can be computed."""
    return node.input(0).elements != 0 and all(axis.static or axis.computable for axis in _axes(node))


def _nearest(node: Node, isa: Isa) -> bool:
    return movable(node) and _settings(node)["mode"] == "nearest" and element_size(node.output) <= 8 and _known(node)


def _weighted(node: Node, isa: Isa) -> bool:
    return _settings(node)["mode"] != "nearest" and node.dtype in SINGLE + DOUBLE and _known(node)


def _layouts(node: Node, isa: Isa) -> Sequence[Ports]:
    return layouts_with_blocked(node, all(axis.axis > 1 for axis in _axes(node)))


def _nearest_cost(node: Node, isa: Isa) -> float:
    return move_cost(product((2 if node.output.layout == "blocked" else 4, node.output.bytes)), 1.0)


def _weighted_cost(node: Node, isa: Isa) -> float:
    return move_cost(product((6, node.output.elements, 4)), 2.0)


def _extrapolated(build: KernelBuilder, node: Node, axes: Sequence[Resized]) -> None:
    """A phase that overwrites what lies outside of the input (tf_crop_and_resize) with the extrapolation value."""
    shape = stored_shape(node.output, build.isa)
    strides, value = row_major(shape), bits_of(_settings(node)["extrapolation"], node.output.dtype)
    moves = []
    for axis in (axis for axis in axes if axis.static):
        outside = axis.taps.outside
        for position in outside.nonzero()[0]:
            extents = [*shape[: axis.axis], 1, *shape[axis.axis + 1 :]]
            loops = tuple(Axis(extent, STILL, stride) for extent, stride in zip(extents, strides, strict=True))
            offset = product((int(position), strides[axis.axis].extent))
            moves.append(Move(element_size(node.output), None, build.output(), loops, target_offset=offset, fill=value))
    if moves:
        move_phase(build, moves)


# nearest


@kernel("Resize", on="cpu", when=_nearest, cost=_nearest_cost, layouts=_layouts)
def resize_nearest(build: KernelBuilder, node: Node) -> None:
    """y[i, j, …] = x[table_i[i], table_j[j], …]; rows of the last resized axis, blocks of what follows it."""
    axes = _axes(node)
    source, target = stored_input(build, 0), build.output()
    tables = {axis.axis: table_of(build, axis, "float") for axis in axes}
    shape, result = stored_shape(node.input(0), build.isa), stored_shape(node.output, build.isa)
    last = max(tables, default=len(shape) - 1)
    block, strides = product((*shape[last + 1 :], element_size(node.output))), row_major(shape[:last])
    length, rows = (result[last], shape[last]) if shape else (1, 1)

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        unit, size, count = f.extent(block), f.extent(rows), f.extent(length)

        def stretch(row: Value, low: Index, high: Index) -> None:
            place = multiply(multiply(_source_row(f, row, result[:last], strides, tables), size), unit)
            line = f.at(f.pointer(target), multiply(multiply(row, count), unit))
            origin = f.at(f.pointer(source), place)

            def step(position: Value) -> None:
                index = tables[last].index(f, 0, position) if last in tables else position
                here = f.at(line, multiply(position, unit))
                copy_bytes(f, build.isa, f.at(origin, multiply(index, unit)), here, unit)

            f.loop(low, high, step)

        f.when(f.compare("slt", begin, end), lambda: stretches(f, begin, end, count, stretch))

    count = product(result[: last + 1])
    build.phase(count, body, grain=grain_of(count, node.output.bytes))
    _extrapolated(build, node, axes)


def _source_row(f: PhaseFunction, row: Value, sizes: Sequence[Extent], strides: Sequence[Stride],
                tables: dict[int, Table]) -> Index:  # fmt: skip
    """Number of the input's row for an output row: axes with a table are looked up."""
    if not any(axis in tables for axis in range(len(sizes))):
        return row
    return offset_of(f, row, sizes, strides, lambda axis, i: tables[axis].index(f, 0, i) if axis in tables else i)


# linear, cubic


@dataclass(frozen=True)
class _Pass:
    """One axis resized: source[outer, size, inner] → target[outer, output, inner], each with its dtype."""

    source: Handle
    target: Handle
    source_dtype: str
    target_dtype: str
    accumulator: str
    outer: Extent
    size: Extent
    inner: Extent
    table: Table

    @property
    def lanes(self) -> int:
        """Vectors of single precision have twice as many lanes."""
        return 1 if self.accumulator == "float64" else 2


@kernel("Resize", on="cpu", when=_weighted, cost=_weighted_cost, layouts=_layouts)
def resize_weighted(build: KernelBuilder, node: Node) -> None:
    """y = Σ weight · x along one axis after the other, those that shrink most first; rounded once, at the end."""
    accumulator = "float64" if node.dtype in DOUBLE else "float32"
    axes = _axes(node)
    if accumulator == "float32":
        axes.sort(key=lambda a: (guess(a.output) / max(guess(a.size), 1), -a.axis))
    weight = MEMORY[accumulator]
    tables = [table_of(build, axis, weight) for axis in axes]
    shape = list(stored_shape(node.input(0), build.isa))
    source, dtype = stored_input(build, 0), node.dtype
    if not axes:
        count = product(shape)
        flat = (Axis(count, Stride(1), Stride(1)),)
        move_phase(build, [Move(element_size(node.output), source, build.output(), flat)])
    for position, (axis, table) in enumerate(zip(axes, tables, strict=True)):
        final = position == len(axes) - 1
        size, shape[axis.axis] = shape[axis.axis], axis.output
        target = build.output() if final else build.temporary(product((*shape, 8 if weight == "double" else 4)))
        after = node.dtype if final else accumulator
        outer, inner = product(shape[: axis.axis]), product(shape[axis.axis + 1 :])
        _emit_pass(build, _Pass(source, target, dtype, after, accumulator, outer, size, inner, table))
        source, dtype = target, after
    _extrapolated(build, node, _axes(node))


def _emit_pass(build: KernelBuilder, step: _Pass) -> None:
    """A phase over the output's rows [outer, output] (over its elements where the axis is the last one)."""
    single = step.inner == 1
    output = step.table.output

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        def stretch(outer: Value, low: Index, high: Index) -> None:
            f.loop(low, high, lambda position: _row(f, step, outer, position))

        def line(outer: Value, low: Index, high: Index) -> None:
            _line(f, step, outer, low, high)

        f.when(f.compare("slt", begin, end),
               lambda: stretches(f, begin, end, f.extent(output), line if single else stretch))  # fmt: skip

    count = product((step.outer, output))
    build.phase(count, body, grain=grain_of(count, product((count, step.inner, 8 * step.table.taps))))


def _row(f: PhaseFunction, step: _Pass, outer: Value, position: Value) -> None:
    """target[outer, position, :] = Σ weight · source[outer, index, :]."""
    assert f.builder is not None
    lanes = f.builder.isa.lanes // 2 * step.lanes
    inner, table = f.extent(step.inner), step.table
    before, after = (element_bytes(dtype) for dtype in (step.source_dtype, step.target_dtype))
    base = multiply(multiply(outer, f.extent(step.size)), inner)
    result = multiply(multiply(outer, f.extent(table.output)) + position, inner)
    out = f.at(f.pointer(step.target), multiply(result, after))

    def tap(number: Index) -> tuple[Value, Value]:
        row = multiply(multiply(table.index(f, number, position), inner) + base, before)
        factor = f.load(MEMORY[step.accumulator], *table.weight_at(f, number, position, 4 * (3 - step.lanes)))
        return f.at(f.pointer(step.source), row), factor

    known = [tap(number) for number in range(table.taps)] if table.taps <= UNROLLED_TAPS else []

    def part(place: Value, width: int) -> None:
        def join(number: Index, total: Value) -> Value:
            row, factor = known[number] if known and isinstance(number, int) else tap(number)
            value = _loaded(f, step, row, multiply(place, before), width)
            return _joined(f, step, f.splat(factor, width), value, total)

        total = f.constant(vector(MEMORY[step.accumulator], width), 0.0)
        if known:
            for number in range(len(known)):
                total = join(number, total)
        else:
            (total,) = f.loop(0, table.taps, lambda number, sum_: (join(number, sum_),), (total,))
        _stored(f, step, total, out, multiply(place, after))

    whole = inner - inner % lanes if isinstance(inner, int) else f.binary("and", inner, -lanes)
    f.loop(0, whole, lambda place: part(place, lanes), step=lanes)
    f.loop(whole, inner, lambda place: part(place, 1))


def _line(f: PhaseFunction, step: _Pass, outer: Value, low: Index, high: Index) -> None:
    """target[outer, i] = Σ weight[i] · source[outer, index[i]] for low <= i < high."""
    assert f.builder is not None
    table = step.table
    before, after = (element_bytes(dtype) for dtype in (step.source_dtype, step.target_dtype))
    row = f.at(f.pointer(step.source), multiply(multiply(outer, f.extent(step.size)), before))
    out = f.at(f.pointer(step.target), multiply(multiply(outer, f.extent(table.output)), after))

    def part(place: Value, width: int) -> None:
        def join(number: Index, total: Value) -> Value:
            pointer, offset = table.weight_at(f, number, place, 4 * (3 - step.lanes))
            factor = f.load(vector(MEMORY[step.accumulator], width), pointer, offset)
            return _joined(f, step, factor, _gathered(f, step, row, number, place, width), total)

        total = f.constant(vector(MEMORY[step.accumulator], width), 0.0)
        if table.taps <= UNROLLED_TAPS:
            for number in range(table.taps):
                total = join(number, total)
        else:
            (total,) = f.loop(0, table.taps, lambda number, sum_: (join(number, sum_),), (total,))
        _stored(f, step, total, out, multiply(place, after))

    lanes = f.builder.isa.lanes if step.source_dtype == "float32" and step.accumulator == "float32" else 1
    whole = low + f.binary("and", f.index(high - low), -lanes)
    if lanes > 1:
        f.loop(low, whole, lambda place: part(place, lanes), step=lanes)
    f.loop(whole if lanes > 1 else low, high, lambda place: part(place, 1))


def _gathered(f: PhaseFunction, step: _Pass, row: Value, tap: Index, place: Value, width: int) -> Value:
    """The source's elements of one tap for `width` output positions."""
    if width == 1:
        offset = multiply(step.table.index(f, tap, place), element_bytes(step.source_dtype))
        return _loaded(f, step, row, offset, 1)
    position = multiply(multiply(tap, f.extent(step.table.output)) + place, 4)
    indices = f.load(vector("i32", width), f.pointer(step.table.indices), position)
    return gather_floats(f, row, indices)


def gather_floats(f: PhaseFunction, base: Value, indices: Value) -> Value:
    """base[indices], lane by lane, of float."""
    width = int(indices.type[1 : indices.type.index(" ")])
    places = f.value(f"<{width} x ptr>", f"getelementptr float, ptr {base.text}, {indices.type} {indices.text}")
    name = f"llvm.masked.gather.v{width}f32.v{width}p0"
    type_ = f"<{width} x float>"
    f.declarations.add(f"declare {type_} @{name}(<{width} x ptr>, i32, <{width} x i1>, {type_})")
    return f.value(type_, f"call {type_} @{name}(<{width} x ptr> {places.text}, i32 4, "
                          f"<{width} x i1> splat (i1 true), {type_} poison)")  # fmt: skip


def element_bytes(dtype: str) -> int:
    """Bytes of an element in memory."""
    return {"double": 8, "float": 4, "half": 2}.get(MEMORY[dtype]) or int(MEMORY[dtype][1:]) // 8


def _loaded(f: PhaseFunction, step: _Pass, pointer: Value, offset: Index, width: int) -> Value:
    return convert(f, load(f, step.source_dtype, pointer, offset, width), step.source_dtype, step.accumulator)


def _joined(f: PhaseFunction, step: _Pass, weight: Value, value: Value, total: Value) -> Value:
    """total + weight · value; in double in two roundings, as numpy does it, which decides about halves."""
    return total + weight * value if step.accumulator == "float64" else f.fma(weight, value, total)


def _stored(f: PhaseFunction, step: _Pass, value: Value, pointer: Value, offset: Index) -> None:
    """Integers are rounded to nearest even and limited to their range."""
    dtype = step.target_dtype
    if "int" in dtype:
        low, high = integer_range(dtype)
        value = f.call("llvm.minnum", value.type, f.call("llvm.maxnum", value.type, value, low), high)
        value = f.call("llvm.rint", value.type, value)
    store(f, dtype, convert(f, value, step.accumulator, dtype), pointer, offset)
