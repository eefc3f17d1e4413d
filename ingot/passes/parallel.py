"""Linears of one input, and a Linear whose result is split, become one ParallelLinear: for targets where a launch costs
more than its work."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx_ir as ir

from ingot.ir import expression as expressions
from ingot.ir.elementwise import FLOATS, Array
from ingot.ir.expression import Input, Literal
from ingot.ir.graph import add_constant, constant_of, dtype_of, make_node, substitute
from ingot.ir.provenance import merged_origins, set_origins
from ingot.ir.shapes import shape_of
from ingot.passes.affine import vectors_of
from ingot.passes.facts import attribute, epilogue_of, extras_of, is_float, is_op, only_reader, operands_of
from ingot.passes.rewrite import detach

_FLOAT8 = "float8_e4m3fn"
_HALVES, _MANY_ROWS = 2, 512  # of fewer rows the depth is split, which a product of halves cannot be


def join_linears(model: ir.Model) -> int:
    """Every group of Linears that read one value and add a bias at most, those of float8 after one multiplication by
    the same number; the number of nodes that went."""
    groups: dict[tuple[ir.Value, str, float], list[ir.Node]] = {}
    for node in model.graph:
        if is_op(node, "Linear") and _bias_of(node) is not None:
            groups.setdefault((operands_of(node)[0], dtype_of(node.outputs[0]), _scale_of(node)), []).append(node)
    before = len(model.graph)
    for nodes in groups.values():
        if sum(len(_results(node)) for node in nodes) > 1:
            _join(model.graph, nodes)
    return before - len(model.graph)


def _split_of(node: ir.Node) -> ir.Node | None:
    """The one reader of a Linear's result, where that divides its columns."""
    reader, shape = only_reader(node.outputs[0]), shape_of(node.outputs[0])
    if reader is None or shape is None or not is_op(reader, "Split"):
        return None
    if any(value.is_graph_output() for value in reader.outputs):
        return None
    return reader if attribute(reader, "axis") in (-1, len(shape) - 1) else None


def _results(node: ir.Node) -> list[ir.Value]:
    """What is made of the columns of a Linear."""
    split = _split_of(node)
    return list(node.outputs if split is None else split.outputs)


def _columns(value: ir.Value) -> int:
    shape = shape_of(value)
    assert shape is not None
    return int(shape[-1])


def _bias_of(node: ir.Node) -> Array | None:
    """What a Linear adds to its columns; None where it does something else, or is a result of the graph."""
    x, weight = operands_of(node)[:2]
    array, output, made = constant_of(weight), shape_of(node.outputs[0]), dtype_of(node.outputs[0])
    if array is None or output is None or made not in FLOATS or node.outputs[0].is_graph_output():
        return None
    narrow = array.dtype.name == _FLOAT8
    if dtype_of(x) != array.dtype.name or not (narrow or dtype_of(x) == made):
        return None
    extras = extras_of(node)
    vectors = vectors_of(extras, output, len(output) - 1)
    steps = [step.op for step in epilogue_of(node).instructions if step.op != "Cast"]
    if narrow and _scale_of(node) != 1.0:
        steps = steps[1:]
    if (steps, len(extras)) not in (([], 0), (["Add"], 1)) or len(vectors) < len(extras):
        return None
    bias = vectors[1] if vectors else np.zeros(1)
    return np.broadcast_to(bias.astype(np.float32 if narrow else array.dtype), array.shape[1:])


def _scale_of(node: ir.Node) -> float:
    """The number that a Linear multiplies its sums by before anything else."""
    first = next((step for step in epilogue_of(node).instructions if step.op != "Cast"), None)
    if first is None or first.op != "Mul":
        return 1.0
    numbers = [operand.value for operand in first.operands if isinstance(operand, Literal)]
    return float(numbers[0]) if len(numbers) == 1 else 1.0


def _join(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    first = nodes[0]
    weights = [array for node in nodes if (array := constant_of(node.inputs[1])) is not None]
    biases = [array for node in nodes if (array := _bias_of(node)) is not None]
    weight = add_constant(graph, np.concatenate(weights, axis=1), first.name)
    bias = add_constant(graph, np.concatenate(biases), first.name)
    results = [value for node in nodes for value in _results(node)]
    sizes = [_columns(value) for value in results]
    attributes = {"sizes": sizes, "scale": _scale_of(first), "dtype": dtype_of(first.outputs[0])}
    joined = make_node("ParallelLinear", (first.inputs[0], weight, bias), attributes, outputs=len(sizes))
    joined.name = first.name
    readers = [split for node in nodes if (split := _split_of(node)) is not None]
    set_origins(joined, merged_origins((*nodes, *readers)))
    graph.insert_before(first, joined)
    for old, new in zip(results, joined.outputs, strict=True):
        old.replace_all_uses_with(new)
    for node in (*readers, *nodes):
        detach(node)


def gate_linears(model: ir.Model) -> int:
    """ParallelLinear of two halves that one Pointwise makes one tensor of, for many rows => GatedLinear."""
    pairs = [(node, reader) for node in model.graph if (reader := _gate_of(node)) is not None]
    for node, reader in pairs:
        text = attribute(reader, "expression")
        places = {k: Input(node.outputs.index(value)) for k, value in enumerate(operands_of(reader))}
        after = expressions.format(expressions.substitute(expressions.parse(text), places))
        gated = make_node("GatedLinear", node.inputs, {"after": after}, name=node.name)
        set_origins(gated, merged_origins((node, reader)))
        model.graph.insert_before(node, gated)
        substitute(reader.outputs[0], gated.outputs[0])
        detach(reader)
        detach(node)
    return len(pairs)


def _gate_of(node: ir.Node) -> ir.Node | None:
    """The Pointwise that reads both halves of the node's columns, and nothing else."""
    if not is_op(node, "ParallelLinear") or attribute(node, "scale") != 1.0 or len(node.outputs) != _HALVES:
        return None
    reader, shapes = only_reader(node.outputs[0]), [shape_of(value) for value in node.outputs]
    if reader is None or not is_op(reader, "Pointwise") or only_reader(node.outputs[1]) is not reader:
        return None
    rows = [n for n in (shapes[0] or ())[:-1] if isinstance(n, int)]
    many = len(rows) == len(shapes[0] or ()) - 1 and prod(rows) >= _MANY_ROWS
    alike = shapes[0] == shapes[1] == shape_of(reader.outputs[0]) and set(operands_of(reader)) == set(node.outputs)
    return reader if many and alike and dtype_of(operands_of(node)[0]) in FLOATS else None


# Activations that a product's last lines may hold; a Conv with others keeps its Split.
_AFTER = frozenset({"Cast", "Add", "Sub", "Mul", "Relu", "Sigmoid", "Tanh", "Clip", "Min", "Max", "LeakyRelu", "Exp"})


def divide_convolutions(model: ir.Model) -> int:
    """Split(Conv(x, w)) => ParallelConv(x, w), where no operand of the epilogue is as large as the result."""
    pairs = [(node, split) for node in model.graph if (split := _channels_split(node)) is not None]
    for node, split in pairs:
        kept = {name: attribute(node, name) for name in ("strides", "pads", "dilations", "group")}
        sizes = [_channels(value) for value in split.outputs]
        divided = make_node("ParallelConv", node.inputs, {**kept, "sizes": sizes, "after": attribute(node, "epilogue")},
                            outputs=len(sizes), name=node.name)  # fmt: skip
        set_origins(divided, merged_origins((node, split)))
        model.graph.insert_before(node, divided)
        for old, new in zip(split.outputs, divided.outputs, strict=True):
            old.replace_all_uses_with(new)
        detach(split)
        detach(node)
    return len(pairs)


def _channels_split(node: ir.Node) -> ir.Node | None:
    """The Split of a Conv's channels that is the one reader of its result."""
    if not is_op(node, "Conv") or attribute(node, "group") != 1 or not is_float(operands_of(node)[1]):
        return None
    split, shape = only_reader(node.outputs[0]), shape_of(node.outputs[0])
    if split is None or shape is None or not is_op(split, "Split") or attribute(split, "axis") != 1:
        return None
    known = {step.op for step in epilogue_of(node).instructions} <= _AFTER and constant_of(node.inputs[1]) is not None
    small = len(vectors_of(extras_of(node), shape, 1)) == len(extras_of(node))
    return split if known and small and not any(value.is_graph_output() for value in split.outputs) else None


def _channels(value: ir.Value) -> int:
    shape = shape_of(value)
    assert shape is not None
    return int(shape[1])
