"""Range: sizes become elements."""

from __future__ import annotations

from ingot.kernels import kernel
from ingot.kernels.cpu.build import KernelBuilder, PhaseFunction
from ingot.kernels.cpu.copying import multiply
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Value
from ingot.kernels.cpu.render import MEMORY, store
from ingot.kernels.cpu.render_convert import convert
from ingot.kernels.cpu.strided import element_size, move_cost
from ingot.kernels.node import Node


def _cost(node: Node, isa: Isa) -> float:
    return move_cost(node.output.bytes)


@kernel("Range", on="cpu", when=lambda node, isa: node.dtype in MEMORY, cost=_cost)
def range_steps(build: KernelBuilder, node: Node) -> None:
    """y[i] = start + i·step."""
    target, dtype = build.output(), node.output.dtype
    start, step = node.attributes.get("start", 0), node.attributes.get("step", 1)

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        def element(i: Value) -> None:
            number = f.index(multiply(i, f.extent(step)) + f.extent(start))
            store(f, dtype, convert(f, number, "int64", dtype), f.pointer(target), i * element_size(node.output))

        f.loop(begin, end, element)

    build.phase(node.output.elements, body, grain=4096)
