"""Concat and Split: copies of parts along one axis, all in one phase; blocked where the parts end with a block."""

from __future__ import annotations

from collections.abc import Sequence

from ingot.kernels import Ports, kernel
from ingot.kernels.cpu.build import KernelBuilder
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.moving import move_phase
from ingot.kernels.cpu.strided import (
    Axis,
    Move,
    element_size,
    layouts_with_blocked,
    movable,
    move_cost,
    row_major,
    stored_input,
    stored_shape,
)  # fmt: skip
from ingot.kernels.node import Node, Port
from ingot.plan.extent import Extent, add, product


def _layouts(node: Node, isa: Isa, parts: Sequence[Port]) -> Sequence[Ports]:
    """Along the channels every part but the last must fill its blocks."""
    if node.attributes["axis"] != 1:
        return layouts_with_blocked(node, True)
    channels = [part.shape[1] for part in parts]
    return layouts_with_blocked(node, all(isinstance(c, int) and c % isa.lanes == 0 for c in channels[:-1]))


def _cost(node: Node, isa: Isa) -> float:
    return move_cost(product((2, node.input(0).bytes if node.op == "Split" else node.output.bytes)))


def _starts(shapes: Sequence[Sequence[Extent]], axis: int) -> list[Extent]:
    """Where each part begins on the axis."""
    starts: list[Extent] = [0]
    for shape in shapes[:-1]:
        starts.append(add(starts[-1], shape[axis]))
    return starts


def _present(node: Node) -> list[Port]:
    return [node.input(i) for i in range(len(node.inputs))]


@kernel("Concat", on="cpu", when=lambda node, isa: movable(node), cost=_cost,
        layouts=lambda node, isa: _layouts(node, isa, _present(node)))  # fmt: skip
def concat_move(build: KernelBuilder, node: Node) -> None:
    """y = the inputs one after the other along the axis."""
    axis, size = node.attributes["axis"], element_size(node.output)
    shapes = [stored_shape(port, build.isa) for port in _present(node)]
    target = row_major(stored_shape(node.output, build.isa))
    moves = []
    for index, (shape, start) in enumerate(zip(shapes, _starts(shapes, axis), strict=True)):
        axes = tuple(map(Axis, shape, row_major(shape), target))
        place = product((start, target[axis].extent))
        moves.append(Move(size, stored_input(build, index), build.output(), axes, target_offset=place))
    move_phase(build, moves)


@kernel("Split", on="cpu", when=lambda node, isa: movable(node), cost=_cost,
        layouts=lambda node, isa: _layouts(node, isa, node.outputs))  # fmt: skip
def split_move(build: KernelBuilder, node: Node) -> None:
    """The outputs = consecutive parts of x along the axis."""
    axis, size = node.attributes["axis"], element_size(node.output)
    shapes = [stored_shape(port, build.isa) for port in node.outputs]
    source = row_major(stored_shape(node.input(0), build.isa))
    moves = []
    for index, (shape, start) in enumerate(zip(shapes, _starts(shapes, axis), strict=True)):
        axes = tuple(map(Axis, shape, source, row_major(shape)))
        place = product((start, source[axis].extent))
        moves.append(Move(size, stored_input(build, 0), build.output(index), axes, source_offset=place))
    move_phase(build, moves)
