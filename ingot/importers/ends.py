"""Inputs and outputs of a model in another floating type than it has: a conversion at each, which passes fold away."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ingot.config import FLOATS
from ingot.errors import ConfigError
from ingot.ir.graph import data_type, dtype_name


def retype(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """The model takes inputs and gives outputs in these types, in place: one for each in their order, or one for all.
    What is of no floating type (and "" in a list) stays. ConfigError where they do not fit."""
    graph = model.graph
    for index, dtype in enumerate(_each("input", graph.inputs, inputs)):
        if dtype:
            _take(graph, index, dtype)
    for index, dtype in enumerate(_each("output", graph.outputs, outputs)):
        if dtype:
            _give(graph, index, dtype)


def _each(kind: str, values: Sequence[ir.Value], wanted: Sequence[str]) -> list[str]:
    """For each value the type it is to have, "" where it has it."""
    if len(wanted) not in (0, 1, len(values)):
        raise ConfigError(f"{len(wanted)} types are given for {len(values)} {kind}s; give one for each, or one for all")
    if len(wanted) > 1:
        for value, dtype in zip(values, wanted, strict=False):
            _check(kind, value, dtype)
    found = list(wanted) * (len(values) if len(wanted) == 1 else 1) or [""] * len(values)
    return [dtype if _is_float(value) and dtype_name(value.dtype) != dtype else ""
            for value, dtype in zip(values, found, strict=True)]  # fmt: skip


def _check(kind: str, value: ir.Value, dtype: str) -> None:
    if dtype and not _is_float(value) and dtype_name(value.dtype) != dtype:
        has = dtype_name(value.dtype)
        raise ConfigError(f"{kind} {value.name!r} is {has} and cannot be {dtype}; leave it as it is")


def _is_float(value: ir.Value) -> bool:
    handed_on = value.is_graph_input() and value.is_graph_output()  # one name for both: it stays what it is
    return not handed_on and isinstance(value.type, ir.TensorType) and dtype_name(value.dtype) in FLOATS


def _take(graph: ir.Graph, index: int, dtype: str) -> None:
    """The input is given as `dtype`; its readers get what they had."""
    old = graph.inputs[index]
    given = ir.Value(name=old.name, shape=old.shape, type=ir.TensorType(data_type(dtype)))
    cast = _cast(given, old)
    old.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
    graph.inputs[index] = given
    _insert_first(graph, cast)


def _insert_first(graph: ir.Graph, node: ir.Node) -> None:
    if len(graph):
        graph.insert_before(graph[0], node)
    else:
        graph.append(node)


def _give(graph: ir.Graph, index: int, dtype: str) -> None:
    """The output is given as `dtype`, under its name."""
    made = graph.outputs[index]
    cast = _cast(made, ir.Value(shape=made.shape, type=ir.TensorType(data_type(dtype))))
    name, made.name = made.name, f"{made.name}.{dtype_name(made.dtype)}"
    cast.outputs[0].name = name
    graph.append(cast)
    graph.outputs[index] = cast.outputs[0]


def _cast(source: ir.Value, like: ir.Value) -> ir.Node:
    """A conversion of `source` to what `like` is, outside of any graph."""
    assert like.dtype is not None
    name = f"{source.name}.{dtype_name(like.dtype)}"
    node = ir.node("Cast", [source], {"to": like.dtype}, name=name)
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, like.shape, like.type
    return node
