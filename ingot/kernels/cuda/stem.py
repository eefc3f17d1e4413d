"""Conv of an image with few channels: its border is written out and its channels are filled up to four, so that a row
of the kernel is one piece of memory; then it is a product whose steps are whole rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.dtypes import size_of
from ingot.kernels import Ports, kernel
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.axes import offset, strides_of, unravel
from ingot.kernels.cuda.build import CudaBuilder, Handle
from ingot.kernels.cuda.conv import Window, conv_applies, conv_layouts, window_of
from ingot.kernels.cuda.gemm import Load, Open, Problem, Sides, Site, Tile, cost, emit_product, extra_bytes, tiles_for
from ingot.kernels.cuda.render import FLOAT8, NARROW, nothing
from ingot.kernels.cuda.rows import power_of_two
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, add, ceil_div, product

_TYPES = (*NARROW, "int8", FLOAT8)
_CHANNELS = 4
_PIXELS = 256  # a block of the copy
_ALIGNED = 8  # pixels: rows begin at multiples of 16 bytes
_LEAST, _MOST = 32, 64  # bytes, elements of a row of the kernel
# Besides those of all products: one row of the kernel a step, so that none is added to fill the last step up, and
# loads that pass through the first level of cache, where pieces that overlap are read once. What the second level
# gives, 5 TB/s of 16-byte pieces of which neighbours share three quarters, is what large batches wait for.
_OWN = ("128x64x32w4s4", "128x64x32w4s3", "128x64x32w8s4", "256x64x32w8s4", "256x64x32w8s3", "64x64x32w4s4",
        "128x64x64w4s1", "64x64x64w4s1", "64x64x128w4s1", "128x64x32w4s1")  # fmt: skip


def _applies(node: Node, target: Any) -> bool:
    if not conv_applies(node, _TYPES) or len(node.input(0).shape) != 4:
        return False
    window = window_of(node)
    few = window.channels <= _CHANNELS and window.group == 1 and set(window.dilations) == {1}
    return few and window.taps > 1 and _width(node) <= _MOST


def _layouts(node: Node, target: Any) -> list[Ports]:
    return conv_layouts(node, few=True)


def _width(node: Node) -> int:
    """Elements of a row of the kernel, filled up to what a product takes at once."""
    return max(power_of_two(int(node.input(1).shape[3]) * _CHANNELS), _LEAST // size_of(node.dtype))


def _rows_a_step(node: Node, tile: Tile) -> int:
    return tile.depth // _width(node)


def _height(node: Node, tile: Tile) -> int:
    """Rows of the kernel, filled up to whole steps."""
    rows = _rows_a_step(node, tile)
    return -(-int(node.input(1).shape[2]) // rows) * rows


def _problem(node: Node, tile: Tile) -> Problem:
    y = node.output
    depth = _height(node, tile) * _width(node)
    return Problem(product((y.shape[0], *y.shape[2:])), y.shape[1], depth, node.dtype, 1, extra_bytes(node.inputs[2:]))


def _tiles(node: Node, target: Architecture) -> tuple[str, ...]:
    y = node.output
    problem = Problem(product((y.shape[0], *y.shape[2:])), y.shape[1], None, node.dtype)
    return tuple(t for t in tiles_for(problem, target, _OWN) if Tile.parse(t).depth % _width(node) == 0)


def _price(node: Node, target: Architecture, tile: str) -> float:
    parsed = Tile.parse(tile)
    written = product((_CHANNELS * size_of(node.dtype), *node.input(0).shape))
    copied = written / (target.bandwidth * 600) if isinstance(written, int) else 0.0
    return cost(_problem(node, parsed), parsed, 1, target) + target.pace.step + copied


@kernel("Conv", on="cuda", when=_applies, layouts=_layouts, cost=_price, space={"tile": _tiles})
def stem(build: CudaBuilder, node: Node, tile: str) -> None:
    """epilogue(Σ over rows of the kernel of x's piece · w's row), after a copy of x with its border"""
    shape, window, y = Tile.parse(tile), window_of(node), node.output
    high = add(product((y.shape[2], window.strides[0])), _height(node, shape))
    wide = add(product((y.shape[3], window.strides[1])), _width(node) // _CHANNELS)
    wide = product((ceil_div(wide, _ALIGNED), _ALIGNED))
    image = build.temporary(product((y.shape[0], high, wide, _CHANNELS, size_of(node.dtype))), node.dtype)
    _copy(build, node, window, image, (high, wide))
    packed = build.pack(_packed(node, shape))
    left, right = _left(node, window, image, (high, wide)), _right(packed)
    emit_product(build, _problem(node, shape), shape, 1, Sides(left, right, 2))


def _copy(build: CudaBuilder, node: Node, window: Window, image: Handle, size: tuple[Extent, Extent]) -> None:
    """image[n, h, w, c] = x[n, c, h - top, w - left], zeros around it"""
    f, x = build.function(warps=4), node.input(0)
    pixels = product((x.shape[0], *size))
    f.emit(f"pixel = tl.program_id(0) * {_PIXELS} + tl.arange(0, {_PIXELS})\nchannel = tl.arange(0, {_CHANNELS})")
    picture, *spots = unravel(f, "pixel", [x.shape[0], *size])
    down, across = (f.let(f"{spot} - {pad}") for spot, pad in zip(spots, window.pads, strict=False))
    f.emit(f"held = ({down} >= 0) & ({down} < {f.extent(x.shape[2])}) & ({across} >= 0) & "
           f"({across} < {f.extent(x.shape[3])}) & (pixel < {f.extent(pixels)})")  # fmt: skip
    places = [f"{picture}[:, None]", "channel[None, :]", f"{down}[:, None]", f"{across}[:, None]"]
    source = offset(f, places, strides_of(x.shape, x.layout))
    f.emit(f"value = tl.load({f.pointer(build.input(0))} + {source}, held[:, None] & "
           f"(channel < {window.channels})[None, :], other={nothing(x.dtype)})")  # fmt: skip
    f.emit(f"tl.store({f.pointer(image)} + pixel[:, None] * {_CHANNELS} + channel[None, :], value, "
           f"(pixel < {f.extent(pixels)})[:, None])")  # fmt: skip
    f.launch(ceil_div(pixels, _PIXELS))


def _packed(node: Node, tile: Tile) -> np.ndarray[Any, Any]:
    """w[O, C, KH, KW] as [O, rows, taps, channels], all filled up with zeros."""
    weight = node.input(1).constant
    assert weight is not None
    moved = weight.transpose(0, 2, 3, 1)
    _, rows, taps, channels = moved.shape
    missing = (_height(node, tile) - rows, _width(node) // _CHANNELS - taps, _CHANNELS - channels)
    filled = np.pad(moved, ((0, 0), *((0, size) for size in missing)))
    return np.ascontiguousarray(filled.reshape(len(filled), -1))


def _left(node: Node, window: Window, image: Handle, size: tuple[Extent, Extent]) -> Open:
    high, wide = size
    width = _width(node)
    line = product((wide, _CHANNELS))

    def open_side(site: Site) -> Load:
        f = site.f
        picture, down, across = unravel(f, "rows_in", [node.output.shape[0], *node.output.shape[2:]])
        first = f.let(f"({picture} * {f.extent(high)} + {down} * {window.strides[0]}) * {f.extent(line)} + "
                      f"{across} * {window.strides[1] * _CHANNELS}")  # fmt: skip
        inner = f.let(f"(depths // {width}) * {f.extent(line)} + depths % {width}")
        base = f.let(f"{f.pointer(image)} + {first}[:, None] + {inner}[None, :]")
        step_size = f.extent(product((_rows_a_step(node, site.tile), line)))
        return lambda f, step: f.let(f"tl.load({base} + {step} * {step_size})")

    return open_side


def _right(packed: Handle) -> Open:
    def open_side(site: Site) -> Load:
        f, depth = site.f, site.problem.depth
        base = f.let(f"{f.pointer(packed)} + columns_in[None, :] * {depth} + depths[:, None]")
        return lambda f, step: f.let(f"tl.load({base} + {step} * {site.tile.depth})")

    return open_side
