"""Products of float8 (E4M3): as fuse_quant, without zero points. For targets that multiply such numbers.

A sum of products of two float8e4m3fn is float32, unrounded, and its epilogue begins with a Cast that says so.
"""

from __future__ import annotations

import onnx_ir as ir

from ingot.ir.expression import Input
from ingot.passes.facts import changed, maker, only_reader, operands_of, same_shape
from ingot.passes.fuse_quant import MOVES, Quantized, dequantize, dequantized, narrow_product
from ingot.passes.pattern import instruction_of
from ingot.passes.rewrite import Builder, Result, Table, reject, rewrite_node

_TYPE = "float8_e4m3fn"


def _float8(value: ir.Value | None) -> Quantized | None:
    found = dequantized(value, (_TYPE,))
    return found if found is not None and found.zero == 0 else None


@rewrite_node("Conv", "Linear", "MatMul")
def float8_product(op: Builder, node: ir.Node) -> Result:
    """Conv(DQ(x), DQ(w)) => Conv(x, w) of float8, its epilogue begins with the product of the scales"""
    x, weight = (_float8(value) for value in operands_of(node)[:2])
    if x is None or weight is None:
        return None if x is None and weight is None else reject("only one of its operands is float8")
    if x.axis is not None:
        return reject("its input is quantized per channel", x.q)
    return narrow_product(op, node, x, weight)


@rewrite_node(*MOVES)
def move_in_float8(op: Builder, node: ir.Node) -> Result:
    """Move(DQ(x)) => DQ(Move(x)) of float8"""
    x = _float8(operands_of(node)[0])
    if x is None or x.axis is not None:
        return None
    moved = op.make(node.op_type, x.q, *node.inputs[1:], _outputs=len(node.outputs), **changed(node))
    results = moved if isinstance(moved, tuple) else (moved,)
    return {old: dequantize(op, x, new) for old, new in zip(node.outputs, results, strict=True)}


@rewrite_node("Pointwise")
def float8_before_move(op: Builder, node: ir.Node) -> Result:
    """Q(Move(x)) => Move(Q(x)): fewer bytes are moved, and Q can join what makes x"""
    instruction = instruction_of(node)
    if instruction is None or instruction.op != "Quantize" or instruction.dtype != _TYPE:
        return None
    if not isinstance(instruction.operands[0], Input) or any(isinstance(o, Input) for o in instruction.operands[1:]):
        return None
    x = operands_of(node)[instruction.operands[0].index]
    move = maker(x, "View", "Transpose", "Slice", "Expand", "Tile")
    if move is None or not same_shape(x, node.outputs[0]):
        return None
    if only_reader(x) is not node:
        return reject("the moved value is used elsewhere too", move)
    narrow = op.Pointwise(*operands_of(move), expression=node.attributes["expression"].as_string())
    return op.make(move.op_type, narrow, **changed(move))


FLOAT8 = Table("float8", (float8_product, move_in_float8, float8_before_move))
