"""The nodes whose precision can be chosen: products of a float32 tensor with constant weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ingot.ir.graph import add_constant, constant_of, dtype_name, onnx_attribute
from ingot.ir.shapes import shape_of
from ingot.passes.common import remove_dead
from ingot.passes.fold import fold

Array = np.ndarray[Any, Any]
_FLOAT = "float32"
_IR_VERSION = 10  # has 4-bit integers


@dataclass(frozen=True)
class Target:
    """One product: its node, the tensor it reads, its weights, and the axis of the weights that is its output's."""

    node: ir.Node
    x: ir.Value
    weight: ir.Value
    axis: int

    @property
    def name(self) -> str:
        """The user's name of the node."""
        return str(self.node.name)

    @property
    def is_convolution(self) -> bool:
        """Whether its channels are axis 1, not the last."""
        return self.node.op_type == "Conv"

    @property
    def channel_axis(self) -> int:
        """The axis of `x` that is summed over (with a window, for convolutions)."""
        return 1 if self.is_convolution else -1

    @property
    def array(self) -> Array:
        """The weights."""
        array = constant_of(self.weight)
        assert array is not None
        return array

    @property
    def sum_axis(self) -> int:
        """The axis of the weights that is summed over."""
        return 1 - self.axis


def prepared(model: ir.Model) -> ir.Model:
    """A copy in which weights that are computed from constants are constants; integers that are dequantized stay."""
    copy = model.clone()
    copy.ir_version = max(copy.ir_version, _IR_VERSION)
    fold(copy, keep_integers=True)
    remove_dead(copy)
    return copy


def targets(model: ir.Model) -> list[Target]:
    """Of a prepared model, subgraphs included, in the order of the graph."""
    return [t for node in ir.traversal.RecursiveGraphIterator(model.graph) for t in _target(node)]


def _target(node: ir.Node) -> Iterator[Target]:
    if node.domain not in ("", "ai.onnx") or node.op_type not in _WEIGHT_AXES or len(node.inputs) < 2:
        return
    x, weight = node.inputs[0], node.inputs[1]
    array = constant_of(weight)
    if x is None or weight is None or array is None or array.dtype != np.float32 or constant_of(x) is not None:
        return
    axis = _WEIGHT_AXES[node.op_type](node, array)
    if axis is not None and dtype_name(x.dtype) == _FLOAT and shape_of(x) is not None and not is_dequantized(x):
        yield Target(node, x, weight, axis)


def is_dequantized(value: ir.Value) -> bool:
    """Whether the model's author has put it into integers already."""
    maker = value.producer()
    return maker is not None and maker.op_type == "DequantizeLinear"


def _of_gemm(node: ir.Node, array: Array) -> int | None:
    return None if onnx_attribute(node, "transA", 0) else 0 if onnx_attribute(node, "transB", 0) else 1


def _of_conv(node: ir.Node, array: Array) -> int | None:
    return 0


def _of_matmul(node: ir.Node, array: Array) -> int | None:
    return 1 if array.ndim == 2 else None


_WEIGHT_AXES: dict[str, Callable[[ir.Node, Array], int | None]] = {
    "Conv": _of_conv, "Gemm": _of_gemm, "MatMul": _of_matmul,
}  # fmt: skip


def replace_weight(target: Target, array: Array) -> ir.Value:
    """New weights for this node alone; returns them."""
    graph = target.node.graph
    assert isinstance(graph, ir.Graph)
    value = add_constant(graph, array.astype(np.float32), target.weight.name)
    target.node.replace_input_with(1, value)
    return value


def place_after(value: ir.Value, reader: ir.Node) -> tuple[ir.Graph, ir.Node, bool]:
    """Where nodes that continue `value` go: (graph, node, behind it or before it)."""
    maker = value.producer()
    if maker is not None and isinstance(maker.graph, ir.Graph):
        return maker.graph, maker, True
    graph = value.graph if isinstance(value.graph, ir.Graph) else reader.graph
    assert isinstance(graph, ir.Graph)
    return graph, graph[0], False
