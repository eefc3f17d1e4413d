"""Copies between two sets of strides: element by element, or by tiles where the two are contiguous along different
axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from ingot.kernels import PLAIN, Ports
from ingot.kernels.cuda.axes import LAST, Axis, collapse, offset, unravel
from ingot.kernels.cuda.build import TYPES, CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.pointwise import block_for, element_index
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, add, ceil_div, product

_TILE = 64


@dataclass(frozen=True)
class Copy:
    """Axes in the target's memory order, strides of the target first, then of the source; where both start."""

    target: Handle
    source: Handle
    axes: Sequence[Axis]
    target_start: Extent = 0
    source_start: Extent = 0


def movable(node: Node, target: Any) -> bool:
    """Whether every operand has a type that Triton knows."""
    return all(p is None or p.dtype in TYPES for p in (*node.inputs, *node.outputs))


def same_layouts(node: Node, target: Any) -> list[Ports]:
    """Everything row-major, or every feature map with its channels last."""
    ports = [p for p in (*node.inputs, *node.outputs) if p is not None]
    if any(len(p.shape) < 3 for p in ports):
        return [PLAIN]
    inputs = tuple("" if p is None or p.constant is not None else LAST for p in node.inputs)
    return [PLAIN, Ports(inputs, (LAST,) * len(node.outputs))]


def emit_copy(build: CudaBuilder, copy: Copy) -> None:
    """target[target_start + …] = source[source_start + …]"""
    axes = collapse(copy.axes)
    along = _along(axes)
    if along is None:
        _by_elements(build, copy, axes)
    else:
        _by_tiles(build, copy, axes, along)


def emit_copies(build: CudaBuilder, copies: Sequence[Copy]) -> None:
    """All of them, in one launch where none needs tiles."""
    collapsed = [(copy, collapse(copy.axes)) for copy in copies]
    if len(copies) == 1 or any(_along(axes) is not None for _, axes in collapsed):
        for copy in copies:
            emit_copy(build, copy)
        return
    totals = [product(axis.size for axis in axes) for _, axes in collapsed]
    block = block_for(reduce(add, totals), build.target.processors)
    f = build.function(warps=max(block // 256, 1))
    f.emit("number = tl.program_id(0)")
    start: Extent = 0
    for (copy, axes), total in zip(collapsed, totals, strict=True):
        end = add(start, ceil_div(total, block))
        with f.block(f"if (number >= {f.extent(start)}) & (number < {f.extent(end)}):"):
            f.emit(f"index = (number - {f.extent(start)}) * {block} + tl.arange(0, {block})")
            f.emit(f"mask = index < {f.extent(total)}")
            _move(f, copy, axes)
        start = end
    f.launch(start)


def _along(axes: Sequence[Axis]) -> int | None:
    """The axis that lies side by side in the source, where another one does in the target."""
    along = next((i for i, axis in enumerate(axes) if axis.strides[1] == 1), len(axes) - 1)
    if along == len(axes) - 1 or axes[-1].strides[0] != 1 or _is_thin(axes[-1]) or _is_thin(axes[along]):
        return None
    return along


def _is_thin(axis: Axis) -> bool:
    return isinstance(axis.size, int) and axis.size < 8


def _by_elements(build: CudaBuilder, copy: Copy, axes: Sequence[Axis]) -> None:
    total = product(axis.size for axis in axes)
    block = block_for(total, build.target.processors)
    f = build.function(warps=max(block // 256, 1))
    element_index(f, total, block)
    _move(f, copy, axes)
    straight = [a.strides for a in axes] == [(1, 1)] and copy.target_start == copy.source_start == 0
    f.launch(ceil_div(total, block), copies=straight)


def _move(f: FunctionBuilder, copy: Copy, axes: Sequence[Axis]) -> None:
    """The elements of number `index`, where `mask`."""
    places = unravel(f, "index", [a.size for a in axes])
    target = f"{f.extent(copy.target_start)} + {offset(f, places, [a.strides[0] for a in axes])}"
    source = f"{f.extent(copy.source_start)} + {offset(f, places, [a.strides[1] for a in axes])}"
    f.emit(f"value = tl.load({f.pointer(copy.source)} + {source}, mask)")
    f.emit(f"tl.store({f.pointer(copy.target)} + {target}, value, mask)")


def _by_tiles(build: CudaBuilder, copy: Copy, axes: Sequence[Axis], along: int) -> None:
    """Rows are contiguous in the source, columns in the target: each side is read or written as it lies."""
    rows, columns = axes[along], axes[-1]
    outer = [axis for i, axis in enumerate(axes) if i not in (along, len(axes) - 1)]
    f = build.function(warps=4)
    down, across = ceil_div(rows.size, _TILE), ceil_div(columns.size, _TILE)
    f.emit(f"tile = tl.program_id(0)\ncolumn = tile % {f.extent(across)}\nrest = tile // {f.extent(across)}")
    f.emit(f"row = rest % {f.extent(down)}\nouter = rest // {f.extent(down)}")
    f.emit(f"rows = row * {_TILE} + tl.arange(0, {_TILE})[:, None]")
    f.emit(f"columns = column * {_TILE} + tl.arange(0, {_TILE})[None, :]")
    f.emit(f"mask = (rows < {f.extent(rows.size)}) & (columns < {f.extent(columns.size)})")
    places = unravel(f, "outer", [a.size for a in outer]) if outer else []
    sides = []
    for side, start in ((0, copy.target_start), (1, copy.source_start)):
        names, strides = [*places, "rows", "columns"], [*(a.strides[side] for a in outer), rows.strides[side],
                                                         columns.strides[side]]  # fmt: skip
        sides.append(f"{f.extent(start)} + {offset(f, names, strides)}")
    f.emit(f"value = tl.load({f.pointer(copy.source)} + {sides[1]}, mask)")
    f.emit(f"tl.store({f.pointer(copy.target)} + {sides[0]}, value, mask)")
    f.launch(product((down, across, *(a.size for a in outer))))
