"""GatherElements, GatherND, ScatterElements, ScatterND: elements whose places are read from a tensor. Negative indices
count from the end, others are kept within the tensor. Where updates are combined, one thread does it in their order, so
that results do not vary from run to run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ingot.ir.elementwise import INTEGERS
from ingot.kernels import kernel
from ingot.kernels.cuda.axes import Axis, offset, strides_of, unravel
from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.copying import Copy, emit_copy, movable
from ingot.kernels.cuda.pointwise import block_for, element_index
from ingot.kernels.cuda.render import NARROW, REAL, converted, wide
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, ceil_div, product

_COMBINED = {
    "add": "{0} + {1}", "mul": "{0} * {1}", "max": "tl.where({1} != {1}, {1}, tl.where({1} > {0}, {1}, {0}))",
    "min": "tl.where({1} != {1}, {1}, tl.where({1} < {0}, {1}, {0}))",
}  # fmt: skip


def _applies(node: Node, target: Any) -> bool:
    if not movable(node, target) or node.input(1).dtype not in ("int32", "int64"):
        return False
    reduction = node.attributes.get("reduction", "none")
    return reduction == "none" or (reduction in _COMBINED and node.dtype in (*NARROW, *REAL, *INTEGERS))


def _has_depth(node: Node, target: Any) -> bool:
    return _applies(node, target) and isinstance(node.input(1).shape[-1], int)


def _start(build: CudaBuilder, total: Extent) -> tuple[FunctionBuilder, str, str, int]:
    """(function, index, mask, elements a block) for one element a lane."""
    block = block_for(total, build.target.processors)
    f = build.function(warps=max(block // 256, 1), stages=1)
    return f, *element_index(f, total, block), block


def _at(f: FunctionBuilder, indices: Handle, place: str, size: Extent, mask: str) -> str:
    """A variable with the index that is read at `place`, within 0 … size - 1."""
    number = f.extent(size)
    at = f.let(f"tl.load({f.pointer(indices)} + {place}, {mask}, other=0)")
    at = f.let(f"tl.where({at} < 0, {at} + {number}, {at})")
    return f.let(f"tl.minimum(tl.maximum({at}, 0), {number} - 1).to(tl.int32)")


@kernel("GatherElements", on="cuda", when=_applies)
def gather_elements(build: CudaBuilder, node: Node) -> None:
    """y[i, j] = data[indices[i, j], j] for axis 0"""
    data, axis, shape = node.input(0), node.attributes["axis"], node.output.shape
    f, index, mask, block = _start(build, node.output.elements)
    places = unravel(f, index, shape)
    places[axis] = _at(f, build.input(1), index, data.shape[axis], mask)
    f.emit(f"value = tl.load({f.pointer(build.input(0))} + {offset(f, places, strides_of(data.shape))}, {mask})")
    f.emit(f"tl.store({f.pointer(build.output())} + {index}, value, {mask})")
    f.launch(ceil_div(node.output.elements, block))


def _tuple(f: FunctionBuilder, indices: Handle, row: str, sizes: Sequence[Extent], mask: str) -> list[str]:
    """Variables with the places that the row of the indices names, one per axis."""
    return [_at(f, indices, f"{row} * {len(sizes)} + {k}", size, mask) for k, size in enumerate(sizes)]


@kernel("GatherND", on="cuda", when=_has_depth)
def gather_nd(build: CudaBuilder, node: Node) -> None:
    """y[b…, i…] = data[b…, indices[b…, i, :], i…]"""
    data, indices, batch = node.input(0), node.input(1), node.attributes["batch_dims"]
    depth, rank = int(indices.shape[-1]), len(indices.shape) - 1
    f, index, mask, block = _start(build, node.output.elements)
    inner = product(node.output.shape[rank:])
    row = f.let(f"{index} // {f.extent(inner)}")
    outer = unravel(f, row, indices.shape[:-1])[:batch] if batch else []
    named = _tuple(f, build.input(1), row, data.shape[batch : batch + depth], mask)
    start = offset(f, [*outer, *named], strides_of(data.shape)[: batch + depth])
    f.emit(f"value = tl.load({f.pointer(build.input(0))} + {start} + {index} % {f.extent(inner)}, {mask})")
    f.emit(f"tl.store({f.pointer(build.output())} + {index}, value, {mask})")
    f.launch(ceil_div(node.output.elements, block))


def _data_first(build: CudaBuilder, node: Node) -> None:
    """data where y is, unless it is already there."""
    emit_copy(build, Copy(build.output(), build.input(0), [Axis(node.output.elements, (1, 1))]))


def _put(build: CudaBuilder, f: FunctionBuilder, place: str, source: str, mask: str) -> None:
    """The update at `source` stored at `place`, or combined with what is there."""
    y, reduction = build.node.output.dtype, build.node.attributes["reduction"]
    f.emit(f"update = tl.load({f.pointer(build.input(2))} + {source}, {mask})")
    target = f"{f.pointer(build.output())} + {place}"
    if reduction == "none":
        f.emit(f"tl.store({target}, update, {mask})")
        return
    f.emit(f"held = {converted(f'tl.load({target}, {mask})', y, wide(y))}")
    f.emit(f"update = {converted('update', y, wide(y))}")
    combined = f"({_COMBINED[reduction].format('held', 'update')})"
    f.emit(f"tl.store({target}, {converted(combined, wide(y), y)}, {mask})")


@kernel("ScatterElements", on="cuda", when=_applies, in_place=lambda node: (0,))
def scatter_elements(build: CudaBuilder, node: Node) -> None:
    """y = data with y[indices[i, j], j] = updates[i, j] for axis 0; a lane has all updates of one line of the axis"""
    shape, axis, whole = node.input(1).shape, node.attributes["axis"], strides_of(node.output.shape)
    _data_first(build, node)
    lines = (*shape[:axis], *shape[axis + 1 :])
    f, index, mask, block = _start(build, product(lines))
    places = unravel(f, index, lines) if lines else []
    along = strides_of(shape)
    first = f.let(offset(f, places, (*along[:axis], *along[axis + 1 :])))
    line = f.let(offset(f, places, (*whole[:axis], *whole[axis + 1 :])))
    with f.block(f"for step in range(0, {f.extent(shape[axis])}):"):
        source = f.let(f"{first} + step * {f.extent(along[axis])} + index * 0")
        at = _at(f, build.input(1), source, node.output.shape[axis], mask)
        _put(build, f, f"{line} + {at} * {f.extent(whole[axis])}", source, mask)
    f.launch(ceil_div(product(lines), block))


@kernel("ScatterND", on="cuda", when=_has_depth, in_place=lambda node: (0,))
def scatter_nd(build: CudaBuilder, node: Node) -> None:
    """y = data with y[indices[i, :]] = updates[i]; updates that are combined pass one after the other"""
    y, indices = node.output, node.input(1)
    depth = int(indices.shape[-1])
    _data_first(build, node)
    rows, inner = product(indices.shape[:-1]), product(y.shape[depth:])
    combined = node.attributes["reduction"] != "none"
    total = inner if combined else product((rows, inner))
    f, index, mask, block = _start(build, total)
    with f.block(f"for row in range(0, {f.extent(rows)}):" if combined else "if True:"):
        if not combined:
            f.emit(f"row = {index} // {f.extent(inner)}")
        within = index if combined else f.let(f"{index} % {f.extent(inner)}")
        named = _tuple(f, build.input(1), f"(row + {index} * 0)", y.shape[:depth], mask)
        start = offset(f, named, strides_of(y.shape)[:depth])
        _put(build, f, f"{start} + {within}", f"row * {f.extent(inner)} + {within}", mask)
    f.launch(ceil_div(total, block))
