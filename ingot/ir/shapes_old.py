"""Shape functions of the opsets before 10 that the library leaves out. Importing this module adds them."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir
from onnx_shape_inference import ShapeInferenceContext, registry

from ingot.ir.shapes_sizes import slice_dims

registry.collect()  # theirs first: the last registration counts

_UNCHANGED = {"Max": 8, "Min": 8, "Mean": 8, "Sum": 8, "GRU": 7, "LSTM": 7, "RNN": 7, "Gemm": 7, "Dropout": 7,
              "GroupNormalization": 21}  # fmt: skip
for _name, _version in _UNCHANGED.items():
    _rule = registry.get("", _name, version=_version)
    assert _rule is not None, _name
    registry.register("", _name, since_version=1)(_rule)


def _first_operand(comparison: bool) -> Callable[[ShapeInferenceContext, onnx_ir.Node], None]:
    """The second operand is placed within the first one, which gives the shape."""

    def rule(context: ShapeInferenceContext, node: onnx_ir.Node) -> None:
        x = node.inputs[0]
        if x is not None:
            context.set_shape_and_dtype(node.outputs[0], x.shape, onnx_ir.DataType.BOOL if comparison else x.dtype)

    return rule


for _name in ("Add", "Sub", "Mul", "Div", "Pow"):
    registry.register("", _name, since_version=1)(_first_operand(comparison=False))
for _name in ("And", "Or", "Xor", "Equal", "Less", "Greater"):
    registry.register("", _name, since_version=1)(_first_operand(comparison=True))


@registry.register("", "Slice", since_version=1)
def infer_slice(context: ShapeInferenceContext, node: onnx_ir.Node) -> None:
    """Bounds are attributes; what reaches beyond an axis is cut."""
    x = node.inputs[0]
    if x is None or x.shape is None:
        return
    starts, ends = (list(node.attributes[name].as_ints()) for name in ("starts", "ends"))
    given = node.attributes.get("axes")
    dims = list(x.shape.dims)
    axes = given.as_ints() if given else range(len(starts))
    slice_dims(context, dims, axes, starts, ends, [1] * len(starts))
    context.set_shape_and_dtype(node.outputs[0], onnx_ir.Shape(dims), x.dtype)


@registry.register("", "TopK", since_version=1)
def infer_topk(context: ShapeInferenceContext, node: onnx_ir.Node) -> None:
    """k is an attribute."""
    x = node.inputs[0]
    if x is None or x.shape is None:
        return
    dims = list(x.shape.dims)
    dims[node.attributes.get_int("axis", -1)] = node.attributes["k"].as_int()
    context.set_shape_and_dtype(node.outputs[0], onnx_ir.Shape(dims), x.dtype)
    context.set_shape_and_dtype(node.outputs[1], onnx_ir.Shape(dims), onnx_ir.DataType.INT64)
