"""ONNX operators become canonical ones: `canonicalise(model)` walks the table of the canonical_* modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ingot.errors import GraphError
from ingot.ir.graph import DOMAIN, dtype_name, is_canonical, is_shape_known, make_node, replace_node, shape
from ingot.ir.provenance import origins
from ingot.ir.shapes import is_data_dependent, known_elements
from ingot.passes import (
    canonical_attention,
    canonical_conv,
    canonical_gather,
    canonical_group_attention,
    canonical_linear,
    canonical_move,
    canonical_norm,
    canonical_pointwise,
    canonical_quantize,
    canonical_recurrent,
    canonical_reduce,
    canonical_resize,
    canonical_sample,
    canonical_signal,
)
from ingot.passes.canonical_table import TABLE, Builder, Function, Reject, reject
from ingot.plan.extent import Extent

FAMILIES = (
    canonical_attention,
    canonical_conv,
    canonical_gather,
    canonical_group_attention,
    canonical_linear,
    canonical_move,
    canonical_norm,
    canonical_pointwise,
    canonical_quantize,
    canonical_recurrent,
    canonical_reduce,
    canonical_resize,
    canonical_sample,
    canonical_signal,
)
_HOST = "it has no canonical form"
IMPOSSIBLE = "ingot.impossible"  # metadata of a node whose inputs have shapes it cannot take
_CONTROL = ("If", "Loop", "Scan", "SequenceMap")


@dataclass(frozen=True)
class Remaining:
    """A node that stays an ONNX operator and runs on the host: why, and what would change it ("" if nothing would)."""

    node: str
    op: str
    origins: tuple[str, ...]
    reason: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """What canonicalisation did: nodes replaced, and those that stayed."""

    replaced: int
    remaining: tuple[Remaining, ...]


def canonicalise(model: ir.Model) -> Report:
    """Replace every node that can be expressed in canonical operators, in place, subgraphs included.

    Shapes must have been inferred. Values keep their names, dtypes and shapes, new nodes the origins of the old.
    """
    model.opset_imports.setdefault(DOMAIN, 1)
    replaced, rejected = 0, []
    for node in [node for graph in graphs_of(model.graph) for node in graph]:
        if is_canonical(node):
            continue
        outcome = _canonicalise_node(node, model.opset_imports, nested=node.graph is not model.graph)
        if outcome is None:
            replaced += 1
        else:
            rejected.append((node, outcome))
    sweep(model)
    left = [(node, why) for node, why in rejected if node.graph is not None and not is_control(node)]
    return Report(replaced, tuple(_remaining(node, why) for node, why in left))


def is_control(node: ir.Node) -> bool:
    """Whether the node is control flow, which plans express themselves."""
    return node.domain == "" and node.op_type in _CONTROL


def graphs_of(graph: ir.Graph) -> Iterator[ir.Graph]:
    """The graph and the bodies of its control flow, outer ones first; other operators keep their graphs as data."""
    yield graph
    for node in graph:
        if is_control(node):
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH:
                    yield from graphs_of(attribute.as_graph())


def _remaining(node: ir.Node, why: Reject) -> Remaining:
    name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return Remaining(node.name or "", name, origins(node), why.reason, why.remedy)


def _canonicalise_node(node: ir.Node, opsets: dict[str, int], nested: bool) -> Reject | None:
    """Replaces the node, or says why not."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    function = sizes if _is_shape_arithmetic(node) else TABLE.get((domain, node.op_type))
    if function is None:
        return reject(_HOST)
    problem = _untyped(node)
    return problem or _replaced(node, function, node.version or opsets.get(domain, 1), nested)


def _is_shape_arithmetic(node: ir.Node) -> bool:
    """Whether the node only computes with sizes that inference could follow."""
    if node.op_type in ("Constant", "Identity") or len(node.outputs) != 1 or node.domain != "":
        return False
    value = node.outputs[0]
    elements = known_elements(value) if dtype_name(value.dtype) in ("int64", "int32") else None
    if elements is None or value.shape is None or len(value.shape) > 1:
        return False
    return any(isinstance(extent, str) for extent in elements) and not any(map(is_data_dependent, elements))


def sizes(op: Builder) -> ir.Value:
    """Shape arithmetic as Range nodes of the extents that come out."""
    parts = [_element(op, extent) for extent in known_elements(op.y) or ()]
    return op.view(op.cast(op.concat(parts, 0), op.dtype), shape(op.y))


def _element(op: Builder, extent: Extent) -> ir.Value:
    made: ir.Value = op.constant(np.array([extent]), op.y) if isinstance(extent, int) else op.size(extent)
    return made


def _untyped(node: ir.Node) -> Reject | None:
    """Why the node's types do not allow a native form."""
    for value in (*node.inputs, *node.outputs):
        if value is None or (value.producer() is node and not _is_read(value)):
            continue
        if not isinstance(value.type, ir.TensorType) or not is_shape_known(value):
            return reject(f"the type or shape of {value.name!r} is not a tensor's or is unknown")
        name = dtype_name(value.dtype)
        if name is None or name in ("string", "complex64", "complex128"):
            return reject(f"{value.name!r} has elements of type {name}")
    return None


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _replaced(node: ir.Node, function: Function, version: int, nested: bool) -> Reject | None:
    op = Builder(node, version)
    try:
        result = function(op)
    except (ValueError, IndexError, GraphError) as error:
        if isinstance(error, GraphError) and not nested:
            raise
        # a branch never taken may hold shapes that its operators do not allow
        node.metadata_props[IMPOSSIBLE] = str(error)
        return reject(f"its shapes are not what the operator allows ({error})")
    if isinstance(result, Reject):
        return result
    results = list(result) if isinstance(result, tuple) else [result]
    results = (results + [None] * len(node.outputs))[: len(node.outputs)]
    missing = [old.name for old, new in zip(node.outputs, results, strict=True) if new is None and _is_read(old)]
    if missing:
        return reject(f"its output {missing[0]!r} has no canonical form")
    results = [_own(op, old, new) for old, new in zip(node.outputs, results, strict=True)]
    replace_node(node, op.nodes, results)
    return None


def _own(op: Builder, old: ir.Value, new: ir.Value | None) -> ir.Value | None:
    """A graph's output needs a value of its own: a copy where the result is a value that already has a name."""
    if new is None or not old.is_graph_output():
        return new
    taken = new.producer() not in op.nodes
    result: ir.Value = op.View(new, shape=shape(new)) if taken else new
    return result


def sweep(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing reads any more."""
    for graph in reversed(list(graphs_of(model.graph))):
        for node in reversed(list(graph)):
            if not any(_is_read(value) for value in node.outputs) and node.outputs:
                graph.remove(node, safe=True)
    for graph in graphs_of(model.graph):
        for name, value in list(graph.initializers.items()):
            if not _is_read(value) and not value.is_graph_input():
                del graph.initializers[name]


def remaining_operators(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes that are not canonical, in graph order."""
    return (node for node in ir.traversal.RecursiveGraphIterator(model.graph) if not is_canonical(node))


__all__ = ["FAMILIES", "Remaining", "Report", "canonicalise", "make_node", "remaining_operators", "sweep"]
