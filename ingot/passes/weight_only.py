"""Products with weights that a DequantizeLinear makes floats of: QuantizedLinear, whose weights stay integers.

Only where x is no integer itself: products of two dequantized operands run in integers (fuse_quant).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from ingot.errors import GraphError
from ingot.ir.elementwise import Array
from ingot.ir.graph import DOMAIN, constant_of, dtype_name, is_shape_known, replace_node, shape, type_of
from ingot.ir.oracle_ops.microsoft import unpacked
from ingot.passes.canonical_table import MICROSOFT, Builder
from ingot.passes.common import graphs_of

BITS = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8}
GROUP_STEP = 8  # weights that kernels keep in one word share a scale
_MOVES = frozenset({
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Slice", "Split", "Concat", "Expand",
    "Gather",
})  # fmt: skip


@dataclass(frozen=True, eq=False)
class Weights:
    """(weight[K, N] - zero[K / group, N]) * scale[K / group, N], the weights `bits` wide but a byte each."""

    weight_KN: Array
    scale_GN: Array
    zero_GN: Array | None
    bits: int
    group: int


def keep_weights(model: ir.Model) -> int:
    """Replace MatMul, Gemm and MatMulNBits of quantized constants, in place, subgraphs included; how many."""
    model.opset_imports.setdefault(DOMAIN, 1)
    nodes = [node for graph in graphs_of(model) for node in graph]
    return sum(_replaced(node) for node in nodes)


def _replaced(node: ir.Node) -> bool:
    function = _TABLE.get((node.domain, node.op_type))
    if function is None or any(value is not None and not _is_known(value) for value in (*node.inputs, *node.outputs)):
        return False
    op = Builder(node, node.version or 1)
    result = function(op)
    if result is None:
        op.discard()
        return False
    replace_node(node, op.nodes, [result])
    return True


def _is_known(value: ir.Value) -> bool:
    return dtype_name(value.dtype) is not None and is_shape_known(value)


def _matmul(op: Builder) -> ir.Value | None:
    """MatMul(x, DequantizeLinear(w)) => QuantizedLinear(x, w)"""
    weights = _weights_of(op.x(1), flipped=False)
    return None if weights is None else _product(op, op.x(0), weights)


def _gemm(op: Builder) -> ir.Value | None:
    """alpha * x @ DequantizeLinear(w) + beta * c => QuantizedLinear(x, w) and a Pointwise"""
    if op.attribute("transA", 0):
        return None
    weights = _weights_of(op.x(1), bool(op.attribute("transB", 0)))
    alpha = op.attribute("alpha", 1.0)
    if weights is not None and alpha != 1:
        weights = replace(weights, scale_GN=weights.scale_GN.astype(np.float32) * np.float32(alpha))
    result = None if weights is None else _product(op, op.x(0), weights)
    beta = float(op.attribute("beta", 1.0))
    if result is None or not op.given(2) or beta == 0:
        return result
    if beta == 1:
        return op.pointwise("Add %0 %1 -> float32", result, op.x(2))
    return op.pointwise(f"Mul %1 {beta} -> float32; Add %0 $0 -> float32", result, op.x(2))


def _matmul_bits(op: Builder) -> ir.Value | None:
    """com.microsoft.MatMulNBits(x, w) => QuantizedLinear(x, w)"""
    bits, group = int(op.attribute("bits", 4)), int(op.attribute("block_size", 0))
    columns, depth = int(op.attribute("N", 0)), int(op.attribute("K", 0))
    packed, scales, zeros = (op.constant_input(index) for index in (1, 2, 3))
    if bits not in (4, 8) or packed is None or scales is None or op.given(4) or op.varies(3):
        return None
    if zeros is not None and zeros.dtype != np.uint8:
        return None
    blocks = -(-depth // group)
    weight_NK = unpacked(packed.reshape(columns, blocks, -1), bits).reshape(columns, -1)[:, :depth]
    zero_NG = np.full((columns, blocks), 1 << (bits - 1), np.uint8)
    if zeros is not None:
        zero_NG = unpacked(zeros.reshape(columns, -1), bits)[:, :blocks]
    found = Weights(weight_NK.T, scales.reshape(columns, blocks).T, zero_NG.T, bits, group)
    result = _product(op, op.x(0), found)
    return result if result is None or not op.given(5) else op.pointwise("Add %0 %1 -> float32", result, op.x(5))


_TABLE: dict[tuple[str, str], Callable[[Builder], ir.Value | None]] = {
    ("", "MatMul"): _matmul,
    ("", "Gemm"): _gemm,
    (MICROSOFT, "MatMulNBits"): _matmul_bits,
}


def _product(op: Builder, x: ir.Value, found: Weights) -> ir.Value | None:
    """The product, where kernels have such weights."""
    kind = type_of(x)
    one_group = found.group >= found.weight_KN.shape[0]
    if kind is None or kind.dtype != "float32" or len(kind.shape) < 2 or kind.shape[-1] != found.weight_KN.shape[0]:
        return None
    if _is_integer(x) or not found.weight_KN.size or not (one_group or found.group % GROUP_STEP == 0):
        return None
    like = op.node.inputs[1]
    zero = None if found.zero_GN is None or not found.zero_GN.any() else op.constant(found.zero_GN, like)
    weight, scale = op.constant(found.weight_KN, like), op.constant(found.scale_GN, like)
    result: ir.Value = op.QuantizedLinear(x, weight, scale, zero, bits=found.bits, group=found.group)
    return result


def _is_integer(value: ir.Value) -> bool:
    """Whether the value was dequantized, and at most moved since."""
    node = value.producer()
    while node is not None and node.op_type in _MOVES and node.inputs and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "DequantizeLinear"


def _weights_of(value: ir.Value, flipped: bool) -> Weights | None:
    """What a value that dequantizes a constant matrix stands for, transposed if asked; None for any other."""
    node = value.producer()
    while node is not None and node.op_type in ("Transpose", "Identity") and node.inputs[0] is not None:
        flipped ^= node.op_type == "Transpose"
        node = node.inputs[0].producer()
    if node is None or node.op_type != "DequantizeLinear" or node.outputs[0].dtype != ir.DataType.FLOAT:
        return None
    op = Builder(node, node.version or 1)
    weight, scale, zero = _constant_matrix(op.x(0)), op.constant_input(1), op.constant_input(2)
    bits = BITS.get(dtype_name(op.x(0).dtype) or "")
    if weight is None or bits is None or scale is None or op.varies(2):
        return None
    depth_axis = 1 if flipped else 0
    placed = [_by_groups(values, op, weight, depth_axis) for values in (scale, zero) if values is not None]
    if any(values is None for values in placed):
        return None
    group = int(op.attribute("block_size", 0)) if scale.ndim == 2 and scale.size > 1 else weight.shape[depth_axis]
    scale_GN, zero_GN = placed[0], _as_bytes(placed[1]) if len(placed) > 1 else None
    assert scale_GN is not None
    weight_KN = _as_bytes(weight.T if flipped else weight)
    assert weight_KN is not None
    return Weights(weight_KN, scale_GN, zero_GN, bits, group)


def _constant_matrix(value: ir.Value) -> Array | None:
    """A constant of two axes, transposed if a Transpose says so."""
    node, array = value.producer(), constant_of(value)
    if array is None and node is not None and node.op_type == "Transpose" and len(shape(value)) == 2:
        source = constant_of(node.inputs[0])
        array = None if source is None else source.T
    return array if array is not None and array.ndim == 2 else None


def _by_groups(values: Array, op: Builder, weight: Array, depth_axis: int) -> Array | None:
    """Scales or zero points as [groups, N]; None where they run along K without a block size."""
    columns = weight.shape[1 - depth_axis]
    axis, block = int(op.attribute("axis", 1)) % 2, int(op.attribute("block_size", 0))
    if values.size == 1:
        return np.repeat(values.reshape(1, 1), columns, axis=1)
    if values.ndim == 1 and not block:
        return values.reshape(1, -1) if axis == 1 - depth_axis and values.size == columns else None
    if values.ndim != 2 or not block or axis != depth_axis:
        return None
    found = values.T if depth_axis else values
    if found.shape != (-(-weight.shape[depth_axis] // block), columns):
        raise GraphError(f"DequantizeLinear {op.node.name!r}: scales {values.shape} do not fit {weight.shape} "
                         f"in blocks of {block}")  # fmt: skip
    return found


def _as_bytes(values: Array | None) -> Array | None:
    """Integers of four bits a byte each."""
    if values is None or values.dtype.name in ("int8", "uint8"):
        return values
    return values.astype(np.uint8 if values.dtype.name.startswith("u") else np.int8)
