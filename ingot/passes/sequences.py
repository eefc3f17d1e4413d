"""Feature maps seen as sequences of positions and back, so that channels that lie last already need no copy.

    Transpose(View(x[N, C, *S], [N, C, P]), (0, 2, 1)) => View(Transpose(x, (0, 2, …, 1)), [N, P, C])
    View(Transpose(y[N, P, C], (0, 2, 1)), [N, C, *S]) => Transpose(View(y, [N, *S, C]), (0, last, 1, …))
"""

from __future__ import annotations

import onnx_ir as ir

from ingot.ir.graph import make_node, substitute
from ingot.ir.provenance import merged_origins, set_origins
from ingot.ir.shapes import shape_of
from ingot.passes.facts import Shape, attribute, is_op, maker, only_reader
from ingot.passes.rewrite import detach

_EXCHANGE = (0, 2, 1)
_LEAST_RANK = 4


def see_as_sequences(model: ir.Model) -> int:
    """How many pairs were turned."""
    count = 0
    for node in tuple(model.graph):
        pair = None if node.graph is None else _into(node) or _back(node)
        if pair is not None:
            (_turn_into if is_op(pair[0], "View") else _turn_back)(model.graph, *pair)
            count += 1
    return count


Pair = tuple[ir.Node, ir.Node]


def _into(node: ir.Node) -> Pair | None:
    """The View before a Transpose and the Transpose."""
    view = maker(node.inputs[0], "View") if is_op(node, "Transpose") and _exchanges(node) else None
    if view is None or only_reader(view.outputs[0]) is not node:
        return None
    return (view, node) if _merges(_input(view), shape_of(view.outputs[0])) else None


def _back(node: ir.Node) -> Pair | None:
    """The Transpose before a View and the View."""
    transpose = maker(node.inputs[0], "Transpose") if is_op(node, "View") else None
    if transpose is None or not _exchanges(transpose) or only_reader(transpose.outputs[0]) is not node:
        return None
    return (transpose, node) if _merges(shape_of(node.outputs[0]), _input(node)) else None


def _input(node: ir.Node) -> Shape | None:
    return None if node.inputs[0] is None else shape_of(node.inputs[0])


def _exchanges(node: ir.Node) -> bool:
    return bool(attribute(node, "perm") == _EXCHANGE)


def _merges(image: Shape | None, sequence: Shape | None) -> bool:
    """Whether the latter is the former with its positions in one axis."""
    if image is None or sequence is None or len(image) < _LEAST_RANK:
        return False
    return len(sequence) == len(_EXCHANGE) and tuple(image[:2]) == tuple(sequence[:2])


def _turn_into(graph: ir.Graph, view: ir.Node, transpose: ir.Node) -> None:
    x, result = view.inputs[0], shape_of(transpose.outputs[0])
    image = _input(view)
    assert image is not None and result is not None
    moved = make_node("Transpose", [x], {"perm": (0, *range(2, len(image)), 1)})
    seen = make_node("View", [moved.outputs[0]], {"shape": result})
    _replace(graph, (view, transpose), (moved, seen))


def _turn_back(graph: ir.Graph, transpose: ir.Node, view: ir.Node) -> None:
    image = shape_of(view.outputs[0])
    assert image is not None
    seen = make_node("View", [transpose.inputs[0]], {"shape": (image[0], *image[2:], image[1])})
    moved = make_node("Transpose", [seen.outputs[0]], {"perm": (0, len(image) - 1, *range(1, len(image) - 1))})
    _replace(graph, (transpose, view), (seen, moved))


def _replace(graph: ir.Graph, old: Pair, new: Pair) -> None:
    origins, last = merged_origins(old), old[1]
    for node, replaced in zip(new, old, strict=True):
        node.name = replaced.name
        set_origins(node, origins)
        graph.insert_before(last, node)
    substitute(last.outputs[0], new[1].outputs[0])
    for node in reversed(old):
        detach(node)
