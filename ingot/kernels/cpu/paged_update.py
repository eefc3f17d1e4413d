"""CacheUpdate: queries, keys and values of new tokens are normalised, rotated, and put where they belong."""

from __future__ import annotations

from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.ir.elementwise import FLOATS
from ingot.ir.ops_paged import LARGEST, LEAST, SCALE_BYTES
from ingot.kernels import kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.cpu.paged_pool import Pool, pool_of
from ingot.kernels.cpu.pointwise_dims import can_mask
from ingot.kernels.cpu.render import MEMORY, load, narrow, store
from ingot.kernels.cpu.rows import each, emitted, fold_of, spread, total_of, visit
from ingot.kernels.node import Node

GRAIN = 1  # tokens in a chunk worth taking
_COSINE, _SINE, _QUERY_SCALE, _KEY_SCALE = 4, 5, 6, 7


@dataclass(frozen=True)
class Table:
    """A constant or varying operand of floats."""

    handle: Handle
    dtype: str


@dataclass(frozen=True)
class Update:
    """One kernel: extents, operands, and where a key waits in scratch to be scattered."""

    pool: Pool
    heads: int
    dtype: str
    lanes: int
    masked: bool
    half: int
    places: int
    epsilon: float
    projected: Handle
    positions: Handle
    slots: Handle
    cosine: Table | None
    sine: Table | None
    scales: tuple[Table | None, Table | None]
    query: Handle
    key_at: int


def _applies(node: Node, isa: Isa) -> bool:
    ports = [port for i, port in enumerate(node.inputs) if port is not None and i not in (2, 3)]
    integers = all(node.input(i).dtype == "int32" for i in (2, 3))
    static = all(isinstance(size, int) for size in (*node.input(0).shape[1:], *node.outputs[1].shape[1:]))
    floats = all(port.dtype in FLOATS or (port is node.input(0) and port.dtype == "int8") for port in ports)
    return integers and static and floats and all(port.dtype in MEMORY for port in ports)


def _job(build: KernelBuilder, node: Node) -> Update:
    heads, depth = node.outputs[1].shape[1:]
    assert isinstance(heads, int) and isinstance(depth, int)
    tables = [_table(build, node, index) for index in (_COSINE, _SINE, _QUERY_SCALE, _KEY_SCALE)]
    places, half = node.input(_COSINE).shape if tables[0] else (1, 0)
    assert isinstance(places, int) and isinstance(half, int)
    dtypes = [node.input(0).dtype, node.input(1).dtype, *(table.dtype for table in tables if table)]
    return Update(
        pool_of(build, node.input(0), build.output(0), depth), heads, node.input(1).dtype, build.isa.lanes,
        can_mask(build.isa, dtypes), half, places, float(node.attributes["epsilon"]), build.input(1), build.input(2),
        build.input(3), tables[0], tables[1], (tables[2], tables[3]), build.output(1), build.scratch(4 * depth),
    )  # fmt: skip


def _table(build: KernelBuilder, node: Node, index: int) -> Table | None:
    return Table(build.input(index), node.input(index).dtype) if node.has_input(index) else None


@kernel("CacheUpdate", on="cpu", when=_applies, in_place=lambda node: (0,))
def cache_update(build: KernelBuilder, node: Node) -> None:
    """A work item is a token. The pool is written where it is; nothing else of it is touched."""
    job = _job(build, node)
    build.phase(node.input(1).shape[0], lambda f, begin, end: each(f, begin, end, lambda t: _token(f, job, t)), GRAIN)


def _token(f: PhaseFunction, job: Update, token: Value) -> None:
    pool, size = job.pool, size_of(job.dtype)
    position = f.cast("sext", f.load("i32", f.pointer(job.positions), token * 4), "i64")
    slot = f.cast("sext", f.load("i32", f.pointer(job.slots), token * 4), "i64")
    angle = f.index(f.maximum(f.minimum(position, job.places - 1), 0)) * job.half
    line = pool.depth * size
    source = f.at(f.pointer(job.projected), token * (line * (job.heads + 2 * pool.groups)))

    def query(head: Value) -> None:
        target = f.at(f.pointer(job.query), (token * job.heads + head) * line)
        _head(f, job, f.at(source, head * line), 0, angle, target, job.dtype)

    f.loop(0, job.heads, query)

    def group(number: Value) -> None:
        held = f.at(f.scratch, job.key_at)
        _head(f, job, f.at(source, (number + job.heads) * line), 1, angle, held, "float32")
        if pool.scaled:
            _shrink(f, job, held, slot, pool.keys(f, f.divide(slot, pool.block), number))
        _scatter_key(f, pool, held, slot, number)
        values = f.at(source, (number + (job.heads + pool.groups)) * line)
        if pool.scaled:
            _widened(f, job, values, held)
            _shrink(f, job, held, slot, pool.values(f, f.divide(slot, pool.block), number))
        _copy_value(f, job, values, held, pool.value(f, slot, number))

    kept = f.binary("and", f.compare("sge", position, 0), f.compare("sge", slot, 0))
    f.when(kept, lambda: emitted(f.loop(0, pool.groups, group)))


def _head(f: PhaseFunction, job: Update, source: Value, which: int, angle: Value, target: Value, dtype: str) -> None:
    """target = the head, normalised by scale `which` and rotated."""
    scale, depth, half = job.scales[which], job.pool.depth, job.half
    factor = None if scale is None else _factor(f, job, source)

    def read(place: Index, lanes: int, mask: Value | None) -> Value:
        x = load(f, job.dtype, source, place * size_of(job.dtype), lanes, mask)
        if scale is None or factor is None:
            return x
        weight = load(f, scale.dtype, f.pointer(scale.handle), place * size_of(scale.dtype), lanes, mask)
        return x * spread(f, factor, lanes) * weight

    def write(place: Index, value: Value, mask: Value | None) -> None:
        store(f, dtype, value, target, place * size_of(dtype), mask)

    def rotated(i: Index, lanes: int, mask: Value | None) -> None:
        a, b = read(i, lanes, mask), read(i + half, lanes, mask)
        cosine, sine = (_angles(f, table, angle, i, lanes, mask) for table in (job.cosine, job.sine))
        write(i, a * cosine - b * sine, mask)
        write(i + half, f.fma(b, cosine, a * sine), mask)

    if half:
        visit(f, half, job.lanes, job.masked, rotated)
    rest = 2 * half
    visit(f, depth - rest, job.lanes, job.masked,
          lambda i, lanes, mask: write(i + rest, read(i + rest, lanes, mask), mask))  # fmt: skip


def _angles(f: PhaseFunction, table: Table | None, row: Value, i: Index, lanes: int, mask: Value | None) -> Value:
    assert table is not None
    return load(f, table.dtype, f.pointer(table.handle), (row + i) * size_of(table.dtype), lanes, mask)


def _factor(f: PhaseFunction, job: Update, source: Value) -> Value:
    """1 / sqrt(mean square + epsilon)"""
    depth = job.pool.depth
    fold = fold_of("add", "float32", job.lanes, job.masked, depth)

    def square(i: Index, lanes: int, mask: Value | None) -> Value:
        x = load(f, job.dtype, source, i * size_of(job.dtype), lanes, mask)
        return x * x

    mean = total_of(f, fold, depth, square) * (1.0 / depth)
    return f.binary("fdiv", 1.0, f.call("llvm.sqrt", "float", mean + job.epsilon))


def _scatter_key(f: PhaseFunction, pool: Pool, held: Value, slot: Value, group: Value) -> None:
    target, size = pool.key(f, slot, group), size_of(pool.dtype)

    def one(d: Value) -> None:
        x = f.load("float", held, d * 4)
        value = f.cast("fptosi", x, "i8") if pool.scaled else narrow(f, x, pool.dtype)
        f.store(value, target, d * (pool.block * size))

    f.loop(0, pool.depth, one)


def _widened(f: PhaseFunction, job: Update, source: Value, held: Value) -> None:
    """held = the head as floats"""

    def some(i: Index, lanes: int, mask: Value | None) -> None:
        store(f, "float32", load(f, job.dtype, source, i * size_of(job.dtype), lanes, mask), held, i * 4, mask)

    visit(f, job.pool.depth, job.lanes, job.masked, some)


def _shrink(f: PhaseFunction, job: Update, held: Value, slot: Value, panel: Value) -> None:
    """held = round(held / scale), whose largest is 127; the scale goes behind the slot's panel."""
    depth = job.pool.depth
    fold = fold_of("max", "float32", job.lanes, job.masked, depth)

    def magnitude(i: Index, lanes: int, mask: Value | None) -> Value:
        x = load(f, "float32", held, i * 4, lanes, mask)
        return f.call("llvm.fabs", x.type, x)

    largest = total_of(f, fold, depth, magnitude)
    scale = f.select(f.compare("ogt", largest, LEAST), largest, LEAST) * (1.0 / LARGEST)
    offset = f.index(f.remainder(slot, job.pool.block))
    f.store(scale, panel, offset * SCALE_BYTES + job.pool.scales_at)

    def rounded(i: Index, lanes: int, mask: Value | None) -> None:
        x = load(f, "float32", held, i * 4, lanes, mask)
        x = f.binary("fdiv", x, spread(f, scale, lanes))
        store(f, "float32", f.call("llvm.rint", x.type, x), held, i * 4, mask)

    visit(f, depth, job.lanes, job.masked, rounded)


def _copy_value(f: PhaseFunction, job: Update, source: Value, held: Value, target: Value) -> None:
    """The slot's value: of the source, or of what `_shrink` made of it."""

    def some(i: Index, lanes: int, mask: Value | None) -> None:
        if job.pool.scaled:
            x = f.cast("fptosi", load(f, "float32", held, i * 4, lanes, mask), "i8")
        else:
            x = load(f, job.dtype, source, i * size_of(job.dtype), lanes, mask)
        store(f, job.pool.dtype, x, target, i * size_of(job.pool.dtype), mask)

    visit(f, job.pool.depth, job.lanes, job.masked, some)
