"""Shape functions the library lacks or has wrong. Importing this module replaces or adds them."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir
from onnx_shape_inference import ShapeInferenceContext, broadcast_shapes, registry

from ingot.ir.shapes_sizes import Dim, elements
from ingot.ir.symbolic import canonical

registry.collect()  # theirs first: the last registration counts
MICROSOFT = "com.microsoft"
_LARGEST_RANK = 64
Rule = Callable[[ShapeInferenceContext, onnx_ir.Node], None]


def _like(standard: str, version: int, dtype: onnx_ir.DataType | None = None) -> Rule:
    """The rule of a standard operator with the same inputs and attributes; `dtype` where the result's differs."""

    def rule(context: ShapeInferenceContext, node: onnx_ir.Node) -> None:
        if dtype is not None:
            context.set_dtype(node.outputs[0], dtype)
        known = registry.get("", standard, version=version)
        assert known is not None, standard
        known(context, node)

    return rule


def _bounded(rule: Rule, index: int) -> Rule:
    """The rule, after a look at the length of the input that lists a shape: it becomes a rank."""

    def bounded(context: ShapeInferenceContext, node: onnx_ir.Node) -> None:
        listed = node.inputs[index] if len(node.inputs) > index else None
        length = listed.shape[0] if listed is not None and listed.shape is not None and len(listed.shape) else 0
        if isinstance(length, int) and length > _LARGEST_RANK:
            context.record_error(node, f"a shape of {length} elements; tensors have at most {_LARGEST_RANK} axes")
        rule(context, node)

    return bounded


for _name, _index in {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0, "Tile": 1}.items():
    _known = {version: registry.get("", _name, version=version) for version in range(1, 29)}
    for _version, _found in _known.items():
        if _found is not None and _found is not _known.get(_version - 1):
            registry.register("", _name, since_version=_version)(_bounded(_found, _index))

for _name, _rule in {
    "FusedConv": _like("Conv", 11),
    "FusedGemm": _like("Gemm", 13),
    "QuantizeLinear": _like("QuantizeLinear", 13),
    "DequantizeLinear": _like("DequantizeLinear", 13),
    "MatMulIntegerToFloat": _like("MatMul", 13, onnx_ir.DataType.FLOAT),
    "DynamicQuantizeMatMul": _like("MatMul", 13, onnx_ir.DataType.FLOAT),
}.items():
    registry.register(MICROSOFT, _name)(_rule)


@registry.register(MICROSOFT, "QLinearAveragePool")
def infer_qlinear_average_pool(context: ShapeInferenceContext, node: onnx_ir.Node) -> None:
    """As AveragePool; with channels_last the sizes are left to the run."""
    if not node.attributes.get_int("channels_last", 0):
        _like("AveragePool", 11)(context, node)
    elif (x := node.inputs[0]) is not None and x.shape is not None:
        dims = [x.shape[0], *(context.new_symbolic_dim() for _ in range(len(x.shape) - 2)), x.shape[-1]]
        context.set_shape_and_dtype(node.outputs[0], onnx_ir.Shape(dims), x.dtype)


@registry.register(MICROSOFT, "QLinearGlobalAveragePool")
def infer_qlinear_global_average_pool(context: ShapeInferenceContext, node: onnx_ir.Node) -> None:
    """The spatial axes become 1."""
    x = node.inputs[0]
    if x is None or x.shape is None:
        return
    ones = [1] * (len(x.shape) - 2)
    last = node.attributes.get_int("channels_last", 0)
    dims = [x.shape[0], *ones, x.shape[-1]] if last else [x.shape[0], x.shape[1], *ones]
    context.set_shape_and_dtype(node.outputs[0], onnx_ir.Shape(dims), x.dtype)


@registry.register(MICROSOFT, "FusedMatMul")
@registry.register(MICROSOFT, "TransposeMatMul")
def infer_fused_matmul(context: ShapeInferenceContext, node: onnx_ir.Node) -> None:
    """numpy's matrix product after the transpositions the attributes ask for."""
    a, b = (_turned(node, value, side) for value, side in zip(node.inputs, "AB", strict=True))
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return
    batch = broadcast_shapes(onnx_ir.Shape(a[:-2]), onnx_ir.Shape(b[:-2]))
    if batch is not None and node.inputs[0] is not None:
        shape = onnx_ir.Shape([*batch.dims, a[-2], b[-1]])
        context.set_shape_and_dtype(node.outputs[0], shape, node.inputs[0].dtype)


def _turned(node: onnx_ir.Node, value: onnx_ir.Value | None, side: str) -> list[int | onnx_ir.SymbolicDim] | None:
    if value is None or value.shape is None:
        return None
    dims = list(value.shape.dims)
    if node.attributes.get_int(f"transBatch{side}", 0):
        dims = [*dims[1:-1], dims[0], dims[-1]]
    if node.attributes.get_int(f"trans{side}", 0) and len(dims) > 1:
        dims = [*dims[:-2], dims[-1], dims[-2]]
    return dims


_infer_group_query_attention = registry.get(MICROSOFT, "GroupQueryAttention", version=1)


@registry.register(MICROSOFT, "GroupQueryAttention")
def infer_group_query_attention(context: ShapeInferenceContext, node: onnx_ir.Node) -> None:
    """The present cache is as long as the past's buffer or as the longest sequence, if its length can be followed."""
    assert _infer_group_query_attention is not None
    _infer_group_query_attention(context, node)
    past = node.inputs[3] if len(node.inputs) > 3 else None
    if past is not None and past.shape is not None:
        length = _longer(context, past.shape[2], node.inputs[6])
        for present in node.outputs[1:3]:
            present.shape = onnx_ir.Shape([*past.shape.dims[:2], length, past.shape[3]])


def _longer(context: ShapeInferenceContext, held: Dim, total: onnx_ir.Value | None) -> Dim:
    """The larger of two lengths; a new symbol where the second is not known."""
    sizes = elements(context, total)
    texts = [d if isinstance(d, int) else d.value for d in (held, *(sizes or ()))]
    if len(texts) != 2 or None in texts:
        return context.new_symbolic_dim()
    extent = canonical(f"max({texts[0]},{texts[1]})")
    return extent if isinstance(extent, int) else onnx_ir.SymbolicDim(extent)


@registry.register("", "Unique", since_version=11)
def infer_unique(context: ShapeInferenceContext, node: onnx_ir.Node) -> None:
    """Distinct slices along `axis` (or elements of the flattened x), and up to three index vectors."""
    x = node.inputs[0]
    count = context.new_symbolic_dim()
    axis = node.attributes.get("axis")
    length: int | onnx_ir.SymbolicDim = context.new_symbolic_dim()
    if axis is None:
        context.set_shape_and_dtype(node.outputs[0], onnx_ir.Shape([count]), None if x is None else x.dtype)
    elif x is not None and x.shape is not None:
        dims = list(x.shape.dims)
        length, dims[axis.as_int()] = dims[axis.as_int()], count
        context.set_shape_and_dtype(node.outputs[0], onnx_ir.Shape(dims), x.dtype)
    for output, size in zip(node.outputs[1:], (count, length, count), strict=False):
        context.set_shape_and_dtype(output, onnx_ir.Shape([size]), onnx_ir.DataType.INT64)
