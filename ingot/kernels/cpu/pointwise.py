"""Pointwise: an expression over broadcast operands, vectorised along the last axis."""

from __future__ import annotations

from typing import Any

from ingot.kernels import kernel
from ingot.kernels.cpu.build import KernelBuilder, PhaseFunction
from ingot.kernels.cpu.llvm import Value
from ingot.kernels.cpu.render import can_render, load, render_expression, store
from ingot.kernels.node import Node


def _same_shape(node: Node, isa: Any) -> bool:
    ports = [p for p in node.inputs if p is not None]
    dtypes = [p.dtype for p in ports]
    return all(p.shape == node.output.shape and p.dtype == "float32" for p in (*ports, node.output)) and can_render(
        node.epilogue, dtypes
    )


@kernel("Pointwise", on="cpu", when=_same_shape, in_place=lambda node: range(len(node.inputs)))
def pointwise_same(build: KernelBuilder, node: Node) -> None:
    """Operands and result of one shape: a flat loop, tail masked."""
    lanes = build.isa.lanes
    operands = [build.input(i) for i in range(len(node.inputs))]
    result, dtypes = build.output(), [p.dtype for p in node.inputs if p is not None]

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        def vectors(i: Value, mask: Value | None = None) -> None:
            values = [load(f, t, f.pointer(o), i * 4, lanes, mask) for o, t in zip(operands, dtypes, strict=True)]
            store(f, "float32", render_expression(f, node.epilogue, values, dtypes, lanes), f.pointer(result), i * 4, mask)

        whole = f.index(f.divide(end - begin, lanes)) * lanes + begin
        f.loop(begin, whole, lambda i: vectors(i), step=lanes)  # type: ignore[func-returns-value]
        f.loop(whole, end, lambda i: vectors(i, f.first_lanes(end - i, lanes)), step=lanes)  # type: ignore[func-returns-value]

    build.phase(node.output.elements, body, grain=1024)
