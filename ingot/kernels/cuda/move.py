"""Transpose, Reorder, Copy, Expand, Tile, Slice, Concat, Split: copies with other strides."""

from __future__ import annotations

from functools import reduce
from typing import Any

from ingot.kernels import Ports, kernel
from ingot.kernels.cuda.axes import HEADS, LAST, Axis, memory_order, ordered, strides_of
from ingot.kernels.cuda.build import CudaBuilder
from ingot.kernels.cuda.copying import Copy, emit_copies, emit_copy, movable, same_layouts
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, add, product


def _reorder_ports(node: Node, target: Any) -> list[Ports]:
    return [Ports((node.attributes["layout_from"],), (node.attributes["layout_to"],))]


@kernel("Reorder", on="cuda", when=movable, layouts=_reorder_ports)
def reorder(build: CudaBuilder, node: Node) -> None:
    """y = x in the other layout"""
    shape = node.output.shape
    sides = strides_of(shape, node.output.layout), strides_of(shape, node.input(0).layout)
    emit_copy(build, Copy(build.output(), build.input(0), ordered(shape, node.output.layout, sides)))


def _seen(node: Node, target: Any) -> list[Ports]:
    """The layouts in which the result has the same bytes as x."""
    perm = tuple(node.attributes["perm"])
    known = ((HEADS, 4), (LAST, 3))
    orders = {layout: memory_order(len(perm), layout) for layout, least in known if len(perm) >= least}
    same = [Ports((layout,), ("",)) for layout, order in orders.items() if order == perm]
    back = [Ports(("",), (layout,)) for layout, order in orders.items()
            if tuple(perm[axis] for axis in order) == tuple(range(len(perm)))]  # fmt: skip
    return [*same, *back]


@kernel("Transpose", on="cuda", when=lambda node, target: movable(node, target) and bool(_seen(node, target)),
        cost=lambda node, target: 0.0, in_place=lambda node: (0,), layouts=_seen)  # fmt: skip
def transpose_seen(build: CudaBuilder, node: Node) -> None:
    """The same bytes, seen with other axes: nothing to do where y takes the place of x"""
    emit_copy(build, Copy(build.output(), build.input(0), [Axis(node.output.elements, (1, 1))]))


@kernel("Transpose", on="cuda", when=movable)
def transpose(build: CudaBuilder, node: Node) -> None:
    """y[i…] = x[i permuted…]"""
    shape, source = node.output.shape, strides_of(node.input(0).shape)
    sides = strides_of(shape), tuple(source[p] for p in node.attributes["perm"])
    emit_copy(build, Copy(build.output(), build.input(0), ordered(shape, "plain", sides)))


@kernel("Copy", on="cuda", when=movable)
def copy(build: CudaBuilder, node: Node) -> None:
    """The same elements"""
    emit_copy(build, Copy(build.output(), build.input(0), [Axis(node.output.elements, (1, 1))]))


def _broadcast(size: Extent, result: Extent, stride: Extent) -> Extent:
    """The source's stride where an axis of `size` becomes `result`: none for a size of 1, at run time too."""
    if size == result:
        return stride
    return 0 if size == 1 else product((stride, f"min({size}-1,1)"))


@kernel("Expand", on="cuda", when=movable)
def expand(build: CudaBuilder, node: Node) -> None:
    """y[i…] = x[i… where x is longer than 1, 0 where not]"""
    source, shape = node.input(0).shape, node.output.shape
    missing = len(shape) - len(source)
    own = map(_broadcast, source, shape[missing:], strides_of(source))
    sides = strides_of(shape), (*[0] * missing, *own)
    emit_copy(build, Copy(build.output(), build.input(0), ordered(shape, "plain", sides)))


@kernel("Tile", on="cuda", when=movable)
def tile(build: CudaBuilder, node: Node) -> None:
    """x repeated along every axis: each becomes two, the repetitions around the elements"""
    shape = node.input(0).shape
    doubled = [size for pair in zip(node.attributes["repeats"], shape, strict=True) for size in pair]
    source = [stride for inner in strides_of(shape) for stride in (0, inner)]
    emit_copy(build, Copy(build.output(), build.input(0), ordered(doubled, "plain", (strides_of(doubled), source))))


@kernel("Slice", on="cuda", when=movable, layouts=same_layouts)
def slice_copy(build: CudaBuilder, node: Node) -> None:
    """Every step-th element from the start, on every axis"""
    shape, x = node.output.shape, node.input(0)
    own = strides_of(x.shape, x.layout)
    stepped = tuple(product((stride, step)) for stride, step in zip(own, node.attributes["steps"], strict=True))
    firsts: list[Extent] = [product(pair) for pair in zip(node.attributes["starts"], own, strict=True)]
    start = reduce(add, firsts) if firsts else 0
    axes = ordered(shape, node.output.layout, (strides_of(shape, node.output.layout), stepped))
    emit_copy(build, Copy(build.output(), build.input(0), axes, source_start=start))


@kernel("Concat", on="cuda", when=movable, layouts=same_layouts)
def concat(build: CudaBuilder, node: Node) -> None:
    """Each input to its place"""
    axis, y = node.attributes["axis"], node.output
    whole, copies = strides_of(y.shape, y.layout), []
    start: Extent = 0
    for index in range(len(node.inputs)):
        x = node.input(index)
        axes = ordered(x.shape, y.layout, (whole, strides_of(x.shape, x.layout if x.constant is None else "plain")))
        if x.elements != 0:
            copies.append(Copy(build.output(), build.input(index), axes, product((start, whole[axis]))))
        start = add(start, x.shape[axis])
    emit_copies(build, copies)


@kernel("Split", on="cuda", when=movable, layouts=same_layouts)
def split(build: CudaBuilder, node: Node) -> None:
    """Each output from its place"""
    axis, x = node.attributes["axis"], node.input(0)
    whole, copies = strides_of(x.shape, x.layout), []
    start: Extent = 0
    for index, y in enumerate(node.outputs):
        axes = ordered(y.shape, y.layout, (strides_of(y.shape, y.layout), whole))
        copies.append(Copy(build.output(index), build.input(0), axes, 0, product((start, whole[axis]))))
        start = add(start, y.shape[axis])
    emit_copies(build, copies)
