"""Reorder: plain ↔ blocked feature maps by square transposes in registers.

A tile is `lanes` channels × `lanes` pixels; pixels that do not fill a tile are copied one by one. Lanes beyond the last
channel receive that channel again: anything is allowed there, and it spares a second body.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.kernels import Ports, kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value, vector
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, ceil_div, product

TILES_PER_ITEM = 8
BYTES_PER_MICROSECOND = 10_000


def transpose(f: PhaseFunction, rows: Sequence[Value]) -> list[Value]:
    """A square matrix in registers, transposed: n rows of n lanes, n a power of two."""
    count = len(rows)
    result, distance = list(rows), count // 2
    while distance:
        low = [count + lane - distance if lane & distance else lane for lane in range(count)]
        high = [count + lane if lane & distance else lane + distance for lane in range(count)]
        for i in (i for i in range(count) if not i & distance):
            a, b = result[i], result[i + distance]
            result[i], result[i + distance] = f.shuffle(a, b, low), f.shuffle(a, b, high)
        distance //= 2
    return result


@dataclass(frozen=True)
class _Maps:
    """Both forms of one channel block of one image: pointers to its first element, and its sizes."""

    plain: Value
    blocked: Value
    pixels: Index
    channels: Index  # of this block that exist
    lanes: int
    bytes: int

    def row(self, f: PhaseFunction, channel: Index) -> Value:
        """The plain row of a channel; that of the last one for channels which do not exist."""
        return f.at(self.plain, f.minimum(channel, self.channels - 1) * self.pixels * self.bytes)

    def pixel(self, f: PhaseFunction, position: Index) -> Value:
        """All channels of a pixel in the blocked form."""
        return f.at(self.blocked, position * (self.lanes * self.bytes))


def _to_blocked_tile(f: PhaseFunction, maps: _Maps, first: Value) -> None:
    type_ = vector(f"i{8 * maps.bytes}", maps.lanes)
    rows = [f.load(type_, maps.row(f, channel), first * maps.bytes) for channel in range(maps.lanes)]
    target = maps.pixel(f, first)
    for lane, pixel in enumerate(transpose(f, rows)):
        f.store(pixel, target, lane * maps.lanes * maps.bytes)


def _to_plain_tile(f: PhaseFunction, maps: _Maps, first: Value) -> None:
    type_ = vector(f"i{8 * maps.bytes}", maps.lanes)
    source = maps.pixel(f, first)
    pixels = [f.load(type_, source, lane * maps.lanes * maps.bytes) for lane in range(maps.lanes)]
    rows = transpose(f, pixels)
    for channel in reversed(range(maps.lanes)):  # those beyond the last channel share its row, and go first
        f.store(rows[channel], maps.row(f, channel), first * maps.bytes)


def _to_blocked_pixel(f: PhaseFunction, maps: _Maps, position: Value) -> None:
    def channel(c: Value) -> None:
        element = f.load(f"i{8 * maps.bytes}", maps.row(f, c), position * maps.bytes)
        f.store(element, maps.pixel(f, position), c * maps.bytes)

    f.loop(0, maps.lanes, channel)


def _to_plain_pixel(f: PhaseFunction, maps: _Maps, position: Value) -> None:
    def channel(c: Value) -> None:
        element = f.load(f"i{8 * maps.bytes}", maps.pixel(f, position), c * maps.bytes)
        f.store(element, maps.row(f, c), position * maps.bytes)

    f.loop(0, maps.channels, channel)


Emit = Callable[[PhaseFunction, _Maps, Value], None]
_BODIES: dict[tuple[str, str], tuple[Emit, Emit]] = {
    ("plain", "blocked"): (_to_blocked_tile, _to_blocked_pixel),
    ("blocked", "plain"): (_to_plain_tile, _to_plain_pixel),
}


def _direction(node: Node) -> tuple[str, str]:
    return node.attributes["layout_from"], node.attributes["layout_to"]


def _applies(node: Node, isa: Isa) -> bool:
    return _direction(node) in _BODIES and isinstance(node.output.shape[1], int) and node.dtype != "string"


def _cost(node: Node, isa: Isa) -> float:
    size = node.output.bytes
    return 1 + 2 * (size if isinstance(size, int) else 1 << 20) / BYTES_PER_MICROSECOND


@kernel("Reorder", on="cpu", when=_applies, cost=_cost,
        layouts=lambda node, isa: (Ports(*((layout,) for layout in _direction(node))),))  # fmt: skip
def reorder(build: KernelBuilder, node: Node) -> None:
    """y = x in the other layout; a work item is a run of tiles of one channel block."""
    channels, pixels = node.output.shape[1], product(node.output.shape[2:])
    assert isinstance(channels, int)
    lanes, blocks = build.isa.lanes, ceil_div(channels, build.isa.lanes)
    items = ceil_div(pixels, lanes * TILES_PER_ITEM)
    source, target = build.input(0), build.output()
    plain, blocked = (source, target) if _direction(node)[0] == "plain" else (target, source)

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        def item(index: Value) -> None:
            place, run = f.divide(index, f.extent(items)), f.remainder(index, f.extent(items))
            maps = _maps(f, plain, blocked, place, channels, pixels, size_of(node.dtype))
            _convert(f, maps, f.index(run) * (lanes * TILES_PER_ITEM), _BODIES[_direction(node)])

        f.loop(begin, end, item)

    build.phase(product((node.output.shape[0], blocks, items)), body)


def _maps(f: PhaseFunction, plain: Handle, blocked: Handle, place: Index, channels: int, pixels: Extent,
          size: int) -> _Maps:  # fmt: skip
    """The forms of channel block `place` (counted over images and blocks)."""
    assert f.builder is not None
    lanes, area = f.builder.isa.lanes, f.extent(pixels)
    blocks = -(-channels // lanes)
    image, block = f.divide(place, blocks), f.remainder(place, blocks)
    first = block * lanes
    exist = lanes if channels % lanes == 0 else f.minimum(channels - first, lanes)
    start = (image * channels + first) * area * size
    return _Maps(f.at(f.pointer(plain), start), f.at(f.pointer(blocked), place * area * (lanes * size)),
                 area, exist, lanes, size)  # fmt: skip


def _convert(f: PhaseFunction, maps: _Maps, first: Value, bodies: tuple[Emit, Emit]) -> None:
    """The pixels from `first` to the end of the run or of the map."""
    last = f.minimum(first + maps.lanes * TILES_PER_ITEM, maps.pixels)
    whole = first + f.index(f.divide(last - first, maps.lanes)) * maps.lanes
    f.loop(first, whole, lambda i: bodies[0](f, maps, i), step=maps.lanes)
    f.loop(whole, last, lambda i: bodies[1](f, maps, i))
