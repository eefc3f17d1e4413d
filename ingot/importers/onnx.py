"""An ONNX model from a path, bytes, a ModelProto or an onnx_ir.Model becomes one checked, function-free graph.

Whatever is accepted passes onnx.checker with strict shape inference; whatever is not raises one ImportFailure that
names the file, the node and the reason. Weights in external files stay mapped.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
from google.protobuf.message import DecodeError, EncodeError

from ingot.errors import ImportFailure, UnsupportedOperator
from ingot.importers import names, normalize, wire
from ingot.ir import oracle

OLDEST_OPSET, NEWEST_OPSET = 6, 28
_LARGEST_PROTOBUF = 2**31 - 1
Source = str | os.PathLike[str] | bytes | onnx.ModelProto | onnx_ir.Model


class ModelWarning(UserWarning):
    """The model is legal but probably not what its author meant."""


def load(source: Source) -> onnx_ir.Model:
    """Import a model; nothing of `source` is modified."""
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    label = str(path) if path else "the model"
    proto, weights = _read(source)
    _check_opsets(proto, label)
    _check(proto, path, label)
    normalize.densify(proto.graph)
    model = _deserialize(proto, label)
    _attach_small(model, path, label)
    normalize.restore_weights(model, weights)
    names.name_nodes(model)
    normalize.inline_functions(model, label)
    names.name_nodes(model)
    names.name_dimensions(model)
    _check_operators(model, label)
    _warn_about_nan(model, label)
    return model


def _read(source: Source) -> tuple[onnx.ModelProto, normalize.Weights]:
    """The model as a proto of our own without its large weights, and those."""
    if isinstance(source, onnx_ir.Model):
        return normalize.skeleton(source)
    if isinstance(source, str | os.PathLike):
        return _parse(_file_content(Path(source)), str(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return _parse(memoryview(bytes(source)), "the model")
    if isinstance(source, onnx.ModelProto):
        return _parse(memoryview(_serialized(source)), "the model")
    raise ImportFailure(
        f"cannot import a {type(source).__name__}: give a path, bytes, an onnx.ModelProto or an onnx_ir.Model"
    )


def _file_content(path: Path) -> memoryview:
    """The file as a map: weights are views of it, so it must not be overwritten in place while it is being built."""
    try:
        size = path.stat().st_size
        if size > _LARGEST_PROTOBUF:
            raise ImportFailure(f"{path} has {size} bytes; beyond 2 GB ONNX wants weights in an external data file")
        if size == 0:
            raise ImportFailure(f"{path} is empty")
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise ImportFailure(f"{path} cannot be read: {error.strerror}") from None


def _serialized(proto: onnx.ModelProto) -> bytes:
    try:
        return proto.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise ImportFailure(f"the ModelProto cannot be serialized ({error}); save it with external data") from None


def _parse(content: memoryview, label: str) -> tuple[onnx.ModelProto, normalize.Weights]:
    try:
        text, payloads = wire.split(content)
        proto = onnx.ModelProto.FromString(text)
    except (DecodeError, wire.Malformed):
        raise ImportFailure(f"{label} is not an ONNX model, or it is truncated ({len(content)} bytes)") from None
    if not proto.HasField("graph"):
        raise ImportFailure(f"{label} holds no graph: not an ONNX model, or truncated ({len(content)} bytes)")
    return proto, normalize.take_weights(proto.graph, payloads)


def _check(proto: onnx.ModelProto, path: Path | None, label: str) -> None:
    """onnx.checker, shapes and types included; the schemas' own faulty functions are not held against the model."""
    external = list(_external_tensors(proto.graph))
    if external and path is None:
        raise ImportFailure(
            f"initializer {external[0].name!r} keeps its data in a file; give the model's path instead of its bytes"
        )
    for tensor in external:
        _check_external(tensor, path or Path(), label)
    try:
        onnx.checker.check_model(str(path) if external else proto.SerializeToString(), full_check=True)
    except onnx.checker.ValidationError as error:
        raise ImportFailure(f"{label} is not a legal ONNX model: {_one_line(error)}") from None
    except onnx.shape_inference.InferenceError as error:  # noqa: TID251 - the error's name, not the inference
        if not _inside_schema_function(str(error)):
            raise ImportFailure(f"{label} contradicts itself: {_one_line(error)}") from None
    except (EncodeError, ValueError, RuntimeError) as error:
        raise ImportFailure(f"{label} cannot be checked: {_one_line(error)}") from None


def _check_opsets(proto: onnx.ModelProto, label: str) -> None:
    seen: dict[str, int] = {}
    for entry in proto.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if (first := seen.setdefault(domain, entry.version)) != entry.version:
            raise ImportFailure(f"{label} imports domain {domain!r} at two versions: {first} and {entry.version}")
    version = seen.get("", NEWEST_OPSET)
    readable = OLDEST_OPSET <= version <= NEWEST_OPSET or (version > 0 and normalize.is_ageless(proto.graph, version))
    if not readable:
        remedy = "update Ingot" if version > NEWEST_OPSET else "convert it with onnx.version_converter"
        raise ImportFailure(f"{label} uses opset {version}, Ingot reads {OLDEST_OPSET} to {NEWEST_OPSET}: {remedy}")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("[ShapeInferenceError] ", "").replace("Inference error(s): ", "")
    return text[:400] if len(text) <= 400 else text[:400] + "…"


def _inside_schema_function(message: str) -> bool:
    """Whether the complaint is about the expansion of a standard operator, not about the model."""
    operators = [part.split(")")[0] for part in message.split("(op_type:")[1:]]
    if len(operators) < 2 or not onnx.defs.has(outer := operators[0].split(",")[0]):
        return False
    schema = onnx.defs.get_schema(outer)
    takes_graph = any(a.type == onnx.defs.OpSchema.AttrType.GRAPH for a in schema.attributes.values())
    return not takes_graph


def _external_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor
    for node in graph.node:
        for attribute in node.attribute:
            for tensor in [attribute.t, *attribute.tensors]:
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    yield tensor
            for inner in [attribute.g, *attribute.graphs]:
                yield from _external_tensors(inner)


def _check_external(tensor: onnx.TensorProto, model: Path, label: str) -> None:
    """The file exists, lies in the model's folder and is long enough for the tensor."""
    info = {entry.key: entry.value for entry in tensor.external_data}
    location = info.get("location", "")
    folder = model.parent.resolve()
    file = folder / location
    if not location or os.path.isabs(location) or not file.resolve().is_relative_to(folder):
        raise ImportFailure(
            f"{label}: the data of initializer {tensor.name!r} lies outside the model's folder ({location!r}); "
            f"move it beside the model and export again"
        )
    if not file.is_file():
        raise ImportFailure(f"{label}: the data of initializer {tensor.name!r} is missing: no file {file}")
    try:
        offset, length = int(info.get("offset", 0)), info.get("length")
        wanted = int(length) if length is not None else normalize.payload_bytes(tensor)
    except ValueError:
        raise ImportFailure(f"{label}: initializer {tensor.name!r} has a damaged external_data entry: {info}") from None
    needed, available = normalize.payload_bytes(tensor), file.stat().st_size
    if offset < 0 or wanted != needed or offset + wanted > available:
        raise ImportFailure(
            f"{label}: initializer {tensor.name!r} of {needed} bytes does not fit in {location} "
            f"({available} bytes) at offset {offset} with length {wanted}"
        )


def _deserialize(proto: onnx.ModelProto, label: str) -> onnx_ir.Model:
    try:
        return onnx_ir.from_proto(proto)
    except onnx_ir.serde.SerdeError as error:
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        raise ImportFailure(f"{label} holds something Ingot does not read: {_one_line(Exception(reason))}") from None


def _attach_small(model: onnx_ir.Model, path: Path | None, label: str) -> None:
    """The remaining initializers become arrays, or maps of their external file."""
    if path is not None:
        onnx_ir.external_data.set_base_dir(model.graph, path.parent)
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if not isinstance(tensor, onnx_ir.serde.TensorProtoTensor):
            continue
        try:
            array = tensor.numpy()
        except (ValueError, TypeError, OverflowError) as error:
            raise ImportFailure(f"{label}: initializer {value.name!r} is damaged: {_one_line(error)}") from None
        value.const_value = onnx_ir.Tensor(array, dtype=tensor.dtype, shape=tensor.shape, name=value.name)


def _check_operators(model: onnx_ir.Model, label: str) -> None:
    """Every operator has a meaning: ONNX's, ours or a plugin's."""
    unknown: dict[str, str] = {}
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = model.opset_imports.get(domain, 1)
        if not oracle.is_known(domain, node.op_type, version):
            unknown.setdefault(f"{domain}::{node.op_type}" if domain else node.op_type, str(node.name))
    if unknown:
        listed = ", ".join(f"{operator} (node {name!r})" for operator, name in unknown.items())
        raise UnsupportedOperator(
            f"{label} uses operators Ingot has no meaning for: {listed}; "
            f'register each with @ingot.plugin("domain::Operator"), see docs/plugins.md'
        )


def nan_counts(model: onnx_ir.Model) -> dict[str, int]:
    """How many NaN each initializer holds that holds any."""
    found = {}
    for name, value in model.graph.initializers.items():
        if value.const_value is not None and value.const_value.dtype.is_floating_point():
            array = value.const_value.numpy()
            # The sum is NaN for infinities of both signs too, so it only says where to look.
            with np.errstate(all="ignore"):
                total = array.sum(dtype=np.float64) if array.dtype.kind == "f" else 0.0
            if np.isnan(total) and np.isnan(array).any():
                found[name] = int(np.isnan(array).sum())
    return found


def _warn_about_nan(model: onnx_ir.Model, label: str) -> None:
    for name, count in nan_counts(model).items():
        warnings.warn(f"{label}: initializer {name!r} holds {count} NaN", ModelWarning, stacklevel=3)
