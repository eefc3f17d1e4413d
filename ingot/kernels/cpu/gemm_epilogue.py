"""Epilogues of matrix products: sums of a tile become output rows, with extras that are scalars, vectors along the
columns, or matrices like the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ingot.dtypes import size_of
from ingot.ir.expression import Expression
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.gemm import Gemm, Sums, Tile, store_sums
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.cpu.render import broadcast, can_render, load, render_expression, store
from ingot.kernels.node import Node, Port
from ingot.plan.extent import Extent

Kind = Literal["scalar", "column", "full"]
INLINE_LIMIT = 160  # IR lines of rendered epilogue per tile above which it becomes a loop over the rows


@dataclass(frozen=True)
class Extra:
    """An epilogue operand; `padded` where it is a constant that may be read in whole vectors."""

    kind: Kind
    handle: Handle
    dtype: str
    padded: bool = False


@dataclass(frozen=True)
class RowEpilogue:
    """The expression over sums of dtype `sums`, its extras, and the output matrix it fills."""

    expression: Expression
    extras: tuple[Extra, ...]
    sums: str
    output: Handle
    dtype: str
    columns: Extent
    lanes: int

    @property
    def dtypes(self) -> tuple[str, ...]:
        """dtypes of the expression's operands."""
        return (self.sums, *(extra.dtype for extra in self.extras))


def kind_of(port: Port, output: Port) -> Kind | None:
    """How an operand broadcasts over the output [..., M, N]; None for a way that epilogues do not have."""
    leading = len(output.shape) - len(port.shape)
    if all(size == 1 for size in port.shape):
        return "scalar"
    if leading >= 0 and port.shape[-1] == output.shape[-1] and all(size == 1 for size in port.shape[:-1]):
        return "column"
    return "full" if leading >= 0 and (1,) * leading + port.shape == output.shape else None


def extras_of(node: Node, first: int = 2) -> list[Port]:
    """The epilogue's operands, which start at input `first`."""
    return [port for port in node.inputs[first:] if port is not None]


def can_finish(node: Node, sums: str, first: int = 2) -> bool:
    """Whether the node's epilogue has vector code for sums of a dtype; its operands start at input `first`."""
    extras = extras_of(node, first)
    dtypes = [sums, *(port.dtype for port in extras), node.output.dtype]
    return all(kind_of(port, node.output) for port in extras) and can_render(node.epilogue, dtypes)


def epilogue_of(build: KernelBuilder, node: Node, sums: str, lanes: int, first: int = 2) -> RowEpilogue:
    """Claim the operands of the node's epilogue, which start at input `first`, and its output."""
    given = [index for index, port in enumerate(node.inputs) if index >= first and port is not None]
    extras = tuple(_extra(build, node, index, lanes) for index in given)
    return RowEpilogue(node.epilogue, extras, sums, build.output(), node.output.dtype, node.output.shape[-1], lanes)


def _extra(build: KernelBuilder, node: Node, index: int, lanes: int) -> Extra:
    port = node.input(index)
    kind = kind_of(port, node.output)
    assert kind is not None
    if kind == "column" and port.constant is not None:
        return Extra(kind, build.pack(_padded(port.constant.reshape(-1), lanes)), port.dtype, padded=True)
    return Extra(kind, build.input(index), port.dtype)


def _padded(vector: np.ndarray[Any, Any], lanes: int) -> np.ndarray[Any, Any]:
    """Ones behind the last element, enough for the widest panel."""
    whole = np.ones(-(-len(vector) // lanes) * lanes + _WIDEST_PANEL * lanes, vector.dtype)
    whole[: len(vector)] = vector
    return whole


_WIDEST_PANEL = 8


@dataclass(frozen=True)
class Columns:
    """A panel's columns: the first one, and for each vector the lanes that exist (None: all)."""

    first: Index
    masks: tuple[Value | None, ...]


def columns_of(f: PhaseFunction, gemm: Gemm, epilogue: RowEpilogue, panel: Index) -> Columns:
    """Columns of a panel."""
    first = panel * gemm.width
    limit, lanes, vectors = f.extent(epilogue.columns), epilogue.lanes, gemm.tile.vectors
    if isinstance(limit, int) and limit % gemm.width == 0:
        return Columns(first, (None,) * vectors)
    return Columns(first, tuple(f.first_lanes(limit - (first + j * lanes), lanes) for j in range(vectors)))


def finish_tile(f: PhaseFunction, gemm: Gemm, epilogue: RowEpilogue, tile: Tile, row: Index, panel: Index,
                sums: Sums | None, slot: Value, rows: Index | None = None) -> None:  # fmt: skip
    """Apply the epilogue to the tile at output row `row` and store it, or its first `rows`; its sums are given or in
    `slot`."""
    columns = columns_of(f, gemm, epilogue, panel)
    common = [[_column_value(f, epilogue, extra, columns, j) for extra in epilogue.extras] for j in range(tile.vectors)]
    if sums is not None and (tile.rows == 1 or rendered_lines(epilogue) * len(sums) <= INLINE_LIMIT):
        for r in range(tile.rows):
            part = sums[r * tile.vectors : (r + 1) * tile.vectors]
            _finish_row(f, epilogue, f.index(row) + r, columns, part, common)
        return
    if sums is not None:
        store_sums(f, gemm, tile, slot, sums)

    def one(r: Value) -> None:
        size = gemm.dot.sum_bytes
        place = f.at(slot, r * (tile.vectors * size))
        part = [f.load(gemm.dot.sums, place, j * size) for j in range(tile.vectors)]
        _finish_row(f, epilogue, row + r, columns, part, common)

    f.loop(0, tile.rows if rows is None else rows, one)


def _column_value(f: PhaseFunction, epilogue: RowEpilogue, extra: Extra, columns: Columns, j: int) -> Value | None:
    """A scalar or column vector in register form, None for a matrix."""
    pointer, lanes = f.pointer(extra.handle), epilogue.lanes
    if extra.kind == "scalar":
        return broadcast(f, extra.dtype, pointer, 0, lanes)
    if extra.kind == "full":
        return None
    place = f.at(pointer, columns.first * size_of(extra.dtype))
    mask = None if extra.padded else columns.masks[j]
    return load(f, extra.dtype, place, j * lanes * size_of(extra.dtype), lanes, mask)


def _finish_row(f: PhaseFunction, epilogue: RowEpilogue, row: Value, columns: Columns, sums: Sequence[Value],
                common: Sequence[Sequence[Value | None]]) -> None:  # fmt: skip
    element, lanes = row * f.extent(epilogue.columns) + columns.first, epilogue.lanes
    places = [f.at(f.pointer(extra.handle), element * size_of(extra.dtype)) if extra.kind == "full" else None
              for extra in epilogue.extras]  # fmt: skip
    target, size = f.at(f.pointer(epilogue.output), element * size_of(epilogue.dtype)), size_of(epilogue.dtype)
    for j, total in enumerate(sums):
        mask, operands = columns.masks[j], [total]
        for extra, place, value in zip(epilogue.extras, places, common[j], strict=True):
            if value is None:
                assert place is not None
                value = load(f, extra.dtype, place, j * lanes * size_of(extra.dtype), lanes, mask)
            operands.append(value)
        result = render_expression(f, epilogue.expression, operands, epilogue.dtypes, lanes)
        store(f, epilogue.dtype, result, target, j * lanes * size, mask)


def rendered_lines(epilogue: RowEpilogue) -> int:
    """IR lines that one vector's epilogue takes: what unrolling it costs."""
    trial = PhaseFunction("trial", ())
    operands = [broadcast(trial, dtype, Value(trial, "ptr", "%p"), 0, epilogue.lanes) for dtype in epilogue.dtypes]
    before = len(trial.lines)
    result = render_expression(trial, epilogue.expression, operands, epilogue.dtypes, epilogue.lanes)
    store(trial, epilogue.dtype, result, Value(trial, "ptr", "%p"), 0)
    return len(trial.lines) - before + len(epilogue.extras)
