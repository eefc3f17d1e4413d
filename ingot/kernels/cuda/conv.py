"""Conv with its channels last, as a product: rows are output positions, columns output channels, the depth is taps by
input channels. Nothing is unfolded: each step's addresses are computed (implicit GEMM).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ingot.ir.expression import parse
from ingot.kernels import Ports, kernel
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.axes import LAST, offset, strides_of, unravel
from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder
from ingot.kernels.cuda.gemm import (
    JOINS,
    SPLITS,
    TYPES,
    Load,
    Open,
    Problem,
    Sides,
    Site,
    Tile,
    cost,
    emit_product,
    epilogue_fits,
    extra_bytes,
    splits_for,
    tiles_for,
)
from ingot.kernels.cuda.render import nothing
from ingot.kernels.node import Node, Port
from ingot.plan.extent import product

_FEW_CHANNELS = 8  # a row-major input with so few is read as it is
_MOST_ADDRESSES = 64 * 64  # of a block, before registers spill
_SLOWER_GATHER = 1.6  # of single elements against vectors of channels
_VECTOR, _MOST_FILLED = 8, 1.7  # channels that are loaded at once; steps that are filled up, as against the channels


@dataclass(frozen=True)
class Window:
    """Kernel sizes, strides, dilations and pads (begins, ends) of the spatial axes; channels of one group."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    channels: int
    group: int

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return int(np.prod(self.kernel))

    @property
    def plain(self) -> bool:
        """Whether an output position reads the input position of the same number, and no other."""
        return self.taps == 1 and set(self.strides) == {1} and not any(self.pads)


def window_of(node: Node) -> Window:
    """The node's window."""
    a, weight = node.attributes, node.input(1).shape
    _, channels, *kernel = (int(n) for n in weight)
    return Window(tuple(kernel), tuple(a["strides"]), tuple(a["dilations"]), tuple(a["pads"]), channels, a["group"])


def _blocks(window: Window, step: int) -> int | None:
    """Steps of `step` channels that a tap takes, the last one filled up; None where steps go over several taps."""
    blocks = -(-window.channels // step)
    if window.channels % step == 0:
        return blocks
    slim = window.taps == 1 or blocks * step <= _MOST_FILLED * window.channels
    return blocks if window.channels % _VECTOR == 0 and slim else None


def _width(window: Window, step: int) -> int:
    """The depth of the product: taps by channels, filled up to whole steps."""
    blocks = _blocks(window, step)
    return window.taps * blocks * step if blocks else -(-window.taps * window.channels // step) * step


def _problem(node: Node, step: int = 1) -> Problem:
    y, window = node.output, window_of(node)
    rows, outputs = product((y.shape[0], *y.shape[2:])), int(node.input(1).shape[0])
    return Problem(rows, outputs // window.group, _width(window, step), node.dtype, window.group,
                   extra_bytes(node.inputs[2:]), grouped=window.group > 1)  # fmt: skip


def conv_applies(node: Node, types: tuple[str, ...]) -> bool:
    """What every convolution here needs: constant weights of the type of x, an epilogue that can be written."""
    weight = node.input(1)
    zero_points = node.attributes.get("x_zero_point") or node.attributes.get("weight_zero_point")
    if weight.constant is None or node.dtype not in types or weight.dtype != node.dtype or zero_points:
        return False
    return epilogue_fits(node, 2, "int32" if node.dtype == "int8" else "float32")


def is_depthwise(node: Node) -> bool:
    """Whether every output channel reads one input channel."""
    return int(node.input(1).shape[1]) == 1 and node.attributes["group"] > 1


def conv_layouts(node: Node, few: bool) -> list[Ports]:
    """Channels last; an image with few channels may be row-major."""
    extras = tuple(LAST if p is not None and p.constant is None and p.shape == node.output.shape else ""
                   for p in node.inputs[2:])  # fmt: skip
    channels = node.input(0).shape[1]
    plain = few and isinstance(channels, int) and channels <= _FEW_CHANNELS
    outputs = (LAST,) * len(node.outputs)
    return [Ports((layout, "", *extras), outputs) for layout in ((LAST, "plain") if plain else (LAST,))]


def _price(node: Node, target: Architecture, tile: str, split: int, join: int) -> float:
    parsed, window = Tile.parse(tile), window_of(node)
    slower = 1.0 if _blocks(window, parsed.depth) else _SLOWER_GATHER
    return cost(_problem(node, parsed.depth), parsed, split, target, bool(join)) * slower


def _prune(node: Node, target: Architecture, tile: str, split: int, join: int) -> bool:
    parsed = Tile.parse(tile)
    return join > split - 1 or split not in splits_for(_problem(node, parsed.depth), parsed, target)


def _tiles(node: Node, target: Architecture) -> tuple[str, ...]:
    """Those for the product; where every element has an address of its own, small steps."""
    found, window = tiles_for(_problem(node), target), window_of(node)
    parsed = [Tile.parse(tile) for tile in found]
    return tuple(str(t) for t in parsed if _blocks(window, t.depth) or t.rows * t.depth <= _MOST_ADDRESSES)


@kernel("Conv", on="cuda", when=lambda node, target: conv_applies(node, TYPES) and not is_depthwise(node),
        layouts=lambda node, target: conv_layouts(node, few=True), cost=_price, prune=_prune,
        space={"tile": _tiles, "split": SPLITS, "join": JOINS})  # fmt: skip
def conv(build: CudaBuilder, node: Node, tile: str, split: int, join: int) -> None:
    """epilogue(Σ over taps and channels of x · w); the weights are stored [O, taps, C], zeros up to a whole step"""
    _emit_conv(build, node, tile, split, join)


def _with_epilogue(node: Node) -> Node:
    """A ParallelConv as the Conv that it is before its channels are divided."""
    return replace(node, epilogue=parse(node.attributes["after"]))


@kernel("ParallelConv", on="cuda", when=lambda node, target: conv_applies(_with_epilogue(node), TYPES),
        layouts=lambda node, target: conv_layouts(node, few=False), cost=_price, prune=_prune,
        space={"tile": _tiles, "split": SPLITS, "join": JOINS})  # fmt: skip
def parallel_conv(build: CudaBuilder, node: Node, tile: str, split: int, join: int) -> None:
    """after(Σ over taps and channels of x · w), the channels divided among the outputs"""
    build.node = _with_epilogue(node)
    _emit_conv(build, build.node, tile, split, join, tuple(node.attributes["sizes"]))


def _emit_conv(build: CudaBuilder, node: Node, tile: str, split: int, join: int,
               sizes: tuple[int, ...] = ()) -> None:  # fmt: skip
    shape, window = Tile.parse(tile), window_of(node)
    packed = build.pack(pack_weights(node, shape.depth))
    right, width = _open_weights(build, packed, window, shape), _width(window, shape.depth)
    sides = Sides(_open_input(build, node, window), right, 2, (packed, width), sizes)
    emit_product(build, _problem(node, shape.depth), shape, split, sides, join)


def pack_weights(node: Node, step: int) -> np.ndarray[Any, Any]:
    """w[O, C, *K] as [O, taps · C], each tap or the last step filled up with zeros."""
    weight, window = node.input(1).constant, window_of(node)
    assert weight is not None
    rows = np.moveaxis(weight, 1, -1).reshape(weight.shape[0], window.taps, -1)
    if (blocks := _blocks(window, step)) is not None:
        rows = np.pad(rows, ((0, 0), (0, 0), (0, blocks * step - window.channels)))
    flat = rows.reshape(len(rows), -1)
    return np.ascontiguousarray(np.pad(flat, ((0, 0), (0, -flat.shape[1] % step))))


def _open_weights(build: CudaBuilder, packed: Any, window: Window, tile: Tile) -> Open:
    width = _width(window, tile.depth)

    def open_side(site: Site) -> Load:
        f = site.f
        group = f"batch * {f.extent(site.problem.columns)} + " * site.problem.grouped
        base = f.let(f"{f.pointer(packed)} + ({group}columns_in[None, :]) * {width} + depths[:, None]")
        return lambda f, step: f.let(f"tl.load({base} + {step} * {tile.depth})")

    return open_side


def _open_input(build: CudaBuilder, node: Node, window: Window) -> Open:
    x = node.input(0)

    def open_side(site: Site) -> Load:
        f, strides = site.f, strides_of(x.shape, x.layout)
        image, *places = unravel(f, "rows_in", [node.output.shape[0], *node.output.shape[2:]])
        first = f"{image} * {f.extent(strides[0])}"
        if site.problem.grouped:
            first += f" + batch * {f.extent(product((window.channels, strides[1])))}"
        base = f.let(f"{f.pointer(build.input(0))} + {first}")
        corners = [f.let(f"{p} * {s} - {b}") for p, s, b in zip(places, window.strides, window.pads, strict=False)]
        if _blocks(window, site.tile.depth):
            return _by_blocks(site, x, window, base, corners)
        return _by_elements(site, x, window, base, corners)

    return open_side


def _by_blocks(site: Site, x: Port, window: Window, base: str, corners: list[str]) -> Load:
    """A step is a part of the channels at one tap."""
    tile, strides = site.tile, strides_of(x.shape, x.layout)
    blocks, partial = -(-window.channels // tile.depth), window.channels % tile.depth != 0

    def load(f: FunctionBuilder, step: str) -> str:
        taps = unravel(f, f.let(f"{step} // {blocks}"), window.kernel) if window.taps > 1 else ["0"] * len(corners)
        spots = _spots(f, corners, taps, window)
        inside = _inside(f, spots, x, window)
        channel = f"({step} % {blocks}) * {tile.depth} + depths"
        held = [f"({inside})[:, None]"] * bool(inside) + [f"(({channel}) < {window.channels})[None, :]"] * partial
        place = f"({base} + {offset(f, spots, strides[2:])})[:, None] + ({channel})[None, :] * {f.extent(strides[1])}"
        return f.let(f"tl.load({place}, {' & '.join(held)}, other={nothing(x.dtype)})" if held else f"tl.load({place})")

    return load


def _by_elements(site: Site, x: Port, window: Window, base: str, corners: list[str]) -> Load:
    """A step mixes taps and channels: every element has an address of its own."""
    tile, strides = site.tile, strides_of(x.shape, x.layout)

    def load(f: FunctionBuilder, step: str) -> str:
        deep = f.let(f"{step} * {tile.depth} + depths")
        *taps, channel = unravel(f, deep, [*window.kernel, window.channels])
        across = [f"{corner}[:, None]" for corner in corners]
        spots = _spots(f, across, [f"{tap}[None, :]" for tap in taps], window)
        inside = [_inside(f, spots, x, window), f"({deep} < {window.taps * window.channels})[None, :]"]
        mask = " & ".join(part for part in inside if part)
        place = f"{base}[:, None] + {offset(f, spots, strides[2:])} + {channel}[None, :] * {f.extent(strides[1])}"
        return f.let(f"tl.load({place}, {mask}, other={nothing(x.dtype)})")

    return load


def _spots(f: FunctionBuilder, corners: list[str], taps: list[str], window: Window) -> list[str]:
    """Positions in the input along each spatial axis."""
    return [f.let(f"{corner} + {tap} * {d}") for corner, tap, d in zip(corners, taps, window.dilations, strict=True)]


def _inside(f: FunctionBuilder, spots: list[str], x: Port, window: Window) -> str:
    """Whether they are in the input; nothing where they always are."""
    if not any(window.pads):
        return ""
    return f.let(" & ".join(f"({spot} >= 0) & ({spot} < {f.extent(size)})"
                            for spot, size in zip(spots, x.shape[2:], strict=True)))  # fmt: skip
