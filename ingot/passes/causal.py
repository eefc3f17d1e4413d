"""Whether a mask is the causal one: every query sees the keys up to its own place, and no other.

A constant is looked at. What is computed is followed by what it is where the key is not after the query, and where it
is: `Where(row >= column, 0, -inf)` is 0 and -inf, whatever the size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from ingot.ir import expression as expressions
from ingot.ir.elementwise import Array
from ingot.ir.expression import Expression, Input, Instruction, Literal, Operand
from ingot.ir.graph import constant_of
from ingot.ir.shapes import shape_of
from ingot.passes.facts import Shape, are_ones, attribute, epilogue_of, maker, operands_of

FORBIDDING = -1e4  # a score this low has no weight
_LARGEST = 1 << 24  # elements of a constant mask that is looked at


@dataclass(frozen=True)
class Place:
    """The number of a query (or of a key) plus an offset."""

    of_query: bool
    offset: int = 0


@dataclass(frozen=True)
class Halves:
    """What a mask is for the keys up to the query's own, and for those after it."""

    upto: Any
    after: Any


Known = Place | Halves
_CHAIN = 16  # nodes behind a mask that are followed


def is_causal(mask: ir.Value) -> bool:
    """Whether adding the mask to the scores (a bool mask: forbidding where it is False) is to be causal."""
    array = constant_of(mask)
    if array is not None:
        return _is_triangle(array)
    shape = shape_of(mask)
    if shape is None or len(shape) < 2 or shape[-1] != shape[-2] or not are_ones(shape[:-2]):
        return False
    halves = _followed(mask, _CHAIN)
    return isinstance(halves, Halves) and _sees(halves.upto) and _hides(halves.after)


def _sees(value: Any) -> bool:
    return bool(value) if np.asarray(value).dtype == bool else bool(value == 0)


def _hides(value: Any) -> bool:
    return not value if np.asarray(value).dtype == bool else bool(value <= FORBIDDING)


def _is_triangle(array: Array) -> bool:
    if array.ndim < 2 or array.size > _LARGEST:
        return False
    queries, keys = array.shape[-2:]
    if array.size != queries * keys or not 2 <= queries <= keys:
        return False
    square = array.reshape(queries, keys)
    lower: np.ndarray[Any, Any] = np.tri(queries, keys, keys - queries, dtype=np.bool_)
    if square.dtype == bool:
        return bool(np.array_equal(square, lower))
    return bool(np.all(square[lower] == 0) and np.all(square[~lower] <= FORBIDDING))


def _halves_of(array: Array) -> Halves | None:
    """A constant: one number, or a square whose lower left and upper right are one number each."""
    if array.size == 1:
        return Halves(array.reshape(()), array.reshape(()))
    if array.ndim < 2 or array.size > _LARGEST or array.shape[-1] != array.shape[-2]:
        return None
    size = array.shape[-1]
    if array.size != size * size:
        return None
    square, lower = array.reshape(size, size), np.tri(size, dtype=bool)
    upto, after = square[0, 0], square[0, -1]
    return Halves(upto, after) if np.array_equal(square, np.where(lower, upto, after)) else None


def _followed(value: ir.Value, left: int) -> Known | None:
    """What is known of a value that depends on nothing but the places of query and key."""
    array = constant_of(value)
    if array is not None:
        return _halves_of(array)
    node = value.producer()
    if node is None or left == 0 or node.domain != "ingot":
        return None
    match node.op_type:
        case "View":
            return _viewed(node, left)
        case "Expand":
            same = _followed(operands_of(node)[0], left - 1)
            return same if isinstance(same, Halves) and same.upto == same.after else None
        case "Slice":
            return _sliced(node, left)
        case "Pointwise":
            known = [_followed(operand, left - 1) for operand in operands_of(node)]
            return _evaluated(epilogue_of(node), known)
    return None


def _viewed(node: ir.Node, left: int) -> Known | None:
    """Places along the last axis but one are the query's, along the last one the key's; squares stay squares."""
    source, shape = operands_of(node)[0], shape_of(node.outputs[0]) or ()
    places = maker(source, "Range")
    if places is not None and len(shape) > 1:
        long = [axis for axis, size in enumerate(shape) if size != 1]
        plain = (attribute(places, "start"), attribute(places, "step")) == (("0",), ("1",))
        return Place(long[0] == len(shape) - 2) if plain and long in ([len(shape) - 2], [len(shape) - 1]) else None
    inner = shape_of(source) or ()
    return _followed(source, left - 1) if _squared(inner) == _squared(shape) else None


def _squared(shape: Shape) -> Shape:
    """The last two axes, where the others are of one element."""
    return shape[-2:] if are_ones(shape[:-2]) else shape


def _sliced(node: ir.Node, left: int) -> Known | None:
    """As large a part of both axes, from the same place on."""
    starts, sizes = attribute(node, "starts"), attribute(node, "sizes")
    if any(step != 1 for step in attribute(node, "steps")) or len(starts) < 2:
        return None
    same = starts[-1] == starts[-2] and sizes[-1] == sizes[-2]
    return _followed(operands_of(node)[0], left - 1) if same else None


# expressions over what is known


def _evaluated(expression: Expression, operands: list[Known | None]) -> Known | None:
    results: list[Known | None] = []
    for instruction in expression.instructions:
        known = [_operand(operand, operands, results) for operand in instruction.operands]
        results.append(_result(instruction, known))
    return results[-1] if results else operands[0]


def _operand(operand: Operand, operands: list[Known | None], results: list[Known | None]) -> Known | None:
    if isinstance(operand, Literal):
        return Halves(np.asarray(operand.value), np.asarray(operand.value))
    return operands[operand.index] if isinstance(operand, Input) else results[operand.index]


def _result(instruction: Instruction, known: list[Known | None]) -> Known | None:
    halves = [value for value in known if isinstance(value, Halves)]
    if len(halves) == len(known):
        return Halves(*(_computed(instruction, [_half(value, after) for value in halves]) for after in (False, True)))
    places = [value for value in known if isinstance(value, Place)]
    if len(places) == len(known) == 2:
        return _compared(instruction.op, *places)
    if len(places) == len(halves) == 1 and instruction.op in ("Add", "Sub"):
        return _moved(instruction.op, known[0], known[1])
    return None


def _half(value: Halves, after: bool) -> Any:
    return value.after if after else value.upto


def _computed(instruction: Instruction, values: list[Any]) -> Any:
    """One instruction over numbers."""
    plain = replace(instruction, operands=tuple(Input(index) for index in range(len(values))))
    return expressions.evaluate(Expression((plain,)), [np.asarray(value) for value in values])[()]


def _moved(op: str, first: Known | None, second: Known | None) -> Place | None:
    """A place plus or minus a number."""
    place, other = (first, second) if isinstance(first, Place) else (second, first)
    if not isinstance(place, Place) or not isinstance(other, Halves) or other.upto != other.after:
        return None
    if op == "Sub" and place is second:
        return None
    return replace(place, offset=place.offset + (int(other.upto) if op == "Add" else -int(other.upto)))


def _compared(op: str, first: Place, second: Place) -> Halves | None:
    """Comparisons of query and key that change their answer right after the query's own key."""
    if first.of_query == second.of_query:
        return None
    if not first.of_query:
        op, first, second = _MIRRORED.get(op, ""), second, first
    lead = first.offset - second.offset  # query + lead <op> key
    wanted = {"GreaterOrEqual": 0, "Less": 0, "Greater": 1, "LessOrEqual": 1}
    if op not in wanted or lead != wanted[op]:
        return None
    upto = op.startswith("Greater")
    return Halves(np.bool_(upto), np.bool_(not upto))


_MIRRORED = {"Less": "Greater", "LessOrEqual": "GreaterOrEqual", "Greater": "Less", "GreaterOrEqual": "LessOrEqual"}
