"""TopK by counting, running sums and products by blocks of columns, and Range."""

from __future__ import annotations

from typing import Any

from ingot.ir.elementwise import INTEGERS
from ingot.kernels import kernel
from ingot.kernels.cuda.axes import Axis, memory_order, offset, strides_of, unravel
from ingot.kernels.cuda.build import LANGUAGE, TYPES, CudaBuilder, FunctionBuilder
from ingot.kernels.cuda.pointwise import block_for, element_index
from ingot.kernels.cuda.render import NARROW, REAL, converted, wide
from ingot.kernels.cuda.rows import Rows, power_of_two, rows_of
from ingot.kernels.node import Node
from ingot.plan.extent import ceil_div, product

_NUMBERS = (*NARROW, *REAL, *INTEGERS)


def _lines(node: Node, axis: int) -> Rows:
    """The axis' lines as rows; operands: x, then the outputs."""
    x = node.input(0)
    sides = [strides_of(p.shape, p.layout) for p in (x, *node.outputs)]
    axes = {a: Axis(x.shape[a], tuple(s[a] for s in sides)) for a in memory_order(len(x.shape), x.layout)}
    along = axes.pop(axis)
    return rows_of(list(axes.values()), [along])


# TopK


def _sortable(node: Node, target: Any) -> bool:
    return node.dtype in _NUMBERS


def _topk_cost(node: Node, target: Any) -> float:
    """Every element is compared with every other of its line."""
    length = node.input(0).shape[node.attributes["axis"]]
    compared = product((node.input(0).elements, length))
    return float(target.pace.step + (compared if isinstance(compared, int) else 0) / 4e6)


@kernel("TopK", on="cuda", when=_sortable, cost=_topk_cost)
def topk(build: CudaBuilder, node: Node) -> None:
    """Each element counts the elements of its line that come before it: that is its place, if it is below k"""
    a, rows = node.attributes, _lines(node, node.attributes["axis"])
    length = rows.length
    elements = min(power_of_two(length), 64) if isinstance(length, int) else 32
    others = min(power_of_two(length), 32) if isinstance(length, int) else 32
    f = build.function(warps=4, stages=1)
    n, type = f.extent(length), LANGUAGE[wide(node.dtype)]
    parts = ceil_div(length, elements)
    f.emit(f"row = tl.program_id(0) // {f.extent(parts)}")
    f.emit(f"mine = (tl.program_id(0) % {f.extent(parts)}) * {elements} + tl.arange(0, {elements})")
    places = unravel(f, "row", [axis.size for axis in rows.kept])
    starts = [offset(f, places, [axis.strides[side] for axis in rows.kept]) for side in range(3)]
    along = [f.extent(rows.reduced[0].strides[side]) for side in range(3)]
    base = f.let(f"{f.pointer(build.input(0))} + {starts[0]}")
    f.emit(f"held = tl.load({base} + mine * {along[0]}, mine < {n})\nx = held.to({type})[:, None]")
    f.emit(f"rank = tl.zeros(({elements},), tl.int32)")
    with f.block(f"for start in range(0, {n}, {others}):"):
        f.emit(f"other = start + tl.arange(0, {others})")
        f.emit(f"y = tl.load({base} + other * {along[0]}, other < {n}).to({type})[None, :]")
        f.emit(_before(bool(a["largest"]), node.dtype))
        f.emit(f"before = before & (other < {n})[None, :]\nrank += tl.sum(before.to(tl.int32), 1)")
    f.emit(f"chosen = (mine < {n}) & (rank < {a['k']})")
    f.emit(f"tl.store({f.pointer(build.output(0))} + {starts[1]} + rank * {along[1]}, held, chosen)")
    f.emit(f"tl.store({f.pointer(build.output(1))} + {starts[2]} + rank * {along[2]}, mine.to(tl.int64), chosen)")
    f.launch(product((rows.count, parts)))


def _before(largest: bool, dtype: str) -> str:
    """Whether y comes before x: of equals the first, NaN as the largest of all."""
    further = "y > x" if largest else "y < x"
    if dtype in INTEGERS:
        return f"before = ({further}) | ((y == x) & (other[None, :] < mine[:, None]))"
    nan = "(y != y) & (x == x)" if largest else "(x != x) & (y == y)"
    same = "(y == x) | ((y != y) & (x != x))"
    return f"before = ({further}) | ({nan}) | (({same}) & (other[None, :] < mine[:, None]))"


# CumSum


@kernel("CumSum", on="cuda", when=_sortable)
def cumsum(build: CudaBuilder, node: Node) -> None:
    """A block has one line or some lines side by side, and carries the total from columns to columns"""
    a, rows = node.attributes, _lines(node, node.attributes["axis"])
    times, length = a["kind"] == "prod", rows.length
    columns = min(power_of_two(length), 1024) if isinstance(length, int) else 256
    lines = max(1024 // columns, 1) if rows.count != 1 else 1
    f = build.function(warps=4, stages=1)
    n, type = f.extent(length), LANGUAGE[wide(node.dtype)]
    nothing = int(times)  # what combines with x to x
    f.emit(f"row = tl.program_id(0) * {lines} + tl.arange(0, {lines})[:, None]")
    places = unravel(f, "row", [axis.size for axis in rows.kept])
    starts = [offset(f, places, [axis.strides[side] for axis in rows.kept]) for side in range(2)]
    along = [f.extent(rows.reduced[0].strides[side]) for side in range(2)]
    shift = int(a["exclusive"])  # exclusive results are those of the element before
    f.emit(f"carry = tl.full(({lines}, 1), {nothing}, {type})")
    with f.block(f"for start in range(0, {n}, {columns}):"):
        f.emit(f"column = start + tl.arange(0, {columns})[None, :]")
        f.emit(f"inside = (row < {f.extent(rows.count)}) & (column < {n})")
        place, source = (f"({n} - 1 - column + {by})" if a["reverse"] else f"(column - {by})" for by in (0, shift))
        f.emit(f"x = tl.load({f.pointer(build.input(0))} + {starts[0]} + {source} * {along[0]}, "
               f"inside & (column >= {shift}), other={nothing}).to({type})")  # fmt: skip
        _running(f, times)
        f.emit(f"tl.store({f.pointer(build.output())} + {starts[1]} + {place} * {along[1]}, "
               f"{converted('y', wide(node.dtype), node.output.dtype)}, inside)")  # fmt: skip
    f.launch(ceil_div(rows.count, lines))


def _running(f: FunctionBuilder, times: bool) -> None:
    """y from x and the carry."""
    whole, sign = (f.core("reduce", "product"), "*") if times else ("tl.sum", "+")
    f.emit(f"y = carry {sign} {'tl.cumprod' if times else 'tl.cumsum'}(x, 1)")
    f.emit(f"carry = carry {sign} {whole}(x, 1)[:, None]")


# Range


@kernel("Range", on="cuda", when=lambda node, target: node.output.dtype in TYPES and node.output.dtype != "bool")
def arange(build: CudaBuilder, node: Node) -> None:
    """start, start + step, …"""
    a, y = node.attributes, node.output
    block = block_for(y.elements, build.target.processors)
    f = build.function(warps=max(block // 256, 1))
    index, mask = element_index(f, y.elements, block)
    number = f"{f.extent(a['start'])} + {index}.to(tl.int64) * {f.extent(a['step'])}"
    f.emit(f"tl.store({f.pointer(build.output())} + {index}, {converted(f'({number})', 'int64', y.dtype)}, {mask})")
    f.launch(ceil_div(y.elements, block))
