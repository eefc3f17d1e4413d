"""Norm: layer, rms, instance, group. A group of elements with common statistics is contiguous: it is read for the mean,
read for the variance (from the mean, so that nothing cancels), read and written; from memory it comes once.

The group is one or more result rows: layer and rms have one, with scale and bias along it; instance and group have one
per channel, with one scale and one bias each.
"""

from __future__ import annotations

from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.ir.elementwise import FLOATS
from ingot.ir.expression import IDENTITY
from ingot.kernels import kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.cpu.pointwise_dims import (
    BYTES_PER_MICROSECOND,
    CYCLES_PER_MICROSECOND,
    can_mask,
    cycles,
    traffic,
    typical,
    vector_lanes,
)
from ingot.kernels.cpu.render import broadcast, load
from ingot.kernels.cpu.render_convert import convert
from ingot.kernels.cpu.results import Results, can_finish, put, results_of, row_of
from ingot.kernels.cpu.rows import each, fold_of, spread, total_of, visit
from ingot.kernels.node import Node, Port
from ingot.plan.extent import Extent, product

GRAIN = 4096  # elements in a chunk worth taking
ELEMENT_CYCLES = 5  # of a vector, all passes


@dataclass(frozen=True)
class Shape:
    """groups × rows_per_group × length elements; scale and bias run along rows, or there is one per channel."""

    groups: Extent
    rows_per_group: int
    length: Extent
    channels: int | None
    inner_axes: int


@dataclass(frozen=True)
class Affine:
    """Scale or bias."""

    handle: Handle
    dtype: str
    runs: bool


@dataclass(frozen=True)
class Norm:
    """Elements of type `dtype`, computed in `real`."""

    shape: Shape
    centred: bool
    epsilon: float
    dtype: str
    real: str
    lanes: int
    masked: bool
    source: Handle
    scale: Affine | None
    bias: Affine | None
    results: Results


def shape_of(node: Node) -> Shape | None:
    """The node's groups and rows; None where a size that must be known is not."""
    shape, kind = node.input(0).shape, node.attributes["kind"]
    if kind in ("layer", "rms"):
        axis = node.attributes.get("axis", 1) % max(len(shape), 1)
        return Shape(product(shape[:axis]), 1, product(shape[axis:]), None, len(shape) - axis)
    channels = shape[1]
    if not isinstance(channels, int) or not channels:
        return None
    groups = channels if kind == "instance" else node.attributes["groups"]
    return Shape(product((shape[0], groups)), channels // groups, product(shape[2:]), channels, len(shape) - 2)


def _affine_fits(port: Port | None, node: Node, shape: Shape) -> bool:
    if port is None:
        return True
    if port.dtype not in FLOATS:
        return False
    if shape.channels is not None:
        return product(port.shape) == shape.channels
    return _runs(port, node, shape) or all(size == 1 for size in port.shape)


def _runs(port: Port, node: Node, shape: Shape) -> bool:
    """Whether scale or bias has the normalised axes' shape."""
    normalised = node.input(0).shape[len(node.input(0).shape) - shape.inner_axes :]
    aligned = (1,) * (shape.inner_axes - len(port.shape)) + port.shape
    return aligned == normalised


def _real(dtype: str) -> str:
    return dtype if dtype == "float64" else "float32"


def _applies(node: Node, isa: Isa) -> bool:
    shape = shape_of(node)
    if shape is None or node.dtype not in FLOATS:
        return False
    ports = [node.inputs[i] if i < len(node.inputs) else None for i in (1, 2)]
    fits = all(_affine_fits(port, node, shape) for port in ports)
    return fits and can_finish(node, 3, shape.inner_axes, _real(node.dtype))


def _cost(node: Node, isa: Isa) -> float:
    shape, lanes = shape_of(node), vector_lanes(isa, IDENTITY, [node.dtype])
    assert shape is not None
    rows = typical(shape.groups) * shape.rows_per_group
    vectors = -(-typical(shape.length) // lanes)
    work = rows * (vectors * (ELEMENT_CYCLES + cycles(node.epilogue, lanes, isa)) + 20) + 60 * typical(shape.groups)
    return 0.2 + max(work / CYCLES_PER_MICROSECOND, traffic(node) / BYTES_PER_MICROSECOND)


def in_place(node: Node) -> list[int]:
    """x, and extras of its shape: an element is last read just before it is written."""
    output = node.output
    return [
        index
        for index, port in enumerate(node.inputs)
        if port is not None and index not in (1, 2) and port.shape == output.shape
        and size_of(port.dtype) == size_of(output.dtype)
    ]  # fmt: skip


def _job(build: KernelBuilder, node: Node) -> Norm:
    shape, dtype = shape_of(node), node.dtype
    assert shape is not None
    results = results_of(build, node, 3, shape.inner_axes, _real(dtype))
    scale, bias = (_affine(build, node, shape, index) for index in (1, 2))
    running = [a.dtype for a in (scale, bias) if a is not None and a.runs]
    masked = can_mask(build.isa, [dtype, *running, *results.dtypes, results.dtype])
    lanes = vector_lanes(build.isa, node.epilogue, [dtype, *results.dtypes, results.dtype])
    centred, epsilon = node.attributes["kind"] != "rms", node.attributes.get("epsilon", 1e-5)
    return Norm(shape, centred, epsilon, dtype, _real(dtype), min(lanes, build.isa.lanes), masked, build.input(0),
                scale, bias, results)  # fmt: skip


def _affine(build: KernelBuilder, node: Node, shape: Shape, index: int) -> Affine | None:
    if not node.has_input(index):
        return None
    port = node.input(index)
    return Affine(build.input(index), port.dtype, shape.channels is None and _runs(port, node, shape))


@kernel("Norm", on="cpu", when=_applies, cost=_cost, in_place=in_place)
def norm(build: KernelBuilder, node: Node) -> None:
    """A work item is a group of elements with common statistics."""
    job = _job(build, node)
    grain = GRAIN // (typical(job.shape.length) * job.shape.rows_per_group + 1)
    groups = job.shape.groups if node.output.elements != 0 else 0
    build.phase(groups, lambda f, begin, end: each(f, begin, end, lambda group: _emit_group(f, job, group)), grain)


def _emit_group(f: PhaseFunction, job: Norm, group: Value) -> None:
    rows, length = job.shape.rows_per_group, f.extent(job.shape.length)
    size = length * rows
    source = f.at(f.pointer(job.source), group * size * size_of(job.dtype))
    mean, factor = _statistics(f, job, source, size)

    def row(k: Index) -> None:
        index = group * rows + k
        start = f.at(source, k * length * size_of(job.dtype))
        _emit_row(f, job, index, start, length, mean, factor)

    if rows == 1:
        row(0)
    else:
        f.loop(0, rows, row)


def _read(f: PhaseFunction, job: Norm, source: Value, place: Index, lanes: int, mask: Value | None) -> Value:
    return load(f, job.dtype, source, place * size_of(job.dtype), lanes, mask)


def _statistics(f: PhaseFunction, job: Norm, source: Value, size: Index) -> tuple[Value | None, Value]:
    """(mean or None, 1 / sqrt(variance or mean square + epsilon))"""
    fold = fold_of("add", job.real, job.lanes, job.masked, size)
    element = "double" if job.real == "float64" else "float"
    count = f.cast("sitofp", f.index(size), element)
    mean: Value | None = None
    if job.centred:
        total = total_of(f, fold, size, lambda i, lanes, mask: _read(f, job, source, i, lanes, mask))
        mean = f.binary("fdiv", total, count)

    def square(i: Index, lanes: int, mask: Value | None) -> Value:
        x = _read(f, job, source, i, lanes, mask)
        shifted = x if mean is None else x - spread(f, mean, lanes)
        return shifted * shifted

    spreading = f.binary("fdiv", total_of(f, fold, size, square), count)
    root = f.call("llvm.sqrt", element, spreading + job.epsilon)
    return mean, f.binary("fdiv", 1.0, root)


def _emit_row(f: PhaseFunction, job: Norm, index: Value, source: Value, length: Index, mean: Value | None,
              factor: Value) -> None:  # fmt: skip
    widths = (job.lanes,) if job.masked else (job.lanes, 1)
    targets = {lanes: row_of(f, job.results, index, lanes) for lanes in widths}
    affines = (job.scale, job.bias)
    fixed = {lanes: [_channel_value(f, job, affine, index, lanes) for affine in affines] for lanes in widths}

    def element(i: Index, lanes: int, mask: Value | None) -> None:
        x = _read(f, job, source, i, lanes, mask)
        y = (x if mean is None else x - spread(f, mean, lanes)) * spread(f, factor, lanes)
        scale, bias = (
            _running_value(f, job, affine, i, lanes, mask) if affine is not None and value is None else value
            for affine, value in zip(affines, fixed[lanes], strict=True)
        )
        y = y if scale is None else y * scale
        y = y if bias is None else y + bias
        put(f, job.results, targets[lanes], i, y, lanes, mask)

    visit(f, length, job.lanes, job.masked, element)


def _channel_value(f: PhaseFunction, job: Norm, affine: Affine | None, row: Value, lanes: int) -> Value | None:
    """Scale or bias if the whole row shares it."""
    if affine is None or affine.runs:
        return None
    channel = 0 if job.shape.channels is None else f.remainder(row, job.shape.channels)
    value = broadcast(f, affine.dtype, f.pointer(affine.handle), channel * size_of(affine.dtype), lanes)
    return convert(f, value, affine.dtype, job.real)


def _running_value(f: PhaseFunction, job: Norm, affine: Affine, place: Index, lanes: int, mask: Value | None) -> Value:
    value = load(f, affine.dtype, f.pointer(affine.handle), place * size_of(affine.dtype), lanes, mask)
    return convert(f, value, affine.dtype, job.real)
