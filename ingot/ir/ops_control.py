"""Unreachable: what stands in a branch of an If that no input of the allowed shapes can take."""

from __future__ import annotations

from ingot.errors import InputError
from ingot.ir.elementwise import Array
from ingot.ir.ops_table import Attribute, TensorType, op
from ingot.plan.extent import Extent


def _types(*, reason: str, dtypes: tuple[str, ...], shapes: tuple[str, ...]) -> tuple[TensorType, ...]:
    return tuple(TensorType(dtype, _extents(text)) for dtype, text in zip(dtypes, shapes, strict=True))


def _extents(text: str) -> tuple[Extent, ...]:
    return tuple(int(part) if part.isdecimal() else part for part in text.split("|") if part)


@op("Unreachable", "", _types, reason=Attribute("text"), dtypes=Attribute("texts"), shapes=Attribute("texts"))
def unreachable(*, reason: str, dtypes: tuple[str, ...], shapes: tuple[str, ...]) -> tuple[Array, ...]:
    """Raises InputError with the reason. One output per dtype; shapes are extents joined by "|"."""
    raise InputError(reason)
