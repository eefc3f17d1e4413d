"""Symbolic shapes: `infer(model)` in place, `shape_of(value)` in the plan's expression syntax, `specialize`.

Every dimension is an int or an expression over the symbols of the graph's inputs ("N", "(H+1)//2"). Extents that only
running the model can tell (NonZero, an unknown operator) get symbols of their own: u0, u1, …
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx_ir
from onnx_shape_inference import SYM_DATA_KEY, OpUsageError, ShapeInferenceError, infer_symbolic_shapes

from ingot.errors import ConfigError, ImportFailure
from ingot.ir import constants, shapes_library, shapes_old
from ingot.ir.shapes_control import CONTRADICTORY
from ingot.ir.symbolic import canonical, substituted, translated
from ingot.plan.extent import Extent, symbols_of

Shape = tuple[Extent, ...]

__all__ = ["Shape", "dimension", "infer", "is_data_dependent", "known_elements", "shape_of", "shapes_library",
           "shapes_old", "specialize", "subgraphs", "values_of"]  # fmt: skip

_ROUNDS = 8  # each follows constants one data-dependent step further (Shape → If → Shape → Reshape …)
_MOST_CONTRADICTIONS = 100
_MOST_ELEMENTS = 64  # a shape computation handles ranks, not data
_DATA_DEPENDENT = re.compile(r"u\d+")


def is_data_dependent(extent: Extent) -> bool:
    """Whether the extent (a symbol or an expression) is known only once the model has run that far."""
    return any(_DATA_DEPENDENT.fullmatch(symbol) for symbol in symbols_of(extent))


def shape_of(value: onnx_ir.Value) -> Shape | None:
    """The value's extents, or None where not even the rank is known."""
    if value.shape is None:
        return None
    return tuple(dimension(value, axis) for axis in range(len(value.shape)))


def dimension(value: onnx_ir.Value, axis: int) -> Extent:
    """One extent of a value whose rank is known; ValueError where `infer` has not been."""
    dim = value.shape[axis] if value.shape is not None else None
    if isinstance(dim, int):
        return dim
    if dim is None or dim.value is None:
        raise ValueError(f"extent {axis} of {value.name!r} is unknown: run infer(model) first")
    return canonical(dim.value)


def known_elements(value: onnx_ir.Value) -> Shape | None:
    """The elements of a small integer tensor as extents, where inference could follow them (Shape → … → Reshape)."""
    recorded = value.metadata_props.get(SYM_DATA_KEY)
    if recorded is not None:
        return tuple(e if isinstance(e, int) else canonical(e) for e in json.loads(recorded))
    tensor = onnx_ir.convenience.get_const_tensor(value)
    if tensor is None or len(tensor.shape) > 1 or tensor.size > _MOST_ELEMENTS or not tensor.dtype.is_integer():
        return None
    return tuple(int(element) for element in tensor.numpy().reshape(-1))


def infer(model: onnx_ir.Model) -> None:
    """Fill in shapes and dtypes in place; `ingot` nodes keep theirs. ImportFailure names the node that contradicts.

    Small tensors that only depend on constants and static shapes get a `const_value` on the way.
    """
    given = _input_symbols(model)
    before = _forget_unless(model, given)
    constants.propagate(model, _MOST_ELEMENTS)
    for _ in range(_ROUNDS):
        _run_engine(model)
        if not constants.propagate(model, _MOST_ELEMENTS):
            break
        _forget_unless(model, given)
    _restore(before)
    _settle(model, given)
    _reconcile(model, before)


def _run_engine(model: onnx_ir.Model) -> None:
    """Infer everything; a node that contradicts inside an If is passed over, for its branch may never be taken."""
    hidden: list[tuple[onnx_ir.Node, str]] = []
    try:
        while (error := _first_contradiction(model)) is not None:
            node = _node_in_branch(model, error)
            if node is None or len(hidden) > _MOST_CONTRADICTIONS:
                raise ImportFailure(f"the shapes of the model contradict each other: {error}")
            hidden.append((node, node.domain))
            node.domain = CONTRADICTORY
    finally:
        for node, domain in hidden:
            node.domain = domain


def _first_contradiction(model: onnx_ir.Model) -> ShapeInferenceError | OpUsageError | None:
    try:
        infer_symbolic_shapes(model, warn_on_missing=False, adopt_declared_symbols=False)
    except (ShapeInferenceError, OpUsageError) as error:
        return error
    return None


def _node_in_branch(model: onnx_ir.Model, error: ShapeInferenceError | OpUsageError) -> onnx_ir.Node | None:
    name = error.node.name if isinstance(error, OpUsageError) else error.node_name
    nodes = onnx_ir.traversal.RecursiveGraphIterator(model.graph)
    return next((node for node in nodes if node.name == name and node.graph is not model.graph), None)


def _input_symbols(model: onnx_ir.Model) -> set[str]:
    shapes = (shape for value in model.graph.inputs if (shape := _lenient_shape(value)) is not None)
    return {symbol for shape in shapes for extent in shape if extent is not None for symbol in symbols_of(extent)}


def _lenient_shape(value: onnx_ir.Value) -> tuple[Extent | None, ...] | None:
    """Like `shape_of`, with None for extents that have no expression."""
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else translated(dim.value or "") for dim in value.shape.dims)


def _forget_unless(model: onnx_ir.Model, given: set[str]) -> dict[onnx_ir.Value, tuple[Extent | None, ...]]:
    """Drop the shapes of ONNX nodes' outputs that are not in terms of `given`; the file's own statements among them.

    Inference will find better ones or the same again.
    """
    dropped: dict[onnx_ir.Value, tuple[Extent | None, ...]] = {}
    for value in values_of(model.graph):
        producer = value.producer()
        value.metadata_props.pop(SYM_DATA_KEY, None)
        if producer is None or producer.domain == "ingot" or (shape := _lenient_shape(value)) is None:
            continue
        if any(extent is None or not symbols_of(extent) <= given for extent in shape):
            dropped[value] = shape
            value.shape = None
    return dropped


def _restore(before: Mapping[onnx_ir.Value, tuple[Extent | None, ...]]) -> None:
    """Where inference came to nothing, what was there before is the best there is."""
    for value, shape in before.items():
        if value.shape is None:
            value.shape = onnx_ir.Shape([extent if isinstance(extent, int) else None for extent in shape])
        elif len(value.shape) == len(shape):
            pairs = zip(value.shape.dims, shape, strict=True)
            value.shape = onnx_ir.Shape([stated if isinstance(stated, int) else found for found, stated in pairs])


def _settle(model: onnx_ir.Model, given: set[str]) -> None:
    """Rewrite every extent canonically; symbols that no input carries become u0, u1, … ."""
    values = list(values_of(model.graph))
    taken = {s for value in values for extent in _lenient_shape(value) or () if extent is not None
             for s in symbols_of(extent)}  # fmt: skip
    fresh = _fresh_symbols(taken)
    renamed: dict[str, Extent] = {}
    for value in values:
        if value.shape is not None and not value.shape.is_static():
            value.shape = onnx_ir.Shape([_settled(e, given, renamed, fresh) for e in _lenient_shape(value) or ()])
        recorded = value.metadata_props.get(SYM_DATA_KEY)
        if recorded is None:
            continue
        elements = [e if isinstance(e, int) else translated(e) for e in json.loads(recorded)]
        if len(elements) > _MOST_ELEMENTS:
            del value.metadata_props[SYM_DATA_KEY]
        elif not all(isinstance(e, int) for e in elements):
            settled = [_settled(e, given, renamed, fresh) for e in elements]
            value.metadata_props[SYM_DATA_KEY] = json.dumps(settled)


def _fresh_symbols(taken: Iterable[str]) -> Iterator[str]:
    number = max((int(symbol[1:]) for symbol in taken if _DATA_DEPENDENT.fullmatch(symbol)), default=-1)
    while True:
        number += 1
        yield f"u{number}"


def _settled(extent: Extent | None, given: set[str], renamed: dict[str, Extent], fresh: Iterator[str]) -> Extent:
    if extent is None:
        return next(fresh)
    foreign = {s for s in symbols_of(extent) if s not in given and not _DATA_DEPENDENT.fullmatch(s)}
    for symbol in sorted(foreign - renamed.keys()):
        renamed[symbol] = next(fresh)
    return substituted(extent, {symbol: renamed[symbol] for symbol in foreign})


def _reconcile(model: onnx_ir.Model, before: Mapping[onnx_ir.Value, tuple[Extent | None, ...]]) -> None:
    """Data-dependent symbols keep their names from one `infer` to the next; those now understood are replaced."""
    better: dict[str, Extent] = {}
    kept: dict[str, Extent] = {}
    for value, shape in before.items():
        for old, new in zip(shape, shape_of(value) or (), strict=False):
            if not isinstance(old, str) or not _DATA_DEPENDENT.fullmatch(old) or old == new:
                continue
            if isinstance(new, str) and _DATA_DEPENDENT.fullmatch(new):
                kept.setdefault(new, old)
            else:
                better.setdefault(old, new)
    if kept or better:
        kept = {new: better.get(str(old), old) for new, old in kept.items()}
        _substitute(model, {**better, **kept})


def specialize(model: onnx_ir.Model, sizes: Mapping[str, int | Sequence[int]]) -> onnx_ir.Model:
    """A copy with symbols ({"N": 1}) or whole inputs ({"x": (1, 3, 224, 224)}) bound to sizes and shapes inferred."""
    clone = model.clone()
    _substitute(clone, _bindings(clone, sizes))
    infer(clone)
    return clone


def _substitute(model: onnx_ir.Model, bound: Mapping[str, Extent]) -> None:
    """Replace symbols in every shape and in the extents that fused ops keep as `strings`."""
    for value in values_of(model.graph):
        if value.shape is not None and not value.shape.is_static():
            value.shape = onnx_ir.Shape([substituted(extent, bound) for extent in shape_of(value) or ()])
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        for name, attribute in list(node.attributes.items()) if node.domain == "ingot" else ():
            if attribute.type == onnx_ir.AttributeType.STRINGS:
                extents = [str(substituted(text, bound)) for text in attribute.as_strings()]
                node.attributes[name] = onnx_ir.AttrStrings(name, extents)


def _bindings(model: onnx_ir.Model, sizes: Mapping[str, int | Sequence[int]]) -> dict[str, Extent]:
    inputs = {value.name: shape_of(value) for value in model.graph.inputs}
    symbols = _input_symbols(model)
    bound: dict[str, Extent] = {}
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


def values_of(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Value]:
    """Inputs, initializers and node outputs of a graph and its subgraphs."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
        for inner in subgraphs(node):
            yield from values_of(inner)


def subgraphs(node: onnx_ir.Node) -> Iterator[onnx_ir.Graph]:
    """The graphs among a node's attributes."""
    for attribute in node.attributes.values():
        if attribute.type == onnx_ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == onnx_ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()
