"""Small helpers over onnx_ir: constants, types by numpy name, nodes of the canonical operators, replacement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir

from ingot.dtypes import numpy_dtype
from ingot.errors import GraphError
from ingot.ir import ops
from ingot.ir.elementwise import INTEGERS, Array
from ingot.ir.ops_table import Attribute, TensorType, normal_extent
from ingot.ir.provenance import origins, set_origins
from ingot.ir.shapes import shape_of
from ingot.ir.symbolic import canonical
from ingot.plan.extent import Extent

DOMAIN = ops.DOMAIN

# constants


def constant_of(value: ir.Value | None) -> Array | None:
    """The array of an initializer, a Constant node or a value known by inference; None when it varies."""
    if value is None or (value.is_graph_input() and value.const_value is None):
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.dtype == ir.DataType.STRING else tensor.numpy()


def is_constant(value: ir.Value | None) -> bool:
    """Whether `constant_of` has an array."""
    return constant_of(value) is not None


def scalar_value(value: ir.Value | None) -> int | float | None:
    """The number in a constant of one element; bool counts as 0 and 1."""
    array = constant_of(value)
    if array is None or array.size != 1 or array.dtype.kind == "c":
        return None
    if array.dtype.kind in "iub" or array.dtype.name in INTEGERS:
        return int(array.reshape(()).item())
    return array.reshape(()).astype(np.float64).item()


def add_constant(graph: ir.Graph | ir.Function, array: Array, like: str | None = None) -> ir.Value:
    """A new initializer of the graph, named after `like`."""
    if not isinstance(graph, ir.Graph):
        raise GraphError("constants cannot be added to a function: inline it first")
    name = fresh_name(graph, f"{like or 'constant'}.constant")
    tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def fresh_name(graph: ir.Graph, base: str) -> str:
    """The name, with a number where an initializer has it already."""
    taken, number, name = graph.initializers, 0, base
    while name in taken:
        number += 1
        name = f"{base}{number}"
    return name


# types


def dtype_of(value: ir.Value) -> str:
    """numpy's name of the element type ("string" for strings); GraphError where it is unknown."""
    name = dtype_name(value.dtype)
    if name is None:
        raise GraphError(f"the element type of {value.name!r} is unknown: shapes have not been inferred")
    return name


@cache
def dtype_name(kind: ir.DataType | None) -> str | None:
    """numpy's name of a DataType."""
    if kind is None or kind == ir.DataType.UNDEFINED:
        return None
    return "string" if kind == ir.DataType.STRING else kind.numpy().name


def type_of(value: ir.Value) -> TensorType | None:
    """dtype and shape, or None while one of them is unknown (or it is no tensor)."""
    name = dtype_name(value.dtype)
    if name is None or not isinstance(value.type, ir.TensorType) or not is_shape_known(value):
        return None
    return TensorType(name, shape(value))


def is_shape_known(value: ir.Value) -> bool:
    """Whether every extent is a number or an expression."""
    return value.shape is not None and all(isinstance(d, int) or d.value is not None for d in value.shape.dims)


def shape(value: ir.Value) -> tuple[Extent, ...]:
    """The shape of a value that must be known."""
    known = shape_of(value) if is_shape_known(value) else None
    if known is None:
        raise GraphError(f"the shape of {value.name!r} is unknown")
    return known


def set_type(value: ir.Value, known: TensorType) -> None:
    """Give a value its dtype and shape."""
    value.type = ir.TensorType(data_type(known.dtype))
    value.shape = ir.Shape([simplified(extent) for extent in known.shape])


def simplified(extent: Extent) -> Extent:
    """The extent in the one form that equal extents share."""
    return extent if isinstance(extent, int) else canonical(extent)


def data_type(name: str) -> ir.DataType:
    """DataType of numpy's name."""
    return ir.DataType.STRING if name == "string" else ir.DataType.from_numpy(numpy_dtype(name))


# nodes


def make_node(op: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any] | None = None, *,
              domain: str = DOMAIN, outputs: int = 1, name: str | None = None) -> ir.Node:  # fmt: skip
    """A node outside of any graph; canonical ones get all their attributes, and outputs typed by their definition."""
    given = dict(attributes or {})
    if domain != DOMAIN:
        return ir.Node(domain, op, inputs, ir.convenience.convert_attributes(given), num_outputs=outputs, name=name)
    encoded = encode(op, given)
    node = ir.Node(domain, op, inputs, encoded, num_outputs=outputs, name=name, version=1)
    types = [None if value is None else type_of(value) for value in inputs]
    if all(value is None or kind is not None for value, kind in zip(inputs, types, strict=True)):
        for value, known in zip(node.outputs, ops.infer(op, types, given), strict=False):
            set_type(value, known)
    return node


def encode(op: str, given: Mapping[str, Any]) -> list[ir.Attr]:
    """All attributes of a canonical operator, defaults filled in."""
    kinds = ops.definition(op).attributes
    return [_encoded(name, kinds[name], value) for name, value in ops.complete(op, given).items()]


def _encoded(name: str, attribute: Attribute, value: Any) -> ir.Attr:
    match attribute.kind:
        case "int":
            return ir.AttrInt64(name, int(value))
        case "number" if isinstance(value, int | np.integer):
            return ir.AttrInt64(name, int(value))
        case "float" | "number":
            return ir.AttrFloat32(name, float(value))
        case "text" | "expression":
            return ir.AttrString(name, str(value))
        case "ints":
            return ir.AttrInt64s(name, [int(item) for item in value])
        case "floats":
            return ir.AttrFloat32s(name, [float(item) for item in value])
        case "extent":
            return ir.AttrStrings(name, [str(value)])
        case _:
            return ir.AttrStrings(name, [str(item) for item in value])


def attributes(node: ir.Node) -> dict[str, Any]:
    """Attributes of a canonical node as python values; lists are tuples, extents are ints or expressions."""
    kinds = ops.definition(node.op_type).attributes
    return {name: _decoded(kinds[name], attribute) for name, attribute in node.attributes.items()}


def _decoded(attribute: Attribute, stored: ir.Attr) -> Any:
    value = stored.value
    if attribute.kind in ("extent", "extents"):
        extents = tuple(map(normal_extent, value))
        return extents if attribute.kind == "extents" else extents[0]
    return tuple(value) if isinstance(value, list | tuple) else value


def is_canonical(node: ir.Node) -> bool:
    """Whether the node is of our domain."""
    return node.domain == DOMAIN


def onnx_attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Value of an ONNX node's attribute; lists are lists."""
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    return list(attribute.value) if isinstance(attribute.value, list | tuple) else attribute.value


# replacement


def replace_node(node: ir.Node, nodes: Iterable[ir.Node], results: Sequence[ir.Value | None]) -> None:
    """Put `nodes` where `node` is; `results` take the place of its outputs, with their names, dtypes and shapes.

    New nodes inherit the origins of the old one. A result that is not made by `nodes` keeps its own name; a graph
    output must not be replaced by such a one.
    """
    new = list(nodes)
    graph = node.graph
    if graph is None:
        raise GraphError(f"node {node.name!r} is in no graph")
    for index, fresh in enumerate(new):  # before they are in the graph, which would name them
        set_origins(fresh, origins(node))
        fresh.name = fresh.name or (node.name if index == len(new) - 1 else f"{node.name}.{index}")
    graph.insert_before(node, new)
    made = {value for fresh in new for value in fresh.outputs}
    for old, result in zip(node.outputs, results, strict=False):
        if result is not None:
            substitute(old, result, inherit=result in made)
    graph.remove(node, safe=True)


def substitute(old: ir.Value, new: ir.Value, inherit: bool = True) -> None:
    """Every reader of `old` reads `new`, which inherits its name, dtype and shape."""
    if inherit:
        new.shape = old.shape if old.shape is not None else new.shape
        new.type = old.type if old.type is not None else new.type
        new.metadata_props.update(old.metadata_props)
        name, old.name = old.name, None
        new.name = name
    elif old.is_graph_output():
        raise GraphError(f"the graph's output {old.name!r} needs a node of its own")
    old.replace_all_uses_with(new, replace_graph_outputs=True)
