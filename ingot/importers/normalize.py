"""Small rewrites that every imported model goes through: sparse constants, overridable weights, local functions."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx
import onnx_ir
from onnx import numpy_helper
from onnx_ir.passes.common import InlinePass

from ingot.errors import ImportFailure

_SMALL = 4096  # bytes; shapes, axes and scales stay in the proto, where the checker sees their values


def payload_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes the tensor's elements take, sub-byte types packed."""
    return int(-(-prod(tensor.dims) * onnx_ir.DataType(tensor.data_type).bitwidth // 8))


def densify(graph: onnx.GraphProto) -> None:
    """Sparse initializers and constants become dense ones, in place."""
    for sparse in graph.sparse_initializer:
        graph.initializer.append(numpy_helper.from_array(dense(sparse), sparse.values.name))
    del graph.sparse_initializer[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.SPARSE_TENSOR and node.op_type == "Constant":
                tensor = numpy_helper.from_array(dense(attribute.sparse_tensor))
                attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))
            for inner in [attribute.g, *attribute.graphs]:
                densify(inner)


def dense(tensor: onnx.SparseTensorProto) -> np.ndarray:
    """The array a sparse tensor stands for; indices are flat or one row per element."""
    values, indices = numpy_helper.to_array(tensor.values), numpy_helper.to_array(tensor.indices)
    result = np.zeros(tuple(tensor.dims), values.dtype)
    flat = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), result.shape)
    result.reshape(-1)[flat] = values
    return result


def constant_inputs(model: onnx_ir.Model) -> None:
    """Inputs that have an initializer (all weights before IR version 4) are constants, not inputs."""
    graph = model.graph
    kept = [value for value in graph.inputs if value.name not in graph.initializers]
    if len(kept) != len(graph.inputs):
        graph.inputs[:] = kept


def skeleton(model: onnx_ir.Model) -> onnx.ModelProto:
    """The model as a proto whose large weights are left out: they are inputs there, so that it stays checkable."""
    clone = model.clone()
    for name, value in list(clone.graph.initializers.items()):
        if value.const_value is not None and value.const_value.nbytes > _SMALL:
            value.shape, value.dtype = onnx_ir.Shape(value.const_value.shape.numpy()), value.const_value.dtype
            del clone.graph.initializers[name]
            value.const_value = None
            clone.graph.inputs.append(value)
    return onnx_ir.to_proto(clone)


def inline_functions(model: onnx_ir.Model, proto: onnx.ModelProto, label: str) -> None:
    """Model-local functions disappear into the graph, in place."""
    if not model.functions:
        return
    for function in model.functions.values():
        _align_opsets(function, model, label)
    try:
        InlinePass()(model)
    except (ValueError, onnx_ir.passes.PassError) as error:
        reason = error.__cause__ or error
        raise ImportFailure(f"{label}: a local function cannot be inlined: {reason}") from None
    model.functions.clear()


def _align_opsets(function: onnx_ir.Function, model: onnx_ir.Model, label: str) -> None:
    """A function may import other versions than the model as long as its operators mean the same in both."""
    for domain, version in list(function.opset_imports.items()):
        wanted = model.opset_imports.setdefault(domain, version)
        for node in function.all_nodes() if wanted != version else ():
            if node.domain == domain and _since(node, version) != _since(node, wanted):
                raise ImportFailure(
                    f"{label}: function {function.name!r} uses {node.op_type} of opset {version}, the model opset "
                    f"{wanted}, where it differs; export the model with one opset"
                )
        function.opset_imports[domain] = wanted


def is_ageless(graph: onnx.GraphProto, version: int) -> bool:
    """Whether every operator still meant the same at opset 6, so that an older model needs no translation."""
    nodes = [node for node in graph.node if node.domain in ("", "ai.onnx")]
    return version < 6 and all(_since(node, version) == _since(node, 6) != 0 for node in nodes)


def _since(node: onnx_ir.Node | onnx.NodeProto, version: int) -> int:
    try:
        return onnx.defs.get_schema(node.op_type, version, node.domain).since_version
    except onnx.defs.SchemaError:
        return 0
