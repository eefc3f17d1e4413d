"""Pointwise: an expression over broadcast operands.

Dimensions are merged first; what is left is rows along the innermost one, where an operand either runs (stride 1) or
repeats (stride 0). Work items are elements, so that long rows are shared too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ingot.dtypes import size_of
from ingot.ir.expression import Expression
from ingot.kernels import kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Function, Index, Value
from ingot.kernels.cpu.pointwise_dims import (
    BYTES_PER_MICROSECOND,
    CYCLES_PER_MICROSECOND,
    Dims,
    can_mask,
    cycles,
    dims_of,
    fits,
    ports_of,
    traffic,
    typical,
    vector_lanes,
)
from ingot.kernels.cpu.render import broadcast, can_render, load, render_expression, store
from ingot.kernels.node import Node

GRAIN_CYCLES = 4000  # a chunk that a thread takes lasts at least about this long
ROW_CYCLES = 15  # finding a row's operands


@dataclass(frozen=True)
class Place:
    """An operand or the result within a row: pointer to its first element, whether it runs along the row."""

    dtype: str
    pointer: Value
    runs: bool


@dataclass(frozen=True)
class Plan:
    """What the emitters need to know of a node."""

    expression: Expression
    dims: Dims
    operands: tuple[Handle, ...]
    result: Handle
    dtypes: tuple[str, ...]
    dtype: str
    lanes: int
    masked: bool


def plan_of(build: KernelBuilder, node: Node, widest: int | None = None) -> Plan:
    """Claim the operands and the output, choose the vector width, at most `widest` lanes."""
    ports, dims = ports_of(node), dims_of(node)
    dtypes = tuple(port.dtype for port in ports)
    lanes = vector_lanes(build.isa, node.epilogue, (*dtypes, node.output.dtype))
    lanes = min(lanes, widest or lanes)
    running = [dtype for i, dtype in enumerate(dtypes) if dims.inner_stride(i)]
    operands = tuple(build.input(i) for i in range(len(ports)))
    masked = can_mask(build.isa, [*running, node.output.dtype])
    return Plan(node.epilogue, dims, operands, build.output(), dtypes, node.output.dtype, lanes, masked)


def applies(node: Node, isa: Isa) -> bool:
    """Whether the operands broadcast to the output and everything has vector code."""
    dtypes = [port.dtype for port in ports_of(node)]
    return bool(dtypes) and can_render(node.epilogue, [*dtypes, node.output.dtype]) and fits(node)


def in_place(node: Node) -> list[int]:
    """Operands of the output's shape and element size: each element is read before it is written."""
    output = node.output
    return [
        index
        for index, port in enumerate(node.inputs)
        if port is not None and port.shape == output.shape and size_of(port.dtype) == size_of(output.dtype)
    ]


def grain_of(plan: Plan, isa: Isa) -> int:
    """Elements in a chunk worth taking."""
    vectors = GRAIN_CYCLES / (cycles(plan.expression, plan.lanes, isa) + 2)
    return max(int(vectors), 16) * plan.lanes


# a row


def emit_row(f: PhaseFunction, plan: Plan, places: Sequence[Place], result: Place, begin: Index, end: Index) -> None:
    """The elements [begin, end) of a row: whole vectors, then the rest under a mask or one by one."""
    length = end - begin if isinstance(end, Value) or isinstance(begin, Value) else f.index(end - begin)
    whole = begin + f.index(f.divide(length, plan.lanes)) * plan.lanes
    repeated = repeat(f, places, plan.lanes)
    f.loop(begin, whole, lambda i: emit_vector(f, plan, places, repeated, result, i, plan.lanes), step=plan.lanes)
    if isinstance(length, int) and length % plan.lanes == 0:
        return
    if plan.masked:
        remains = f.compare("slt", whole, end)
        f.when(remains, lambda: _masked_tail(f, plan, places, repeated, result, whole, end))
    else:
        single = repeat(f, places, 1)
        f.loop(whole, end, lambda i: emit_vector(f, plan, places, single, result, i, 1))


def _masked_tail(f: PhaseFunction, plan: Plan, places: Sequence[Place], repeated: Sequence[Value | None],
                 result: Place, begin: Value, end: Index) -> None:  # fmt: skip
    mask = f.first_lanes(f.index(end) - begin, plan.lanes)
    emit_vector(f, plan, places, repeated, result, begin, plan.lanes, mask)


def repeat(f: PhaseFunction, places: Sequence[Place], lanes: int) -> list[Value | None]:
    """Values of the operands that repeat along the row; None for those that run."""
    return [None if place.runs else broadcast(f, place.dtype, place.pointer, 0, lanes) for place in places]


def emit_vector(f: PhaseFunction, plan: Plan, places: Sequence[Place], repeated: Sequence[Value | None], result: Place,
                index: Value, lanes: int, mask: Value | None = None) -> None:  # fmt: skip
    """`lanes` elements from `index` on."""
    values = [
        load(f, place.dtype, place.pointer, index * size_of(place.dtype), lanes, mask) if value is None else value
        for place, value in zip(places, repeated, strict=True)
    ]
    value = render_expression(f, plan.expression, values, plan.dtypes, lanes)
    store(f, result.dtype, value, result.pointer, index * size_of(result.dtype), mask)


def places_of(f: PhaseFunction, plan: Plan, row: Value | None) -> list[Place]:
    """The operands' rows; `row` counts over the outer dimensions."""
    dims = plan.dims
    coordinates = unravel(f, row, dims.outer)
    places = []
    for i, (handle, dtype) in enumerate(zip(plan.operands, plan.dtypes, strict=True)):
        strides = [f.extent(dims.stride(i, d)) for d in range(len(dims.outer))]
        offset = dot(f, coordinates, strides)
        pointer = f.at(f.pointer(handle), offset * size_of(dtype))
        places.append(Place(dtype, pointer, bool(dims.inner_stride(i))))
    return places


def unravel(f: PhaseFunction, index: Index | None, extents: Sequence[Any]) -> list[Index]:
    """Coordinates of a row-major index."""
    if index is None or not extents:
        return []
    coordinates: list[Index] = []
    for extent in reversed(extents[1:]):
        coordinates.insert(0, f.remainder(index, f.extent(extent)))
        index = f.divide(index, f.extent(extent))
    return [index, *coordinates]


def dot(f: Function, coordinates: Sequence[Index], strides: Sequence[Index]) -> Index:
    """Σ coordinate · stride."""
    total: Index = 0
    for coordinate, stride in zip(coordinates, strides, strict=True):
        if not isinstance(stride, int) or stride:
            term = coordinate * stride
            total = term if isinstance(total, int) and total == 0 else total + term
    return total


# the kernel


def _cost(node: Node, isa: Isa) -> float:
    dims = dims_of(node)
    dtypes = [*(port.dtype for port in ports_of(node)), node.output.dtype]
    lanes = vector_lanes(isa, node.epilogue, dtypes)
    rows = typical(node.output.elements) // max(typical(dims.inner), 1)
    vectors = -(-typical(dims.inner) // lanes)
    work = rows * (vectors * cycles(node.epilogue, lanes, isa) + ROW_CYCLES)
    return 0.2 + max(work / CYCLES_PER_MICROSECOND, traffic(node) / BYTES_PER_MICROSECOND)


@kernel("Pointwise", on="cpu", when=applies, in_place=in_place, cost=_cost)
def pointwise_rows(build: KernelBuilder, node: Node) -> None:
    """Row by row; a work item is an element."""
    plan = plan_of(build, node)
    dims = plan.dims

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        if not dims.outer:
            result = Place(plan.dtype, f.pointer(plan.result), True)
            emit_row(f, plan, places_of(f, plan, None), result, begin, end)
            return
        inner = f.extent(dims.inner)
        inner = inner if isinstance(inner, int) else f.maximum(inner, 1)

        def row(index: Value) -> None:
            start = index * inner
            pointer = f.at(f.pointer(plan.result), start * size_of(plan.dtype))
            first, last = f.maximum(begin - start, 0), f.minimum(end - start, inner)
            emit_row(f, plan, places_of(f, plan, index), Place(plan.dtype, pointer, True), first, last)

        f.loop(f.divide(begin, inner), f.divide(end + (inner - 1), inner), row)

    build.phase(node.output.elements, body if node.output.elements != 0 else nothing, grain_of(plan, build.isa))


def nothing(f: PhaseFunction, begin: Value, end: Value) -> None:
    """The body for an output without elements."""
