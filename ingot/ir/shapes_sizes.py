"""Shape functions that follow symbolic sizes where the library gives up or is wrong: Slice, ConstantOfShape.

Importing this module replaces the library's.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir
from onnx_shape_inference import ShapeInferenceContext, registry

from ingot.ir.symbolic import translated

Dim = int | onnx_ir.SymbolicDim
registry.collect()  # theirs first: the last registration counts
_FAR = 2**31 - 1  # what exporters write for "to the end"


def elements(context: ShapeInferenceContext, value: onnx_ir.Value | None) -> list[Dim] | None:
    """The elements of a small integer tensor, where they can be followed."""
    if value is None:
        return None
    tensor = onnx_ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return [int(item) for item in tensor.numpy().reshape(-1)]
    found = context.get_symbolic_value(value)
    return None if found is None else list(found)


@registry.register("", "ConstantOfShape", since_version=9)
def infer_constant_of_shape(context: ShapeInferenceContext, node: onnx_ir.Node) -> None:
    """The shape is the input's elements."""
    value = node.attributes.get("value")
    dtype = onnx_ir.DataType.FLOAT if value is None else value.as_tensor().dtype
    source = node.inputs[0]
    dims = elements(context, source)
    if dims is None and source is not None and source.shape is not None and isinstance(source.shape[0], int):
        dims = [context.new_symbolic_dim() for _ in range(source.shape[0])]
    context.set_shape_and_dtype(node.outputs[0], None if dims is None else onnx_ir.Shape(dims), dtype)


@registry.register("", "Slice", since_version=10)
def infer_slice(context: ShapeInferenceContext, node: onnx_ir.Node) -> None:
    """Bounds are inputs; what reaches beyond an axis is cut."""
    x = node.inputs[0]
    if x is None or x.shape is None:
        return
    inputs = [*node.inputs, None, None]
    starts, ends = elements(context, inputs[1]), elements(context, inputs[2])
    axes = _whole(elements(context, inputs[3])) if inputs[3] is not None else range(len(starts or ()))
    steps = _whole(elements(context, inputs[4])) if inputs[4] is not None else [1] * len(starts or ())
    dims = list(x.shape.dims)
    if axes is None or steps is None or starts is None or ends is None:
        touched = range(len(dims)) if axes is None or starts is None else axes
        for axis in touched:
            dims[axis] = context.new_symbolic_dim()
    else:
        slice_dims(context, dims, axes, starts, ends, steps)
    context.set_shape_and_dtype(node.outputs[0], onnx_ir.Shape(dims), x.dtype)
    whole = x.dtype in (onnx_ir.DataType.INT64, onnx_ir.DataType.INT32)
    sizes = elements(context, x) if whole and len(dims) == 1 else None
    if sizes is not None and axes is not None and (taken := _taken(starts, ends, steps)) is not None:
        context.set_symbolic_value(node.outputs[0], sizes[taken])


def _taken(starts: Sequence[Dim] | None, ends: Sequence[Dim] | None, steps: Sequence[int] | None) -> slice | None:
    """Which elements of a list of sizes `Shape(x)[1:2]` takes; None where its bounds are no numbers."""
    start, end = _whole(starts), _whole(ends)
    return slice(start[0], end[0], steps[0]) if start and end and steps and steps[0] else None


def _whole(elements: Sequence[Dim] | None) -> list[int] | None:
    numbers = [element for element in elements or () if isinstance(element, int)]
    return numbers if elements is not None and len(numbers) == len(elements) else None


def slice_dims(context: ShapeInferenceContext, dims: list[Dim], axes: Sequence[int], starts: Sequence[Dim],
               ends: Sequence[Dim], steps: Sequence[int]) -> None:  # fmt: skip
    """Replace the extents of the sliced axes."""
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        span = _span(dims[axis], start, end, step)
        dims[axis] = context.new_symbolic_dim() if span is None else span


def _span(dim: Dim, start: Dim, end: Dim, step: int) -> Dim | None:
    """How many elements are taken; None where the extent has no name."""
    if isinstance(dim, int) and isinstance(start, int) and isinstance(end, int):
        return len(range(*slice(start, end, step).indices(dim))) if step else None
    if step == 0 or any(isinstance(d, onnx_ir.SymbolicDim) and d.value is None for d in (dim, start, end)):
        return None
    first, last = (_bound(dim, bound, step) for bound in (start, end))
    text = f"({last})-({first})" if step > 0 else f"({first})-({last})"
    count = text if abs(step) == 1 else f"({text}+{abs(step) - 1})//{abs(step)}"
    return _dim(f"max(0,{count})" if not _surely_positive(start, end, step) else count)


def _bound(dim: Dim, bound: Dim, step: int) -> str:
    """A bound counted from the start and cut to the axis, as a text; an axis has one element at least."""
    size = str(dim) if isinstance(dim, int) else str(dim.value)
    low, high = ("0", f"({size})") if step > 0 else ("-1", f"({size})-1")
    if not isinstance(bound, int):
        return f"min({bound.value},{high})"
    if bound >= _FAR:
        return high
    if bound < -_FAR:
        return low
    if bound >= 0:
        return str(bound) if bound <= (1 if step > 0 else 0) else f"min({bound},{high})"
    return f"({size})-{-bound}" if bound == -1 else f"max({low},({size})-{-bound})"


def _surely_positive(start: Dim, end: Dim, step: int) -> bool:
    """Whether the bounds cannot cross, as an axis has one element at least."""
    if step > 0:
        whole = isinstance(end, int) and end >= _FAR and isinstance(start, int) and start <= 1
        return whole or (start == 0 and not isinstance(end, int)) or (start == 0 and isinstance(end, int) and end >= -1)
    return isinstance(start, int) and isinstance(end, int) and start in (-1, _FAR, 2**63 - 1) and end < -_FAR


def _dim(text: str) -> Dim | None:
    extent = translated(text)
    return extent if extent is None or isinstance(extent, int) else onnx_ir.SymbolicDim(extent)
