"""A Norm takes in the Linear that it reads: for targets where few rows cost launches rather than work."""

from __future__ import annotations

import math

import onnx_ir as ir

from ingot.ir.graph import constant_of, is_constant, make_node
from ingot.ir.provenance import merged_origins, set_origins
from ingot.ir.shapes import shape_of
from ingot.passes.facts import attribute, extras_of, is_float, is_op, maker, only_reader
from ingot.passes.rewrite import detach

_ROWS = range(16, 513)  # fewer are read at the weights' pace, more keep a GPU busy by themselves
_LONGEST = 8192


def normalise_linears(model: ir.Model) -> int:
    """Norm(Linear(x, w)) => LinearNorm(x, w), which gives the Linear too if others read it; the number of Norms."""
    pairs = [(norm, linear) for norm in model.graph if (linear := _linear_of(norm)) is not None]
    for norm, linear in pairs:
        _take_in(model.graph, norm, linear)
    return len(pairs)


def _linear_of(norm: ir.Node) -> ir.Node | None:
    """The Linear whose rows a Norm normalises, where one kernel can do both."""
    if not is_op(norm, "Norm") or attribute(norm, "kind") not in ("layer", "rms") or attribute(norm, "epilogue"):
        return None
    x = norm.inputs[0]
    linear, shape = maker(x, "Linear"), shape_of(norm.outputs[0])
    if linear is None or linear.graph is not norm.graph or shape is None or attribute(norm, "axis") != len(shape) - 1:
        return None
    if any(value is not None and not is_constant(value) for value in norm.inputs[1:]):
        return None
    return linear if _few_rows(shape) and _plain(linear) and not linear.outputs[0].is_graph_output() else None


def _few_rows(shape: tuple[int | str, ...]) -> bool:
    numbers = [extent for extent in shape if isinstance(extent, int)]
    return len(numbers) == len(shape) and math.prod(numbers[:-1]) in _ROWS and numbers[-1] <= _LONGEST


def _plain(linear: ir.Node) -> bool:
    """Whether it multiplies floats of one type by a constant."""
    x, weight = linear.inputs[:2]
    if x is None or weight is None or constant_of(weight) is None:
        return False
    return is_float(x) and x.dtype == weight.dtype == linear.outputs[0].dtype


def _take_in(graph: ir.Graph, norm: ir.Node, linear: ir.Node) -> None:
    source = linear.outputs[0]
    whole = only_reader(source) is not norm
    scale, bias = (norm.inputs[k] if k < len(norm.inputs) else None for k in (1, 2))
    given = (*linear.inputs[:2], scale, bias, *extras_of(linear))
    attributes = {"inside": attribute(linear, "epilogue"), "kind": attribute(norm, "kind"),
                  "epsilon": attribute(norm, "epsilon"), "whole": int(whole)}  # fmt: skip
    made = make_node("LinearNorm", given, attributes, outputs=1 + whole, name=linear.name)
    set_origins(made, merged_origins((linear, norm)))
    graph.insert_before(linear, made)
    for old, new in zip((norm.outputs[0], source), made.outputs, strict=False):
        new.name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    for node in (norm, linear):
        detach(node)
