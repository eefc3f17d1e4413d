"""KServe v2 over HTTP: JSON with binary tensors behind it ↔ requests and responses."""

from __future__ import annotations

import array
import gzip
import itertools
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import orjson

from ingot.dtypes import numpy_dtype
from ingot.server.ports import Ports, classified
from ingot.server.request import (
    Array,
    Code,
    Placement,
    Request,
    RequestedOutput,
    Response,
    SequencePlace,
    ServerError,
    Tensor,
    datatype_of,
    element_count,
    from_bytes,
    invalid,
    to_bytes,
)
from ingot.server.shm import Regions
from ingot.server.templates import Template, template_of
from ingot.server.wire import Part

_KNOWN_PARAMETERS = {"sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "binary_data_output"}
_UNPACKED = 16 << 10  # compressed bytes at a time
_REMEMBERED, _REMEMBERED_TEXT = 1024, 2048  # JSON parts that are kept, and bytes of the longest one
_KINDS = {"b": "b", "i": "iu", "u": "iu", "f": "fiu", "V": "fiu"}  # numpy kinds of JSON values a datatype takes


# -- compression ------------------------------------------------------------------------------------------------------
def decompressed(body: bytes | bytearray, encoding: bytes, limit: int) -> bytes | bytearray:
    """The body without its Content-Encoding; refuses to unpack beyond the limit."""
    if encoding in (b"", b"identity"):
        return body
    if encoding not in (b"gzip", b"deflate"):
        raise ServerError(
            Code.INVALID_ARG, f"Content-Encoding '{encoding.decode('latin-1')}' is not supported; gzip, deflate are"
        )
    unpacker = zlib.decompressobj(31 if encoding == b"gzip" else 15)
    plain, view = bytearray(), memoryview(body)
    for at in range(0, len(view), _UNPACKED):  # a bomb is noticed before it has taken more than the limit
        try:
            plain += unpacker.decompress(view[at : at + _UNPACKED], limit + 1 - len(plain))
        except zlib.error as error:
            raise invalid(f"the body is not valid {encoding.decode()}: {error}") from error
        if len(plain) > limit:
            raise ServerError(Code.TOO_LARGE, f"the decompressed body exceeds {limit} bytes")
    if not unpacker.eof:
        raise invalid(f"the {encoding.decode()} body is cut short")
    return plain


def chosen_compression(accepted: bytes) -> bytes:
    """gzip or deflate where the client accepts it, else nothing."""
    offered = [
        item.split(b";")[0].strip().lower() for item in accepted.split(b",") if b"q=0" not in item.split(b";")[-1]
    ]
    return next((name for name in offered if name in (b"gzip", b"deflate")), b"")


def compressed(parts: Sequence[Part], encoding: bytes) -> bytes:
    """The parts as one compressed body."""
    whole = b"".join(parts)
    return gzip.compress(whole, 1) if encoding == b"gzip" else zlib.compress(whole, 1)


# -- requests ---------------------------------------------------------------------------------------------------------
class Decoder:
    """Decodes bodies; JSON parts that were seen before, whose tensors all follow in binary, are not parsed again."""

    def __init__(self, regions: Regions) -> None:
        self._regions = regions
        self._templates: dict[bytes, Template] = {}

    def __call__(
        self, body: bytes | bytearray, json_length: int | None, model: str, version: int, arrived: int
    ) -> Request:
        """A request; its tensors are views of `body`. `json_length`: Inference-Header-Content-Length."""
        if json_length is not None and json_length <= _REMEMBERED_TEXT:
            template = self._templates.get(bytes(body[:json_length]))
            if template is not None and template.end == len(body):
                return template.filled(body, model, version, arrived)
        request = decode(body, json_length, model, version, self._regions, arrived)
        if json_length is not None and json_length <= _REMEMBERED_TEXT:
            self._remember(bytes(body[:json_length]), json_length, request)
        return request

    def _remember(self, text: bytes, at: int, request: Request) -> None:
        described = parse_json(text)["inputs"]
        sizes = [item.get("parameters", {}).get("binary_data_size") for item in described]
        if None in sizes:
            return
        *starts, end = itertools.accumulate(sizes, initial=at)
        template = template_of(request, starts, end)
        if template is None:
            return
        if len(self._templates) >= _REMEMBERED:
            self._templates.pop(next(iter(self._templates)))
        self._templates[text] = template


def decode(
    body: bytes | bytearray, json_length: int | None, model: str, version: int, regions: Regions, arrived: int
) -> Request:
    """A request; its tensors are views of `body`. `json_length`: Inference-Header-Content-Length."""
    view = memoryview(body)
    if json_length is not None and not 0 <= json_length <= len(view):
        raise invalid(f"Inference-Header-Content-Length is {json_length}, the body has {len(view)} bytes")
    document = parse_json(view if json_length is None else view[:json_length])
    binary = view[len(view) if json_length is None else json_length :]
    parameters = _typed(document.get("parameters", {}), dict, "'parameters'")
    inputs, used = _inputs(_typed(document.get("inputs"), list, "'inputs'"), binary, regions)
    if used != len(binary):
        raise invalid(f"unexpected additional input data for model '{model}': {len(binary) - used} bytes are left over")
    default = _typed(parameters.get("binary_data_output", False), bool, "'binary_data_output'")
    outputs = tuple(_output(item, default) for item in _typed(document.get("outputs", []), list, "'outputs'"))
    return Request(
        model, inputs, version, _typed(document.get("id", ""), str, "'id'"), outputs, _sequence(parameters),
        _unsigned(parameters.get("priority", 0), "priority"), _unsigned(parameters.get("timeout", 0), "timeout"),
        _others(parameters) if default is False else {**_others(parameters), "binary_data_output": True}, arrived,
    )  # fmt: skip


def parse_json(text: memoryview | bytes) -> dict[str, Any]:
    """A JSON object; ServerError says where it is malformed."""
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise invalid(f"failed to parse the request JSON buffer: {error}") from error
    return _typed(document, dict, "the request")


_NAMES = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}


def _typed(value: Any, kind: type, what: str) -> Any:
    if type(value) is not kind:
        raise invalid(f"Unable to parse {what}: must be {_NAMES[kind]}" + (", it is missing" if value is None else ""))
    return value


def _unsigned(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise invalid(f"Unable to parse '{what}': must be an unsigned integer")
    return value


def _others(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    return {key: value for key, value in parameters.items() if key not in _KNOWN_PARAMETERS} if parameters else {}


def _sequence(parameters: Mapping[str, Any]) -> SequencePlace | None:
    identity = parameters.get("sequence_id", 0)
    if type(identity) is not str:
        _unsigned(identity, "sequence_id")
    if not identity:
        return None
    return SequencePlace(
        identity,
        _typed(parameters.get("sequence_start", False), bool, "'sequence_start'"),
        _typed(parameters.get("sequence_end", False), bool, "'sequence_end'"),
    )


def _inputs(items: list[Any], binary: memoryview, regions: Regions) -> tuple[tuple[Tensor, ...], int]:
    tensors, used = [], 0
    for item in items:
        name = _typed(_typed(item, dict, "an input").get("name"), str, "an input's 'name'")
        datatype = _typed(item.get("datatype"), str, f"the 'datatype' of input '{name}'")
        shape = _shape(item.get("shape"), name)
        parameters = _typed(item.get("parameters", {}), dict, f"the 'parameters' of input '{name}'")
        if "binary_data_size" in parameters:
            end = used + _unsigned(parameters["binary_data_size"], "binary_data_size")
            if end > len(binary):
                raise invalid(
                    f"input '{name}' asks for {end - used} bytes of binary data, {len(binary) - used} are left"
                )
            tensors.append(from_bytes(name, datatype, shape, binary[used:end]))
            used = end
        elif "shared_memory_region" in parameters:
            tensors.append(regions.tensor(name, datatype, shape, _placement(parameters)))
        else:
            tensors.append(_from_json(name, datatype, shape, _typed(item.get("data"), list, f"the 'data' of '{name}'")))
    return tuple(tensors), used


def _shape(value: Any, name: str) -> tuple[int, ...]:
    shape = tuple(_typed(value, list, f"the 'shape' of input '{name}'"))
    if any(type(extent) is not int for extent in shape):
        raise invalid(f"Unable to parse the 'shape' of input '{name}': must be integers")
    return shape


def _placement(parameters: Mapping[str, Any]) -> Placement:
    return Placement(
        _typed(parameters.get("shared_memory_region"), str, "'shared_memory_region'"),
        _unsigned(parameters.get("shared_memory_offset", 0), "shared_memory_offset"),
        _unsigned(parameters.get("shared_memory_byte_size"), "shared_memory_byte_size"),
    )


def _from_json(name: str, datatype: str, shape: tuple[int, ...], data: list[Any]) -> Tensor:
    """Numbers, flat or nested; nothing is converted that would change its value's kind."""
    kind, count = datatype_of(name, datatype), element_count(name, shape)
    if kind.size is None:
        return Tensor(name, datatype, _texts(name, data, count).reshape(shape))
    values = _numbers(name, data)
    if values.size != count:
        raise invalid(f"input '{name}' has {values.size} elements, its shape {list(shape)} takes {count}")
    dtype = numpy_dtype(kind.numpy)
    if count and values.dtype.kind not in _KINDS[dtype.kind]:
        raise invalid(f"Unable to parse 'data' of input '{name}': must be {datatype}, it is {values.dtype}")
    if dtype.kind != "b" and ((values == 0) | (values == 1)).any() and _hold_boolean(data):
        raise invalid(f"Unable to parse 'data' of input '{name}': must be {datatype}, it holds booleans")
    if dtype.kind in "iu" and count and not _within(values, dtype):
        raise invalid(f"Unable to parse 'data' of input '{name}': a value does not fit into {datatype}")
    with np.errstate(over="ignore"):
        converted = values.astype(dtype)
    if dtype.kind in "fV" and not np.isfinite(converted).all():
        raise invalid(f"Unable to parse 'data' of input '{name}': a value does not fit into {datatype}")
    return Tensor(name, datatype, converted.reshape(shape))


def _numbers(name: str, data: list[Any]) -> Array:
    """A list as an array; flat ones, mostly floats, in two thirds of the time that numpy takes to find that out."""
    if data and type(data[0]) is float:
        try:
            return np.frombuffer(array.array("d", data))
        except (TypeError, OverflowError):  # not all are numbers: what they are is numpy's to say
            pass
    try:
        return np.array(data)
    except ValueError as error:
        raise invalid(f"the 'data' of input '{name}' is ragged: {error}") from error


def _hold_boolean(values: list[Any]) -> bool:
    """Whether true or false is among numbers: numpy takes them for 1 and 0."""
    kinds = set(map(type, values))
    return bool in kinds or (list in kinds and any(_hold_boolean(value) for value in values if type(value) is list))


def _within(values: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> bool:
    limits = np.iinfo(dtype)
    return int(values.min()) >= limits.min and int(values.max()) <= limits.max


def _texts(name: str, data: list[Any], count: int) -> np.ndarray[Any, Any]:
    flat, pending = [], list(reversed(data))
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending.extend(reversed(item))
        else:
            flat.append(_typed(item, str, f"an element of input '{name}'").encode())
    if len(flat) != count:
        raise invalid(f"input '{name}' has {len(flat)} elements, its shape takes {count}")
    array = np.empty(count, object)
    array[:] = flat
    return array


def _output(item: Any, binary: bool) -> RequestedOutput:
    name = _typed(_typed(item, dict, "an output").get("name"), str, "an output's 'name'")
    parameters = _typed(item.get("parameters", {}), dict, f"the 'parameters' of output '{name}'")
    return RequestedOutput(
        name,
        _typed(parameters.get("binary_data", binary), bool, "'binary_data'"),
        _unsigned(parameters.get("classification", 0), "classification"),
        _placement(parameters) if "shared_memory_region" in parameters else None,
    )


# -- responses --------------------------------------------------------------------------------------------------------
def encode(request: Request, response: Response, regions: Regions) -> tuple[list[Part], int | None]:
    """(parts of the body, length of its JSON if binary tensors follow it)."""
    binary = bool(request.parameters.get("binary_data_output"))
    described = not response.parameters and not response.id
    if described and binary and not request.outputs:
        return _all_binary(response)
    default = RequestedOutput("", binary)
    wanted = {output.name: output for output in request.outputs}
    chosen = [wanted.get(tensor.name, default) for tensor in response.outputs]
    if described and all(x.binary and not x.classification and x.placement is None for x in chosen):
        return _all_binary(response)
    return _encode(response, chosen, regions)


def _all_binary(response: Response) -> tuple[list[Part], int]:
    parts: list[Part] = [b""]
    described = []
    for tensor in response.outputs:
        raw = to_bytes(tensor)
        parts.append(raw)
        described.append((tensor.name, tensor.datatype, tensor.data.shape, len(raw)))
    parts[0] = text = _binary_text(response.model, response.version, *described)
    return parts, len(text)


@lru_cache(1024)
def _binary_text(model: str, version: int, *described: tuple[str, str, tuple[int, ...], int]) -> bytes:
    """The JSON of a response whose outputs all follow in binary."""
    outputs = [
        {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}
        for name, datatype, shape, size in described
    ]
    return orjson.dumps({"model_name": model, "model_version": str(version), "outputs": outputs})


def _encode(response: Response, chosen: Sequence[RequestedOutput], regions: Regions) -> tuple[list[Part], int | None]:
    binaries: list[Part] = []
    described = [
        _encoded(tensor, output, response.ports, regions, binaries)
        for tensor, output in zip(response.outputs, chosen, strict=True)
    ]
    document: dict[str, Any] = {
        "model_name": response.model, "model_version": str(response.version), "outputs": described,
    }  # fmt: skip
    if response.id:
        document["id"] = response.id
    if response.parameters:
        document["parameters"] = response.parameters
    text = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return [text, *binaries], len(text) if binaries else None


def _encoded(
    tensor: Tensor, wanted: RequestedOutput, ports: Ports, regions: Regions, binaries: list[Part]
) -> dict[str, Any]:
    if wanted.classification:
        port = ports.output_of[tensor.name]
        tensor = classified(tensor, wanted.classification, port.labels, bool(ports.max_rows))
    entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
    if wanted.placement:
        place = wanted.placement
        size = regions.write(tensor, place)
        entry["parameters"] = {"shared_memory_region": place.region, "shared_memory_byte_size": size}
        if place.offset:
            entry["parameters"]["shared_memory_offset"] = place.offset
    elif wanted.binary:
        raw = to_bytes(tensor)
        entry["parameters"] = {"binary_data_size": len(raw)}
        binaries.append(raw)
    else:
        entry["data"] = _as_json(tensor)
    return entry


def _as_json(tensor: Tensor) -> Any:
    flat = np.ascontiguousarray(tensor.data).reshape(-1)
    if tensor.datatype == "BYTES":
        try:
            return [item.decode() for item in flat]
        except UnicodeDecodeError as error:
            raise invalid(f"output '{tensor.name}' is not UTF-8; ask for it with binary_data: {error}") from error
    return flat.astype(np.float32) if tensor.datatype in ("FP16", "BF16") else flat
