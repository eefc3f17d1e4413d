"""Pointwise over feature maps in the blocked layout: [N, C/b, *S, b], one vector of b channels after the other.

Operands of the output's shape are blocked too. Others: scalars; one number per channel ([C,1,1], plain); one per image
and channel ([N,C,1,1], blocked); one per pixel ([N,1,*S] or [1,1,*S], plain).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ingot.dtypes import size_of
from ingot.kernels import Ports, kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.cpu.pointwise import GRAIN_CYCLES, in_place, nothing
from ingot.kernels.cpu.pointwise_dims import (
    BYTES_PER_MICROSECOND,
    CYCLES_PER_MICROSECOND,
    cycles,
    ports_of,
    traffic,
    typical,
)
from ingot.kernels.cpu.render import broadcast, can_render, load, render_expression, store
from ingot.kernels.layout import to_blocked
from ingot.kernels.node import Node, Port
from ingot.plan.extent import Extent, ceil_div, product

Kind = Literal["full", "scalar", "channel", "image_channel", "pixel", "image_pixel"]


def kind_of(port: Port, output: Port) -> Kind | None:
    """How an operand broadcasts over the output; None for a way this kernel does not know."""
    rank = len(output.shape)
    shape = (1,) * (rank - len(port.shape)) + port.shape
    batch, channels, *spatial = output.shape
    ones = (1,) * len(spatial)
    table: dict[tuple[Extent, ...], Kind] = {
        (1, 1, *spatial): "pixel",
        (batch, 1, *spatial): "image_pixel",
        (batch, channels, *ones): "image_channel",
        (1, channels, *ones): "channel",
        (1, 1, *ones): "scalar",
    }
    kind = "full" if shape == output.shape and (len(port.shape) == rank or shape not in table) else table.get(shape)
    stored_plain = len(port.shape) < rank and port.constant is None
    return None if stored_plain and _is_blocked(kind) else kind


@dataclass(frozen=True)
class Operand:
    """One operand: how it broadcasts, where it is, its type."""

    kind: Kind
    handle: Handle
    dtype: str


@dataclass(frozen=True)
class Row:
    """One channel block of one image: its number, the image, the block, the channels in it that exist."""

    index: Value
    image: Index
    block: Index
    channels: Index
    lanes: int
    pixels: Index


def _applies(node: Node, isa: Isa) -> bool:
    ports, output = ports_of(node), node.output
    if len(output.shape) < 3 or not isinstance(output.shape[1], int) or not 0 < len(ports) == len(node.inputs):
        return False
    kinds = [kind_of(port, output) for port in ports]
    dtypes = [port.dtype for port in ports]
    return None not in kinds and "full" in kinds and can_render(node.epilogue, [*dtypes, output.dtype])


def _layouts(node: Node, isa: Isa) -> Sequence[Ports]:
    varying = (port.constant is None and _is_blocked(kind_of(port, node.output)) for port in ports_of(node))
    return (Ports(tuple("blocked" if blocked else "" for blocked in varying), ("blocked",)),)


def _is_blocked(kind: Kind | None) -> bool:
    return kind in ("full", "image_channel")


def _operand(build: KernelBuilder, node: Node, index: int) -> Operand:
    port = node.input(index)
    kind = kind_of(port, node.output)
    assert kind is not None
    if port.constant is None or not _is_blocked(kind):
        return Operand(kind, build.input(index), port.dtype)
    aligned = port.constant.reshape((1,) * (len(node.output.shape) - port.constant.ndim) + port.constant.shape)
    return Operand(kind, build.pack(to_blocked(aligned, build.isa.lanes)), port.dtype)


def _cost(node: Node, isa: Isa) -> float:
    batch, channels, *spatial = node.output.shape
    vectors = typical(product((batch, ceil_div(channels, isa.lanes), *spatial)))
    work = vectors * cycles(node.epilogue, isa.lanes, isa) / CYCLES_PER_MICROSECOND
    return 0.2 + max(work, traffic(node) / BYTES_PER_MICROSECOND)


@kernel("Pointwise", on="cpu", when=_applies, layouts=_layouts, in_place=in_place, cost=_cost)
def pointwise_blocked(build: KernelBuilder, node: Node) -> None:
    """Rows of the pixels of one channel block; a work item is a vector."""
    lanes, (batch, channels, *spatial) = build.isa.lanes, node.output.shape
    assert isinstance(channels, int)
    blocks, pixels = -(-channels // lanes), product(spatial)
    operands = [_operand(build, node, index) for index in range(len(node.inputs))]
    result = build.output()

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        size = f.extent(pixels)
        size = size if isinstance(size, int) else f.maximum(size, 1)

        def row(index: Value) -> None:
            image, block = f.divide(index, blocks), f.remainder(index, blocks)
            here = Row(index, image, block, channels - f.index(block) * lanes, lanes, size)
            fixed = [_row_value(f, operand, here, channels) for operand in operands]
            start = index * size
            first, last = f.maximum(begin - start, 0), f.minimum(end - start, size)
            f.loop(first, last, lambda pixel: _pixel(f, node, operands, fixed, result, here, pixel))

        f.loop(f.divide(begin, size), f.divide(end + (size - 1), size), row)

    count = product((batch, blocks, pixels))
    grain = max(int(GRAIN_CYCLES / (cycles(node.epilogue, lanes, build.isa) + 2)), 16)
    build.phase(count, body if count != 0 else nothing, grain)


def _row_value(f: PhaseFunction, operand: Operand, row: Row, channels: int) -> Value | None:
    """The operand's vector if all pixels of the row share it."""
    pointer, size = f.pointer(operand.handle), size_of(operand.dtype)
    if operand.kind == "scalar":
        return broadcast(f, operand.dtype, pointer, 0, row.lanes)
    if operand.kind == "image_channel":
        return load(f, operand.dtype, pointer, row.index * (row.lanes * size), row.lanes)
    if operand.kind == "channel":
        mask = None if channels % row.lanes == 0 else f.first_lanes(row.channels, row.lanes)
        return load(f, operand.dtype, pointer, row.block * (row.lanes * size), row.lanes, mask)
    return None


def _pixel(f: PhaseFunction, node: Node, operands: Sequence[Operand], fixed: Sequence[Value | None], result: Handle,
           row: Row, pixel: Value) -> None:  # fmt: skip
    place = (row.index * row.pixels + pixel) * row.lanes
    values = []
    for operand, value in zip(operands, fixed, strict=True):
        size, pointer = size_of(operand.dtype), f.pointer(operand.handle)
        if operand.kind == "full":
            value = load(f, operand.dtype, pointer, place * size, row.lanes)
        elif value is None:
            first = row.image * row.pixels if operand.kind == "image_pixel" else 0
            value = broadcast(f, operand.dtype, pointer, (first + pixel) * size, row.lanes)
        values.append(value)
    y = render_expression(f, node.epilogue, values, [operand.dtype for operand in operands], row.lanes)
    store(f, node.output.dtype, y, f.pointer(result), place * size_of(node.output.dtype))
