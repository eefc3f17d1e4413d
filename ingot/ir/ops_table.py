"""The table of canonical operators: `@op("Softmax", "x", shape=…, axis=Attribute("int"))` above a numpy meaning.

Kinds of attributes: "int", "float", "number" (int or float), "text", "ints", "floats", "texts", "extent" (an int or a
size expression such as "N*64"), "extents" (a tuple of them), "expression" (the text form of `ir/expression.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from ingot.errors import GraphError
from ingot.ir import expression as expressions
from ingot.ir.elementwise import NARROW_FLOATS, Array, cast
from ingot.plan import extent as extents
from ingot.plan.extent import Extent

Kind = Literal["int", "float", "number", "text", "ints", "floats", "texts", "extent", "extents", "expression"]
Shape = tuple[Extent, ...]


@dataclass(frozen=True)
class TensorType:
    """dtype by numpy name, row-major shape."""

    dtype: str
    shape: Shape


@dataclass(frozen=True)
class Attribute:
    """A static attribute; required where it has no default."""

    kind: Kind
    default: Any = None


Attributes = Mapping[str, Any]
Types = Sequence[TensorType | None]
ShapeFunction = Callable[..., "TensorType | tuple[TensorType, ...]"]
"""(*types of the inputs before the extras, **attributes) -> type of every output, before the epilogue."""


@dataclass(frozen=True)
class Op:
    """A canonical operator. Of `inputs` those whose name ends in "?" may be absent; `extras` may follow them."""

    name: str
    inputs: tuple[str, ...]
    extras: str | None
    attributes: Mapping[str, Attribute]
    shape: ShapeFunction
    function: Callable[..., Any]

    @property
    def required(self) -> int:
        """How many inputs must be there."""
        return sum(not name.endswith("?") for name in self.inputs)

    @property
    def epilogue(self) -> bool:
        """Whether elementwise work may be attached, its operands being the extras."""
        return "epilogue" in self.attributes


OPS: dict[str, Op] = {}
EPILOGUE = Attribute("expression", "")


def op(name: str, inputs: str, shape: ShapeFunction, /, **attributes: Attribute) -> Callable[[Any], Any]:
    """Register `function(*inputs, **attributes) -> array | tuple`; `inputs` reads like "x weight bias? *extras"."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        names = inputs.split()
        extras = names.pop()[1:] if names and names[-1].startswith("*") else None
        OPS[name] = Op(name, tuple(names), extras, attributes, shape, function)
        return function

    return register


def definition(name: str) -> Op:
    """The operator's entry; GraphError for an unknown one."""
    if name not in OPS:
        raise GraphError(f"there is no canonical operator {name!r}: ir/ops.py has {', '.join(sorted(OPS))}")
    return OPS[name]


def complete(name: str, attributes: Attributes) -> dict[str, Any]:
    """The attributes with defaults filled in; GraphError for missing or unknown ones."""
    known = definition(name).attributes
    missing = [key for key, attribute in known.items() if attribute.default is None and key not in attributes]
    if missing or not attributes.keys() <= known.keys():
        raise GraphError(f"{name} has the attributes {sorted(known)}, not {sorted(attributes)} (missing: {missing})")
    return {key: attributes.get(key, attribute.default) for key, attribute in known.items()}


def infer(name: str, types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    """Types of all outputs the operator can have."""
    entry = definition(name)
    given = complete(name, attributes)
    epilogue = given.pop("epilogue") if entry.epilogue else ""
    main, extras = _parted(entry, types)
    results = entry.shape(*main, *(extras if not entry.epilogue else ()), **given)
    results = results if isinstance(results, tuple) else (results,)
    if not epilogue:
        return results
    operand_dtypes = [results[0].dtype, *(extra.dtype for extra in extras if extra)]
    dtype = expressions.result_dtype(expressions.parse(epilogue), operand_dtypes)
    return (TensorType(dtype, results[0].shape), *results[1:])


def _parted(entry: Op, inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """(the named inputs, None where absent; the extras)"""
    count = len(entry.inputs)
    named = list(inputs[:count])
    return named + [None] * (count - len(named)), list(inputs[count:])


@cache
def meaning(name: str) -> Callable[..., tuple[Array, ...]]:
    """function(*inputs, symbols={}, **attributes) -> the outputs; `symbols` gives the values of symbolic extents."""
    entry = definition(name)

    def run(*inputs: Array | None, symbols: Mapping[str, int] | None = None, **attributes: Any) -> tuple[Array, ...]:
        given = bound(name, complete(name, attributes), symbols or {})
        main, extras = _parted(entry, inputs)
        if not entry.epilogue:
            return _as_tuple(entry.function(*main, *extras, **given))
        epilogue = expressions.parse(given.pop("epilogue"))
        first, *others = _as_tuple(entry.function(*main, **given))
        if epilogue:
            return (expressions.evaluate(epilogue, [first, *extras]), *others)
        return (narrowed(first, main[0].dtype.name), *others)

    return run


def _as_tuple(result: Any) -> tuple[Array, ...]:
    return tuple(map(np.asarray, result)) if isinstance(result, tuple) else (np.asarray(result),)


def narrowed(result: Array, dtype: str) -> Array:
    """A float32 accumulator rounded to the narrow float it came from."""
    return cast(result, dtype) if dtype in NARROW_FLOATS and result.dtype == np.float32 else result


def bound(name: str, attributes: Attributes, symbols: Mapping[str, int]) -> dict[str, Any]:
    """The attributes with size expressions evaluated; an unbound symbol stays as it is."""
    known = definition(name).attributes
    return {key: _bound_value(known[key].kind, value, symbols) for key, value in attributes.items()}


def _bound_value(kind: Kind, value: Any, symbols: Mapping[str, int]) -> Any:
    if kind == "extents":
        return tuple(_bound_extent(normal_extent(item), symbols) for item in value)
    if kind == "extent":
        return _bound_extent(normal_extent(value[0] if isinstance(value, list | tuple) else value), symbols)
    return value


def _bound_extent(value: Extent, symbols: Mapping[str, int]) -> Extent:
    return extents.evaluate(value, symbols) if extents.symbols_of(value) <= symbols.keys() else value


def normal_extent(value: Extent | bytes) -> Extent:
    """An extent as stored ("2", b"2", "N") as int or expression."""
    text = value.decode() if isinstance(value, bytes) else value
    if isinstance(text, str):
        return int(text) if text.lstrip("-").isdecimal() else text
    return int(text)


# shapes


def same(x: TensorType, **_: Any) -> TensorType:
    """The result has the type of x."""
    return x


def broadcast(*shapes: Shape) -> Shape:
    """numpy's broadcasting; two different symbols are taken to be equal at run time."""
    rank = max(map(len, shapes), default=0)
    aligned = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(_common(sizes) for sizes in zip(*aligned, strict=True))


def _common(sizes: Sequence[Extent]) -> Extent:
    wide = [size for size in sizes if size != 1]
    numbers = {size for size in wide if isinstance(size, int)}
    if len(numbers) > 1:
        raise GraphError(f"shapes with the sizes {sorted(numbers)} on one axis do not broadcast")
    return next(iter(numbers)) if numbers else wide[0] if wide else 1


def windowed(size: Extent, begin: int, end: int, span: int, stride: int) -> Extent:
    """Positions of a window of `span` elements on an axis: (size + begin + end - span) // stride + 1."""
    change = begin + end - span
    if isinstance(size, int):
        return (size + change) // stride + 1
    if stride == 1:
        return shifted(size, change + 1)
    return shifted(f"({shifted(size, change)})//{stride}", 1)


def shifted(size: Extent, change: int) -> Extent:
    """size + change."""
    if isinstance(size, int):
        return size + change
    return size if change == 0 else f"{size}+{change}" if change > 0 else f"{size}-{-change}"
