"""Symbolic shapes: `infer(model)` in place, `shape_of(value)` in the plan's expression syntax, `specialize`.

Every dimension is an int or an expression over the symbols of the graph's inputs ("N", "(H+1)//2"). Extents that only
running the model can tell (NonZero, an unknown operator) get symbols of their own: u0, u1, …
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import onnx_ir
import sympy  # type: ignore[import-untyped, unused-ignore]
from onnx_ir._symbolic_shapes import parse_symbolic_expression
from onnx_shape_inference import SYM_DATA_KEY, OpUsageError, ShapeInferenceError, infer_symbolic_shapes

from ingot.errors import ConfigError, ImportFailure
from ingot.plan.extent import Extent, symbols_of

_INFERRED = "ingot.shapes"
_DATA_DEPENDENT = re.compile(r"u\d+")


def is_data_dependent(extent: Extent) -> bool:
    """Whether the extent (a symbol or an expression) is known only once the model has run that far."""
    return any(_DATA_DEPENDENT.fullmatch(symbol) for symbol in symbols_of(extent))


def shape_of(value: onnx_ir.Value) -> tuple[Extent, ...] | None:
    """The value's extents, or None where not even the rank is known."""
    if value.shape is None:
        return None
    return tuple(dimension(value, axis) for axis in range(len(value.shape)))


def dimension(value: onnx_ir.Value, axis: int) -> Extent:
    """One extent of a value whose rank is known."""
    if value.shape is None:
        raise ValueError(f"the rank of {value.name!r} is unknown")
    dim = value.shape[axis]
    if isinstance(dim, int):
        return dim
    return _canonical(dim.value) if dim.value is not None else "u0"


def known_elements(value: onnx_ir.Value) -> tuple[Extent, ...] | None:
    """The elements of a small integer tensor as extents, where inference could follow them (Shape → … → Reshape)."""
    recorded = value.metadata_props.get(SYM_DATA_KEY)
    if recorded is not None:
        return tuple(e if isinstance(e, int) else _canonical(e) for e in json.loads(recorded))
    tensor = onnx_ir.convenience.get_const_tensor(value)
    if tensor is None or len(tensor.shape) > 1 or tensor.size > 64 or not tensor.dtype.is_integer():
        return None
    return tuple(int(element) for element in tensor.numpy().reshape(-1))


def infer(model: onnx_ir.Model) -> None:
    """Fill in shapes and dtypes in place; `ingot` nodes keep theirs. ImportFailure names the node that contradicts."""
    declared = {} if _INFERRED in model.metadata_props else _forget_derived(model.graph)
    try:
        infer_symbolic_shapes(model, warn_on_missing=False, adopt_declared_symbols=False)
    except (ShapeInferenceError, OpUsageError) as error:
        raise ImportFailure(f"the shapes of the model contradict each other: {error}") from None
    _restore(declared)
    _settle(model)
    model.metadata_props[_INFERRED] = "1"


def specialize(model: onnx_ir.Model, sizes: Mapping[str, int | Sequence[int]]) -> onnx_ir.Model:
    """A copy with symbols ({"N": 1}) or whole inputs ({"x": (1, 3, 224, 224)}) bound to sizes and shapes inferred."""
    clone = model.clone()
    bound = _bindings(clone, sizes)
    for value in _values(clone.graph):
        value.metadata_props.pop(SYM_DATA_KEY, None)
        if value.shape is not None:
            value.shape = onnx_ir.Shape([_substituted(dim, bound) for dim in shape_of(value) or ()])
    for node in onnx_ir.traversal.RecursiveGraphIterator(clone.graph):
        if node.domain == "ingot":
            _substitute_attributes(node, bound)
    infer(clone)
    return clone


def _bindings(model: onnx_ir.Model, sizes: Mapping[str, int | Sequence[int]]) -> dict[str, int]:
    inputs = {value.name: shape_of(value) for value in model.graph.inputs}
    symbols = {s for shape in inputs.values() for extent in shape or () for s in symbols_of(extent)}
    bound: dict[str, int] = {}
    for name, size in sizes.items():
        if isinstance(size, int):
            pairs: list[tuple[Extent, int]] = [(name, size)]
        elif (shape := inputs.get(name)) is not None and len(shape) == len(size):
            pairs = list(zip(shape, size, strict=True))
        else:
            raise ConfigError(f"cannot bind {name!r} to {tuple(size)}: the model's inputs are {inputs}")
        for extent, concrete in pairs:
            bindable = extent in symbols and bound.setdefault(str(extent), concrete) == concrete
            if extent != concrete and not bindable:
                raise ConfigError(f"cannot bind {extent} to {concrete} ({name!r}): the model's inputs are {inputs}")
    return bound


def _substituted(extent: Extent, bound: Mapping[str, int]) -> Extent:
    if isinstance(extent, int) or not symbols_of(extent) & bound.keys():
        return extent
    replaced = _expression(extent).subs({_symbol(name): size for name, size in bound.items()})
    return int(replaced) if replaced.is_Integer else _print_top(replaced)


def _substitute_attributes(node: onnx_ir.Node, bound: Mapping[str, int]) -> None:
    """Fused ops keep symbolic extents in `strings` attributes."""
    for name, attribute in list(node.attributes.items()):
        if attribute.type == onnx_ir.AttributeType.STRINGS:
            extents = [str(_substituted(text, bound)) for text in attribute.as_strings()]
            node.attributes[name] = onnx_ir.AttrStrings(name, extents)


def _forget_derived(graph: onnx_ir.Graph) -> dict[onnx_ir.Value, onnx_ir.Shape]:
    """Remove symbolic shapes that the file merely states: inference expresses them in the inputs' symbols."""
    declared: dict[onnx_ir.Value, onnx_ir.Shape] = {}
    for value in _values(graph):
        if value.shape is not None and not value.is_graph_input() and not value.shape.is_static():
            declared[value] = value.shape
            value.shape = None
    return declared


def _restore(declared: Mapping[onnx_ir.Value, onnx_ir.Shape]) -> None:
    """Where inference came to nothing, what the file states is the best there is."""
    for value, shape in declared.items():
        if value.shape is None:
            value.shape = onnx_ir.Shape([dim if isinstance(dim, int) else None for dim in shape.dims])
        elif len(value.shape) == len(shape):
            pairs = zip(value.shape.dims, shape.dims, strict=True)
            value.shape = onnx_ir.Shape([stated if isinstance(stated, int) else found for found, stated in pairs])


def _settle(model: onnx_ir.Model) -> None:
    """Rewrite every extent canonically; symbols that no input carries become u0, u1, … ."""
    given = {s for value in model.graph.inputs for extent in shape_of(value) or () for s in symbols_of(extent)}
    values = list(_values(model.graph))
    used = {s for value in values for extent in shape_of(value) or () for s in symbols_of(extent)}
    fresh = _fresh_symbols(used)
    renamed: dict[str, str] = {}
    for value in values:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([_settled(dim, given, renamed, fresh) for dim in value.shape.dims])
        if (recorded := value.metadata_props.get(SYM_DATA_KEY)) is not None:
            elements = [_settled(e if isinstance(e, int) else onnx_ir.SymbolicDim(e), given, renamed, fresh)
                        for e in json.loads(recorded)]  # fmt: skip
            value.metadata_props[SYM_DATA_KEY] = json.dumps(elements)


def _fresh_symbols(used: set[str]) -> Iterator[str]:
    numbers = [int(symbol[1:]) for symbol in used if _DATA_DEPENDENT.fullmatch(symbol)]
    number = max(numbers, default=-1)
    while True:
        number += 1
        yield f"u{number}"


def _settled(dim: int | onnx_ir.SymbolicDim, given: set[str], renamed: dict[str, str], fresh: Iterator[str]) -> Extent:
    if isinstance(dim, int):
        return dim
    if dim.value is None or (extent := _translated(dim.value)) is None:
        return next(fresh)
    if isinstance(extent, int):
        return extent
    foreign = {s for s in symbols_of(extent) if s not in given and not _DATA_DEPENDENT.fullmatch(s)}
    for symbol in sorted(foreign - renamed.keys()):
        renamed[symbol] = next(fresh)
    if not foreign:
        return extent
    replaced = _expression(extent).subs({_symbol(old): _symbol(renamed[old]) for old in foreign}, simultaneous=True)
    return _print_top(replaced)


def _values(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Value]:
    """Inputs, initializers and node outputs of a graph and its subgraphs."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
        for attribute in node.attributes.values():
            if attribute.type == onnx_ir.AttributeType.GRAPH:
                yield from _values(attribute.as_graph())
            elif attribute.type == onnx_ir.AttributeType.GRAPHS:
                for inner in attribute.as_graphs():
                    yield from _values(inner)


# sympy ↔ the plan's syntax


def _symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, nonnegative=True)


@cache
def _expression(text: str) -> sympy.Expr:
    parsed = parse_symbolic_expression(text)
    return parsed.subs({symbol: _symbol(symbol.name) for symbol in parsed.free_symbols})


def _canonical(text: str) -> Extent:
    translated = _translated(text)
    if translated is None:
        raise ValueError(f"{text!r} is not a size expression")
    return translated


@cache
def _translated(text: str) -> Extent | None:
    """The inference's text in the plan's syntax; None for what that cannot say (square roots, powers of symbols)."""
    if text.isidentifier():
        return text
    try:
        expression = _expression(text)
        return int(expression) if expression.is_Integer else _print_top(expression)
    except (ValueError, TypeError, ZeroDivisionError):
        return None


def _print_top(expression: sympy.Expr) -> str:
    """A quotient outside any floor is exact, so // says the same."""
    numerator, denominator = sympy.together(expression).as_numer_denom()
    return _print(numerator) if denominator == 1 else f"{_factor(numerator)}//{_factor(denominator)}"


def _print(expression: sympy.Expr) -> str:
    if expression.is_Symbol:
        return str(expression.name)
    if expression.is_Integer:
        return str(int(expression))
    if expression.is_Add:
        return _print_sum(expression)
    if expression.is_Mul:
        return _print_product(expression)
    if expression.is_Pow and expression.exp.is_Integer and 0 < int(expression.exp) <= 8:
        return "*".join([_factor(expression.base)] * int(expression.exp))
    match expression:
        case sympy.floor():
            return _print_top(expression.args[0])
        case sympy.ceiling():
            return f"-({_factor(sympy.floor(-expression.args[0]))})"
        case sympy.Mod():
            return f"{_factor(expression.args[0])}%{_factor(expression.args[1])}"
        case sympy.Max() | sympy.Min():
            arguments = sorted(_print_top(argument) for argument in expression.args)
            return f"{'max' if isinstance(expression, sympy.Max) else 'min'}({','.join(arguments)})"
    raise ValueError(f"{expression} has no integer form")


def _print_sum(expression: sympy.Expr) -> str:
    text = ""
    for term in sorted(expression.args, key=lambda term: (term.could_extract_minus_sign(), term.is_number, str(term))):
        negative = term.could_extract_minus_sign()
        part = _print(-term if negative else term)
        text += ("-" if negative else "+" if text else "") + part
    return text


def _print_product(expression: sympy.Expr) -> str:
    if expression.as_numer_denom()[1] != 1:
        return _print_top(expression)
    if expression.could_extract_minus_sign():
        return f"-{_factor(-expression)}"
    factors = sorted(expression.args, key=lambda factor: (factor.is_number, str(factor)))
    return "*".join(_factor(factor) for factor in factors)


def _factor(expression: sympy.Expr) -> str:
    """Parenthesised unless it binds tighter than a product."""
    text = _print_top(expression)
    return text if re.fullmatch(r"\w+|(max|min)\([^()]*\)", text) else f"({text})"
