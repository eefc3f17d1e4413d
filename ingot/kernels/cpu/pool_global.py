"""Reduce over all spatial axes of blocked maps: global pooling, to a plain or (with keepdims) blocked result."""

from __future__ import annotations

from collections.abc import Sequence

from ingot.dtypes import size_of
from ingot.kernels import Ports, kernel
from ingot.kernels.cpu.build import KernelBuilder, PhaseFunction
from ingot.kernels.cpu.conv_epilogue import (
    Epilogue,
    block_values,
    can_finish,
    epilogue_of,
    extra_layouts,
    finish,
)
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value, vector
from ingot.kernels.cpu.pool_steps import largest, lowest
from ingot.kernels.cpu.render import load, register_element, render_expression, store
from ingot.kernels.node import Node
from ingot.plan.extent import product

SINGLE = ("float32", "bfloat16")  # float32 in registers
KINDS = {"mean": SINGLE, "sum": (*SINGLE, "int8", "uint8"), "max": (*SINGLE, "int8", "uint8")}
PIXELS = 4  # totals side by side, so that additions overlap
ASSUMED = 1 << 16  # elements of x where symbolic
BYTES_PER_MICROSECOND = 15_000


def _total(node: Node) -> str:
    """dtype of the totals."""
    if node.dtype in SINGLE:
        return "float32"
    return "int32" if node.attributes["kind"] == "sum" else node.dtype


def _applies(node: Node, isa: Isa) -> bool:
    x, attributes = node.input(0), node.attributes
    rank = len(x.shape)
    spatial = rank > 2 and sorted(axis % rank for axis in attributes["axes"]) == list(range(2, rank))
    kinds = x.dtype in KINDS.get(attributes["kind"], ())
    return spatial and kinds and isinstance(x.shape[1], int) and can_finish(node, 1, _total(node))


def _layouts(node: Node, isa: Isa) -> list[Ports]:
    plain = Ports(("blocked",), ("plain",))
    if not node.attributes["keepdims"]:
        return [plain]
    return [plain, Ports(("blocked", *extra_layouts(node, 1)), ("blocked",))]


def _cost(node: Node, isa: Isa) -> float:
    size = node.input(0).bytes
    return 1 + (size if isinstance(size, int) else ASSUMED) / BYTES_PER_MICROSECOND


@kernel("Reduce", on="cpu", when=_applies, cost=_cost, layouts=_layouts)
def reduce_spatial(build: KernelBuilder, node: Node) -> None:
    """A work item is one channel block of one image."""
    x, port, lanes = build.input(0), node.input(0), build.isa.lanes
    channels, pixels = port.shape[1], product(port.shape[2:])
    assert isinstance(channels, int)
    blocks = -(-channels // lanes)
    epilogue = epilogue_of(build, node, 1, _total(node))

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        def item(place: Value) -> None:
            image, block = f.divide(place, blocks), f.remainder(place, blocks)
            area = f.extent(pixels)
            source = f.at(f.pointer(x), place * (area * (lanes * size_of(port.dtype))))
            total = _reduced(f, node, source, area, lanes)
            if node.output.layout == "blocked":
                finish(f, epilogue, total, block_values(f, epilogue, block), place * lanes)
            else:
                _finish_plain(f, epilogue, total, image, block)

        f.loop(begin, end, item)

    build.phase(product((port.shape[0], blocks)), body, grain=4)


def _reduced(f: PhaseFunction, node: Node, source: Value, area: Index, lanes: int) -> Value:
    """The reduction of one channel block's pixels."""
    kind, dtype = node.attributes["kind"], node.dtype
    type_ = vector(register_element(_total(node)), lanes)
    start = f.constant(type_, lowest(dtype) if kind == "max" else 0)

    def take(pixel: Index, total: Value) -> Value:
        x = load(f, dtype, source, pixel * (lanes * size_of(dtype)), lanes)
        if kind == "max":
            return largest(f, dtype, total, x)
        return total + (x if x.type == type_ else f.cast("zext" if dtype == "uint8" else "sext", x, "i32"))

    def several(pixel: Value, *totals: Value) -> Sequence[Value]:
        return [take(pixel + i, total) for i, total in enumerate(totals)]

    whole = f.divide(area, PIXELS) * PIXELS
    totals = list(f.loop(0, whole, several, (start,) * PIXELS, step=PIXELS))
    totals[:1] = f.loop(whole, area, lambda pixel, total: [take(pixel, total)], totals[:1])
    while len(totals) > 1:
        half = len(totals) // 2
        pairs = zip(totals[:half], totals[half:], strict=True)
        totals = [largest(f, dtype, a, b) if kind == "max" else a + b for a, b in pairs]
    if kind != "mean":
        return totals[0]
    count = float(area) if isinstance(area, int) else f.splat(f.cast("sitofp", area, "float"), lanes)
    return f.binary("fdiv", totals[0], count)


def _finish_plain(f: PhaseFunction, epilogue: Epilogue, total: Value, image: Index, block: Index) -> None:
    """The epilogue of one channel vector, stored to y[image, block · lanes …] without the lanes beyond the channels."""
    lanes, channels = epilogue.lanes, epilogue.channels
    mask = None if channels % lanes == 0 else f.first_lanes(channels - block * lanes, lanes)
    element = image * channels + block * lanes
    operands = [total]
    for extra, value in zip(epilogue.extras, block_values(f, epilogue, block), strict=True):
        place = element * size_of(extra.dtype)
        operands.append(value or load(f, extra.dtype, f.pointer(extra.handle), place, lanes, mask))
    result = render_expression(f, epilogue.expression, operands, epilogue.dtypes, lanes)
    store(f, epilogue.dtype, result, f.pointer(epilogue.output), element * epilogue.size, mask)


