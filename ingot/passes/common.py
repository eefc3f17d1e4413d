"""Common subexpressions become one node; equal small constants one initializer; what nothing reads goes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import onnx_ir as ir

from ingot.ir.graph import DOMAIN
from ingot.ir.provenance import merged_origins, set_origins
from ingot.passes.rewrite import detach

_SMALL = 1 << 12  # bytes of a constant that is compared with others


def share(graph: ir.Graph) -> int:
    """Equal canonical nodes of one graph become one, in place; the number that went."""
    _share_constants(graph)
    seen: dict[Hashable, ir.Node] = {}
    count = 0
    for node in list(graph):
        if node.domain != DOMAIN or any(value.is_graph_output() for value in node.outputs):
            continue
        first = seen.setdefault(_identity(node), node)
        if first is not node:
            _merge(first, node)
            count += 1
    return count


def _identity(node: ir.Node) -> Hashable:
    attributes = tuple((name, _plain(attribute.value)) for name, attribute in sorted(node.attributes.items()))
    return (node.op_type, len(node.outputs), tuple(map(id, node.inputs)), attributes)


def _plain(value: object) -> Hashable:
    return tuple(value) if isinstance(value, list | tuple) else value


def _merge(first: ir.Node, second: ir.Node) -> None:
    for kept, gone in zip(first.outputs, second.outputs, strict=True):
        gone.replace_all_uses_with(kept)
    set_origins(first, merged_origins([first, second]))
    detach(second)


def _share_constants(graph: ir.Graph) -> None:
    seen: dict[Hashable, ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes > _SMALL or value.is_graph_output():
            continue
        key = (tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes())
        first = seen.setdefault(key, value)
        if first is not value and not value.is_graph_input():
            value.replace_all_uses_with(first)


def remove_dead(model: ir.Model) -> int:
    """Nodes and initializers that nothing reads, inner graphs first; the number of nodes that went."""
    count = 0
    for graph in reversed(list(graphs_of(model))):
        for node in reversed(list(graph)):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                detach(node)
                count += 1
    for graph in graphs_of(model):
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del graph.initializers[name]
    return count


def graphs_of(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph, then the bodies of its If, Loop and Scan nodes, outer ones first."""
    yield model.graph
    yield from model.graph.subgraphs()
