"""Shapes of If and Loop that hold for every run: the library's own take one branch's word, or the first iteration's.

Importing this module replaces the library's functions by ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir
from onnx_shape_inference import ShapeInferenceContext, registry
from onnx_shape_inference._engine import _process_graph

from ingot.ir.symbolic import translated
from ingot.plan.extent import symbols_of

registry.collect()  # theirs first: the last registration counts
CONTRADICTORY = "ingot.contradictory"
"""While shapes are inferred, the domain of nodes inside a branch that cannot be computed; nothing infers it."""
_MOST_WIDENINGS = 4
_WIDENED = "ingot.widened"
Dim = int | onnx_ir.SymbolicDim


def subgraph(node: onnx_ir.Node, name: str) -> onnx_ir.Graph:
    """A graph attribute."""
    return node.attributes[name].as_graph()


@registry.register("", "If")
def infer_if(context: ShapeInferenceContext, node: onnx_ir.Node) -> None:
    """The taken branch's types where the condition is known, else what the branches that can return agree on."""
    branches = _possible(node)
    branches = [branch for branch in branches if not _fails(branch)] or branches
    for index, output in enumerate(node.outputs):
        results = [branch.outputs[index] for branch in branches]
        _set_type(context, output, results)
        shape = _agreed([result.shape for result in results])
        context.set_shape_and_dtype(output, _outside(context, shape))


def _possible(node: onnx_ir.Node) -> list[onnx_ir.Graph]:
    branches = [subgraph(node, "then_branch"), subgraph(node, "else_branch")]
    condition = node.inputs[0]
    known = None if condition is None else onnx_ir.convenience.get_const_tensor(condition)
    if known is None or known.size != 1:
        return branches
    return branches[:1] if known.numpy().item() else branches[1:]


def _fails(branch: onnx_ir.Graph) -> bool:
    """Whether a node that contradicts itself is computed whenever the branch is taken."""
    return any(
        node.domain == CONTRADICTORY or (node.op_type == "If" and all(_fails(inner) for inner in _possible(node)))
        for node in branch
    )


@registry.register("", "Loop")
def infer_loop(context: ShapeInferenceContext, node: onnx_ir.Node) -> None:
    """State variables keep the extents that survive an iteration; scan outputs gain an axis of the trip count."""
    body = subgraph(node, "body")
    states = len(node.inputs) - 2
    for _ in range(_MOST_WIDENINGS):
        if not _widen(context, body.inputs[2:], body.outputs[1 : 1 + states]):
            break
        _forget(body)
        _process_graph(context, body, warn_on_missing=False)
    trips = _trip_count(context, node, body)
    for index, output in enumerate(node.outputs):
        result = body.outputs[1 + index]
        _set_type(context, output, [result])
        if index < states:
            initial = node.inputs[2 + index]
            shapes = [result.shape, None if initial is None else initial.shape]
            context.set_shape_and_dtype(output, _outside(context, _agreed(shapes)))
        elif result.shape is not None:
            shape = onnx_ir.Shape([trips, *result.shape.dims])
            context.set_shape_and_dtype(output, _outside(context, shape, keep=1))


def _trip_count(context: ShapeInferenceContext, node: onnx_ir.Node, body: onnx_ir.Graph) -> Dim:
    """The `M` input where nothing ends the loop earlier, else a new symbol."""
    limit = node.inputs[0]
    counts = context.get_symbolic_value(limit) if limit is not None else None
    if counts is None or len(counts) != 1 or not _never_stops(node, body):
        return context.new_symbolic_dim()
    return max(counts[0], 0) if isinstance(counts[0], int) else counts[0]


def _never_stops(node: onnx_ir.Node, body: onnx_ir.Graph) -> bool:
    start, again = node.inputs[1], body.outputs[0]
    producer = again.producer()
    passed_on = again is body.inputs[1] or (
        producer is not None and producer.op_type == "Identity" and producer.inputs[0] is body.inputs[1]
    )
    return (start is None or _is_true(start)) and (passed_on or _is_true(again))


def _is_true(value: onnx_ir.Value) -> bool:
    tensor = onnx_ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.size == 1 and bool(tensor.numpy().item())


def _widen(context: ShapeInferenceContext, before: Sequence[onnx_ir.Value], after: Sequence[onnx_ir.Value]) -> bool:
    """Give a symbol to every extent of a state variable that an iteration changes; True if there was one."""
    widened = False
    for state, result in zip(before, after, strict=False):
        if state.shape is None or result.shape is None or len(state.shape) != len(result.shape):
            continue
        pairs = list(zip(state.shape.dims, result.shape.dims, strict=True))
        if any(old != new and not _is_own(old, state) for old, new in pairs):
            widened = True
            fresh = [old if old == new else context.new_symbolic_dim() for old, new in pairs]
            state.shape = onnx_ir.Shape(fresh)
            state.metadata_props[_WIDENED] = ",".join(str(dim) for dim in fresh)
    return widened


def _is_own(dim: Dim, state: onnx_ir.Value) -> bool:
    """Whether the extent is a symbol that says no more than that it changes."""
    if isinstance(dim, int) or dim.value is None:
        return not isinstance(dim, int)
    return dim.value in state.metadata_props.get(_WIDENED, "").split(",")


def _forget(graph: onnx_ir.Graph) -> None:
    for node in graph:
        for output in node.outputs:
            output.shape = None
            output.const_value = output.const_value if node.op_type == "Constant" else None


def _set_type(context: ShapeInferenceContext, output: onnx_ir.Value, results: Sequence[onnx_ir.Value]) -> None:
    for result in results:
        if result.type is not None:
            context.set_type(output, result.type)


def _agreed(shapes: Sequence[onnx_ir.Shape | None]) -> onnx_ir.Shape | None:
    """Extents all shapes share, None where they differ; no shape where a rank is unknown or differs."""
    first = shapes[0]
    if first is None or any(shape is None or len(shape) != len(first) for shape in shapes):
        return None
    columns = zip(*(shape.dims for shape in shapes if shape is not None), strict=True)
    return onnx_ir.Shape([column[0] if all(dim == column[0] for dim in column) else None for column in columns])


def _outside(context: ShapeInferenceContext, shape: onnx_ir.Shape | None, keep: int = 0) -> onnx_ir.Shape | None:
    """The shape as the enclosing graph may say it: symbols made up inside mean nothing there."""
    if shape is None:
        return None
    dims = [dim if i < keep or _is_meaningful(context, dim) else context.new_symbolic_dim()
            for i, dim in enumerate(shape.dims)]  # fmt: skip
    return onnx_ir.Shape(dims)


def _is_meaningful(context: ShapeInferenceContext, dim: Dim) -> bool:
    if isinstance(dim, int):
        return True
    extent = translated(dim.value) if dim.value is not None else None
    return extent is not None and not any(context.is_generated_symbol(symbol) for symbol in symbols_of(extent))
