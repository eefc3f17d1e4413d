"""Gather, GatherElements, GatherND: rows picked by indices, which are clamped so that nothing outside is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ingot.kernels import kernel
from ingot.kernels.cpu.build import KernelBuilder, PhaseFunction
from ingot.kernels.cpu.copying import copy_bytes, multiply
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Function, Index, Value
from ingot.kernels.cpu.moving import grain_of, stretches
from ingot.kernels.cpu.strided import Stride, element_size, movable, move_cost, row_major
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

INDEX_TYPES = {"int32": "i32", "int64": "i64"}


def indexable(node: Node, isa: Isa) -> bool:
    """Whether data and indices have types that kernels read."""
    return movable(node) and node.input(1).dtype in INDEX_TYPES


def _cost(node: Node, isa: Isa) -> float:
    return move_cost(product((3, node.output.bytes)))


def load_index(f: Function, indices: Value, position: Index, dtype: str, size: Index) -> Value:
    """indices[position] within [0, size): counted from the end where negative, clamped where out of range."""
    raw = f.load(INDEX_TYPES[dtype], indices, multiply(position, int(dtype[3:]) // 8))
    index = f.cast("sext", raw, "i64")
    index = f.select(f.compare("slt", index, 0), index + size, index)
    return f.index(f.maximum(f.minimum(index, size - 1), 0))


def offset_of(f: PhaseFunction, row: Index, sizes: Sequence[Extent], strides: Sequence[Stride],
              place: Callable[[int, Index], Index] = lambda axis, index: index) -> Index:  # fmt: skip
    """Σ place(k, iₖ)·stridesₖ for the indices whose row-major number within `sizes` is `row`."""
    offset: Index = 0
    rest = row
    for axis in reversed(range(len(sizes))):
        extent = f.extent(sizes[axis])
        index = f.remainder(rest, extent) if axis else rest
        rest = f.divide(rest, extent) if axis else rest
        offset = multiply(place(axis, index), f.extent(strides[axis].extent)) + offset
    return offset


@kernel("Gather", on="cpu", when=indexable, cost=_cost)
def gather_rows(build: KernelBuilder, node: Node) -> None:
    """y[o, k, :] = data[o, indices[k], :]; a work item is one row."""
    data, indices, axis = node.input(0), node.input(1), node.attributes.get("axis", 0)
    sources, places, target = build.input(0), build.input(1), build.output()
    size, inner = data.shape[axis], product((*data.shape[axis + 1 :], element_size(data)))
    count = product((*data.shape[:axis], indices.elements))

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        extent, row_bytes, picked = f.extent(size), f.extent(inner), f.extent(indices.elements)

        def rows(outer: Value, low: Index, high: Index) -> None:
            source = f.at(f.pointer(sources), multiply(multiply(outer, extent), row_bytes))
            result = f.at(f.pointer(target), multiply(multiply(outer, picked), row_bytes))

            def row(k: Value) -> None:
                index = load_index(f, f.pointer(places), k, indices.dtype, extent)
                copy_bytes(f, build.isa, f.at(source, multiply(index, row_bytes)), f.at(result, multiply(k, row_bytes)),
                           row_bytes)  # fmt: skip

            f.loop(low, high, row)

        f.when(f.compare("slt", begin, end), lambda: stretches(f, begin, end, picked, rows))

    build.phase(count, body, grain=grain_of(count, node.output.bytes))


@kernel("GatherElements", on="cpu", when=indexable, cost=_cost)
def gather_elements(build: KernelBuilder, node: Node) -> None:
    """y[i, j, k] = data[indices[i, j, k], j, k] for axis 0; a work item is one element."""
    data, indices, axis = node.input(0), node.input(1), node.attributes.get("axis", 0)
    sources, places, target, element = build.input(0), build.input(1), build.output(), element_size(data)
    strides, last = row_major(data.shape), len(data.shape) - 1
    fixed = [Stride(0) if k == axis else stride for k, stride in enumerate(strides)]

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        extent, along = f.extent(data.shape[axis]), f.extent(strides[axis].extent)

        def line(row: Value, low: Index, high: Index) -> None:
            base = offset_of(f, row, indices.shape[:last], fixed[:last])
            first = multiply(row, f.extent(indices.shape[last]))

            def one(j: Value) -> None:
                index = load_index(f, f.pointer(places), first + j, indices.dtype, extent)
                place = multiply(index, along) + base + multiply(j, 0 if axis == last else 1)
                copy_bytes(f, build.isa, f.at(f.pointer(sources), multiply(place, element)),
                           f.at(f.pointer(target), (first + j) * element), element)  # fmt: skip

            f.loop(low, high, one)

        length = f.extent(indices.shape[last])
        f.when(f.compare("slt", begin, end), lambda: stretches(f, begin, end, length, line))

    build.phase(indices.elements, body, grain=grain_of(indices.elements, node.output.bytes))


@kernel("GatherND", on="cpu", when=indexable, cost=_cost)
def gather_nd(build: KernelBuilder, node: Node) -> None:
    """y[b, k, :] = data[b, indices[b, k, 0], indices[b, k, 1], …, :]; a work item is one slice."""
    data, indices, batch = node.input(0), node.input(1), node.attributes.get("batch_dims", 0)
    sources, places, target = build.input(0), build.input(1), build.output()
    depth = indices.shape[-1]
    assert isinstance(depth, int)
    sizes, inner = data.shape[batch : batch + depth], product((*data.shape[batch + depth :], element_size(data)))
    count, per_batch = product(indices.shape[:-1]), product(indices.shape[batch:-1])

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        row_bytes = f.extent(inner)

        def item(k: Value) -> None:
            place: Index = f.divide(k, f.extent(per_batch)) if batch else 0
            for position, size in enumerate(sizes):
                index = load_index(f, f.pointer(places), k * depth + position, indices.dtype, f.extent(size))
                place = index + multiply(place, f.extent(size))
            copy_bytes(f, build.isa, f.at(f.pointer(sources), multiply(place, row_bytes)),
                       f.at(f.pointer(target), multiply(k, row_bytes)), row_bytes)  # fmt: skip

        f.loop(begin, end, item)

    build.phase(count, body, grain=grain_of(count, node.output.bytes))
