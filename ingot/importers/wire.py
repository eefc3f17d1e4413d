"""Takes the large weights out of a serialized model without copying them, before protobuf sees the rest.

Only lengths are followed here (https://protobuf.dev/programming-guides/encoding); every other byte is left to protobuf.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9  # ModelProto.graph, GraphProto.initializer, TensorProto.raw_data
SMALL = 4096  # bytes; shapes, axes and scales stay where the checker sees their values
_LENGTH_DELIMITED = 2
_FIXED = {1: 8, 5: 4}


class Malformed(ValueError):
    """The lengths do not fit: truncated, or not a protobuf message."""


@dataclass(frozen=True)
class Field:
    """One field of a message: `start` is its tag's position, `body` its value's, `end` the next field's."""

    number: int
    kind: int
    start: int
    body: int
    end: int


def split(content: memoryview) -> tuple[bytes, dict[int, memoryview]]:
    """The message without its large initializers' raw data, and that data by the initializer's position."""
    payloads: dict[int, memoryview] = {}
    count = 0
    parts: list[bytes | memoryview] = []
    for field in _fields(content, 0, len(content)):
        if field.number != GRAPH or field.kind != _LENGTH_DELIMITED:
            parts.append(content[field.start : field.end])
            continue
        inner: list[bytes | memoryview] = []
        for member in _fields(content, field.body, field.end):
            if member.number != INITIALIZER or member.kind != _LENGTH_DELIMITED:
                inner.append(content[member.start : member.end])
                continue
            tensor, payload = _without_payload(content, member)
            inner.append(tensor)
            if payload is not None:
                payloads[count] = payload
            count += 1
        parts.append(_delimited(GRAPH, b"".join(inner)))
    return b"".join(parts), payloads


def _without_payload(content: memoryview, tensor: Field) -> tuple[bytes | memoryview, memoryview | None]:
    """The initializer as a field, without its raw data if that is large and stated once."""
    whole = content[tensor.start : tensor.end]
    if tensor.end - tensor.body <= SMALL:
        return whole, None
    fields = list(_fields(content, tensor.body, tensor.end))
    raw = [field for field in fields if field.number == RAW_DATA and field.kind == _LENGTH_DELIMITED]
    if len(raw) != 1 or raw[0].end - raw[0].body <= SMALL:
        return whole, None
    rest = b"".join(content[field.start : field.end] for field in fields if field is not raw[0])
    return _delimited(INITIALIZER, rest), content[raw[0].body : raw[0].end]


def _fields(content: memoryview, position: int, end: int) -> Iterator[Field]:
    while position < end:
        tag, body = _varint(content, position, end)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            _, after = _varint(content, body, end)
        elif kind == _LENGTH_DELIMITED:
            length, body = _varint(content, body, end)
            after = body + length
        elif kind in _FIXED:
            after = body + _FIXED[kind]
        else:  # groups are not used by ONNX
            raise Malformed(f"wire type {kind} at byte {position}")
        if after > end:
            raise Malformed(f"a field of {after - body} bytes at byte {position} ends after byte {end}")
        yield Field(number, kind, position, body, after)
        position = after


def _varint(content: memoryview, position: int, end: int) -> tuple[int, int]:
    """(value, position behind it)"""
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            break
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise Malformed(f"an unfinished number at byte {position}")


def _delimited(number: int, body: bytes) -> bytes:
    length, encoded = len(body), bytearray([number << 3 | _LENGTH_DELIMITED])
    while length > 127:
        encoded.append(length & 127 | 128)
        length >>= 7
    encoded.append(length)
    return bytes(encoded) + body
