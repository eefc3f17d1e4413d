"""QuantizedLinear with weights that are restored when the engine is built: the kernels of Linear.

Where rows are many and known and the layer is small, making numbers of integers in every run takes longer than reading
numbers: an encoder of sentences was at two thirds of float32's speed without these. Larger in the engine than the
integers; language models, whose rows only the run knows, keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ingot.config import BFLOAT16_ERROR, SPLIT_ERROR
from ingot.kernels import Kernel, kernel, registered
from ingot.kernels.cpu import linear, linear_tiles
from ingot.kernels.cpu.build import KernelBuilder
from ingot.kernels.cpu.gemm_tiles import SPLIT
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.weight_only import split_dot
from ingot.kernels.cpu.weight_only_product import TALLEST
from ingot.kernels.node import Node, Port

Array = np.ndarray[Any, Any]
OPERANDS = 4  # inputs before the epilogue's


def restored(node: Node) -> Node:
    """The Linear that the node is; inputs keep their places."""
    weight_KN, scale_GN = node.input(1).constant, node.input(2).constant
    assert weight_KN is not None and scale_GN is not None
    of_depth = np.arange(len(weight_KN)) // int(node.attributes["group"])
    centred_KN = weight_KN.astype(np.float32)
    zero_GN = node.input(3).constant if node.has_input(3) else None
    if zero_GN is not None:
        centred_KN -= zero_GN.astype(np.float32)[of_depth]
    return _with_weight(node, centred_KN * scale_GN.astype(np.float32)[of_depth])


def _outline(node: Node) -> Node:
    """The same with a weight of no numbers: for questions that its size answers."""
    return _with_weight(node, np.broadcast_to(np.float32(0), _shape(node)))


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.input(1).shape)


def _with_weight(node: Node, weight_KN: Array) -> Node:
    port = Port("float32", _shape(node), weight_KN)
    inputs = (node.inputs[0], port, None, None, *node.inputs[OPERANDS:])
    return replace(node, op="Linear", inputs=inputs, attributes={})


def _is_split(node: Node) -> bool:
    """Whether integers would be made two numbers each in every run; as one they are multiplied sooner than restored
    ones."""
    return split_dot(node) is SPLIT


def _declaration(entry: Kernel, worth: Callable[[Node], bool] = lambda node: True) -> Mapping[str, Any]:
    """when, space, prune and cost of a kernel of Linear, asked about the Linear that a node is, if it is `worth` it."""
    cost = entry.cost
    assert cost is not None

    def applies(node: Node, isa: Isa) -> bool:
        constants = [node.input(1), node.input(2), *([node.input(3)] if node.has_input(3) else [])]
        many = all(isinstance(size, int) for size in node.input(0).shape) and _rows(node) > TALLEST
        known = all(port.constant is not None for port in constants)
        return many and known and worth(node) and entry.when(_outline(node), isa)

    return {
        "when": applies,
        "cost": lambda node, isa, **tactic: cost(_outline(node), isa, **tactic),
        "prune": lambda node, isa, **tactic: entry.prune(_outline(node), isa, **tactic),
        "space": {name: _values(axis) for name, axis in entry.space.items()},
    }


def _values(axis: Any) -> Any:
    """The values of a tactic's parameter, which may depend on the node."""
    return (lambda node, isa: axis(_outline(node), isa)) if callable(axis) else axis


def _rows(node: Node) -> int:
    return int(np.prod([int(size) for size in node.input(0).shape[:-1]], dtype=np.int64))


@kernel("QuantizedLinear", on="cpu", **_declaration(registered("Linear", "cpu", "linear")))
def weight_only_restored(build: KernelBuilder, node: Node, rows: int, vectors: int, depth: int) -> None:
    """As linear."""
    linear.linear(build, restored(node), rows, vectors, depth)


@kernel("QuantizedLinear", on="cpu", **_declaration(registered("Linear", "cpu", "linear_split"), _is_split),
        tolerance=SPLIT_ERROR)  # fmt: skip
def weight_only_restored_split(build: KernelBuilder, node: Node, height: int, wide: int) -> None:
    """As linear_split."""
    linear_tiles.linear_split(build, restored(node), height, wide)


@kernel("QuantizedLinear", on="cpu", **_declaration(registered("Linear", "cpu", "linear_rounded")),
        tolerance=BFLOAT16_ERROR)  # fmt: skip
def weight_only_restored_rounded(build: KernelBuilder, node: Node, height: int, wide: int) -> None:
    """As linear_rounded."""
    linear_tiles.linear_rounded(build, restored(node), height, wide)
