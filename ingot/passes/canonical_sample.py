"""GridSample: positions and weights are pointwise, the samples are rows of channels picked by GatherND."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product as combinations
from math import prod

import onnx_ir as ir

from ingot.ir.graph import dtype_of, shape
from ingot.passes.canonical_table import Builder, Result, canonical, known, reject
from ingot.plan.extent import product

_MODES = {"bilinear": "linear", "bicubic": "cubic"}  # names before opset 20
_CUBIC = -0.75
_FLOATS = ("float32", "float64")


@dataclass(frozen=True)
class _Axis:
    """A spatial axis: its size, how positions outside count, and the positions' type."""

    size: int
    padding: str
    corners: bool
    dtype: str

    @property
    def low(self) -> float:
        """The first position within; positions are reflected about it."""
        return 0.0 if self.corners else -0.5

    @property
    def high(self) -> float:
        """The last position within."""
        return self.size - 1 if self.corners else self.size - 0.5


@dataclass(frozen=True)
class _Tap:
    """A sample along one axis: which element, and its share (None: all of it)."""

    index: ir.Value
    weight: ir.Value | None


@canonical("GridSample")
def grid_sample(op: Builder) -> Result:
    """Σ over neighbours: weight · GatherND(pixels, place of the neighbour)"""
    x, grid = op.x(), op.x(1)
    sizes, mode = known(shape(x)[2:]), op.attribute("mode", "linear")
    if sizes is None or 0 in sizes:
        return reject("the size of its image is symbolic or zero", "build for static image sizes")
    if dtype_of(x) not in _FLOATS or dtype_of(grid) not in _FLOATS:
        return reject(f"it samples {dtype_of(x)} at {dtype_of(grid)}", "use float32 for image and grid")
    batch, *outer, rank = shape(grid)
    count, channels = product(outer), shape(x)[1]
    places = op.view(grid, [batch, count, rank])
    taps = [_taps(op, places, len(sizes) - 1 - place, size, _MODES.get(mode, mode)) for place, size in enumerate(sizes)]
    pixels = op.transpose(op.view(x, [batch, channels, prod(sizes)]), [0, 2, 1])
    total: ir.Value | None = None
    for neighbour in combinations(*taps):
        total = _added(op, total, op.GatherND(pixels, _flat(op, neighbour, sizes), batch_dims=1), neighbour)
    assert total is not None
    return op.view(op.transpose(total, [0, 2, 1]), [batch, channels, *outer])


def _added(op: Builder, total: ir.Value | None, pixels: ir.Value, neighbour: Sequence[_Tap]) -> ir.Value:
    """total + pixels · the neighbour's share."""
    t = dtype_of(pixels)
    shares = [op.cast(tap.weight, t) for tap in neighbour if tap.weight is not None]
    text = "; ".join(f"Mul {'%0' if k == 0 else f'${k - 1}'} %{k + 1} -> {t}" for k in range(len(shares)))
    one = op.pointwise(text, pixels, *shares) if shares else pixels
    return one if total is None else op.pointwise(f"Add %0 %1 -> {t}", total, one)


def _flat(op: Builder, neighbour: Sequence[_Tap], sizes: Sequence[int]) -> ir.Value:
    """Row-major place of the neighbour: [N, positions, 1]."""
    place = neighbour[0].index
    for tap, size in zip(neighbour[1:], sizes[1:], strict=True):
        place = op.pointwise(f"Mul %0 {size} -> int64; Add $0 %1 -> int64", place, tap.index)
    return place


def _taps(op: Builder, places: ir.Value, column: int, size: int, mode: str) -> list[_Tap]:
    """The neighbours along one axis, of which `column` of the grid gives the position in -1..1."""
    padding, corners = op.attribute("padding_mode", "zeros"), bool(op.attribute("align_corners", 0))
    axis = _Axis(size, padding, corners, dtype_of(places))
    batch, count, _ = shape(places)
    one = op.Slice(places, starts=[0, 0, column], steps=[1, 1, 1], sizes=[batch, count, 1])
    return _MODE_TAPS[mode](op, axis, _position(op, axis, one, rounded=mode == "nearest"))


def _position(op: Builder, axis: _Axis, x: ir.Value, rounded: bool) -> ir.Value:
    """-1..1 → elements from the first, moved inside as the padding says."""
    t = axis.dtype
    scale, shift = (axis.size - 1, axis.size - 1) if axis.corners else (axis.size, axis.size - 1)
    position = op.pointwise(f"Mul %0 {scale} -> {t}; Add $0 {shift} -> {t}; Mul $1 0.5 -> {t}", x)
    if rounded:
        position = op.pointwise(f"Round %0 -> {t}", position)
    return _inside(op, axis, position)


def _inside(op: Builder, axis: _Axis, x: ir.Value) -> ir.Value:
    """Positions outside clipped or reflected; with zeros around they stay."""
    t = axis.dtype
    if axis.padding == "border":
        outside = f"Less %0 {axis.low} -> bool; Greater %0 {axis.high} -> bool; Or $0 $1 -> bool"
        return op.pointwise(f"{outside}; Clip %0 0.0 {float(axis.size - 1)} -> {t}; Where $2 $3 %0 -> {t}", x)
    if axis.padding == "reflection" and axis.high > axis.low:
        # the distance walked from the first edge, folded: an odd number of spans counts from the last edge
        span = axis.high - axis.low
        text = (f"Sub %0 {axis.low} -> {t}; Abs $0 -> {t}; Div $1 {span} -> {t}; Floor $2 -> {t}; "
                f"Mul $3 {span} -> {t}; Sub $1 $4 -> {t}; Mul $3 0.5 -> {t}; Floor $6 -> {t}; Mul $7 2.0 -> {t}; "
                f"Equal $8 $3 -> bool; Add $5 {axis.low} -> {t}; Sub {axis.high} $5 -> {t}; "
                f"Where $9 $10 $11 -> {t}")  # fmt: skip
        return op.pointwise(text, x)
    return x


def _element(op: Builder, axis: _Axis, x: ir.Value, weight: ir.Value | None) -> _Tap:
    """The element at a whole position: outside of the image it counts as zero, or is the one that stands for it."""
    t, last = axis.dtype, float(axis.size - 1)
    if axis.padding == "zeros":
        text = f"GreaterOrEqual %0 0.0 -> bool; LessOrEqual %0 {last} -> bool; And $0 $1 -> bool"
        weight = (op.pointwise(f"{text}; Cast $2 -> {t}", x) if weight is None
                  else op.pointwise(f"{text}; Where $2 %1 0.0 -> {t}", x, weight))  # fmt: skip
    index = op.pointwise(f"Clip %0 0.0 {last} -> {t}; Cast $0 -> int64", _inside(op, axis, x))
    return _Tap(index, weight)


def _nearest(op: Builder, axis: _Axis, position: ir.Value) -> list[_Tap]:
    whole = op.pointwise(f"Round %0 -> {axis.dtype}", position)
    return [_element(op, axis, whole, None)]


def _linear(op: Builder, axis: _Axis, position: ir.Value) -> list[_Tap]:
    t = axis.dtype
    first = op.pointwise(f"Floor %0 -> {t}", position)
    after = op.pointwise(f"Sub %0 %1 -> {t}", position, first)
    before = op.pointwise(f"Sub 1.0 %0 -> {t}", after)
    second = op.pointwise(f"Add %0 1.0 -> {t}", first)
    return [_element(op, axis, first, before), _element(op, axis, second, after)]


def _cubic(op: Builder, axis: _Axis, position: ir.Value) -> list[_Tap]:
    """Keys' cubic convolution. Source: ONNX operator specification, GridSample-22."""
    t = axis.dtype
    first = op.pointwise(f"Floor %0 -> {t}", position)
    after = op.pointwise(f"Sub %0 %1 -> {t}", position, first)
    taps = []
    for offset in (-1, 0, 1, 2):
        whole = op.pointwise(f"Add %0 {float(offset)} -> {t}", first)
        distance = op.pointwise(f"Sub %0 {float(offset)} -> {t}; Abs $0 -> {t}", after)
        taps.append(_element(op, axis, whole, _share(op, distance, near=offset in (0, 1), t=t)))
    return taps


def _share(op: Builder, distance: ir.Value, near: bool, t: str) -> ir.Value:
    """The cubic's value at a distance within 1, or between 1 and 2, by Horner's rule."""
    a = _CUBIC
    cube, square, line, constant = (a + 2, -(a + 3), 0.0, 1.0) if near else (a, -5 * a, 8 * a, -4 * a)
    return op.pointwise(f"Mul %0 {cube} -> {t}; Add $0 {square} -> {t}; Mul $1 %0 -> {t}; Add $2 {line} -> {t}; "
                        f"Mul $3 %0 -> {t}; Add $4 {constant} -> {t}", distance)  # fmt: skip


_MODE_TAPS: dict[str, Callable[[Builder, _Axis, ir.Value], list[_Tap]]] = {
    "nearest": _nearest,
    "linear": _linear,
    "cubic": _cubic,
}
