"""Expand and Tile: copies whose source stands still on the repeated axes."""

from __future__ import annotations

from ingot.kernels import kernel
from ingot.kernels.cpu.build import KernelBuilder
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.moving import move_phase
from ingot.kernels.cpu.strided import STILL, Axis, Move, Stride, element_size, movable, move_cost, row_major
from ingot.kernels.node import Node
from ingot.plan.extent import Extent


def _cost(node: Node, isa: Isa) -> float:
    return move_cost(node.output.bytes)


def _broadcast(size: Extent, result: Extent, stride: Stride) -> Stride:
    """The source's stride where an axis of `size` becomes `result`: none for a size of 1, at run time too."""
    if size == result or size == 0:
        return stride
    return STILL if size == 1 else stride.times(f"min({size}-1,1)")


@kernel("Expand", on="cpu", when=lambda node, isa: movable(node), cost=_cost)
def expand_move(build: KernelBuilder, node: Node) -> None:
    """y[i…] = x[i… where x is longer than 1, 0 where not]."""
    source, target = node.input(0).shape, node.output.shape
    missing = len(target) - len(source)
    strides = [STILL] * missing + [
        _broadcast(size, result, stride)
        for size, result, stride in zip(source, target[missing:], row_major(source), strict=True)
    ]
    axes = tuple(map(Axis, target, strides, row_major(target)))
    move_phase(build, [Move(element_size(node.output), build.input(0), build.output(), axes)])


@kernel("Tile", on="cpu", when=lambda node, isa: movable(node), cost=_cost)
def tile_move(build: KernelBuilder, node: Node) -> None:
    """y = x repeated along every axis: each becomes two, the repetitions around the elements."""
    shape, repeats = node.input(0).shape, node.attributes["repeats"]
    doubled = [size for pair in zip(repeats, shape, strict=True) for size in pair]
    target = row_major(doubled)
    source = [stride for inner in row_major(shape) for stride in (STILL, inner)]
    move_phase(build, [Move(element_size(node.output), build.input(0), build.output(),
                            tuple(map(Axis, doubled, source, target)))])  # fmt: skip
