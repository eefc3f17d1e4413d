"""Softmax and its logarithm: rows (the last axis: vectors along it) or columns (another axis: one result a lane).

Three passes over a row, which stays in cache: the largest element; the sum of exp(x - largest); the result. Where the
output holds the exponentials exactly, the second pass leaves them there; narrow types compute them again.
"""

from __future__ import annotations

from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.ir.elementwise import FLOATS
from ingot.ir.expression import IDENTITY
from ingot.kernels import kernel
from ingot.kernels.cpu import math
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
from ingot.kernels.cpu.render import load, store
from ingot.kernels.cpu.rows import Fold, columns_phase, each, fold_of, spread, total_of, visit
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

GRAIN = 2048  # elements in a chunk worth taking
ELEMENT_CYCLES = 14  # of a vector, all three passes


@dataclass(frozen=True)
class Softmax:
    """Elements x[outer, length, inner] of type `dtype`, computed in `real`."""

    dtype: str
    real: str
    log: bool
    lanes: int
    masked: bool
    outer: Extent
    length: Extent
    inner: Extent
    source: Handle
    target: Handle

    @property
    def kept(self) -> bool:
        """Whether the exponentials wait in the output."""
        return self.real == self.dtype and not self.log


@dataclass(frozen=True)
class Line:
    """Elements along the axis, `gap` bytes apart from each other: pointers to the first, read and written."""

    source: Value
    target: Value
    gap: Index


def _read(f: PhaseFunction, job: Softmax, line: Line, place: Index, lanes: int, mask: Value | None) -> Value:
    return load(f, job.dtype, line.source, place * line.gap, lanes, mask)


def _exponential(f: PhaseFunction, job: Softmax, line: Line, peak: Value, place: Index, lanes: int,
                 mask: Value | None) -> Value:  # fmt: skip
    """exp(x - peak), left in the output if that is where it waits."""
    power = math.exp(f, _read(f, job, line, place, lanes, mask) - spread(f, peak, lanes))
    if job.kept:
        store(f, job.dtype, power, line.target, place * line.gap, mask)
    return power


def _finish(f: PhaseFunction, job: Softmax, line: Line, peak: Value, total: Value, place: Index, lanes: int,
            mask: Value | None) -> None:  # fmt: skip
    """`total` is the sum's reciprocal, or its logarithm."""
    scale = spread(f, total, lanes)
    if job.kept:
        y = load(f, job.dtype, line.target, place * line.gap, lanes, mask) * scale
    else:
        x = _read(f, job, line, place, lanes, mask) - spread(f, peak, lanes)
        y = x - scale if job.log else math.exp(f, x) * scale
    store(f, job.dtype, y, line.target, place * line.gap, mask)


def _settled(f: PhaseFunction, job: Softmax, total: Value) -> Value:
    return math.log(f, total) if job.log else f.binary("fdiv", 1.0, total)


def _emit_row(f: PhaseFunction, job: Softmax, row: Value) -> None:
    size = f.extent(job.length)
    start = row * size * size_of(job.dtype)
    line = Line(f.at(f.pointer(job.source), start), f.at(f.pointer(job.target), start), size_of(job.dtype))
    largest = fold_of("max", job.real, job.lanes, job.masked, size)
    peak = total_of(f, largest, size, lambda i, lanes, mask: _read(f, job, line, i, lanes, mask))
    sums = Fold("add", job.real, job.lanes, job.masked, 2 if largest.parts > 1 else 1)
    total = total_of(f, sums, size, lambda i, lanes, mask: _exponential(f, job, line, peak, i, lanes, mask))
    settled = _settled(f, job, total)
    visit(f, size, job.lanes, job.masked, lambda i, lanes, mask: _finish(f, job, line, peak, settled, i, lanes, mask))


def _emit_columns(f: PhaseFunction, job: Softmax, row: Index, column: Index, lanes: int, parts: int,
                  mask: Value | None) -> None:  # fmt: skip
    size, gap = f.extent(job.length), f.index(f.extent(job.inner)) * size_of(job.dtype)
    start = (f.index(row) * f.extent(job.length) * f.extent(job.inner) + column) * size_of(job.dtype)
    width = lanes * size_of(job.dtype)
    lines = [Line(f.at(f.pointer(job.source), start + k * width), f.at(f.pointer(job.target), start + k * width), gap)
             for k in range(parts)]  # fmt: skip
    fold = Fold("max", job.real, lanes, True)

    def largest(i: Value, *peaks: Value) -> list[Value]:
        return [fold.add(f, p, _read(f, job, line, i, lanes, mask)) for line, p in zip(lines, peaks, strict=True)]

    peaks = f.loop(0, size, largest, [fold.nothing(f, lanes)] * parts)

    def add(i: Value, *totals: Value) -> list[Value]:
        powers = [_exponential(f, job, line, p, i, lanes, mask) for line, p in zip(lines, peaks, strict=True)]
        return [total + power for total, power in zip(totals, powers, strict=True)]

    totals = f.loop(0, size, add, [f.constant(peaks[0].type, 0)] * parts)
    settled = [_settled(f, job, total) for total in totals]

    def finish(i: Value) -> None:
        for line, peak, total in zip(lines, peaks, settled, strict=True):
            _finish(f, job, line, peak, total, i, lanes, mask)

    f.loop(0, size, finish)


def _applies(node: Node, isa: Isa) -> bool:
    return node.dtype in FLOATS and node.output.dtype == node.dtype


def _job(build: KernelBuilder, node: Node) -> Softmax:
    shape, axis, dtype = node.input(0).shape, node.attributes["axis"], node.dtype
    axis = axis % len(shape)
    real = dtype if dtype in ("float32", "float64") else "float32"
    lanes = vector_lanes(build.isa, IDENTITY, [dtype])
    parts = (product(shape[:axis]), shape[axis], product(shape[axis + 1 :]))
    masked = can_mask(build.isa, [dtype])
    log = bool(node.attributes.get("log", 0))
    return Softmax(dtype, real, log, lanes, masked, *parts, build.input(0), build.output())


def _cost(node: Node, isa: Isa) -> float:
    lanes = vector_lanes(isa, IDENTITY, [node.dtype])
    length = typical(node.input(0).shape[node.attributes["axis"]])
    rows = typical(node.input(0).elements) // max(length, 1)
    work = rows * (-(-length // lanes) * ELEMENT_CYCLES * cycles(IDENTITY, lanes, isa) + 60)
    return 0.2 + max(work / CYCLES_PER_MICROSECOND, traffic(node) / BYTES_PER_MICROSECOND)


@kernel("Softmax", on="cpu", when=_applies, cost=_cost, in_place=lambda node: (0,))
def softmax(build: KernelBuilder, node: Node) -> None:
    """A work item is a row or a vector of columns."""
    job = _job(build, node)
    grain = GRAIN // (typical(job.length) + 1)
    if job.inner == 1:
        rows = job.outer if job.length != 0 else 0
        build.phase(rows, lambda f, begin, end: each(f, begin, end, lambda row: _emit_row(f, job, row)), grain)
        return
    columns_phase(build, job.outer, job.inner, job.lanes, job.masked, grain,
                  lambda f, row, column, *how: _emit_columns(f, job, row, column, *how))  # fmt: skip
