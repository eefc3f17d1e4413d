"""Small tensors that follow from constants and static shapes: found while shapes are inferred, through the oracle."""

from __future__ import annotations

import logging
import math

import numpy as np
import onnx_ir

from ingot.errors import IngotError
from ingot.ir import oracle

_log = logging.getLogger(__name__)
_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
)


def propagate(model: onnx_ir.Model, most_elements: int) -> bool:
    """Set `const_value` on every small node output that can be computed now; True if there was a new one."""
    opset = dict(model.opset_imports)
    found = False
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type == "Shape" and node.domain == "":
            found |= _fold_shape(node)
        elif node.op_type == "Size" and node.domain == "":
            found |= _fold_size(node)
        elif node.op_type == "If":
            found |= _take_branch(node)
        elif _is_foldable(node, most_elements):
            found |= _fold(node, opset, most_elements)
    return found


def _is_foldable(node: onnx_ir.Node, most_elements: int) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_type in _RANDOM or not node.outputs:
        return False
    if all(output.const_value is not None for output in node.outputs) or node.op_type == "Constant":
        return False
    if any(attribute.type == onnx_ir.AttributeType.GRAPH for attribute in node.attributes.values()):
        return False
    if any(output.shape is not None and _elements(output.shape) > most_elements for output in node.outputs):
        return False
    tensors = [None if value is None else onnx_ir.convenience.get_const_tensor(value) for value in node.inputs]
    return all(
        value is None or (tensor is not None and tensor.size <= most_elements)
        for value, tensor in zip(node.inputs, tensors, strict=True)
    )


def _elements(shape: onnx_ir.Shape) -> int:
    """At least how many elements there are, as far as the extents are known."""
    return math.prod(dim for dim in shape.dims if isinstance(dim, int) and dim > 0)


def _fold(node: onnx_ir.Node, opset: dict[str, int], most_elements: int) -> bool:
    inputs = [None if v is None else _array(v) for v in node.inputs]
    try:
        results = oracle.compile_node(onnx_ir.to_proto(node).SerializeToString(), opset)(inputs)
    except (IngotError, ValueError, TypeError, IndexError, ArithmeticError, RuntimeError, MemoryError) as error:
        # What is wrong with the node will be said where it counts: by shape inference or when the model runs.
        _log.debug("not folded: %s: %s", node.name, error)
        return False
    found = False
    for output, result in zip(node.outputs, results, strict=False):
        if isinstance(result, np.ndarray) and result.size <= most_elements and result.dtype != object:
            found |= _set_constant(output, result)
    return found


def _array(value: onnx_ir.Value) -> np.ndarray:
    tensor = onnx_ir.convenience.get_const_tensor(value)
    assert tensor is not None, value.name
    return tensor.numpy()


def _set_constant(value: onnx_ir.Value, array: np.ndarray) -> bool:
    if value.const_value is not None:
        return False
    value.const_value = onnx_ir.tensor(array, name=value.name)
    value.shape, value.dtype = onnx_ir.Shape(array.shape), value.const_value.dtype
    return True


def _fold_shape(node: onnx_ir.Node) -> bool:
    source = node.inputs[0]
    if source is None or source.shape is None:
        return False
    dims = source.shape.dims
    start, end = (node.attributes.get_int("start", 0), node.attributes.get_int("end", len(dims)))
    wanted = dims[slice(start, end)]
    if not all(isinstance(dim, int) for dim in wanted):
        return False
    return _set_constant(node.outputs[0], np.array(wanted, np.int64))


def _fold_size(node: onnx_ir.Node) -> bool:
    source = node.inputs[0]
    if source is None or source.shape is None or not source.shape.is_static():
        return False
    return _set_constant(node.outputs[0], np.array(np.prod(source.shape.numpy(), dtype=np.int64), np.int64))


def _take_branch(node: onnx_ir.Node) -> bool:
    """An If whose condition is known has the constants of the branch taken."""
    condition = node.inputs[0]
    tensor = None if condition is None else onnx_ir.convenience.get_const_tensor(condition)
    if tensor is None or tensor.size != 1:
        return False
    branch = node.attributes["then_branch" if tensor.numpy().item() else "else_branch"].as_graph()
    found = False
    for output, result in zip(node.outputs, branch.outputs, strict=True):
        tensor = onnx_ir.convenience.get_const_tensor(result)
        if tensor is not None and output.const_value is None:
            output.const_value = tensor
            output.shape, output.dtype = onnx_ir.Shape(tensor.shape.numpy()), tensor.dtype
            found = True
    return found
