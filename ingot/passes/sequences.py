"""Feature maps seen as sequences of positions and back, so that channels that lie last already need no copy.

    Transpose(View(x[N, C, *S], [N, C, P]), (0, 2, 1)) => View(Transpose(x, (0, 2, …, 1)), [N, P, C])
    View(Transpose(y[N, P, C], (0, 2, 1)), [N, C, *S]) => Transpose(View(y, [N, *S, C]), (0, last, 1, …))
    f(Conv(…), Transpose(View(y), …)) => Transpose(View(f(View(Transpose(Conv(…), …)), y)), …)

The last makes what is added to a product's image the product's epilogue.
"""

from __future__ import annotations

import onnx_ir as ir

from ingot.ir.graph import make_node, substitute
from ingot.ir.provenance import merged_origins, set_origins
from ingot.ir.shapes import shape_of
from ingot.passes.facts import Shape, attribute, is_op, maker, only_reader, operands_of, takes_epilogue
from ingot.passes.fuse_epilogue import EPILOGUES
from ingot.passes.rewrite import Journal, detach

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
    added = [node for node in tuple(model.graph) if _adds_to_image(node)]
    for node in added:
        _as_sequence(model.graph, node)
    if added:
        EPILOGUES.apply(model.graph, Journal())
    return count + len(added)


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


def _product_of(value: ir.Value) -> ir.Node | None:
    """The Transpose that makes the value an image of rows that a product gives, where nobody else reads them."""
    transpose = maker(value, "Transpose")
    view = maker(transpose.inputs[0], "View") if transpose is not None else None
    rows = view.inputs[0] if view is not None else None
    product = rows.producer() if rows is not None else None
    if transpose is None or view is None or rows is None or product is None or not takes_epilogue(product):
        return None
    rank = len(shape_of(value) or ())
    moved = attribute(transpose, "perm") == (0, rank - 1, *range(1, rank - 1)) and rank >= _LEAST_RANK
    alone = all(only_reader(made) is not None for made in (value, view.outputs[0], rows))
    return transpose if moved and alone and _merges(shape_of(value), _exchanged(shape_of(rows))) else None


def _exchanged(shape: Shape | None) -> Shape | None:
    return (shape[0], shape[2], shape[1]) if shape is not None and len(shape) == len(_EXCHANGE) else None


def _adds_to_image(node: ir.Node) -> bool:
    """Whether a Pointwise reads such rows, and else images that convolutions give, channels last."""
    if not is_op(node, "Pointwise"):
        return False
    values, shape = operands_of(node), shape_of(node.outputs[0])
    rows = [value for value in values if _product_of(value) is not None]
    images = [value for value in values if value not in rows]
    return len(rows) == 1 and len(values) > 1 and all(
        maker(value, "Conv") is not None and shape_of(value) == shape for value in images
    )  # fmt: skip


def _as_sequence(graph: ir.Graph, node: ir.Node) -> None:
    """The Pointwise on rows of channels; what it gives is an image again."""
    image, values = shape_of(node.outputs[0]), operands_of(node)
    turned = [_product_of(value) for value in values]
    sources = [None if transpose is None else _view_of(transpose).inputs[0] for transpose in turned]
    rows = next(shape_of(source) for source in sources if source is not None)
    assert image is not None and rows is not None
    new: list[ir.Node] = []

    def then(op: str, inputs: list[ir.Value], **attributes: object) -> ir.Value:
        new.append(make_node(op, inputs, attributes, name=f"{node.name}.{len(new)}"))
        return new[-1].outputs[0]

    inputs = []
    for value, source in zip(values, sources, strict=True):
        if source is None:
            source = then("View", [then("Transpose", [value], perm=(0, *range(2, len(image)), 1))], shape=rows)
        inputs.append(source)
    made = then("Pointwise", inputs, expression=attribute(node, "expression"))
    seen = then("View", [made], shape=(image[0], *image[2:], image[1]))
    result = then("Transpose", [seen], perm=(0, len(image) - 1, *range(1, len(image) - 1)))
    for made_node in new:
        set_origins(made_node, merged_origins((node,)))
        graph.insert_before(node, made_node)
    substitute(node.outputs[0], result)
    detach(node)
    for transpose in filter(None, turned):
        view = _view_of(transpose)
        detach(transpose)
        detach(view)


def _view_of(transpose: ir.Node) -> ir.Node:
    view = maker(transpose.inputs[0], "View")
    assert view is not None
    return view
