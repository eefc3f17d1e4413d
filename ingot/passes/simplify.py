"""What changes nothing goes; chains of moves become one; moves go where they cost nothing."""

from __future__ import annotations

import onnx_ir as ir

from ingot.ir import expression as expressions
from ingot.ir.graph import dtype_of
from ingot.ir.shapes import shape_of
from ingot.passes.facts import (
    ACCUMULATOR,
    accumulator_dtype,
    are_ones,
    attribute,
    changed,
    epilogue_of,
    exchanges_last,
    extras_of,
    main_inputs,
    maker,
    only_reader,
    operands_of,
    same_shape,
)
from ingot.passes.fuse_pointwise import distinct
from ingot.passes.meeting import MEETINGS
from ingot.passes.peephole import simpler, simplified
from ingot.passes.rewrite import Builder, Result, Table, reject, rewrite_node
from ingot.passes.shuffles import shuffles
from ingot.plan.extent import Extent

Perm = tuple[int, ...]


def _input(node: ir.Node, index: int = 0) -> ir.Value:
    return operands_of(node)[index]


# nodes that change nothing


@rewrite_node("View", "Slice", "Expand", "Pad", "Tile")
def same_as_input(op: Builder, node: ir.Node) -> Result:
    """View(x), Slice(x), Expand(x), Pad(x) or Tile(x) of x's own shape => x"""
    if not same_shape(node.outputs[0], _input(node)):
        return None
    if node.op_type == "Slice" and any(step != 1 for step in attribute(node, "steps")):
        return None
    return _input(node)


@rewrite_node("Concat", "Split")
def single_part(op: Builder, node: ir.Node) -> Result:
    """Concat(x) => x, Split(x) into one => x"""
    return _input(node) if len(node.inputs) == len(node.outputs) == 1 else None


@rewrite_node("Pool")
def pool_of_one(op: Builder, node: ir.Node) -> Result:
    """Pool(x) over windows of one element => x"""
    ones = are_ones((*attribute(node, "kernel"), *attribute(node, "strides")))
    if not ones or any(attribute(node, "pads")) or attribute(node, "kind") == "lp" or attribute(node, "indices"):
        return None
    return _input(node)


@rewrite_node("Pool")
def global_pool(op: Builder, node: ir.Node) -> Result:
    """Pool over a window as large as x => Reduce(x) over the spatial axes"""
    shape = shape_of(_input(node))
    kernel, kind = attribute(node, "kernel"), attribute(node, "kind")
    if shape is None or shape[2:] != kernel or kind == "lp" or attribute(node, "indices"):
        return None
    if any(attribute(node, "pads")) or any(step != 1 for step in attribute(node, "dilations")):
        return None
    kinds = {"average": "mean", "max": "max"}
    return op.Reduce(_input(node), kind=kinds[kind], axes=range(2, len(shape)), keepdims=1)


@rewrite_node("Reduce")
def reduce_of_one(op: Builder, node: ir.Node) -> Result:
    """Reduce(x) over axes of one element => View(x)"""
    shape = shape_of(_input(node))
    if attribute(node, "kind") not in ("sum", "mean", "max", "min", "prod") or attribute(node, "epilogue"):
        return None
    if shape is None or not are_ones([shape[axis] for axis in attribute(node, "axes")]):
        return None
    return op.View(_input(node), shape=shape_of(node.outputs[0]))


@rewrite_node("Pointwise")
def simpler_expression(op: Builder, node: ir.Node) -> Result:
    """x + 0, x * 1, Relu(Relu(x)), Cast(Cast(x)), … => less"""
    operands = operands_of(node)
    text = attribute(node, "expression")
    simple, kept = simplified(text, operands, node.outputs[0])
    if simple == text and kept == operands:
        return None
    if not simple and same_shape(kept[0], node.outputs[0]) and kept[0].dtype == node.outputs[0].dtype:
        return kept[0]
    return op.Pointwise(*kept, expression=simple) if simple else None


@rewrite_node("Linear", "QuantizedLinear", "MatMul", "Conv", "ConvTranspose", "Reduce", "Norm")
def simpler_epilogue(op: Builder, node: ir.Node) -> Result:
    """The same of what an epilogue does"""
    text, extras = attribute(node, "epilogue"), extras_of(node)
    if not text:
        return None
    simple = simpler(text, (accumulator_dtype(node), *map(dtype_of, extras)))
    names: tuple[object, ...] = (ACCUMULATOR, *extras)
    pruned, kept = expressions.prune(simple, names, keep=1)
    if expressions.format(pruned) == text:
        return None
    values = [value for value in kept if isinstance(value, ir.Value)]
    return op.make(node.op_type, *main_inputs(node), *values, **changed(node, epilogue=expressions.format(pruned)))


# chains


@rewrite_node("View")
def views(op: Builder, node: ir.Node) -> Result:
    """View(View(x)) => View(x)"""
    source = maker(_input(node), "View")
    return None if source is None else op.View(_input(source), shape=attribute(node, "shape"))


@rewrite_node("Transpose")
def transposes(op: Builder, node: ir.Node) -> Result:
    """Transpose(Transpose(x)) => Transpose(x); one that moves nothing => x, that moves only ones => View(x)"""
    perm, x = attribute(node, "perm"), _input(node)
    if perm == tuple(range(len(perm))):
        return x
    if (source := maker(x, "Transpose")) is not None:
        inner = attribute(source, "perm")
        return op.Transpose(_input(source), perm=[inner[axis] for axis in perm])
    shape = shape_of(x)
    moved = [axis for axis in perm if shape is not None and shape[axis] != 1]
    if shape is not None and moved == sorted(moved):
        return op.View(x, shape=shape_of(node.outputs[0]))
    return None


@rewrite_node("Slice")
def slices(op: Builder, node: ir.Node) -> Result:
    """Slice(Slice(x)) => Slice(x)"""
    source = maker(_input(node), "Slice")
    if source is None:
        return None
    starts, steps, inner_starts, inner_steps = (
        attribute(n, name) for n in (node, source) for name in ("starts", "steps")
    )
    if not all(str(start).isdecimal() for start in (*starts, *inner_starts)):
        return reject("a start is symbolic", source)
    triples = zip(map(int, starts), map(int, inner_starts), inner_steps, strict=True)
    first = [inner + step * outer for outer, inner, step in triples]
    total = [a * b for a, b in zip(steps, inner_steps, strict=True)]
    return op.Slice(_input(source), starts=first, steps=total, sizes=attribute(node, "sizes"))


@rewrite_node("Concat")
def concats(op: Builder, node: ir.Node) -> Result:
    """Concat(Concat(a, b), c) => Concat(a, b, c)"""
    axis = attribute(node, "axis")
    parts: list[ir.Value] = []
    for value in operands_of(node):
        source = maker(value, "Concat")
        inner = source is not None and attribute(source, "axis") == axis and only_reader(value) is node
        parts.extend(operands_of(source) if source is not None and inner else [value])
    return op.Concat(*parts, axis=axis) if len(parts) > len(node.inputs) else None


@rewrite_node("Concat")
def split_and_joined(op: Builder, node: ir.Node) -> Result:
    """Concat(*Split(x)) => x"""
    sources = {value.producer() for value in node.inputs if value is not None}
    source = sources.pop() if len(sources) == 1 else None
    if source is None or source.op_type != "Split" or tuple(node.inputs) != tuple(source.outputs):
        return None
    return _input(source) if attribute(source, "axis") == attribute(node, "axis") else None


@rewrite_node("Expand")
def expands(op: Builder, node: ir.Node) -> Result:
    """Expand(Expand(x)) => Expand(x)"""
    source = maker(_input(node), "Expand")
    return None if source is None else op.Expand(_input(source), shape=attribute(node, "shape"))


# moves into what reads them


@rewrite_node("MatMul")
def transposed_operand(op: Builder, node: ir.Node) -> Result:
    """MatMul(Transpose(a), b) => MatMul(a, b) reading a transposed, where the last two axes are exchanged"""
    operands, flags = [], {}
    for value, name in zip(main_inputs(node), ("transpose_a", "transpose_b"), strict=True):
        assert value is not None
        source, flags[name] = maker(value, "Transpose"), attribute(node, name)
        if source is not None and exchanges_last(attribute(source, "perm")):
            value, flags[name] = _input(source), 1 - flags[name]
        operands.append(value)
    if tuple(operands) == main_inputs(node):
        return None
    return op.MatMul(*operands, *extras_of(node), **changed(node, **flags))


@rewrite_node("Pointwise")
def broadcast_operand(op: Builder, node: ir.Node) -> Result:
    """Pointwise(Expand(x), …) => Pointwise(x, …), which broadcasts by itself"""
    expression, operands = distinct(epilogue_of(node), operands_of(node))
    for index, value in enumerate(operands):
        source = maker(value, "Expand")
        if source is not None and any(same_shape(v, node.outputs[0]) for v in operands if v is not value):
            replaced = (*operands[:index], _input(source), *operands[index + 1 :])
            return op.Pointwise(*replaced, expression=expressions.format(expression))
    return None


@rewrite_node("Reduce")
def reduce_transposed(op: Builder, node: ir.Node) -> Result:
    """Reduce(Transpose(x)) => Reduce(x) over the axes' old places, where the others keep their order"""
    source = maker(_input(node), "Transpose")
    if source is None or attribute(node, "kind") in ("argmax", "argmin") or extras_of(node):
        return None
    perm, axes = attribute(source, "perm"), attribute(node, "axes")
    kept = [old for axis, old in enumerate(perm) if axis not in axes]
    if kept != sorted(kept):
        return reject("the axes that stay change their order", source)
    old_axes = sorted(perm[axis] for axis in axes)
    reduced = op.Reduce(_input(source), **changed(node, axes=old_axes, keepdims=0))
    return op.View(reduced, shape=shape_of(node.outputs[0])) if attribute(node, "keepdims") else reduced


@rewrite_node("Reduce")
def reduce_viewed(op: Builder, node: ir.Node) -> Result:
    """Reduce(View(x)) => Reduce(x) where the view joins neighbouring axes that are all reduced"""
    source = maker(_input(node), "View")
    if source is None or attribute(node, "kind") in ("argmax", "argmin") or extras_of(node):
        return None
    x = _input(source)
    places = _places(shape_of(x), shape_of(source.outputs[0]), attribute(node, "axes"))
    if places is None or len(places) == len(attribute(node, "axes")) == 0:
        return None
    reduced = op.Reduce(x, **changed(node, axes=places, keepdims=0))
    return op.View(reduced, shape=shape_of(node.outputs[0])) if attribute(node, "keepdims") else reduced


def _places(source: tuple[Extent, ...] | None, viewed: tuple[Extent, ...] | None, axes: Perm) -> list[int] | None:
    """The axes of the source that make up the reduced axes at the view's end, all others being the same."""
    if source is None or viewed is None or axes != tuple(range(len(viewed) - len(axes), len(viewed))):
        return None
    kept = viewed[: len(viewed) - len(axes)]
    if len(source) <= len(viewed) or source[: len(kept)] != kept:
        return None
    return list(range(len(kept), len(source)))


@rewrite_node("View")
def squeezed_reduce(op: Builder, node: ir.Node) -> Result:
    """View(Reduce(x)) => Reduce(x) without the reduced axes"""
    source = maker(_input(node), "Reduce")
    if source is None or not attribute(source, "keepdims") or only_reader(source.outputs[0]) is not node:
        return None
    shape, axes = shape_of(source.outputs[0]), attribute(source, "axes")
    if shape is None or extras_of(source):
        return None
    without = tuple(size for axis, size in enumerate(shape) if axis not in axes)
    if shape_of(node.outputs[0]) != without:
        return None
    return op.Reduce(_input(source), **changed(source, keepdims=0))


# what only the order matters of


@rewrite_node("Reduce")
def extreme_of_softmax(op: Builder, node: ir.Node) -> Result:
    """ArgMax(Softmax(x)) => ArgMax(x) along the same axis"""
    source = maker(_input(node), "Softmax")
    if source is None or attribute(node, "kind") not in ("argmax", "argmin"):
        return None
    if (attribute(source, "axis"),) != attribute(node, "axes"):
        return reject("Softmax is along another axis", source)
    return op.Reduce(_input(source), *extras_of(node), **changed(node))


@rewrite_node("TopK")
def top_of_softmax(op: Builder, node: ir.Node) -> Result:
    """TopK(Softmax(x)) => TopK(x) along the same axis where only the indices are read"""
    source = maker(_input(node), "Softmax")
    if source is None or len(node.outputs) < 2:
        return None
    values, indices = node.outputs[:2]
    if values.uses() or values.is_graph_output():
        return reject("the values are read too", source)
    if attribute(source, "axis") != attribute(node, "axis"):
        return reject("Softmax is along another axis", source)
    _, found = op.make("TopK", _input(source), *node.inputs[1:], _outputs=2, **changed(node))
    return {indices: found}


@rewrite_node("Pointwise")
def log_softmax(op: Builder, node: ir.Node) -> Result:
    """Log(Softmax(x)) => Softmax(x) with log"""
    source = maker(_input(node), "Softmax")
    simple = attribute(node, "expression").split(" ")[0] == "Log" and ";" not in attribute(node, "expression")
    if source is None or not simple or attribute(source, "log"):
        return None
    if only_reader(source.outputs[0]) is not node:
        return reject("the probabilities are used elsewhere too", source)
    return op.Softmax(_input(source), **changed(source, log=1))


MOVES = (
    same_as_input, single_part, pool_of_one, global_pool, reduce_of_one, simpler_expression, simpler_epilogue, views,
    transposes, slices, concats, split_and_joined, expands, transposed_operand, broadcast_operand, reduce_transposed,
    reduce_viewed, squeezed_reduce, extreme_of_softmax, top_of_softmax, log_softmax,
)  # fmt: skip
SIMPLIFY = Table("simplify", (*MOVES, shuffles, *MEETINGS))
