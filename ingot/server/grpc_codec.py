"""inference.ModelInferRequest → Request, Response → ModelInferResponse; raw contents are not copied again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from ingot.dtypes import numpy_dtype
from ingot.server.ports import classified
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
from ingot.server.schema import message
from ingot.server.service import version_number
from ingot.server.shm import Regions
from ingot.server.templates import Template, template_of
from ingot.server.wire import Part

InferRequest, InferResponse = message("inference.ModelInferRequest"), message("inference.ModelInferResponse")
_OWN = {"sequence_id", "sequence_start", "sequence_end", "priority", "timeout"}
_REMEMBERED, _OF_A_SIZE, _REMEMBERED_HEAD = 1024, 8, 2048  # sizes of messages, messages of one, bytes beside tensors
Raw = bytes | bytearray


def _tag(kind: Any, name: str) -> bytes:
    """What a field of bytes begins with, before its length."""
    return bytes([kind.DESCRIPTOR.fields_by_name[name].number << 3 | 2])


_RAW_INPUT, _RAW_OUTPUT = _tag(InferRequest, "raw_input_contents"), _tag(InferResponse, "raw_output_contents")


class Decoder:
    """Decodes messages; one that was seen before, but for the numbers in its raw contents, is not parsed again."""

    def __init__(self, regions: Regions) -> None:
        self._regions = regions
        self._known: dict[int, tuple[_Known, ...]] = {}

    def __call__(self, raw: Raw, arrived: int) -> Request:
        """A request over the message's bytes."""
        for known in self._known.get(len(raw), ()):
            if known.means(raw):
                rest = known.template.rest
                return known.template.filled(raw, rest.model, rest.version, arrived)
        asked = parsed(InferRequest, raw)
        request = decode(asked, self._regions, arrived)
        self._remember(raw, asked, request)
        return request

    def _remember(self, raw: Raw, asked: Any, request: Request) -> None:
        sizes = [len(content) for content in asked.raw_input_contents]
        if len(sizes) != len(request.inputs) or len(raw) - sum(sizes) > _REMEMBERED_HEAD:
            return
        found = _laid_out(raw, sizes)
        starts = [start + len(prefix) for start, prefix in found]
        template = template_of(request, starts, len(raw))
        if template is None:
            return
        same_size = self._known.pop(len(raw), ())
        if len(self._known) >= _REMEMBERED:
            self._known.pop(next(iter(self._known)))
        known = _Known(bytes(raw[: starts[0]]), tuple(found[1:]), template)
        self._known[len(raw)] = (known, *same_size[: _OF_A_SIZE - 1])


@dataclass(frozen=True, slots=True)
class _Known:
    """What is before the first raw content of a message, and between the others."""

    head: bytes
    between: tuple[tuple[int, bytes], ...]
    template: Template

    def means(self, raw: Raw) -> bool:
        """Whether other bytes, as many, say the same, but for the raw contents."""
        return raw.startswith(self.head) and (
            not self.between or all(raw.startswith(piece, start) for start, piece in self.between)
        )


def _laid_out(raw: Raw, sizes: list[int]) -> list[tuple[int, bytes]]:
    """Where the lengths of a message's raw contents are, and their bytes, if it ends with all of those; else nothing.

    What precedes them must be a message itself: then it is at a field's beginning that they are looked for.
    """
    prefixes = [_RAW_INPUT + _varint(size) for size in sizes]
    at = len(raw) - sum(sizes) - sum(map(len, prefixes))
    try:
        if at < 0 or InferRequest.FromString(bytes(raw[:at])).raw_input_contents:
            return []
    except DecodeError:
        return []
    found = []
    for prefix, size in zip(prefixes, sizes, strict=True):
        found.append((at, prefix))
        at += len(prefix) + size
    return found if all(raw.startswith(prefix, start) for start, prefix in found) else []


def _varint(value: int) -> bytes:
    """Protobuf's form of a length."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def parsed(kind: Any, raw: Raw) -> Any:
    """Bytes as a message; what is none is the client's mistake."""
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise ServerError(Code.INVALID_ARG, f"the request is no {kind.DESCRIPTOR.full_name}: {error}") from error


def decode(asked: Any, regions: Regions, arrived: int) -> Request:
    """A request over the message's bytes."""
    parameters = plain_parameters(asked.parameters)
    return Request(
        asked.model_name, _inputs(asked, regions), version_number(asked.model_version), asked.id,
        tuple(_output(item) for item in asked.outputs), _sequence(parameters),
        _unsigned(parameters, "priority"), _unsigned(parameters, "timeout"),
        {key: value for key, value in parameters.items() if key not in _OWN}, arrived,
    )  # fmt: skip


def plain_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by name as bool, int, float or str."""
    return {name: _chosen(name, value) for name, value in parameters.items()} if parameters else {}


def _chosen(name: str, value: Any) -> Any:
    choice = value.WhichOneof("parameter_choice")
    if choice is None:
        raise invalid(f"parameter '{name}' has no value")
    return getattr(value, choice)


def _unsigned(parameters: Mapping[str, Any], name: str, default: int = 0) -> int:
    value = parameters.get(name, default)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise invalid(f"parameter '{name}' must be an unsigned integer, it is {value!r}")
    return value


def _sequence(parameters: Mapping[str, Any]) -> SequencePlace | None:
    identity = parameters.get("sequence_id", 0)
    if type(identity) is not str:
        identity = _unsigned(parameters, "sequence_id")
    if not identity:
        return None
    flags = [parameters.get(name, False) for name in ("sequence_start", "sequence_end")]
    if any(type(flag) is not bool for flag in flags):
        raise invalid("'sequence_start' and 'sequence_end' must be bool_param")
    return SequencePlace(identity, *flags)


def _inputs(asked: Any, regions: Regions) -> tuple[Tensor, ...]:
    raw = iter(asked.raw_input_contents)
    tensors, used, count = [], 0, len(asked.raw_input_contents)
    for item in asked.inputs:
        shape, parameters = tuple(item.shape), plain_parameters(item.parameters)
        if "shared_memory_region" in parameters:
            tensors.append(regions.tensor(item.name, item.datatype, shape, _placement(parameters)))
        elif count:
            if item.HasField("contents"):
                raise invalid(f"contents field must not be specified when using raw_input_contents for '{item.name}'")
            if used == count:
                raise invalid(f"there are fewer raw_input_contents than inputs: none is left for '{item.name}'")
            used += 1
            tensors.append(from_bytes(item.name, item.datatype, shape, next(raw)))
        else:
            tensors.append(_from_contents(item, shape))
    if used != count:
        raise invalid(f"expected {used} raw input contents, the request has {count}")
    return tuple(tensors)


def _from_contents(item: Any, shape: tuple[int, ...]) -> Tensor:
    kind = datatype_of(item.name, item.datatype)
    if not kind.contents:
        raise invalid(f"input '{item.name}': {kind.name} has no typed contents; send raw_input_contents")
    values = getattr(item.contents, kind.contents)
    if len(values) != element_count(item.name, shape):
        raise invalid(
            f"input '{item.name}' has {len(values)} elements in {kind.contents}, its shape {list(shape)} takes "
            f"{element_count(item.name, shape)}"
        )
    return Tensor(item.name, item.datatype, _array(item.name, values, kind.numpy).reshape(shape))


def _array(name: str, values: Any, dtype: str) -> Array:
    if dtype == "string":
        array = np.empty(len(values), object)
        array[:] = list(values)
        return array
    try:
        return np.array(list(values), numpy_dtype(dtype))
    except OverflowError as error:
        raise invalid(f"input '{name}': a value does not fit into {dtype}: {error}") from error


def _placement(parameters: Mapping[str, Any]) -> Placement:
    region = parameters["shared_memory_region"]
    if type(region) is not str or "shared_memory_byte_size" not in parameters:
        raise invalid("shared memory takes 'shared_memory_region' (string) and 'shared_memory_byte_size'")
    return Placement(
        region, _unsigned(parameters, "shared_memory_offset"), _unsigned(parameters, "shared_memory_byte_size")
    )


def _output(item: Any) -> RequestedOutput:
    parameters = plain_parameters(item.parameters)
    return RequestedOutput(
        item.name,
        True,
        _unsigned(parameters, "classification"),
        _placement(parameters) if "shared_memory_region" in parameters else None,
    )


def encode(request: Request, response: Response, regions: Regions) -> Sequence[Part]:
    """The response's message, in parts; tensors are not copied."""
    outputs, parts, described = response.outputs, list[Part](), []
    if response.parameters or not outputs or (request.outputs and any(map(_is_special, request.outputs))):
        return (as_message(request, response, regions).SerializeToString(),)
    for tensor in outputs:
        raw = to_bytes(tensor)
        parts += (b"", raw)
        described.append((tensor.name, tensor.datatype, tensor.data.shape, len(raw)))
    parts[::2] = _heads(response.model, response.version, *described)
    return [InferResponse(id=response.id).SerializeToString(), *parts] if response.id else parts


def _is_special(output: RequestedOutput) -> bool:
    return bool(output.classification or output.placement)


@lru_cache(1024)
def _heads(model: str, version: int, *described: tuple[str, str, tuple[int, ...], int]) -> tuple[bytes, ...]:
    """What precedes each raw content of a message that has them all at its end."""
    answer = InferResponse(model_name=model, model_version=str(version))
    for name, datatype, shape, _ in described:
        answer.outputs.add(name=name, datatype=datatype, shape=shape)
    first, *others = [_RAW_OUTPUT + _varint(size) for *_, size in described]
    return (answer.SerializeToString() + first, *others)


def as_message(request: Request, response: Response, regions: Regions) -> Any:
    """The response as a message that more is added to."""
    wanted = {output.name: output for output in request.outputs}
    answer = InferResponse(model_name=response.model, model_version=str(response.version), id=response.id)
    for name, value in response.parameters.items():
        set_parameter(answer.parameters[name], value)
    for tensor in response.outputs:
        _add_output(answer, tensor, wanted.get(tensor.name), response, regions)
    return answer


def _add_output(
    answer: Any, tensor: Tensor, wanted: RequestedOutput | None, response: Response, regions: Regions
) -> None:
    if wanted is not None and wanted.classification:
        port = response.ports.output_of[tensor.name]
        tensor = classified(tensor, wanted.classification, port.labels, bool(response.ports.max_rows))
    entry = answer.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    if wanted is None or wanted.placement is None:
        raw = to_bytes(tensor)
        answer.raw_output_contents.append(bytes(raw))
        return
    size = regions.write(tensor, wanted.placement)
    set_parameter(entry.parameters["shared_memory_region"], wanted.placement.region)
    set_parameter(entry.parameters["shared_memory_byte_size"], size)
    if wanted.placement.offset:
        set_parameter(entry.parameters["shared_memory_offset"], wanted.placement.offset)


_FIELDS = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}


def set_parameter(target: Any, value: Any) -> None:
    """Write a value into an InferParameter or its like."""
    setattr(target, _FIELDS[type(value)], value)
