"""Pointwise where rows are much shorter than a vector, such as [N, 3] * [3]: as many rows at a time as it has lanes.

That many rows of `inner` elements are exactly `inner` vectors. An operand that has one number per row is spread over
them by a shuffle, one that repeats in every row likewise; both shuffles are constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.kernels import kernel
from ingot.kernels.cpu.build import KernelBuilder, PhaseFunction
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value, vector
from ingot.kernels.cpu.pointwise import Plan, applies, dot, grain_of, in_place, plan_of, unravel
from ingot.kernels.cpu.pointwise_dims import (
    BYTES_PER_MICROSECOND,
    CYCLES_PER_MICROSECOND,
    Dims,
    cycles,
    dims_of,
    traffic,
    typical,
)
from ingot.kernels.cpu.render import broadcast, load, register_element, render_expression, store
from ingot.kernels.node import Node
from ingot.plan.extent import product

LONGEST = 4


@dataclass(frozen=True)
class Rows:
    """An operand over neighbouring rows: pointer to the first, its elements per row and per column (0 or more)."""

    dtype: str
    pointer: Value
    row_stride: int
    column_stride: int


def _applies(node: Node, isa: Isa) -> bool:
    if not applies(node, isa) or node.output.elements == 0:
        return False
    inner = dims_of(node).inner
    return len(dims_of(node).extents) > 1 and isinstance(inner, int) and inner <= LONGEST


def _cost(node: Node, isa: Isa) -> float:
    dims = dims_of(node)
    elements, rows = typical(node.output.elements), typical(dims.extents[-2])
    single = rows % isa.lanes / max(rows, 1)
    work = elements * cycles(node.epilogue, isa.lanes, isa) * (single + (1 - single) / isa.lanes)
    return 0.2 + max(work / CYCLES_PER_MICROSECOND, traffic(node) / BYTES_PER_MICROSECOND)


@kernel("Pointwise", on="cpu", when=_applies, in_place=in_place, cost=_cost)
def pointwise_short(build: KernelBuilder, node: Node) -> None:
    """Groups of rows, then the remaining elements one by one; a work item is a row."""
    plan = plan_of(build, node, widest=build.isa.lanes)
    dims, inner, lanes = plan.dims, plan.dims.inner, plan.lanes
    assert isinstance(inner, int)

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        count = f.extent(dims.extents[-2])
        count = count if isinstance(count, int) else f.maximum(count, 1)

        def stretch(index: Value) -> None:
            start = index * count
            operands = _operands(f, plan, index)
            target = f.at(f.pointer(plan.result), start * (inner * size_of(plan.dtype)))
            result = Rows(plan.dtype, target, inner, 1)
            first, last = f.index(f.maximum(begin - start, 0)), f.minimum(end - start, count)
            whole = first + f.index(f.divide(last - first, lanes)) * lanes
            fixed = [_fixed(f, operand, inner, lanes) for operand in operands]
            f.loop(first, whole, lambda row: _group(f, plan, operands, fixed, result, row), step=lanes)
            f.loop(whole, last, lambda row: _one_by_one(f, plan, operands, result, row))

        f.loop(f.divide(begin, count), f.divide(end + (count - 1), count), stretch)

    build.phase(product(dims.outer), body, max(grain_of(plan, build.isa) // inner, lanes))


def _operands(f: PhaseFunction, plan: Plan, index: Value) -> list[Rows]:
    dims, last = plan.dims, len(plan.dims.extents) - 1
    coordinates = unravel(f, index, dims.extents[:-2])
    rows = []
    for i, (handle, dtype) in enumerate(zip(plan.operands, plan.dtypes, strict=True)):
        offset = dot(f, coordinates, [f.extent(dims.stride(i, d)) for d in range(last - 1)])
        pointer = f.at(f.pointer(handle), offset * size_of(dtype))
        rows.append(Rows(dtype, pointer, *_strides(dims, i, last)))
    return rows


def _strides(dims: Dims, operand: int, last: int) -> tuple[int, int]:
    row, column = dims.stride(operand, last - 1), dims.stride(operand, last)
    assert isinstance(row, int) and isinstance(column, int)
    return row, column


def _fixed(f: PhaseFunction, operand: Rows, inner: int, lanes: int) -> list[Value] | None:
    """The operand's vectors if they are the same for every group."""
    if operand.row_stride:
        return None
    if not operand.column_stride:
        return [broadcast(f, operand.dtype, operand.pointer, 0, lanes)] * inner
    pattern = Value(f, vector(register_element(operand.dtype), lanes), "poison")
    for column in range(inner):
        element = load(f, operand.dtype, operand.pointer, column * size_of(operand.dtype), 1)
        pattern = f.insert(pattern, element, column)
    return [f.shuffle(pattern, None, [(k * lanes + lane) % inner for lane in range(lanes)]) for k in range(inner)]


def _group(f: PhaseFunction, plan: Plan, operands: Sequence[Rows], fixed: Sequence[list[Value] | None], result: Rows,
           row: Value) -> None:  # fmt: skip
    """All elements of `lanes` rows. Everything is read before anything is written, for operands in place."""
    inner, lanes = result.row_stride, plan.lanes
    loaded = [_vectors(f, operand, row, inner, lanes) if known is None else known
              for operand, known in zip(operands, fixed, strict=True)]  # fmt: skip
    for k in range(inner):
        value = render_expression(f, plan.expression, [vectors[k] for vectors in loaded], plan.dtypes, lanes)
        place = row * (inner * size_of(plan.dtype)) + k * lanes * size_of(plan.dtype)
        store(f, plan.dtype, value, result.pointer, place)


def _vectors(f: PhaseFunction, operand: Rows, row: Value, inner: int, lanes: int) -> list[Value]:
    size = size_of(operand.dtype)
    place = row * (operand.row_stride * size)
    if operand.column_stride:
        return [load(f, operand.dtype, operand.pointer, place + k * lanes * size, lanes) for k in range(inner)]
    values = load(f, operand.dtype, operand.pointer, place, lanes)
    return [f.shuffle(values, None, [(k * lanes + lane) // inner for lane in range(lanes)]) for k in range(inner)]


def _one_by_one(f: PhaseFunction, plan: Plan, operands: Sequence[Rows], result: Rows, row: Value) -> None:
    f.loop(0, result.row_stride, lambda column: _single(f, plan, operands, result, row, column))


def _single(f: PhaseFunction, plan: Plan, operands: Sequence[Rows], result: Rows, row: Value, column: Value) -> None:
    def place(operand: Rows) -> Index:
        return (dot(f, (row, column), (operand.row_stride, operand.column_stride))) * size_of(operand.dtype)

    values = [load(f, operand.dtype, operand.pointer, place(operand), 1) for operand in operands]
    store(f, plan.dtype, render_expression(f, plan.expression, values, plan.dtypes, 1), result.pointer, place(result))
