"""Small rewrites that every imported model goes through: sparse constants, overridable weights, local functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod

import numpy as np
import onnx
import onnx_ir
from onnx import numpy_helper
from onnx_ir.passes.common import InlinePass

from ingot.errors import ImportFailure
from ingot.importers import wire

Weights = dict[str, onnx_ir.TensorProtocol]
_CONSTANTS_ARE_NO_INPUTS = 4  # the IR version since which an initializer need not be an input

_PLAIN_TYPES = frozenset(
    onnx_ir.DataType[name].value
    for name in "FLOAT DOUBLE FLOAT16 BFLOAT16 INT8 UINT8 INT16 UINT16 INT32 UINT32 INT64 UINT64 BOOL".split()
)
_TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "string_data", "double_data", "uint64_data")


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


def take_weights(graph: onnx.GraphProto, payloads: Mapping[int, memoryview]) -> Weights:
    """Tensors over raw data that was taken out of the graph; there they are inputs now, so that it stays checkable."""
    inputs = {value.name: value for value in graph.input}
    counts = Counter(tensor.name for tensor in graph.initializer)
    weights: Weights = {}
    kept = []
    for index, tensor in enumerate(graph.initializer):
        raw = payloads.get(index)
        declared = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        given = inputs.get(tensor.name, declared)
        if raw is None or counts[tensor.name] > 1 or given.type != declared.type or not _is_sound(tensor, len(raw)):
            if raw is not None:
                tensor.raw_data = bytes(raw)
            kept.append(tensor)
            continue
        dtype = onnx_ir.DataType(tensor.data_type)
        array = np.frombuffer(raw, dtype.numpy()).reshape(tuple(tensor.dims))
        weights[tensor.name] = onnx_ir.Tensor(array, dtype, name=tensor.name)
        if tensor.name not in inputs:
            graph.input.append(declared)
    if weights:
        small = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
        del graph.initializer[:]
        graph.initializer.extend(small)
    return weights


def _is_sound(tensor: onnx.TensorProto, size: int) -> bool:
    """Whether there is nothing for the checker to find: a name, a known type, data of exactly its size."""
    if not tensor.name or tensor.data_type not in _PLAIN_TYPES:
        return False
    others = any(len(getattr(tensor, field)) for field in _TYPED_FIELDS) or tensor.HasField("segment")
    external = tensor.data_location == onnx.TensorProto.EXTERNAL or len(tensor.external_data)
    return min(tensor.dims, default=1) > 0 and payload_bytes(tensor) == size and not others and not external


def skeleton(model: onnx_ir.Model) -> tuple[onnx.ModelProto, Weights]:
    """The model as a proto whose large weights are inputs, and those weights, shared with the model."""
    clone = model.clone()
    weights: Weights = {}
    for name, value in list(clone.graph.initializers.items()):
        if value.const_value is not None and value.const_value.nbytes > wire.SMALL:
            weights[name] = value.const_value
            value.shape, value.dtype = onnx_ir.Shape(value.const_value.shape.numpy()), value.const_value.dtype
            del clone.graph.initializers[name]
            value.const_value = None
            if not value.is_graph_input():
                clone.graph.inputs.append(value)
    return onnx_ir.to_proto(clone), weights


def restore_weights(model: onnx_ir.Model, weights: Weights) -> None:
    """Weights become initializers again; inputs that have an initializer are constants, not inputs."""
    graph = model.graph
    for value in list(graph.inputs):
        if value.name in weights:
            value.const_value = weights[value.name]
    constants = [value for value in graph.inputs if value.const_value is not None]
    graph.inputs[:] = [value for value in graph.inputs if value.const_value is None]
    model.ir_version = max(model.ir_version, _CONSTANTS_ARE_NO_INPUTS)
    for value in constants:
        if value.name not in graph.initializers:
            graph.register_initializer(value)


def inline_functions(model: onnx_ir.Model, label: str) -> None:
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
