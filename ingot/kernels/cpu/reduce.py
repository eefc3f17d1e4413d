"""Reduce over any axes. Neighbouring axes of one sort are merged first; then there are either rows (the last axis is
reduced: vectors along it, then across the lanes) or columns (the last axis is kept: one result a lane)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.ir.expression import IDENTITY
from ingot.kernels import kernel
from ingot.kernels.cpu import math
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value, lanes_of
from ingot.kernels.cpu.pointwise import dot, unravel
from ingot.kernels.cpu.pointwise_dims import (
    BYTES_PER_MICROSECOND,
    CYCLES_PER_MICROSECOND,
    can_mask,
    traffic,
    typical,
    vector_lanes,
)
from ingot.kernels.cpu.reduce_kinds import (
    KINDS,
    Combine,
    Kind,
    accumulator,
    finished,
    finite_or_zero,
    main_dtype,
)
from ingot.kernels.cpu.render import MEMORY, load
from ingot.kernels.cpu.render_convert import convert
from ingot.kernels.cpu.results import Results, can_finish, put, results_of, row_of
from ingot.kernels.cpu.rows import Fold, closed, columns_phase, continued, each, fold_of, opened, spread
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

ROW_CYCLES = 40
GRAIN = 16384  # elements read in a chunk worth taking


@dataclass(frozen=True)
class Axes:
    """(extent, stride) of the kept axes before the last run, of the reduced axes; `columns`: the kept last axis."""

    kept: tuple[tuple[Extent, Extent], ...]
    reduced: tuple[tuple[Extent, Extent], ...]
    columns: Extent | None
    column_axes: int

    @property
    def rows(self) -> Extent:
        """How many rows (groups of columns) of results there are."""
        return product(extent for extent, _ in self.kept)

    @property
    def count(self) -> Extent:
        """Elements that become one."""
        return product(extent for extent, _ in self.reduced)


def axes_of(node: Node) -> Axes:
    """The node's axes, merged; an axis of size 1 counts as kept."""
    shape = node.input(0).shape
    stated = set(node.attributes["axes"])
    reduced = [axis in stated and size != 1 for axis, size in enumerate(shape)]
    groups: list[tuple[bool, Extent]] = []
    for flag, size in zip(reduced, shape, strict=True):
        if size == 1:
            continue
        if groups and groups[-1][0] == flag:
            groups[-1] = (flag, product((groups[-1][1], size)))
        else:
            groups.append((flag, size))
    if not groups or groups[-1][0]:
        return Axes(_strided(groups, False), _strided(groups, True), None if groups else 1, 0)
    last = max((axis for axis, flag in enumerate(reduced) if flag), default=-1) + 1
    trailing = [axis for axis in range(last, len(shape)) if node.attributes.get("keepdims", 1) or axis not in stated]
    return Axes(_strided(groups, False)[:-1], _strided(groups, True), groups[-1][1], len(trailing))


def _strided(groups: Sequence[tuple[bool, Extent]], flag: bool) -> tuple[tuple[Extent, Extent], ...]:
    strides = [product(size for _, size in groups[position + 1 :]) for position in range(len(groups))]
    return tuple((size, stride) for (own, size), stride in zip(groups, strides, strict=True) if own == flag)


def nest(f: PhaseFunction, axes: Sequence[tuple[Extent, Extent]], offset: Index, carried: Sequence[Value],
         body: Callable[..., Sequence[Value]]) -> tuple[Value, ...]:  # fmt: skip
    """Loops over all axes: carried = body(offset, *carried)."""
    if not axes:
        return tuple(body(offset, *carried))
    (extent, stride), *rest = axes
    step = f.extent(stride)
    return f.loop(
        0, f.extent(extent), lambda i, *inner: nest(f, rest, i * step + offset, inner, body), carried
    )  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A node as the emitters see it: elements of type `dtype` are combined in type `total`, `lanes` at a time."""

    kind: Kind
    dtype: str
    total: str
    lanes: int
    masked: bool
    axes: Axes
    source: Handle
    results: Results


@dataclass(frozen=True)
class Pass:
    """One pass over elements: what becomes of each (in the given column part), how they combine."""

    job: Job
    combine: Combine
    change: Callable[[PhaseFunction, Value, int], Value]

    def read(self, f: PhaseFunction, offset: Index, lanes: int, mask: Value | None = None, part: int = 0) -> Value:
        """`lanes` elements from `offset` on, changed."""
        job = self.job
        x = load(f, job.dtype, f.pointer(job.source), offset * size_of(job.dtype), lanes, mask)
        return self.change(f, convert(f, x, job.dtype, job.total), part)


def evaluated(f: PhaseFunction, job: Job, run: Callable[[Pass], list[Value]]) -> list[Value]:
    """The finished results of one pass, or of two where the largest elements are found first and subtracted."""
    kind, count = job.kind, f.index(1)
    for extent, _ in job.axes.reduced:
        count = count * f.extent(extent)
    if not kind.shifted:
        totals = run(Pass(job, kind.combine, lambda f, x, part: kind.prepare(f, x, job.total)))
        return [finished(f, kind, job.dtype, total, count, None) for total in totals]
    peaks = [finite_or_zero(f, peak) for peak in run(Pass(job, "max", lambda f, x, part: x))]
    totals = run(Pass(job, kind.combine, lambda f, x, part: math.exp(f, x - spread(f, peaks[part], lanes_of(x.type)))))
    return [finished(f, kind, job.dtype, t, count, peak) for t, peak in zip(totals, peaks, strict=True)]


# rows


def fold_row(f: PhaseFunction, fold: Pass, base: Index) -> Value:
    """All elements of the reduced axes as one scalar; the last axis is contiguous."""
    job = fold.job
    *outer, (length, _) = job.axes.reduced
    size = f.extent(length)
    run = fold_of(fold.combine, job.total, job.lanes, job.masked, size)

    def body(offset: Index, *partial: Value) -> tuple[Value, ...]:
        return continued(f, run, size, partial, lambda i, lanes, mask: fold.read(f, i + offset, lanes, mask))

    return closed(f, run, nest(f, outer, base, opened(f, run), body))


def _emit_row(f: PhaseFunction, job: Job, item: Value) -> None:
    base = offset_of(f, job.axes, item)
    (value,) = evaluated(f, job, lambda fold: [fold_row(f, fold, base)])
    put(f, job.results, row_of(f, job.results, item, 1), 0, value, 1)


def offset_of(f: PhaseFunction, axes: Axes, row: Index) -> Index:
    coordinates = unravel(f, row, [extent for extent, _ in axes.kept])
    return dot(f, coordinates, [f.extent(stride) for _, stride in axes.kept])


# columns


def fold_columns(f: PhaseFunction, fold: Pass, base: Index, lanes: int, parts: int, mask: Value | None) -> list[Value]:
    """`parts` vectors of neighbouring columns, each lane its own result."""
    job = fold.job
    run = Fold(fold.combine, job.total, lanes, job.masked)

    def body(offset: Index, *totals: Value) -> list[Value]:
        return [
            run.add(f, total, fold.read(f, offset + k * lanes, lanes, mask, k)) for k, total in enumerate(totals)
        ]  # fmt: skip

    return list(nest(f, job.axes.reduced, base, [run.nothing(f, lanes)] * parts, body))


def _emit_columns(f: PhaseFunction, job: Job, row: Index, column: Index, lanes: int, parts: int,
                  mask: Value | None) -> None:  # fmt: skip
    base = f.index(offset_of(f, job.axes, row)) + column
    target = row_of(f, job.results, row, lanes)
    values = evaluated(f, job, lambda fold: fold_columns(f, fold, base, lanes, parts, mask))
    for k, value in enumerate(values):
        put(f, job.results, target, column + k * lanes, value, lanes, mask)


# the kernel


def _applies(node: Node, isa: Isa) -> bool:
    dtype, kind = node.input(0).dtype, node.attributes["kind"]
    if kind not in KINDS or dtype not in MEMORY or (dtype == "bool" and kind not in ("max", "min")):
        return False
    return can_finish(node, 1, axes_of(node).column_axes, main_dtype(KINDS[kind], dtype))


def _cost(node: Node, isa: Isa) -> float:
    axes, shifted = axes_of(node), KINDS[node.attributes["kind"]].shifted
    lanes = vector_lanes(isa, IDENTITY, [node.input(0).dtype])
    run = max(typical(axes.columns if axes.columns is not None else axes.reduced[-1][0]), 1)
    vectors = typical(node.input(0).elements) // run * -(-run // lanes)
    work = vectors * (12 if shifted else 1) + ROW_CYCLES * typical(axes.rows)
    return 0.2 + max(work / CYCLES_PER_MICROSECOND, traffic(node) / BYTES_PER_MICROSECOND)


def _job(build: KernelBuilder, node: Node) -> Job:
    axes, dtype, kind = axes_of(node), node.input(0).dtype, KINDS[node.attributes["kind"]]
    total = accumulator(kind, dtype)
    lanes = vector_lanes(build.isa, IDENTITY, [dtype, total])
    results = results_of(build, node, 1, axes.column_axes, main_dtype(kind, dtype))
    masked = can_mask(build.isa, [dtype, *results.dtypes, results.dtype])
    return Job(kind, dtype, total, lanes, masked, axes, build.input(0), results)


@kernel("Reduce", on="cpu", when=_applies, cost=_cost)
def reduce_any(build: KernelBuilder, node: Node) -> None:
    """A work item is a row's result or a block of columns."""
    job = _job(build, node)
    columns, rows = job.axes.columns, job.axes.rows
    grain = GRAIN // (typical(job.axes.count) + 1)
    if columns is None:
        build.phase(rows, lambda f, begin, end: each(f, begin, end, lambda i: _emit_row(f, job, i)), grain)
        return
    columns_phase(build, rows, columns, job.lanes, job.masked, grain,
                  lambda f, row, column, *how: _emit_columns(f, job, row, column, *how))  # fmt: skip
