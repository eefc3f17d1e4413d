"""The generate extension: a flat JSON object in, one out. Keys that are inputs become tensors, others parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from ingot.dtypes import numpy_dtype
from ingot.server.ports import Port, Ports
from ingot.server.request import BY_NAME, Request, Response, SequencePlace, Tensor, invalid

_SEQUENCE: Mapping[str, Any] = {"sequence_id": 0, "sequence_start": False, "sequence_end": False}
EVENT_STREAM = {b"content-type": b"text/event-stream; charset=utf-8", b"cache-control": b"no-cache"}


def decode(document: Mapping[str, Any], model: str, version: int, ports: Ports, arrived: int) -> Request:
    """A request of what the object's keys say; a value with too few dimensions is one row, one element."""
    inputs = tuple(
        _tensor(ports, ports.input_of[key], value) for key, value in document.items() if key in ports.input_of
    )
    parameters = {key: value for key, value in document.items() if key not in ports.input_of and key != "id"}
    nested = parameters.pop("parameters", {})
    if not isinstance(nested, dict):
        raise invalid("Unable to parse 'parameters': must be an object")
    parameters |= nested
    sequence = _sequence(parameters)
    timeout, priority = (_unsigned(parameters.pop(key, 0), key) for key in ("timeout", "priority"))
    plain = {key: value for key, value in parameters.items() if isinstance(value, bool | int | float | str)}
    stray = sorted(parameters.keys() - plain.keys())
    if stray:
        known = ", ".join(ports.input_of)
        raise invalid(f"'{stray[0]}' is no input of model '{model}' ({known}) and no plain parameter")
    identity = document.get("id", "")
    if not isinstance(identity, str):
        raise invalid("Unable to parse 'id': must be a string")
    return Request(model, inputs, version, identity, (), sequence, priority, timeout, plain, arrived)


def _sequence(parameters: dict[str, Any]) -> SequencePlace | None:
    identity, start, end = (parameters.pop(key, default) for key, default in _SEQUENCE.items())
    if type(identity) not in (int, str) or type(start) is not bool or type(end) is not bool:
        raise invalid("'sequence_id' must be a number or a string, 'sequence_start' and 'sequence_end' booleans")
    return SequencePlace(identity, start, end) if identity else None


def _unsigned(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise invalid(f"Unable to parse '{name}': must be an unsigned integer")
    return value


def _tensor(ports: Ports, port: Port, value: Any) -> Tensor:
    kind = BY_NAME[port.datatype]
    try:
        array = _texts(value) if kind.size is None else _numbers(value, kind.numpy)
    except (TypeError, ValueError, OverflowError) as error:
        raise invalid(f"Unable to parse '{port.name}': must be {port.datatype}: {error}") from error
    rank = len(ports.shape_of(port))
    if array.ndim < rank:
        array = array.reshape((1,) * (rank - array.ndim) + array.shape)
    return Tensor(port.name, port.datatype, array)


def _texts(value: Any) -> Any:
    array = np.array(value, object)
    if any(not isinstance(item, str) for item in array.ravel()):
        raise TypeError("its elements are not all strings")
    made = np.empty(array.shape, object)
    made.ravel()[:] = [item.encode() for item in array.ravel()]
    return made


def _numbers(value: Any, dtype: str) -> Any:
    array, wanted = np.array(value), numpy_dtype(dtype)
    allowed = {"b": "b", "i": "iu", "u": "iu"}.get(wanted.kind, "fiu")
    if array.size and array.dtype.kind not in allowed:
        raise TypeError(f"it is {array.dtype}")
    made = array.astype(wanted)
    if wanted.kind in "iu" and (made != array).any():
        raise OverflowError("a value does not fit")
    return made


def encode(response: Response) -> bytes:
    """The outputs by name: a value where there is one element, else a flat list."""
    document: dict[str, Any] = {"model_name": response.model, "model_version": str(response.version)}
    if response.id:
        document["id"] = response.id
    for tensor in response.outputs:
        values = [_plain(item) for item in tensor.data.ravel().tolist()]
        document[tensor.name] = values[0] if len(values) == 1 else values
    return orjson.dumps(document)


def _plain(item: Any) -> Any:
    return item.decode(errors="replace") if isinstance(item, bytes) else item


def event(data: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + data + b"\n\n"
