"""What rewrites ask about values and nodes: constancy, readers, channel axes, how an operand broadcasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

from ingot.ir import expression as expressions
from ingot.ir.elementwise import FLOATS, Array
from ingot.ir.expression import Expression
from ingot.ir.graph import DOMAIN, attributes, dtype_name, is_constant, type_of
from ingot.ir.ops_table import OPS, infer
from ingot.ir.shapes import shape_of
from ingot.plan.extent import Extent

Shape = tuple[Extent, ...]
OperandKind = Literal["scalar", "channel", "full"]
MAX_INSTRUCTIONS = 24
MAX_OPERANDS = 8


@dataclass(frozen=True, eq=False)
class Accumulator:
    """Stands for `%0` of an epilogue where operands are compared."""


ACCUMULATOR = Accumulator()


def is_op(node: ir.Node | None, *ops: str) -> bool:
    """Whether the node is one of these canonical operators."""
    return node is not None and node.domain == DOMAIN and node.op_type in ops


def maker(value: ir.Value | None, *ops: str) -> ir.Node | None:
    """The node whose first output the value is, when it is one of these canonical operators."""
    node = value.producer() if isinstance(value, ir.Value) else None
    return node if node is not None and is_op(node, *ops) and node.outputs[0] is value else None


def attribute(node: ir.Node, name: str) -> Any:
    """One attribute as stored: a number, a text or a tuple."""
    value = node.attributes[name].value
    return tuple(value) if isinstance(value, list | tuple) else value


def changed(node: ir.Node, **changes: Any) -> dict[str, Any]:
    """The node's attributes with some replaced, to make another of its kind."""
    return {**attributes(node), **changes}


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads the value; None when there are several, none, or it is an output of a graph."""
    readers = {use.node for use in value.uses()}
    return readers.pop() if len(readers) == 1 and not value.is_graph_output() else None


def varying(values: Sequence[ir.Value]) -> list[ir.Value]:
    """Those that are not constant."""
    return [value for value in values if not is_constant(value)]


def rank_of(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def is_float(value: ir.Value) -> bool:
    return dtype_name(value.dtype) in FLOATS


def same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Whether both shapes are known and equal."""
    shape = shape_of(a)
    return shape is not None and shape == shape_of(b)


def are_ones(sizes: Sequence[Extent]) -> bool:
    return all(size == 1 for size in sizes)


def exchanges_last(perm: Sequence[int]) -> bool:
    """Whether a permutation exchanges the last two axes and does nothing else."""
    rank = len(perm)
    return rank > 1 and tuple(perm) == (*range(rank - 2), rank - 1, rank - 2)


# epilogues


def main_count(node: ir.Node) -> int:
    """How many inputs stand before the extras."""
    return len(OPS[node.op_type].inputs)


def takes_epilogue(node: ir.Node | None) -> bool:
    return node is not None and node.domain == DOMAIN and OPS[node.op_type].epilogue


def epilogue_of(node: ir.Node) -> Expression:
    """The epilogue, or a Pointwise's whole expression."""
    return expressions.parse(attribute(node, "expression" if node.op_type == "Pointwise" else "epilogue"))


def accumulator_dtype(node: ir.Node) -> str:
    """The type of an epilogue's `%0`."""
    types = [None if value is None else type_of(value) for value in main_inputs(node)]
    return infer(node.op_type, types, {**attributes(node), "epilogue": ""})[0].dtype


def extras_of(node: ir.Node) -> tuple[ir.Value, ...]:
    return tuple(value for value in node.inputs[main_count(node) :] if value is not None)


def main_inputs(node: ir.Node) -> tuple[ir.Value | None, ...]:
    """The inputs before the extras, None where one is absent."""
    count = main_count(node)
    return (*node.inputs[:count], *(None,) * (count - len(node.inputs)))


def operands_of(node: ir.Node) -> tuple[ir.Value, ...]:
    """Inputs of a node that has none missing."""
    return tuple(value for value in node.inputs if value is not None)


def channel_axis(node: ir.Node) -> int | None:
    """The axis of the output along which an epilogue operand may be a vector; None where there is none."""
    rank = rank_of(node.outputs[0])
    if rank is None or rank == 0:
        return None
    match node.op_type:
        case "Linear" | "QuantizedLinear" | "MatMul":
            return rank - 1
        case "Conv" | "ConvTranspose":
            return 1
        case "Norm":
            return rank - 1 if attribute(node, "kind") in ("layer", "rms") else 1
    return None


def operand_kind(operand: Shape | None, output: Shape, axis: int | None) -> OperandKind | None:
    """How an operand broadcasts to an output; None for a way that epilogues do not know."""
    if operand is None or len(operand) > len(output):
        return None
    if are_ones(operand):
        return "scalar"
    if operand == output:
        return "full"
    aligned = (1,) * (len(output) - len(operand)) + operand
    others = [size for place, size in enumerate(aligned) if place != axis]
    return "channel" if axis is not None and are_ones(others) and aligned[axis] == output[axis] else None


def channel_vector(constant: Array, output: Shape, axis: int) -> Array | None:
    """A constant operand as a scalar (shape ()) or as a vector along the channel axis; None when it is neither."""
    kind = operand_kind(constant.shape, output, axis)
    if kind == "scalar":
        return constant.reshape(())
    fits = kind == "channel" or (kind == "full" and are_ones([s for i, s in enumerate(output) if i != axis]))
    return constant.reshape(-1) if fits else None


def channel_shaped(vector: Array, rank: int, axis: int) -> Array:
    """The vector with ones after it, so that it broadcasts along `axis` of a tensor of this rank."""
    return vector.reshape(-1, *[1] * (rank - 1 - axis))
