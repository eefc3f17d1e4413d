"""Triton's configuration and service messages, from `descriptors.binpb` (the .proto files beside it, compiled).

    python -m grpc_tools.protoc -I. --include_imports --descriptor_set_out=descriptors.binpb *.proto

The messages live in a descriptor pool of their own, so that a process may also import tritonclient's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

DESCRIPTORS = Path(__file__).with_name("descriptors.binpb")


def _loaded_pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes()).file:
        pool.Add(file)
    return pool


POOL = _loaded_pool()


def message(name: str) -> Any:
    """The class of a message, e.g. `message("inference.ModelConfig")`."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))


def methods(service: str) -> dict[str, Any]:
    """The method descriptors of a service by name."""
    return dict(POOL.FindServiceByName(service).methods_by_name)


def as_plain(instance: Any) -> dict[str, Any]:
    """A message as Triton's JSON: snake case, every field without presence printed, 64-bit integers as numbers."""
    return {
        field.name: _plain_field(instance, field) for field in instance.DESCRIPTOR.fields if _printed(instance, field)
    }


def _printed(instance: Any, field: Any) -> bool:
    return not field.has_presence or bool(instance.HasField(field.name))


def _plain_field(instance: Any, field: Any) -> Any:
    value = getattr(instance, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        value_field = field.message_type.fields_by_name["value"]
        return {str(key): _plain_value(value[key], value_field) for key in value}
    if field.is_repeated:
        return [_plain_value(item, field) for item in value]
    return _plain_value(value, field)


def _plain_value(value: Any, field: Any) -> Any:
    if field.message_type is not None:
        return as_plain(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    return value.decode("latin-1") if isinstance(value, bytes) else value
