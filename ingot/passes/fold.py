"""Constant folding through the oracle, with a cap on what a result may take."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir

from ingot.errors import IngotError
from ingot.ir import oracle
from ingot.ir.elementwise import Array
from ingot.ir.graph import (
    DOMAIN,
    add_constant,
    constant_of,
    dtype_of,
    fresh_name,
    is_shape_known,
    make_node,
    shape,
    substitute,
)
from ingot.ir.provenance import origins, set_origins
from ingot.ir.shapes import shape_of

_log = logging.getLogger(__name__)
LARGEST_GROWTH = 1 << 20  # bytes: a result may always be this large, or as large as what it is made of
_INTEGERS, _FLOAT8 = (ir.DataType.INT8, ir.DataType.UINT8), (ir.DataType.FLOAT8E4M3FN,)
RANDOM = frozenset({
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli",
})  # fmt: skip


def fold(
    model: ir.Model, largest_growth: int = LARGEST_GROWTH, keep_integers: bool = False, keep_float8: bool = False
) -> int:
    """Replace nodes that only read constants by initializers, in place, subgraphs included; the number of nodes gone.

    A graph output stays a node: a View of the constant. What the oracle cannot compute stays as well, and with
    `keep_integers` (`keep_float8`) such weights under a Dequantize, for products that can take them as they are.
    """
    opsets = dict(model.opset_imports)
    kept = frozenset((*(_INTEGERS if keep_integers else ()), *(_FLOAT8 if keep_float8 else ())))
    return sum(_fold_graph(graph, opsets, largest_growth, kept) for graph in _graphs(model.graph))


def empty_inputs(model: ir.Model) -> int:
    """Inputs for lists (rank 1, integers) that can hold no element become constants; the number of them.

    The inputs stay, unread: an exporter makes them for axes that are left out.
    """
    empty = [value for value in model.graph.inputs
             if value.dtype in (ir.DataType.INT32, ir.DataType.INT64) and shape_of(value) == (0,)
             and value.uses() and not value.is_graph_output()]  # fmt: skip
    for value in empty:
        value.replace_all_uses_with(add_constant(model.graph, np.empty(0, dtype_of(value)), value.name))
    return len(empty)


def _dequantizes(node: ir.Node, kept: frozenset[ir.DataType]) -> bool:
    """Whether the node makes wider floats of one of these types."""
    source = node.inputs[0] if node.inputs else None
    if source is None or source.dtype not in kept:
        return False
    if node.op_type == "Pointwise" and node.domain == DOMAIN:
        return "Dequantize" in node.attributes["expression"].as_string()
    return node.op_type == "DequantizeLinear"


def _graphs(graph: ir.Graph) -> list[ir.Graph]:
    """Inner graphs last, as they may read constants of the outer ones."""
    return [graph, *(inner for inner in graph.subgraphs() if inner is not graph)]


def _fold_graph(
    graph: ir.Graph, opsets: Mapping[str, int], largest_growth: int, kept: frozenset[ir.DataType]
) -> int:
    count = 0
    for node in list(graph):
        if _dequantizes(node, kept) or not _is_foldable(node, largest_growth):
            continue
        results = _results(node, opsets)
        if results is not None and all(_fits(node, result, largest_growth) for result in results):
            _replace(graph, node, results)
            count += 1
    return count


def _is_foldable(node: ir.Node, largest_growth: int) -> bool:
    if node.op_type in RANDOM or any(a.type in _GRAPHS for a in node.attributes.values()):
        return False
    if node.op_type == "View" and node.domain == DOMAIN and node.outputs[0].is_graph_output():
        return False
    if all(_known(output) for output in node.outputs):
        return True
    if not all(value is None or constant_of(value) is not None for value in node.inputs):
        return False
    return not any(_expected_bytes(value) > max(largest_growth, _input_bytes(node)) for value in node.outputs)


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _known(value: ir.Value) -> bool:
    """Whether inference has already found the value."""
    return value.const_value is not None and constant_of(value) is not None


def _expected_bytes(value: ir.Value) -> int:
    """Size of a result as far as inference knows it."""
    if value.dtype is None or value.dtype == ir.DataType.STRING or not is_shape_known(value):
        return 0
    return math.prod(d if isinstance(d, int) else 0 for d in shape(value)) * math.ceil(value.dtype.itemsize)


def _input_bytes(node: ir.Node) -> int:
    arrays = (constant_of(value) for value in node.inputs)
    return sum(array.nbytes for array in arrays if array is not None)


def _fits(node: ir.Node, result: object, largest_growth: int) -> bool:
    """Whether a result is an array of numbers that is not too large."""
    if not isinstance(result, np.ndarray) or result.dtype.kind in "OUSc":
        return False
    return result.nbytes <= max(largest_growth, _input_bytes(node))


def _results(node: ir.Node, opsets: Mapping[str, int]) -> list[Array] | None:
    """The node's outputs; None where the oracle cannot compute them (which running the model will then say)."""
    if all(_known(output) for output in node.outputs):
        return [array for output in node.outputs if (array := constant_of(output)) is not None]
    proto: onnx.NodeProto = ir.to_proto(node)
    try:
        return oracle.compile_node(proto.SerializeToString(), opsets)([constant_of(v) for v in node.inputs])  # type: ignore[return-value]
    except (IngotError, ValueError, TypeError, IndexError, ArithmeticError, RuntimeError, MemoryError) as error:
        _log.debug("not folded: %s: %s", node.name, error)  # what is wrong with the node will be said when it runs
        return None


def _replace(graph: ir.Graph, node: ir.Node, results: list[Array]) -> None:
    """Initializers under the names of the node's outputs."""
    last = node
    for value, array in zip(list(node.outputs), results, strict=False):
        constant = _initializer(graph, value, array)
        if value.is_graph_output():
            view = make_node("View", [constant], {"shape": array.shape}, name=node.name)
            graph.insert_after(last, view)
            set_origins(view, origins(node))
            substitute(value, view.outputs[0])
            last = view
        else:
            value.replace_all_uses_with(constant)
    graph.remove(node, safe=True)


def _initializer(graph: ir.Graph, value: ir.Value, array: Array) -> ir.Value:
    name = value.name or "constant"
    if value.is_graph_output():
        name = fresh_name(graph, f"{name}.constant")
    else:
        value.name = f"{name}.folded"
    tensor = ir.tensor(np.array(array, order="C"), name=name)
    constant = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(constant)
    return constant
