"""Names that last: every node gets a unique one, every symbolic dimension one that is legal in size expressions."""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx_ir

from ingot.errors import EngineError
from ingot.ir.provenance import KEY, set_origins
from ingot.plan import extent

_RESERVED = re.compile(r"u\d+|_d\d+|min|max")


def name_nodes(model: onnx_ir.Model) -> None:
    """Unnamed nodes are called <operator>_<n>, repeated names get a suffix; each node starts as its own origin."""
    taken: set[str] = set()
    for index, node in enumerate(onnx_ir.traversal.RecursiveGraphIterator(model.graph)):
        wanted = node.name or f"{node.op_type}_{index}"
        name, suffix = wanted, 1
        while name in taken:
            suffix += 1
            name = f"{wanted}_{suffix}"
        taken.add(name)
        node.name = name
        if KEY not in node.metadata_props:
            set_origins(node, [name])


def name_dimensions(model: onnx_ir.Model) -> None:
    """Rewrite every symbolic dimension as a legal expression; unnamed input dimensions become <input>_<axis>."""
    renamed: dict[str, str] = {}
    for value in _values(model.graph):
        if value.shape is None:
            continue
        is_input = value.is_graph_input() and value.graph is model.graph
        dims = [_dimension(dim, value, axis, is_input, renamed) for axis, dim in enumerate(value.shape.dims)]
        if dims != list(value.shape.dims):
            value.shape = onnx_ir.Shape(dims)


def _dimension(dim: int | onnx_ir.SymbolicDim, value: onnx_ir.Value, axis: int, is_input: bool,
               renamed: dict[str, str]) -> int | onnx_ir.SymbolicDim:  # fmt: skip
    if isinstance(dim, int) and dim >= 0:
        return dim
    if isinstance(dim, int) or dim.value is None:  # exporters write -1 for "any"
        return onnx_ir.SymbolicDim(_fresh(f"{value.name}_{axis}", renamed) if is_input else None)
    if dim.value not in renamed:
        renamed[dim.value] = dim.value if _is_expression(dim.value) else _fresh(dim.value, renamed)
    return onnx_ir.SymbolicDim(renamed[dim.value])


def _is_expression(text: str) -> bool:
    """A name or an arithmetic expression that the plan's grammar reads, without our reserved names."""
    try:
        symbols = extent.symbols_of(text)
    except EngineError:
        return False
    return bool(symbols) and not any(_RESERVED.fullmatch(symbol) for symbol in symbols) and "\n" not in text


def _fresh(text: str, renamed: dict[str, str]) -> str:
    """An identifier like `text` that nothing else was renamed to."""
    name = re.sub(r"\W", "_", text, flags=re.ASCII)
    if not name or not name[0].isalpha() or _RESERVED.fullmatch(name):
        name = f"d_{name}"
    taken = set(renamed.values()) | set(renamed)
    unique, suffix = name, 1
    while unique in taken:
        suffix += 1
        unique = f"{name}_{suffix}"
    renamed[unique] = unique
    return unique


def _values(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Value]:
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
