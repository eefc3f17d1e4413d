"""Conv, fp32 or bytes, blocked, in groups of few channels: every output channel reads input channels of its own vector.

With m channels a group (m divides the lanes; 1 is depthwise) lane l adds, for j < m, w[l, j, k] · x[(l//m)·m + j]: a
shuffle of x. Weights are packed [C/lanes][*K][m][lanes]. A loaded pixel serves all taps along the row that reach it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ingot.kernels import Ports, kernel
from ingot.kernels.cpu.build import KernelBuilder
from ingot.kernels.cpu.conv_epilogue import can_finish, epilogue_of, extra_layouts, residuals
from ingot.kernels.cpu.conv_shape import Direct
from ingot.kernels.cpu.conv_tile import Method, Order, Site, Sums, Taps, emit_phase, walk, zeros
from ingot.kernels.cpu.conv_window import balanced, conv_axes
from ingot.kernels.cpu.gemm_dot import SHORT
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.linear import zero_points
from ingot.kernels.cpu.llvm import Function, Index, Value, vector
from ingot.kernels.node import Node

Array = np.ndarray[Any, Any]
FLOAT = 4  # bytes
ASSUMED = 64  # positions along a symbolic axis, for estimates
CYCLES_PER_MICROSECOND = 2600
Centre = Callable[[Function, Value], Value]
ORDER: Order = ("image", "panel", "row")
WIDEST = {32: (14, 20), 16: (6, 9)}


def lanewise_of(node: Node, isa: Isa, columns: int = 1) -> Direct:
    """The convolution seen as one group for each channel vector."""
    channels, members, *kernel = (int(size) for size in node.input(1).shape)
    axes, lanes = conv_axes(node, kernel), isa.lanes
    tap = members * lanes * FLOAT
    form = (4, "float") if node.dtype == "float32" else (1, "i32")
    return Direct(axes, node.output.shape[0], -(-channels // lanes), lanes, lanes, lanes, lanes, columns, 1, tap, *form)


def pack_lanewise(weight: Array, lanes: int) -> Array:
    """w[C, m, *K] → [C/lanes][*K][m][lanes], zeros beyond C."""
    channels, members, *kernel = weight.shape
    blocks = -(-channels // lanes)
    padded = np.zeros((blocks * lanes, members, math.prod(kernel)), weight.dtype)
    padded[:channels] = weight.reshape(channels, members, -1)
    return np.ascontiguousarray(padded.reshape(blocks, lanes, members, -1).transpose(0, 3, 2, 1))


def _fits(node: Node, isa: Isa, accumulator: str) -> bool:
    x, weight = node.input(0), node.input(1)
    outputs, members = weight.shape[:2]
    fits = outputs == x.shape[1] and isinstance(members, int) and isa.lanes % members == 0
    some = fits and node.attributes["group"] > 1 and weight.constant is not None
    return some and can_finish(node, 2, accumulator)


def _applies(node: Node, isa: Isa) -> bool:
    return node.dtype == node.input(1).dtype == "float32" and _fits(node, isa, "float32")


def _bytes_apply(node: Node, isa: Isa) -> bool:
    return node.dtype in SHORT and node.input(1).dtype in SHORT and _fits(node, isa, "int32")


def _layouts(node: Node, isa: Isa) -> list[Ports]:
    return [Ports(("blocked", "", *extra_layouts(node, 2)), ("blocked",))]


def _column_choices(node: Node, isa: Isa) -> tuple[int, ...]:
    size, members = node.output.shape[-1], int(node.input(1).shape[1])
    widest = WIDEST[isa.registers] if members == 1 else (max(2 * WIDEST[isa.registers][0] // members, 4),)
    return widest if not isinstance(size, int) else tuple(sorted({balanced(size, limit) for limit in widest}))


def _cost(node: Node, isa: Isa, columns: int) -> float:
    shape = lanewise_of(node, isa, columns)
    members = shape.tap // (shape.lanes * FLOAT)
    sizes = [size if isinstance(size, int) else ASSUMED for size in (*node.output.shape[2:], shape.batch)]
    row = shape.row
    loads = (columns - 1) * row.stride + row.kernel if row.stride < row.kernel else columns * row.kernel
    work = columns * row.kernel * members / 2 + loads * members / 2
    tiles = shape.panels * math.prod(sizes) / columns
    return 1 + tiles * (math.prod(shape.kernel[:-1]) * work + 30) / CYCLES_PER_MICROSECOND


@kernel("Conv", on="cpu", when=_applies, layouts=_layouts, cost=_cost, in_place=residuals,
        space={"columns": _column_choices})  # fmt: skip
def conv_lanewise(build: KernelBuilder, node: Node, columns: int) -> None:
    """A work item is a run of tiles of one row of one channel vector."""
    shape = lanewise_of(node, build.isa, columns)
    weight = node.input(1).constant
    assert weight is not None
    x, packed = build.input(0), build.pack(pack_lanewise(weight, build.isa.lanes))
    emit_phase(build, shape, x, packed, epilogue_of(build, node, 2), Method(zeros, _accumulate), ORDER)


def _bytes_cost(node: Node, isa: Isa, columns: int) -> float:
    return 2 * _cost(node, isa, columns)


@kernel("Conv", on="cpu", when=_bytes_apply, layouts=_layouts, cost=_bytes_cost, in_place=residuals,
        space={"columns": _column_choices})  # fmt: skip
def conv_lanewise_bytes(build: KernelBuilder, node: Node, columns: int) -> None:
    """The same for uint8 or int8, widened: exactly, with sums in int32. What is padding adds nothing."""
    shape, (x_zero_point, zero_point) = lanewise_of(node, build.isa, columns), zero_points(node)
    weight = node.input(1).constant
    assert weight is not None
    x = build.input(0)
    packed = build.pack(pack_lanewise(weight.astype(np.int32) - zero_point, build.isa.lanes))
    centre = partial(_centred, signed=node.dtype == "int8", zero_point=x_zero_point)
    method = Method(zeros, partial(_accumulate, centre=centre))
    emit_phase(build, shape, x, packed, epilogue_of(build, node, 2, "int32"), method, ORDER)


def _centred(f: Function, x: Value, signed: bool, zero_point: int) -> Value:
    return f.cast("sext" if signed else "zext", x, "i32") - zero_point


def _as_it_is(f: Function, x: Value) -> Value:
    return x


def _accumulate(site: Site, taps: Taps, sums: Sums, centre: Centre = _as_it_is) -> Sums:
    """sums[column] += Σ over taps of the row; with computed bounds tap by tap, else pixel by pixel."""
    f, shape = site.f, site.shape
    if taps.clip is None:
        return _written_out(site, taps, sums, centre)

    def tap(index: Index, x: Value, weights: Value, *sums: Value) -> Sums:
        return [_add(site, sums[0], _members(site, x, 0, centre), weights, 0)]

    steps = shape.row.dilation * shape.block * shape.element, shape.tap
    return walk(f, taps.clip, tap, (taps.x, taps.weights), steps, sums)


def _written_out(site: Site, taps: Taps, sums: Sums, centre: Centre) -> Sums:
    row, result = site.shape.row, list(sums)
    reached = sorted((column * row.stride + tap * row.dilation, tap, column)
                     for tap, columns in enumerate(taps.tile.taps) for column in columns)  # fmt: skip
    loaded: tuple[int, list[Value]] | None = None
    for pixel, tap, column in reached:
        if loaded is None or loaded[0] != pixel:
            loaded = pixel, _members(site, taps.x, pixel, centre)
        result[column] = _add(site, result[column], loaded[1], taps.weights, tap)
    return result


def _members(site: Site, x: Value, pixel: int, centre: Centre) -> list[Value]:
    """For each member j of a group the pixel's vector with channel (l//m)·m + j in lane l."""
    f, shape = site.f, site.shape
    stored = vector("float" if shape.accumulator == "float" else "i8", shape.lanes)
    whole = centre(f, f.load(stored, x, pixel * shape.block * shape.element))
    members = shape.tap // (shape.lanes * FLOAT)
    if members == 1:
        return [whole]
    return [f.shuffle(whole, None, [lane // members * members + j for lane in range(shape.lanes)])
            for j in range(members)]  # fmt: skip


def _add(site: Site, total: Value, members: list[Value], weights: Value, tap: int) -> Value:
    f, shape = site.f, site.shape
    for j, member in enumerate(members):
        weight = f.load(site.type, weights, tap * shape.tap + j * shape.lanes * FLOAT)
        total = f.fma(member, weight, total) if shape.accumulator == "float" else member * weight + total
    return total
