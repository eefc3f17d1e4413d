"""CumSum, a running sum or product, along rows (the last axis) or columns (another axis: one running sum a lane).

Along a row, a vector's own running sums take log2(lanes) shifted additions; only adding the sum of all vectors
before it waits for those.
"""

from __future__ import annotations

from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.ir.elementwise import NARROW_FLOATS
from ingot.ir.expression import IDENTITY
from ingot.kernels import kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value, lanes_of, vector
from ingot.kernels.cpu.pointwise_dims import (
    BYTES_PER_MICROSECOND,
    CYCLES_PER_MICROSECOND,
    can_mask,
    traffic,
    typical,
    vector_lanes,
)
from ingot.kernels.cpu.reduce_kinds import Combine, combined, identity
from ingot.kernels.cpu.render import MEMORY, load, register_element, store
from ingot.kernels.cpu.rows import columns_phase, each
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

GRAIN = 4096  # elements in a chunk worth taking
VECTOR_CYCLES = 8


@dataclass(frozen=True)
class Sums:
    """Elements x[outer, length, inner] of type `dtype`, combined in `real`, `lanes` at a time."""

    combine: Combine
    dtype: str
    real: str
    exclusive: bool
    reverse: bool
    lanes: int
    masked: bool
    outer: Extent
    length: Extent
    inner: Extent
    source: Handle
    target: Handle

    def nothing(self, f: PhaseFunction, lanes: int) -> Value:
        """What the sum begins with."""
        return f.constant(vector(register_element(self.real), lanes), identity(self.combine, self.real))

    def add(self, f: PhaseFunction, before: Value, x: Value) -> Value:
        """The sum with one element (or another sum) more."""
        return combined(f, self.combine, self.real, before, x)


def _read(f: PhaseFunction, job: Sums, place: Index, lanes: int, mask: Value | None) -> Value:
    x = load(f, job.dtype, f.pointer(job.source), place, lanes, mask)
    return x if mask is None else f.select(mask, x, job.nothing(f, lanes))


def _moved(f: PhaseFunction, job: Sums, x: Value, count: int) -> Value:
    """Lanes moved by `count` in the direction of the sum."""
    lanes = lanes_of(x.type)
    if job.reverse:
        return f.shuffle(x, job.nothing(f, lanes), range(count, lanes + count))
    return f.shuffle(job.nothing(f, lanes), x, range(lanes - count, 2 * lanes - count))


def _within(f: PhaseFunction, job: Sums, x: Value) -> Value:
    """Running sums of the vector's own lanes."""
    count = 1
    while count < lanes_of(x.type):
        x = job.add(f, x, _moved(f, job, x, count))
        count *= 2
    return x


def _step(f: PhaseFunction, job: Sums, base: Index, lanes: int, mask: Value | None, before: Value) -> Value:
    """The results of the neighbours from element `base` on, given the sum before them; the sum after them."""
    place = base * size_of(job.dtype)
    sums = _within(f, job, _read(f, job, place, lanes, mask))
    total = f.extract(sums, 0 if job.reverse else lanes - 1) if lanes > 1 else sums
    if job.exclusive:
        sums = _moved(f, job, sums, 1) if lanes > 1 else job.nothing(f, 1)
    store(f, job.dtype, job.add(f, f.splat(before, lanes), sums), f.pointer(job.target), place, mask)
    return job.add(f, before, total)


def _emit_row(f: PhaseFunction, job: Sums, row: Value) -> None:
    size, lanes = f.extent(job.length), job.lanes
    base = row * size
    whole = f.index(f.divide(size, lanes)) * lanes
    start = job.nothing(f, 1)

    def vectors(before: Value) -> Value:
        def step(i: Value, before: Value) -> tuple[Value, ...]:
            place = whole - lanes - i if job.reverse else i
            return (_step(f, job, base + place, lanes, None, before),)

        return f.loop(0, whole, step, [before], lanes)[0]

    if isinstance(size, int) and size % lanes == 0:
        vectors(start)
    elif job.reverse:
        vectors(_emit_rest(f, job, base, whole, size, start))
    else:
        _emit_rest(f, job, base, whole, size, vectors(start))


def _emit_rest(f: PhaseFunction, job: Sums, base: Value, whole: Value, size: Index, before: Value) -> Value:
    """What is left of a row after its whole vectors."""
    if job.masked:
        mask = f.first_lanes(f.index(size) - whole, job.lanes)
        last = f.when(f.compare("slt", whole, size),
                      lambda: (_step(f, job, base + whole, job.lanes, mask, before),), unchanged=(before,))  # fmt: skip
        return last[0]

    def step(i: Value, before: Value) -> tuple[Value, ...]:
        place = f.index(size) - 1 - i if job.reverse else whole + i
        return (_step(f, job, base + place, 1, None, before),)

    return f.loop(0, f.index(size) - whole, step, [before])[0]


def _emit_columns(f: PhaseFunction, job: Sums, row: Index, column: Index, lanes: int, parts: int,
                  mask: Value | None) -> None:  # fmt: skip
    size, inner = f.extent(job.length), f.extent(job.inner)
    base = f.index(row) * size * inner + column

    def add(before: Value, first: Value, k: int) -> Value:
        place = (first + k * lanes) * size_of(job.dtype)
        after = job.add(f, before, load(f, job.dtype, f.pointer(job.source), place, lanes, mask))
        store(f, job.dtype, before if job.exclusive else after, f.pointer(job.target), place, mask)
        return after

    def step(i: Value, *before: Value) -> list[Value]:
        first = base + (f.index(size) - 1 - i if job.reverse else i) * inner
        return [add(total, first, k) for k, total in enumerate(before)]

    f.loop(0, size, step, [job.nothing(f, lanes)] * parts)


def _applies(node: Node, isa: Isa) -> bool:
    return node.dtype in MEMORY and node.dtype != "bool"


def _cost(node: Node, isa: Isa) -> float:
    lanes = vector_lanes(isa, IDENTITY, [node.dtype])
    length = typical(node.input(0).shape[node.attributes["axis"]])
    rows = typical(node.input(0).elements) // max(length, 1)
    work = rows * (-(-length // lanes) * VECTOR_CYCLES + 20)
    return 0.2 + max(work / CYCLES_PER_MICROSECOND, traffic(node) / BYTES_PER_MICROSECOND)


def _job(build: KernelBuilder, node: Node) -> Sums:
    shape, axis, dtype = node.input(0).shape, node.attributes["axis"], node.dtype
    exclusive, reverse = (bool(node.attributes.get(name, 0)) for name in ("exclusive", "reverse"))
    real = "float32" if dtype in NARROW_FLOATS else dtype
    combine: Combine = "multiply" if node.attributes.get("kind") == "prod" else "add"
    return Sums(combine, dtype, real, exclusive, reverse, vector_lanes(build.isa, IDENTITY, [dtype]),
                can_mask(build.isa, [dtype]), product(shape[:axis]), shape[axis], product(shape[axis + 1 :]),
                build.input(0), build.output())  # fmt: skip


@kernel("CumSum", on="cpu", when=_applies, cost=_cost, in_place=lambda node: (0,))
def cumsum(build: KernelBuilder, node: Node) -> None:
    """A work item is a row or a vector of columns."""
    job = _job(build, node)
    grain = GRAIN // (typical(job.length) + 1)
    if job.inner == 1:
        rows = job.outer if job.length != 0 else 0
        build.phase(rows, lambda f, begin, end: each(f, begin, end, lambda row: _emit_row(f, job, row)), grain)
        return
    columns_phase(build, job.outer, job.inner, job.lanes, job.masked, grain,
                  lambda f, row, column, *how: _emit_columns(f, job, row, column, *how))  # fmt: skip
