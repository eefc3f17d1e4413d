"""`If` with a condition that is known: the branch taken becomes part of the graph around it, the other one goes. A
branch that cannot work for the allowed shapes becomes one Unreachable node."""

from __future__ import annotations

import onnx_ir as ir

from ingot.ir.graph import constant_of, fresh_name, is_shape_known, make_node, type_of
from ingot.ir.provenance import origins, set_origins
from ingot.passes.canonical import IMPOSSIBLE


def inline_branches(model: ir.Model) -> int:
    """Inline every decided If, in place, inner graphs included; the number that went."""
    count = 0
    while (node := _decided(model.graph)) is not None:
        _inline(node)
        count += 1
    return count


def _decided(graph: ir.Graph) -> ir.Node | None:
    """The first If, outermost first, whose condition is a constant."""
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if node.op_type == "If" and node.domain in ("", "ai.onnx") and constant_of(node.inputs[0]) is not None:
            return node
    return None


def _inline(node: ir.Node) -> None:
    condition = constant_of(node.inputs[0])
    graph = node.graph
    assert condition is not None and isinstance(graph, ir.Graph)
    branch = node.attributes["then_branch" if condition.reshape(-1)[0] else "else_branch"].as_graph()
    _move_initializers(branch, graph)
    outputs = [_own_node(value, branch) for value in branch.outputs]
    branch.outputs.clear()
    moved = list(branch)
    for inner in moved:
        branch.remove(inner)
        set_origins(inner, (*origins(inner), *origins(node)))
    graph.insert_before(node, moved)
    for old, new in zip(node.outputs, outputs, strict=True):
        new.shape = new.shape if new.shape is not None else old.shape
        new.type = new.type if new.type is not None else old.type
        name, old.name = old.name, None
        if old.is_graph_output():
            new.name = name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _move_initializers(branch: ir.Graph, graph: ir.Graph) -> None:
    for name, value in list(branch.initializers.items()):
        branch.initializers.pop(name)
        if name in graph.initializers:
            value.name = fresh_name(graph, name)
        graph.register_initializer(value)


def _own_node(value: ir.Value, branch: ir.Graph) -> ir.Value:
    """The branch's output as made by a node of the branch (not an outer value or an initializer handed through)."""
    producer = value.producer()
    if producer is not None and producer.graph is branch:
        return value
    node = make_node("Identity", [value], domain="")
    node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
    branch.append(node)
    return node.outputs[0]


# branches that cannot be taken


def seal_branches(model: ir.Model) -> int:
    """Replace, in place, every branch that holds a node no input of the allowed shapes can run; their number."""
    count = 0
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        if node.op_type != "If" or node.domain not in ("", "ai.onnx") or not all(map(is_shape_known, node.outputs)):
            continue
        for key in ("then_branch", "else_branch"):
            branch = node.attributes[key].as_graph()
            broken = next((inner for inner in branch if IMPOSSIBLE in inner.metadata_props), None)
            if broken is not None:
                _seal(node, branch, _reason(node, key, broken))
                count += 1
    return count


def _reason(node: ir.Node, key: str, broken: ir.Node) -> str:
    return (
        f"the {key.replace('_', ' ')} of {node.name!r} cannot run with inputs of these shapes: in {broken.name!r} "
        f"({broken.op_type}) {broken.metadata_props[IMPOSSIBLE]}"
    )


def _seal(node: ir.Node, branch: ir.Graph, reason: str) -> None:
    types = [type_of(value) for value in node.outputs]
    known = [kind for kind in types if kind is not None]
    shapes = ["|".join(map(str, kind.shape)) for kind in known]
    names = [value.name for value in branch.outputs]
    branch.outputs.clear()
    branch.remove(list(branch), safe=False)
    branch.initializers.clear()
    stated = {"reason": reason, "dtypes": [kind.dtype for kind in known], "shapes": shapes}
    sealed = make_node("Unreachable", [], stated, outputs=len(known), name=f"{node.name}:unreachable")
    for value, name in zip(sealed.outputs, names, strict=True):
        value.name = name
    branch.append(sealed)
    branch.outputs.extend(sealed.outputs)
