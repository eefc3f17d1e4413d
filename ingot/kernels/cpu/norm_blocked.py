"""Instance and group norm of blocked maps. A work item is a channel block, whose lanes are alone or in groups of
neighbours, or the several blocks of one group: its elements are contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.kernels import Ports, kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.conv_epilogue import (
    Epilogue,
    block_values,
    can_finish,
    epilogue_of,
    extra_layouts,
    finish,
)
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value, lanes_of
from ingot.kernels.cpu.norm import ELEMENT_CYCLES, GRAIN, in_place
from ingot.kernels.cpu.pointwise_dims import (
    BYTES_PER_MICROSECOND,
    CYCLES_PER_MICROSECOND,
    can_mask,
    cycles,
    traffic,
    typical,
)
from ingot.kernels.cpu.reduce_kinds import together
from ingot.kernels.cpu.render import load
from ingot.kernels.cpu.rows import Fold, continued, each, fold_of, opened
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Norm:
    """`blocks` channel blocks of `pixels` are normalised together, every `segment` lanes of them, over `channels`."""

    blocks: int
    segment: int
    channels: int
    per_image: int
    pixels: Extent
    epsilon: float
    dtype: str
    lanes: int
    source: Handle
    affine: tuple[tuple[Handle, str] | None, ...]
    epilogue: Epilogue


def _group(node: Node) -> int:
    """Channels that are normalised together; 0 where they are not known."""
    channels = node.input(0).shape[1]
    if not isinstance(channels, int):
        return 0
    return 1 if node.attributes["kind"] == "instance" else channels // node.attributes["groups"]


def _applies(node: Node, isa: Isa) -> bool:
    x = node.input(0)
    if node.attributes["kind"] not in ("instance", "group") or len(x.shape) < 3 or x.dtype not in DTYPES:
        return False
    group = _group(node)
    if not group or (group % isa.lanes and isa.lanes % group):
        return False
    return all(map(_affine_fits, (node, node), (isa, isa), (1, 2))) and can_finish(node, 3)


def _affine_fits(node: Node, isa: Isa, index: int) -> bool:
    if not node.has_input(index):
        return True
    port, channels = node.input(index), node.input(0).shape[1]
    assert isinstance(channels, int)
    whole = channels % isa.lanes == 0 or can_mask(isa, [port.dtype])
    return port.dtype in DTYPES and product(port.shape) == channels and whole


def _layouts(node: Node, isa: Isa) -> list[Ports]:
    return [Ports(("blocked", "", "", *extra_layouts(node, 3)), ("blocked",))]


def _cost(node: Node, isa: Isa) -> float:
    batch, channels, *spatial = node.input(0).shape
    items = typical(batch) * -(-typical(channels) // isa.lanes)
    work = items * (typical(product(spatial)) * (ELEMENT_CYCLES + cycles(node.epilogue, isa.lanes, isa)) + 60)
    return 0.2 + max(work / CYCLES_PER_MICROSECOND, traffic(node) / BYTES_PER_MICROSECOND)


def _job(build: KernelBuilder, node: Node) -> Norm:
    x, lanes, group = node.input(0), build.isa.lanes, _group(node)
    channels = x.shape[1]
    assert isinstance(channels, int)
    blocks = max(group // lanes, 1)
    affine = tuple((build.input(i), node.input(i).dtype) if node.has_input(i) else None for i in (1, 2))
    return Norm(blocks, min(group, lanes), group, -(-channels // lanes) // blocks, product(x.shape[2:]),
                node.attributes.get("epsilon", 1e-5), x.dtype, lanes, build.input(0), affine,
                epilogue_of(build, node, 3))  # fmt: skip


@kernel("Norm", on="cpu", when=_applies, cost=_cost, layouts=_layouts, in_place=in_place)
def norm_blocked(build: KernelBuilder, node: Node) -> None:
    """A work item is one or more channel blocks of an image."""
    job = _job(build, node)
    grain = GRAIN // (typical(job.pixels) * job.lanes * job.blocks + 1)
    items = product((node.input(0).shape[0], job.per_image)) if job.pixels != 0 else 0
    build.phase(items, lambda f, begin, end: each(f, begin, end, lambda item: _emit_item(f, job, item)), grain)


def _emit_item(f: PhaseFunction, job: Norm, item: Value) -> None:
    block_size = f.extent(job.pixels) * job.lanes
    first = item * (block_size * job.blocks)
    source = f.at(f.pointer(job.source), first * size_of(job.dtype))
    mean, factor = _statistics(f, job, source, block_size * job.blocks)

    def block(k: Index) -> None:
        number = f.index(f.remainder(item, job.per_image)) * job.blocks + k
        _emit_block(f, job, source, first, f.index(block_size) * k, number, mean, factor)

    if job.blocks == 1:
        block(0)
    else:
        f.loop(0, job.blocks, block)


def _statistics(f: PhaseFunction, job: Norm, source: Value, size: Index) -> tuple[Value, Value]:
    """Mean and 1 / sqrt(variance + epsilon), a lane each."""
    count = f.splat(f.cast("sitofp", f.index(f.extent(job.pixels)) * job.channels, "float"), job.lanes)
    fold = fold_of("add", "float32", job.lanes, True, size)

    def read(i: Index, lanes: int, mask: Value | None) -> Value:
        return load(f, job.dtype, source, i * size_of(job.dtype), lanes, mask)

    def square(i: Index, lanes: int, mask: Value | None) -> Value:
        shifted = read(i, lanes, mask) - mean
        return shifted * shifted

    mean = f.binary("fdiv", _segments(f, job, fold, continued(f, fold, size, opened(f, fold), read)), count)
    spreading = _segments(f, job, fold, continued(f, fold, size, opened(f, fold), square))
    root = f.call("llvm.sqrt", count.type, f.binary("fdiv", spreading, count) + job.epsilon)
    return mean, f.binary("fdiv", 1.0, root)


def _segments(f: PhaseFunction, job: Norm, fold: Fold, partial: tuple[Value, ...]) -> Value:
    """In every lane the sum over its segment."""
    total, distance = together(f, "add", fold.dtype, partial[: fold.parts]), 1
    while distance < job.segment:
        total = total + f.shuffle(total, None, [lane ^ distance for lane in range(lanes_of(total.type))])
        distance *= 2
    return total


def _emit_block(f: PhaseFunction, job: Norm, source: Value, first: Value, start: Index, block: Value, mean: Value,
                factor: Value) -> None:  # fmt: skip
    scale, bias = (_channels(f, job, operand, block) for operand in job.affine)
    factor = factor if scale is None else factor * scale
    values = block_values(f, job.epilogue, block)

    def pixel(place: Value) -> None:
        x = load(f, job.dtype, source, place * size_of(job.dtype), job.lanes)
        y = (x - mean) * factor
        finish(f, job.epilogue, y if bias is None else y + bias, values, first + place)

    f.loop(start, f.index(start) + f.extent(job.pixels) * job.lanes, pixel, step=job.lanes)


def _channels(f: PhaseFunction, job: Norm, operand: tuple[Handle, str] | None, block: Value) -> Value | None:
    """The block's scale or bias."""
    if operand is None:
        return None
    handle, dtype = operand
    channels, place = job.epilogue.channels, block * job.lanes
    mask = None if channels % job.lanes == 0 else f.first_lanes(channels - place, job.lanes)
    return load(f, dtype, f.pointer(handle), place * size_of(dtype), job.lanes, mask)
