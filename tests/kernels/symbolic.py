"""Kernels whose extents are symbols: one code, several sizes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ingot.ir.ops import TensorType, infer, meaning
from ingot.kernels import candidates
from ingot.kernels.cpu.standalone import Standalone
from ingot.kernels.node import Node, Port
from tests.kernels.harness import _compare, isas

Array = np.ndarray[Any, Any]
Shape = tuple[int | str, ...]


def symbolic_node(
    op: str, inputs: Sequence[Array | None], shapes: Sequence[Shape | None], attributes: Mapping[str, Any]
) -> Node:
    """The node over inputs of these symbolic shapes; inputs without a shape are constants."""
    types = [None if x is None else TensorType(x.dtype.name, x.shape if s is None else s)
             for x, s in zip(inputs, shapes, strict=True)]  # fmt: skip
    ports = tuple(
        None if t is None else Port(t.dtype, t.shape, x if s is None else None)
        for x, s, t in zip(inputs, shapes, types, strict=True)
    )
    outputs = tuple(Port(t.dtype, t.shape) for t in infer(op, types, attributes))
    return Node(op, ports, outputs, dict(attributes), name="under_test")


def check_symbolic(
    op: str, inputs: Sequence[Array | None], shapes: Sequence[Shape | None], symbols: Mapping[str, int],
    rtol: float = 1e-4, atol: float = 1e-5, **attributes: Any,
) -> None:  # fmt: skip
    """Every candidate with the symbols bound to these sizes against the meaning."""
    node = symbolic_node(op, inputs, shapes, attributes)
    expected = meaning(op)(*inputs, symbols=symbols, **attributes)
    for isa in isas():
        found = list(candidates(node, "cpu", isa))
        assert found, f"no kernel for {op} {shapes} on {isa.name}"
        for candidate in found:
            alone = Standalone(node, candidate, isa, symbols, level=1)
            for chunks in (1, 3):
                for mine, theirs in zip(alone(*inputs, chunks=chunks), expected, strict=True):
                    _compare(mine, theirs, rtol, atol, f"{candidate.label} {candidate.ports} on {isa.name}, {symbols}")
