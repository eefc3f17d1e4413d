"""Results that come row by row, through an epilogue whose extras broadcast over the output in any way that rows allow.

The output is seen as [*outer, inner]: an extra either runs along the inner axes like the output or repeats along them;
along the outer ones it may broadcast as it likes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.ir.expression import Expression
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.cpu.pointwise import dot, unravel
from ingot.kernels.cpu.pointwise_dims import Dims, contradict, merged
from ingot.kernels.cpu.render import broadcast, can_render, load, render_expression, store
from ingot.kernels.node import Node, Port
from ingot.plan.extent import Extent, product


@dataclass(frozen=True)
class Extra:
    """An epilogue operand; `runs`: along the inner axes."""

    handle: Handle
    dtype: str
    runs: bool


@dataclass(frozen=True)
class Results:
    """The epilogue over values of type `main`, its extras, and the output."""

    expression: Expression
    main: str
    extras: tuple[Extra, ...]
    outer: Dims
    inner: Extent
    output: Handle
    dtype: str

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Types of the expression's operands."""
        return (self.main, *(extra.dtype for extra in self.extras))


@dataclass(frozen=True)
class Row:
    """The output's and the extras' rows: pointers to their first elements, values of extras that repeat."""

    target: Value
    extras: tuple[Value, ...]
    repeated: tuple[Value | None, ...]


def _halves(port: Port, output: Port, inner_axes: int) -> tuple[tuple[Extent, ...], tuple[Extent, ...]]:
    """The operand's shape over the outer and over the inner axes."""
    rank = len(output.shape)
    shape = (1,) * (rank - len(port.shape)) + port.shape
    return shape[: rank - inner_axes], shape[rank - inner_axes :]


def _runs(port: Port, output: Port, inner_axes: int) -> bool | None:
    """Whether an operand runs along the inner axes or repeats; None if it does neither."""
    inner = _halves(port, output, inner_axes)[1]
    wanted = output.shape[len(output.shape) - inner_axes :]
    if all(size == 1 for size in inner):
        return product(wanted) == 1
    return True if inner == wanted else None


def can_finish(node: Node, first: int, inner_axes: int, main: str) -> bool:
    """Whether the epilogue, whose extras start at input `first`, has vector code."""
    ports, output = node.inputs[first:], node.output
    for port in ports:
        if port is None or len(port.shape) > len(output.shape) or _runs(port, output, inner_axes) is None:
            return False
        outer = _halves(port, output, inner_axes)[0]
        if any(contradict(size, wanted) for size, wanted in zip(outer, output.shape, strict=False)):
            return False
    return can_render(node.epilogue, [main, output.dtype, *(port.dtype for port in ports if port)])


def results_of(build: KernelBuilder, node: Node, first: int, inner_axes: int, main: str) -> Results:
    """Claim the epilogue's extras and the output."""
    output = node.output
    ports = [port for port in node.inputs[first:] if port is not None]
    extras = tuple(
        Extra(build.input(first + i), port.dtype, bool(_runs(port, output, inner_axes))) for i, port in enumerate(ports)
    )
    split = len(output.shape) - inner_axes
    outer = merged(output.shape[:split], [_halves(port, output, inner_axes)[0] for port in ports])
    return Results(
        node.epilogue, main, extras, outer, product(output.shape[split:]), build.output(), output.dtype
    )  # fmt: skip


def row_of(f: PhaseFunction, results: Results, index: Index, lanes: int) -> Row:
    """Row `index`, counted over the outer axes; extras that repeat are read here."""
    coordinates = unravel(f, index, results.outer.extents)
    inner = f.extent(results.inner)
    pointers = []
    for i, extra in enumerate(results.extras):
        strides = [f.extent(results.outer.stride(i, d)) for d in range(len(results.outer.extents))]
        place = dot(f, coordinates, strides) * (inner if extra.runs else 1)
        pointers.append(f.at(f.pointer(extra.handle), place * size_of(extra.dtype)))
    repeated = tuple(
        None if extra.runs else broadcast(f, extra.dtype, pointer, 0, lanes)
        for extra, pointer in zip(results.extras, pointers, strict=True)
    )
    target = f.at(f.pointer(results.output), index * inner * size_of(results.dtype))
    return Row(target, tuple(pointers), repeated)


def put(f: PhaseFunction, results: Results, row: Row, column: Index, value: Value, lanes: int,
        mask: Value | None = None) -> None:  # fmt: skip
    """Store `lanes` values of type `main` at `column` of the row, through the epilogue."""
    operands = [value, *_extra_values(f, results, row, column, lanes, mask)]
    result = render_expression(f, results.expression, operands, results.dtypes, lanes)
    store(f, results.dtype, result, row.target, column * size_of(results.dtype), mask)


def _extra_values(f: PhaseFunction, results: Results, row: Row, column: Index, lanes: int,
                  mask: Value | None) -> Sequence[Value]:  # fmt: skip
    return [
        load(f, extra.dtype, pointer, column * size_of(extra.dtype), lanes, mask) if value is None else value
        for extra, pointer, value in zip(results.extras, row.extras, row.repeated, strict=True)
    ]
