"""Norm: layer, rms, instance, group; statistics in float32, scale, bias and epilogue on the way out. NarrowNorm: also
what its result is quantized to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ingot.ir.expression import operands_of, parse
from ingot.kernels import PLAIN, Ports, kernel
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.axes import LAST, Axis, broadcast_strides, memory_order, strides_of
from ingot.kernels.cuda.build import LANGUAGE, CudaBuilder
from ingot.kernels.cuda.reduce import accumulator
from ingot.kernels.cuda.render import NARROW, REAL, can_render, converted, render
from ingot.kernels.cuda.rows import Rows, Tile, open_tile, rows_of
from ingot.kernels.node import Node, Port
from ingot.kernels.work import bytes_of
from ingot.plan.extent import Extent, product

MAIN = 3  # x, scale, bias; extras follow
_ALONE = 30_000  # bytes that one processor reads a microsecond


def norm_applies(node: Node, target: Any) -> bool:
    """Whether types, groups and epilogue are such that a Norm can be written."""
    floats = all(p is None or p.dtype in (*NARROW, *REAL) for p in node.inputs[:MAIN])
    divided = node.attributes["kind"] != "group" or isinstance(node.input(0).shape[1], int)
    return floats and divided and can_render(node.epilogue, [node.dtype, *(p.dtype for p in extras_of(node))])


def extras_of(node: Node) -> list[Port]:
    """Operands of the epilogue."""
    return [p for p in node.inputs[MAIN:] if p is not None]


def _layouts(node: Node, target: Any) -> list[Ports]:
    x = node.input(0)
    if node.attributes["kind"] not in ("instance", "group") or len(x.shape) < 3:
        return [PLAIN]
    extras = (LAST if p.constant is None and p.shape == node.output.shape else "" for p in extras_of(node))
    return [PLAIN, Ports((LAST, *("" for _ in node.inputs[1:MAIN]), *extras), (LAST,))]


def _channel(port: Port | None, shape: Sequence[Extent]) -> tuple[Extent, ...]:
    """Strides of a [C] operand along x[N, C, *S]."""
    held = port is not None and port.elements != 1
    return tuple(1 if axis == 1 and held else 0 for axis in range(len(shape)))


def _rows(node: Node) -> Rows:
    """Operands: x, the result, scale, bias, the epilogue's."""
    x, y = node.input(0), node.output
    kind, given = node.attributes["kind"], [*node.inputs, None, None]
    by_channel = kind in ("instance", "group")
    affine = [_channel(p, x.shape) if by_channel else (0,) * len(x.shape) if p is None else
              broadcast_strides(p, x.shape) for p in given[1:MAIN]]  # fmt: skip
    sides = [strides_of(x.shape, x.layout), strides_of(y.shape, y.layout), *affine,
             *(broadcast_strides(p, y.shape) for p in extras_of(node))]  # fmt: skip
    axes = {a: Axis(x.shape[a], tuple(s[a] for s in sides)) for a in range(len(x.shape))}
    order = memory_order(len(x.shape), x.layout)
    if kind == "group":
        return _grouped(axes, order, node.attributes["groups"])
    kept = {0, 1} if by_channel else set(range(node.attributes["axis"] % len(x.shape)))
    return rows_of([axes[a] for a in order if a in kept], [axes[a] for a in order if a not in kept])


def _grouped(axes: dict[int, Axis], order: Sequence[int], groups: int) -> Rows:
    """The channel axis split into groups and the channels of one."""
    channels = axes[1]
    assert isinstance(channels.size, int)
    inner = channels.size // groups
    outer = Axis(groups, tuple(product((s, inner)) for s in channels.strides))
    within = {**axes, 1: Axis(inner, channels.strides)}
    return rows_of([axes[0], outer], [within[a] for a in order if a != 0])


def _cost(node: Node, target: Architecture) -> float:
    """A row is one processor's: few long ones take as long as one."""
    size, count = bytes_of(node), _rows(node).count
    if not isinstance(size, int) or not isinstance(count, int) or count == 0:
        return target.pace.step
    alone = size / count / _ALONE * (3.0 if node.input(0).layout == LAST else 1.0)
    return target.pace.step + max(size / target.pace.bytes, -(-count // target.processors) * alone)


@kernel("Norm", on="cuda", when=norm_applies, layouts=_layouts, cost=_cost)
def norm(build: CudaBuilder, node: Node) -> None:
    """epilogue((x - mean) / sqrt(variance + epsilon) * scale + bias)"""
    _emit(build, node)


def _narrow_applies(node: Node, target: Any) -> bool:
    return norm_applies(node, target) and can_render(parse(node.attributes["narrow"]), [node.output.dtype])


@kernel("NarrowNorm", on="cuda", when=_narrow_applies, cost=_cost)
def narrow_norm(build: CudaBuilder, node: Node) -> None:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, and that quantized"""
    _emit(build, node)


def _emit(build: CudaBuilder, node: Node) -> None:
    tile = open_tile(build, _rows(node))
    normalised = statistics(tile, node, lambda element: _total(build, node, tile, element))
    with tile.columns():
        _load_x(build, node, tile)
        _write(build, node, tile, normalised)
    tile.launch()


def statistics(tile: Tile, node: Node, total: Callable[[str], str]) -> str:
    """Lines with the rows' mean and spread, and the text of x without them; `total` gives that of a sum over rows."""
    f, n, type = tile.f, tile.f.extent(tile.rows.length), LANGUAGE[accumulator(node.dtype)]
    centred = node.attributes["kind"] != "rms"
    if centred:
        f.emit(f"mean = {total('x')} / {n}")
        f.emit(f"spread = {total('tl.where(inside, (x - mean) * (x - mean), 0.0)')} / {n}")
    else:
        f.emit(f"spread = {total('x * x')} / {n}")
    f.emit(f"factor = 1.0 / libdevice.sqrt(spread + tl.full((), {node.attributes['epsilon']!r}, {type}))")
    return "(x - mean) * factor" if centred else "x * factor"


def _load_x(build: CudaBuilder, node: Node, tile: Tile) -> None:
    """x of the pass; a tile that holds a whole row has it already."""
    if tile.shape.whole and any(line.strip().startswith("x = ") for line in tile.f.lines):
        return
    loaded = tile.load(build.input(0), 0, other="0.0")
    tile.f.emit(f"x = {loaded}.to({LANGUAGE[accumulator(node.dtype)]})")


def _total(build: CudaBuilder, node: Node, tile: Tile, element: str) -> str:
    """Text of the sum of a row's elements."""
    f = tile.f
    if tile.shape.whole:
        with tile.columns():
            _load_x(build, node, tile)
        return f"tl.sum({element}, 1)[:, None]"
    sums = f.name("sums")
    f.emit(f"{sums} = tl.zeros(({tile.shape.rows}, {tile.shape.columns}), {LANGUAGE[accumulator(node.dtype)]})")
    with tile.columns():
        _load_x(build, node, tile)
        f.emit(f"{sums} += {element}")
    return f"tl.sum({sums}, 1)[:, None]"


def _write(build: CudaBuilder, node: Node, tile: Tile, value: str) -> None:
    f, type = tile.f, accumulator(node.dtype)
    for index, sign in ((1, "*"), (2, "+")):
        if node.has_input(index):
            value = f"({value}) {sign} {tile.load(build.input(index), index + 1)}.to({LANGUAGE[type]})"
    result, used = f.let(value), set(operands_of(node.epilogue))
    extras = [tile.load(build.input(k), k + 1) if k - MAIN + 1 in used else ""
              for k in range(MAIN, len(node.inputs))]  # fmt: skip
    made = render(f, node.epilogue, [result, *extras], [type, *(p.dtype for p in extras_of(node))])
    held = node.epilogue.dtype or type
    made = f.let(converted(made, held, node.output.dtype))
    f.emit(f"tl.store({f.pointer(build.output())} + {tile.offset(1)}, {made}, {tile.mask})")
    if "narrow" in node.attributes:
        narrow = render(f, parse(node.attributes["narrow"]), [made], [node.output.dtype])
        f.emit(f"tl.store({f.pointer(build.output(1))} + {tile.offset(1)}, {narrow}, {tile.mask})")
