"""The table of canonical forms: `@canonical("Softmax")` above `(op) -> value | tuple of values | reject(…)`.

`op` knows the ONNX node (its inputs, attributes and opset version) and builds the canonical nodes that replace it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ingot.ir import expression as expressions
from ingot.ir.elementwise import Array
from ingot.ir.expression import Expression, Input, Operand
from ingot.ir.graph import (
    constant_of,
    dtype_name,
    dtype_of,
    onnx_attribute,
    scalar_value,
    shape,
    simplified,
)
from ingot.ir.ops import broadcast
from ingot.ir.ops_table import Shape
from ingot.ir.shapes import is_data_dependent, known_elements, shape_of
from ingot.passes import rewrite
from ingot.plan.extent import Extent

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Reject:
    """Why a node stays what it is, and what would change that ("" if nothing would)."""

    reason: str
    remedy: str = ""


def reject(reason: str, remedy: str = "") -> Reject:
    return Reject(reason, remedy)


class Builder(rewrite.Builder):
    """The node being replaced, and the nodes that will replace it: `op.Softmax(op.x(0), axis=1)` makes one."""

    def __init__(self, node: ir.Node, version: int) -> None:
        super().__init__(node)
        self.node = node
        self.version = version

    # what the node says

    def given(self, index: int) -> bool:
        """Whether input `index` is there."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def optional(self, index: int) -> ir.Value | None:
        """Input `index`, or None where it is absent."""
        return self.node.inputs[index] if self.given(index) else None

    def x(self, index: int = 0) -> ir.Value:
        """Input `index`, which is there."""
        value = self.optional(index)
        if value is None:
            raise IndexError(f"{self.node.op_type} {self.node.name!r} has no input {index}")
        return value

    @property
    def y(self) -> ir.Value:
        """The first output."""
        return self.node.outputs[0]

    @property
    def dtype(self) -> str:
        """dtype of the first output."""
        return dtype_of(self.y)

    @property
    def inputs(self) -> list[ir.Value]:
        """The inputs that are there."""
        return [value for value in self.node.inputs if value is not None]

    def attribute(self, name: str, default: Any = None) -> Any:
        """Value of an attribute; lists are lists."""
        return onnx_attribute(self.node, name, default)

    def used(self, index: int) -> bool:
        """Whether something reads output `index`."""
        if index >= len(self.node.outputs):
            return False
        value = self.node.outputs[index]
        return bool(value.uses()) or value.is_graph_output()

    def constant_input(self, index: int) -> Array | None:
        """The array of input `index`; None where it is absent or varies."""
        return constant_of(self.optional(index))

    def varies(self, index: int) -> bool:
        """Whether input `index` is there but not constant."""
        return self.given(index) and self.constant_input(index) is None

    def ints(self, index: int) -> list[int] | None:
        """The elements of a constant integer input; None where it is absent or varies."""
        array = self.constant_input(index)
        return None if array is None else [int(item) for item in array.reshape(-1)]

    def extents(self, index: int) -> Shape | None:
        """The elements of an integer input as extents; None where it is absent or they cannot be followed."""
        value = self.optional(index)
        return None if value is None else known_elements(value)

    # what replaces it

    def pointwise(self, text: str, *operands: ir.Value | float) -> ir.Value:
        """Pointwise of an expression's text; numbers and scalar constants become literals, equal operands one."""
        expression = expressions.parse(text)
        kept = _carriers([operand for operand in operands if isinstance(operand, ir.Value)])
        inputs: dict[int, Operand] = {}
        for index, operand in enumerate(operands):
            number = scalar_value(operand) if isinstance(operand, ir.Value) else operand
            if operand in kept or number is None:
                inputs[index] = Input(kept.index(operand))  # type: ignore[arg-type]
            else:
                inputs[index] = expressions.Literal(_shortest(operand, number))
        bound = expressions.tidy(expressions.substitute(expression, inputs))
        pruned, values = _read(bound, kept)
        result: ir.Value = self.Pointwise(*values, expression=expressions.format(pruned))
        return result

    def view(self, x: ir.Value, wanted: Sequence[Extent]) -> ir.Value:
        """x in another shape; x itself where it has it. A constant is reshaped now."""
        target = tuple(simplified(extent) for extent in wanted)
        if shape_of(x) == target:
            return x
        array, sizes = constant_of(x), known(target)
        if array is not None and sizes is not None:
            return self.constant(array.reshape(sizes), x)
        result: ir.Value = self.View(x, shape=target)
        return result

    def cast(self, x: ir.Value, dtype: str) -> ir.Value:
        """x as another type; x itself where it has it."""
        return x if dtype_of(x) == dtype else self.pointwise(f"Cast %0 -> {dtype}", x)

    def transpose(self, x: ir.Value, perm: Sequence[int]) -> ir.Value:
        """x with permuted axes; x itself where nothing moves. A constant is transposed now."""
        if list(perm) == sorted(perm):
            return x
        array = constant_of(x)
        if array is not None:
            return self.constant(np.transpose(array, perm), x)
        result: ir.Value = self.Transpose(x, perm=list(perm))
        return result

    def expand(self, x: ir.Value, wanted: Sequence[Extent]) -> ir.Value:
        """x broadcast to a shape; x itself where it has it."""
        result: ir.Value = x if shape_of(x) == tuple(wanted) else self.Expand(x, shape=list(wanted))
        return result

    def along(self, vector: ir.Value, axis: int, rank: int) -> ir.Value:
        """A vector shaped to broadcast along one axis of a tensor of the given rank."""
        return self.view(vector, [*([1] * axis), shape(vector)[0], *([1] * (rank - 1 - axis))][axis:])

    def steps(self, size: Extent, axis: int = 0, rank: int = 1) -> ir.Value:
        """0, 1, … as int64 along one axis of a tensor of the given rank."""
        if isinstance(size, int):
            return self.constant(np.arange(size).reshape([-1 if place == axis else 1 for place in range(rank)]))
        return self.view(self.Range(size=size), [size if place == axis else 1 for place in range(rank)])

    def size(self, extent: Extent) -> ir.Value:
        """An extent as a tensor of one int64."""
        result: ir.Value = self.Range(start=extent, step=0, size=1)
        return result

    def split_axis(self, x: ir.Value, axis: int, sizes: Sequence[Extent]) -> tuple[ir.Value, ...]:
        """Consecutive parts of x."""
        if len(sizes) == 1:
            return (x,)
        parts: tuple[ir.Value, ...] = self.make("Split", x, axis=axis, sizes=list(sizes), _outputs=len(sizes))
        return parts

    def concat(self, values: Sequence[ir.Value], axis: int) -> ir.Value:
        """Values one after the other; the value itself when it is one."""
        result: ir.Value = values[0] if len(values) == 1 else self.Concat(*values, axis=axis)
        return result


def _carriers(values: Sequence[ir.Value]) -> list[ir.Value]:
    """The operands that must stay operands: all but the scalar constants the result's shape does not need."""
    distinct = list(dict.fromkeys(values))
    kept = [value for value in distinct if scalar_value(value) is None]
    for value in distinct:
        if value not in kept and (not kept or _wider(kept, value)):
            kept.append(value)
    return kept


def _wider(kept: Sequence[ir.Value], value: ir.Value) -> bool:
    shapes = [shape(other) for other in kept]
    return len(shape(value)) > len(broadcast(*shapes))


def _shortest(operand: ir.Value | float, number: float) -> int | float:
    """The shortest number that the operand's type rounds to the same value; one NaN object, so that texts compare."""
    if isinstance(number, float) and math.isnan(number):
        return math.nan
    if isinstance(operand, ir.Value) and dtype_name(operand.dtype) == "float32":
        return float(str(np.float32(number)))
    return number


def _read(expression: Expression, values: Sequence[ir.Value]) -> tuple[Expression, tuple[ir.Value, ...]]:
    """Operands nobody reads dropped, as long as the shape of the result stays."""
    pruned, used = expressions.prune(expression, values)
    if used and broadcast(*map(shape, used)) == broadcast(*map(shape, values)):
        return pruned, used
    return expression, tuple(values)


Result = ir.Value | tuple[ir.Value | None, ...] | Reject
Function = Callable[[Builder], Result]
TABLE: dict[tuple[str, str], Function] = {}


def canonical(*op_types: str, domain: str = "") -> Callable[[Function], Function]:
    """Register how operators are replaced; the first result stands for the first output, and so on."""

    def register(function: Function) -> Function:
        TABLE.update({(domain, op_type): function for op_type in op_types})
        return function

    return register


# questions that many families ask


def axis_of(op: Builder, default: int, rank: int, name: str = "axis") -> int:
    """A normalised axis attribute."""
    return int(op.attribute(name, default)) % max(rank, 1)


def normal_axes(axes: Sequence[int], rank: int) -> list[int]:
    """Axes counted from the start, ascending."""
    return sorted({axis % max(rank, 1) for axis in axes})


def attribute_or_input(op: Builder, name: str, index: int, since: int) -> list[int] | Reject | None:
    """A list that became an input with opset `since`; None where it is absent."""
    if op.version < since:
        value = op.attribute(name)
        return None if value is None else [int(item) for item in value]
    if op.varies(index):
        return reject(f"its {name} vary at run time", f"make the input {name!r} a constant")
    return op.ints(index)


def known(sizes: Sequence[Extent]) -> list[int] | None:
    """The sizes if all are numbers."""
    numbers = [size for size in sizes if isinstance(size, int)]
    return numbers if len(numbers) == len(sizes) else None


def undetermined(sizes: Sequence[Extent]) -> Reject | None:
    """A rejection where a size is known only while the model runs."""
    late = [str(size) for size in sizes if is_data_dependent(size)]
    if not late:
        return None
    return reject(f"its output size {late[0]} depends on the data", "give it a constant shape")


def minus(a: Extent, b: Extent) -> Extent:
    """a - b."""
    return a - b if isinstance(a, int) and isinstance(b, int) else simplified(f"({a})-({b})")


def over(a: Extent, b: Extent) -> Extent:
    """a // b."""
    return a // b if isinstance(a, int) and isinstance(b, int) else simplified(f"({a})//({b})")
