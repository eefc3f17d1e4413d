"""Reduce: any axes of any layout, floats accumulated in float32, with the epilogue on each result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ingot.ir.expression import operands_of
from ingot.ir.ops_linear import SHORT_INTEGERS
from ingot.ir.ops_reduce import INDEX_KINDS
from ingot.kernels import PLAIN, Ports, kernel
from ingot.kernels.cuda.axes import LAST, Axis, broadcast_strides, memory_order, strides_of
from ingot.kernels.cuda.build import LANGUAGE, CudaBuilder
from ingot.kernels.cuda.render import NARROW, REAL, can_render, converted, render
from ingot.kernels.cuda.rows import Rows, Shape, Tile, open_tile, power_of_two, rows_of
from ingot.kernels.node import Node, Port
from ingot.plan.extent import Extent


@dataclass(frozen=True)
class Kind:
    """`start` of the sums, what is done to an element `x`, how two `combine`, tl's reduction, what is made of it."""

    start: str
    element: str
    combine: str
    across: str
    finish: str = "{0}"
    floats: bool = False


_ADD, _LOG = "{0} + {1}", "tl.log({0})"
KINDS = {
    "sum": Kind("0", "{0}", _ADD, "tl.sum"),
    "mean": Kind("0", "{0}", _ADD, "tl.sum", "{0} / {n}", True),
    "max": Kind("low", "{0}", "tl.maximum({0}, {1})", "tl.max"),
    "min": Kind("high", "{0}", "tl.minimum({0}, {1})", "tl.min"),
    "prod": Kind("1", "{0}", "{0} * {1}", "product"),
    "l1": Kind("0", "tl.abs({0})", _ADD, "tl.sum"),
    "l2": Kind("0", "{0} * {0}", _ADD, "tl.sum", "libdevice.sqrt({0})", True),
    "logsum": Kind("0", "{0}", _ADD, "tl.sum", _LOG, True),
    "logsumexp": Kind("0", "tl.exp({0} - peak)", _ADD, "tl.sum", "tl.log({0}) + peak", True),
    "sumsquare": Kind("0", "{0} * {0}", _ADD, "tl.sum"),
}
_ACROSS, _AT_ONCE = 128, 16  # rows and columns of a tile of rows that lie side by side
_INTEGERS = ("int32", "int64")
_SHORT = ("int8", "uint8", "int16", "uint16", "bool")  # computed in int32, and what is too large for them wraps
_KINDS_OF_SHORT = ("sum", "max", "min", "prod", "argmax", "argmin")
_LIMITS = {f"{u}int{b}": (0, 2**b - 1) if u else (-(2 ** (b - 1)), 2 ** (b - 1) - 1)
           for u in ("", "u") for b in (8, 16, 32, 64)} | {"bool": (0, 1)}  # fmt: skip


def accumulator(dtype: str) -> str:
    """What sums are kept in."""
    return "float32" if dtype in NARROW else "int32" if dtype in _SHORT else dtype


def _applies(node: Node, target: Any) -> bool:
    kind, dtype = node.attributes["kind"], node.dtype
    if dtype not in (*NARROW, *REAL, *_INTEGERS, *_SHORT) or (dtype in _INTEGERS and _floats_only(kind)):
        return False
    if dtype in _SHORT and (kind not in _KINDS_OF_SHORT or (dtype == "bool" and kind not in ("max", "min"))):
        return False
    return can_render(node.epilogue, [_nominal(node), *(p.dtype for p in node.inputs[1:] if p is not None)])


def _nominal(node: Node) -> str:
    """Type of the result before the epilogue."""
    kind, dtype = node.attributes["kind"], node.dtype
    if kind in INDEX_KINDS:
        return "int64"
    return dtype if dtype in _SHORT and (kind != "sum" or dtype not in SHORT_INTEGERS) else accumulator(dtype)


def _floats_only(kind: str) -> bool:
    return kind in KINDS and KINDS[kind].floats


def _layouts(node: Node, target: Any) -> list[Ports]:
    """Row-major; an image with its channels last whose result is the same in both layouts."""
    x = node.input(0)
    spatial = tuple(range(2, len(x.shape)))
    if len(x.shape) < 3 or tuple(node.attributes["axes"]) != spatial:
        return [PLAIN]
    ends = ("", LAST) if node.attributes["keepdims"] else ("",)
    return [PLAIN, *(Ports((LAST,), (end,)) for end in ends)]


@kernel("Reduce", on="cuda", when=_applies, layouts=_layouts)
def reduce(build: CudaBuilder, node: Node) -> None:
    """kind over the axes of x"""
    rows = _rows(node)
    tile = open_tile(build, rows, None if rows.contiguous else _shape_across(rows))
    result = _extreme_index(build, node, tile) if node.attributes["kind"] in INDEX_KINDS else _sums(build, node, tile)
    _finish(build, node, tile, result)
    tile.launch()


def _shape_across(rows: Rows) -> Shape:
    """For rows that lie side by side: many of them, a few columns at a time."""
    across = rows.kept[-1].size
    return Shape(min(power_of_two(across), _ACROSS) if isinstance(across, int) else _ACROSS, _AT_ONCE, False)


def _rows(node: Node) -> Rows:
    """Operands: x, the result, the epilogue's."""
    x, axes, order = node.input(0), set(node.attributes["axes"]), memory_order(len(node.input(0).shape),
                                                                                node.input(0).layout)  # fmt: skip
    sides = [strides_of(x.shape, x.layout), *(_aligned(node, p, x) for p in (node.output, *_extras(node)))]
    lists: tuple[list[Axis], list[Axis]] = ([], [])
    for axis in order:
        lists[axis in axes].append(Axis(x.shape[axis], tuple(s[axis] for s in sides)))
    return rows_of(*lists)


def _extras(node: Node) -> list[Port]:
    return [p for p in node.inputs[1:] if p is not None]


def _aligned(node: Node, port: Port, x: Port) -> tuple[Extent, ...]:
    """Strides of an operand shaped like the result along the axes of x."""
    axes, shape = set(node.attributes["axes"]), node.output.shape
    own = list(strides_of(shape, port.layout) if port is node.output else broadcast_strides(port, shape))
    if node.attributes["keepdims"]:
        return tuple(0 if axis in axes else stride for axis, stride in enumerate(own))
    rest = iter(own)
    return tuple(0 if axis in axes else next(rest) for axis in range(len(x.shape)))


def start_of(kind: Kind, dtype: str) -> str:
    """The text of what a reduction of that dtype begins with."""
    low, high = _LIMITS.get(dtype, ('float("-inf")', 'float("inf")'))
    return {"low": str(low), "high": str(high)}.get(kind.start, kind.start)


def _sums(build: CudaBuilder, node: Node, tile: Tile) -> str:
    kind, f = KINDS[node.attributes["kind"]], tile.f
    type = accumulator(node.dtype)
    if node.attributes["kind"] == "logsumexp":
        f.emit(f"peak = {_reduced(build, tile, KINDS['max'], type)}")
        f.emit('peak = tl.where(tl.abs(peak) < float("inf"), peak, 0.0)')
    total = f.let(_reduced(build, tile, kind, type))
    return f.let(kind.finish.format(total, n=f.extent(tile.rows.length)))


def _reduced(build: CudaBuilder, tile: Tile, kind: Kind, type: str) -> str:
    """Text of the row's reduction, with one column."""
    f, start = tile.f, start_of(kind, build.node.dtype)
    sums = f.name("sums")
    f.emit(f"{sums} = tl.full(({tile.shape.rows}, {tile.shape.columns}), {start}, {LANGUAGE[type]})")
    with tile.columns():
        x = tile.load(build.input(0), 0, other="0")
        element = kind.element.format(f.let(f"{x}.to({LANGUAGE[type]})"))
        f.emit(f"{sums} = tl.where({tile.mask}, {kind.combine.format(sums, element)}, {sums})")
    across = f.core("reduce", "product") if kind.across == "product" else kind.across
    return f"{across}({sums}, 1)[:, None]"


def _extreme_index(build: CudaBuilder, node: Node, tile: Tile) -> str:
    """Place of the first (or last) extreme element."""
    f, largest = tile.f, node.attributes["kind"] == "argmax"
    type, last = accumulator(node.dtype), bool(node.attributes["select_last_index"])
    whole = f"({tile.shape.rows}, {tile.shape.columns})"
    f.emit(f"best = tl.full({whole}, {start_of(KINDS['max' if largest else 'min'], node.dtype)}, {LANGUAGE[type]})")
    f.emit(f"place = tl.full({whole}, {-1 if last else 2**31 - 1}, tl.int32)")
    with tile.columns():
        x = tile.load(build.input(0), 0, other="0")
        f.emit(f"x = {x}.to({LANGUAGE[type]})")
        better = f"(x {'>' if largest else '<'} best) | ((x == best) & {'True' if last else f'(place == {2**31 - 1})'})"
        f.emit(f"better = inside & ({better})\nbest = tl.where(better, x, best)")
        f.emit("place = tl.where(better, column + tl.zeros_like(place), place)")
    f.emit(f"extreme = {'tl.max' if largest else 'tl.min'}(best, 1)[:, None]")
    outside = "-1" if last else str(2**31 - 1)
    f.emit(f"place = tl.where(best == extreme, place, {outside})")
    return f.let(f"{'tl.max' if last else 'tl.min'}(place, 1)[:, None].to(tl.int64)")


def _finish(build: CudaBuilder, node: Node, tile: Tile, result: str) -> None:
    f = tile.f
    used = set(operands_of(node.epilogue))
    texts = [tile.load_row(build.input(k), k + 1) if k in used else "" for k in range(1, len(node.inputs))]
    nominal = _nominal(node)
    if nominal in _SHORT:
        result = f.let(converted(result, "int32", nominal))
    dtypes = [nominal, *(p.dtype for p in _extras(node))]
    value = render(f, node.epilogue, [result, *texts], dtypes)
    held = node.epilogue.dtype or nominal
    place = f"{tile.row_offset(1)} + row * 0"  # a block, even where there is one result
    f.emit(f"tl.store({f.pointer(build.output())} + {place}, {converted(value, held, node.output.dtype)}, "
           f"row < {f.extent(tile.rows.count)})")  # fmt: skip
