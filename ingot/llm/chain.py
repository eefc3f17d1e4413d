"""Projections that follow each other become one operator, which has one launch for a token: between attention of one
layer and of the next nothing but products is left.

Where all products stream float8 (see early): what waits in a launch for its row asks for weights meanwhile, and of one
that goes on with the next product's nothing has to begin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from ingot.ir.graph import attributes
from ingot.passes.facts import is_op
from ingot.passes.rewrite import Builder, Journal, Result, Table, reject, rewrite_node

# Launches that lie beside a chain: others, that stream weights themselves, would begin when it has ended.
_BEHIND = frozenset({"CachedAttention", "CacheUpdate"})
_X, _WEIGHT, _NORM, _OPERANDS = range(4)


def chain_projections(model: ir.Model) -> int:
    """In place; how many chains."""
    return Table("projections in chains", (_projection_chain,)).apply(model.graph, Journal())


@rewrite_node("Projection")
def _projection_chain(op: Builder, node: ir.Node) -> Result:
    """y = Projection(x, …); z = Projection(y, …); … => (…, z) = ProjectionChain(x, …)"""
    first = node
    while is_op(before := first.inputs[_X].producer(), "Projection"):  # type: ignore[union-attr]
        first = before  # type: ignore[assignment]
    links = _links(first)
    if links[-1] is not node:
        return reject("it is not the last of its chain", links[-1])
    if len(links) < 2:
        return reject("no Projection makes its rows")
    if not any(is_op(use.node, *_BEHIND) for use in node.outputs[0].uses()):
        return reject("what comes behind does not find room beside a chain", node)
    if None in first.inputs[_OPERANDS:]:
        return reject("an operand is missing", first)
    op.after(first.outputs[0])
    made, norms = [link.outputs[0] for link in links], [_norm_of(link) for link in links]
    inputs, sources, results = [first.inputs[_X]], list[int](), list[int]()
    for number, link in enumerate(links):
        inputs += [link.inputs[_WEIGHT], *([norms[number]] if norms[number] is not None else [])]
        operands = link.inputs[_OPERANDS:]
        sources += [made.index(value) if value in made else -1 for value in operands]
        inputs += [value for value in operands if value not in made]
        others = {use.node for use in made[number].uses()} - set(links)
        if others or made[number].is_graph_output() or number + 1 == len(links):
            results.append(number)
    stated = [attributes(link) for link in links]
    new = op.make(
        "ProjectionChain", *inputs, _outputs=len(results), parts=[s["parts"] for s in stated],
        norms=[int(norm is not None) for norm in norms],
        epsilons=[s["epsilon"] for s in stated], expressions=[s["expression"] for s in stated],
        reads=[len(link.inputs[_OPERANDS:]) for link in links], sources=sources, results=results,
        early=min(s["early"] for s in stated),
    )  # fmt: skip
    return dict(zip((made[k] for k in results), new if len(results) > 1 else (new,), strict=True))


def _norm_of(node: ir.Node) -> ir.Value | None:
    return node.inputs[_NORM] if len(node.inputs) > _NORM else None


def _links(first: ir.Node) -> list[ir.Node]:
    """The Projections of the chain that begins with one."""
    assert first.graph is not None
    found, places = [first], {node: k for k, node in enumerate(first.graph)}
    while (after := _after(found, places)) is not None:
        found.append(after)
    return found


def _after(links: Sequence[ir.Node], places: Mapping[ir.Node, int]) -> ir.Node | None:
    """The Projection that reads the last one's result as its rows, and nothing that is made later than the chain is."""
    rows = [use.node for use in links[-1].outputs[0].uses() if use.idx == _X and is_op(use.node, "Projection")]
    if len(rows) != 1:
        return None
    known, after, norm = [link.outputs[0] for link in links], rows[0], _norm_of(rows[0])
    for value in (after.inputs[_WEIGHT], *([norm] if norm is not None else []), *after.inputs[_OPERANDS:]):
        if value is None:
            return None
        producer = value.producer()
        if value not in known and producer is not None and places[producer] > places[links[0]]:
            return None
    return after
