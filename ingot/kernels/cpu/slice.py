"""Slice: a strided window; also of blocked feature maps, where its channels start at a block."""

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
    total,
)  # fmt: skip
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product


def _layouts(node: Node, isa: Isa) -> Sequence[Ports]:
    if len(node.output.shape) < 3:
        return layouts_with_blocked(node, False)
    start, step = node.attributes["starts"][1], node.attributes["steps"][1]
    return layouts_with_blocked(node, isinstance(start, int) and start % isa.lanes == 0 and step == 1)


def _cost(node: Node, isa: Isa) -> float:
    steps = node.attributes["steps"]
    return move_cost(product((2 if not steps or steps[-1] == 1 else 4, node.output.bytes)))


@kernel("Slice", on="cpu", when=lambda node, isa: movable(node), cost=_cost, layouts=_layouts)
def slice_move(build: KernelBuilder, node: Node) -> None:
    """y[i…] = x[start + i·step…]."""
    steps, starts = list(node.attributes["steps"]), list(node.attributes["starts"])
    if node.output.layout == "blocked":
        starts = [*starts[:1], starts[1] // build.isa.lanes, *starts[2:], 0]
        steps = [*steps, 1]
    source = row_major(stored_shape(node.input(0), build.isa))
    sizes = stored_shape(node.output, build.isa)
    target = row_major(sizes)
    axes = [Axis(size, a.times(step), b) for size, a, step, b in zip(sizes, source, steps, target, strict=True)]
    offsets: list[Extent] = [product((start, a.extent)) for start, a in zip(starts, source, strict=True)]
    move_phase(build, [Move(element_size(node.output), stored_input(build, 0), build.output(), tuple(axes),
                            total(offsets))])  # fmt: skip
