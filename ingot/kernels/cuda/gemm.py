"""What Linear, MatMul and Conv share: tiles of a product, the loop over its depth, split sums, the epilogue.

    result[rows, columns] = epilogue(Σ over depth of left[rows, depth] · right[depth, columns])

A kernel says how a step of `depth` is loaded on either side; everything else is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.ir.expression import operands_of
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.build import LANGUAGE, CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.render import FLOAT8, NARROW, can_render, converted, render
from ingot.kernels.cuda.rows import power_of_two
from ingot.kernels.node import Node, Port
from ingot.plan.extent import Extent, ceil_div, product

_GROUP = 8  # row tiles that share their columns in the second level of cache
_LINE, _MOST_LINES, _FETCHING_BLOCKS = 128, 4096, 2  # bytes of a line of cache; lines a block, blocks a processor
_FLOAT = 4  # bytes of a partial sum
_EARLY = 64 * 32  # elements a warp of results whose operands are asked for before the sums
SPLITS = (1, 2, 4, 8, 16)
JOINS = (0, 1)
_JOINING = 110_000  # bytes of partial sums that one block reads a microsecond
TYPES = (*NARROW, "float32", "int8", FLOAT8)


@dataclass(frozen=True)
class Tile:
    """A block's part of the result, the depth of a step, warps a block, steps in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @classmethod
    def parse(cls, text: str) -> Tile:
        """Of "128x64x32w4s3"."""
        sizes, _, rest = text.partition("w")
        warps, _, stages = rest.partition("s")
        rows, columns, depth = map(int, sizes.split("x"))
        return cls(rows, columns, depth, int(warps), int(stages))

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.depth}w{self.warps}s{self.stages}"

    def shared(self, element: int) -> int:
        """Bytes of shared memory the steps in flight take."""
        return self.stages * (self.rows + self.columns) * self.depth * element

    def in_flight(self, problem: Problem, split: int) -> int:
        """Steps in flight, where there are so many: shared memory for more would keep other blocks out."""
        if problem.depth is None:
            return self.stages
        return min(self.stages, max(-(-problem.depth // (self.depth * split)), 2))


TILES = tuple(map(Tile.parse, (
    "128x256x64w8s3", "256x128x64w8s3", "128x256x64w8s4", "128x128x64w8s3", "128x128x64w4s3", "128x128x64w4s4",
    "128x128x32w4s4", "128x64x64w4s4", "64x128x64w4s4", "64x256x64w4s3", "256x64x64w4s3", "64x64x64w4s5",
    "64x64x128w4s3", "64x32x64w4s5", "32x64x64w4s5", "32x128x64w4s4", "32x32x128w4s4", "16x128x64w4s5",
    "16x64x128w4s4", "16x32x256w4s3", "64x32x32w4s4", "128x32x64w4s4", "32x64x32w2s5",
)))  # fmt: skip

BYTE_TILES = tuple(map(Tile.parse, ("128x256x128w8s3", "128x128x128w8s3", "128x128x128w4s3", "128x64x128w4s4",
                                    "64x128x128w4s4", "64x64x128w4s4")))  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Sizes of a product, element type, how many of them there are, and what the epilogue adds to its traffic.
    `grouped`: the batches are groups of columns of one result, not results of their own."""

    rows: Extent
    columns: Extent
    depth: int | None
    dtype: str
    batch: Extent = 1
    extra_bytes: int = 0
    grouped: bool = False

    @property
    def pitch(self) -> Extent:
        """Elements from one row of the result to the next."""
        return product((self.columns, self.batch)) if self.grouped else self.columns

    @property
    def accumulator(self) -> str:
        """Type of the sums."""
        return "int32" if self.dtype == "int8" else "float32"


def _number(extent: Extent, assumed: int = 128) -> int:
    return extent if isinstance(extent, int) else assumed


def tiles_for(problem: Problem, target: Architecture, more: Sequence[str] = ()) -> tuple[str, ...]:
    """Tiles, `more` among them, that fit the processor and are not mostly empty."""
    rows, columns = _number(problem.rows), _number(problem.columns)
    element = size_of(problem.dtype)
    usable = [
        t for t in (*TILES, *(BYTE_TILES if element == 1 else ()), *map(Tile.parse, more))
        if t.shared(element) <= target.shared
        and t.rows <= max(2 * rows - 1, 16) and t.columns <= max(2 * columns - 1, 32)
        and (problem.depth is None or t.depth <= max(2 * problem.depth - 1, 32))
        and (element < _FLOAT or (t.rows * t.columns <= 64 * 64 and t.depth <= 64))  # three products each: registers
    ]  # fmt: skip
    return tuple(map(str, usable))


def splits_for(problem: Problem, tile: Tile, target: Architecture) -> tuple[int, ...]:
    """How often the depth may be divided: never where the result's tiles keep all processors busy."""
    if problem.depth is None or problem.grouped:
        return (1,)
    count = _tile_count(problem, tile)
    steps = -(-problem.depth // tile.depth)
    return tuple(s for s in SPLITS if s == 1 or (s * count <= 2 * target.processors and s * 2 <= steps))


def _tile_count(problem: Problem, tile: Tile) -> int:
    rows, columns = _number(problem.rows), _number(problem.columns)
    return -(-rows // tile.rows) * -(-columns // tile.columns) * _number(problem.batch, 1)


_EFFICIENCY = {2**15: 0.85, 2**14: 0.72, 2**13: 0.58, 2**12: 0.42, 2**11: 0.25, 2**10: 0.14, 2**9: 0.08}


def cost(problem: Problem, tile: Tile, split: int, target: Architecture, join: bool = False) -> float:
    """Microseconds: the slowest of tensor units, memory and the steps' latency, plus a second pass over split sums."""
    element = size_of(problem.dtype)
    rows, columns, depth = _number(problem.rows), _number(problem.columns), problem.depth or 256
    blocks = _tile_count(problem, tile) * split
    together = max(min(target.shared // tile.shared(element), 16 // tile.warps, -(-blocks // target.processors)), 1)
    waves = -(-blocks // (target.processors * together))
    steps = -(-depth // (tile.depth * split))
    speed = target.half_flops / target.processors * {1: 2.0, 2: 1.0, 4: 0.2}[element]
    size = tile.rows * tile.columns
    compute = 2 * size * tile.depth * steps / (speed * _EFFICIENCY.get(size, 0.05)) * together
    feed = (tile.rows + tile.columns) * tile.depth * steps * element * together / 45_000
    latency = 0.9 + steps * max(0.6 / max(tile.stages - 1, 1), 0.1)
    traffic = ((rows + columns) * depth + rows * columns) * element * _number(problem.batch, 1) + problem.extra_bytes
    time = max(waves * max(compute, feed, latency) + 0.6 * waves, traffic / (target.bandwidth * 800))
    if join:
        time += 1.0 + (split + 1) * size * _FLOAT / _JOINING
    elif split > 1:
        time += 2.0 + (split + 1) * rows * columns * _FLOAT / (target.bandwidth * 800)
    return time + target.pace.step


# the kernel

Load = Callable[[FunctionBuilder, str], str]
"""(function, step) -> text of a tile of one side; both sides may emit lines first"""


@dataclass(frozen=True)
class Site:
    """Where a block is: what the two sides' loads and the epilogue may refer to. `rows`, `columns`, `depths` are
    variables with the places along each axis; `rows_in` and `columns_in` stay inside the tensor."""

    f: FunctionBuilder
    tile: Tile
    problem: Problem
    batch: str


Open = Callable[[Site], Load]


@dataclass(frozen=True)
class Sides:
    """How both sides are loaded; `extras` counts the inputs before the epilogue's. `weights`: the right side, where it
    is a constant stored [columns, width], and its width. `sizes`: columns of each output, where there are several.
    `finish`: what is launched on the float32 sums [parts, rows, columns] instead of their sum and the epilogue.
    `write`: what stores a block's `sums` instead of the epilogue, where the depth is not split."""

    left: Open
    right: Open
    extras: int
    weights: tuple[Handle, int] | None = None
    sizes: tuple[int, ...] = ()
    finish: Callable[[CudaBuilder, Problem, Handle, int], None] | None = None
    write: Callable[[Site], None] | None = None


def emit_product(build: CudaBuilder, problem: Problem, tile: Tile, split: int, sides: Sides, join: int = 0) -> None:
    """One launch, or two where the depth is split: sums of each part, then their sum and the epilogue. `join`: the
    block of a tile that is the last to end does the latter instead of a second launch."""
    f = build.function(tile.warps, tile.in_flight(problem, split))
    partial = None
    if split > 1 or sides.finish is not None:
        size = product((split, problem.batch, problem.rows, problem.columns, _FLOAT))
        partial = build.temporary(size, problem.accumulator)
    site = _open(f, problem, tile, split)
    _fetch_weights(build, site, split, sides)
    f.emit(f"inside = (rows < {f.extent(problem.rows)})[:, None] & (columns < {f.extent(problem.columns)})[None, :]")
    place = f"rows[:, None] * {f.extent(problem.pitch)} + columns[None, :]"
    whole = f.extent(product((problem.rows, problem.columns)))
    step = f.extent(problem.columns) if problem.grouped else whole
    f.emit(f"place = {place}" if problem.batch == 1 else f"place = batch * {step} + {place}")
    columns = "columns[None, :]" + f" + batch * {step}" * problem.grouped
    left, right = sides.left(site), sides.right(site)
    early = partial is None and tile.rows * tile.columns <= _EARLY * tile.warps
    vectors = _extras(f, build, columns, sides, constant=True) if early else {}
    f.wait()
    operands = {**vectors, **_extras(f, build, columns, sides, constant=False)} if early else None
    _accumulate(build, site, split, left, right)
    if sides.write is not None:
        sides.write(site)
    elif partial is None:
        _finish(f, build, problem, "sums", columns, sides, operands=operands)
    else:
        f.emit(f"stride = {f.extent(problem.batch)} * {whole}")
        mine = "part * stride + " * (split > 1)
        f.emit(f"tl.store({f.pointer(partial)} + {mine}place, sums, inside)")
    tiles = product((ceil_div(problem.rows, tile.rows), ceil_div(problem.columns, tile.columns), problem.batch))
    if partial is not None and join:
        _join(f, build, problem, partial, build.counter(product((tiles, _FLOAT))), split, sides)
    f.launch(tiles, split)
    if partial is not None and sides.finish is not None:
        sides.finish(build, problem, partial, split)
    elif partial is not None and not join:
        _second_pass(build, problem, partial, split, sides)


def _join(f: FunctionBuilder, build: CudaBuilder, problem: Problem, partial: Handle, counter: Handle, split: int,
          sides: Sides) -> None:  # fmt: skip
    """The last block of a tile adds all parts, in their order, and leaves the counter as it was."""
    ticket = f"{f.pointer(counter)} + tl.program_id(0)"
    f.emit(f"tl.debug_barrier()\nticket = tl.atomic_add({ticket}, 1, sem='acq_rel')")
    with f.block(f"if ticket == {split - 1}:"):
        f.emit(f"tl.store({ticket}, 0)")
        f.emit(f"whole = tl.load({f.pointer(partial)} + place, inside, cache_modifier='.cg')")
        with f.block(f"for other in tl.static_range(1, {split}):"):
            f.emit(f"whole += tl.load({f.pointer(partial)} + other * stride + place, inside, cache_modifier='.cg')")
        _finish(f, build, problem, "whole", "columns[None, :]", sides, "rows[:, None]")


def _open(f: FunctionBuilder, problem: Problem, tile: Tile, split: int) -> Site:
    """The block's batch, rows and columns: tiles in groups of rows, so that what they share stays in the cache."""
    down, across = ceil_div(problem.rows, tile.rows), ceil_div(problem.columns, tile.columns)
    f.emit(f"number = tl.program_id(0)\ndown = {f.extent(down)}\nacross = {f.extent(across)}")
    if problem.batch != 1:
        f.emit("batch = number // (down * across)\nnumber = number % (down * across)")
    else:
        f.emit("batch = 0")
    f.emit(f"group = number // ({_GROUP} * across)\nfirst = group * {_GROUP}")
    f.emit(f"height = tl.minimum(down - first, {_GROUP})\nwithin = number % ({_GROUP} * across)")
    f.emit("row = first + within % height\ncolumn = within // height")
    f.emit(f"rows = row * {tile.rows} + tl.arange(0, {tile.rows})")
    f.emit(f"columns = column * {tile.columns} + tl.arange(0, {tile.columns})")
    f.emit(f"depths = tl.arange(0, {tile.depth})")
    for name, size, step in (("rows", problem.rows, tile.rows), ("columns", problem.columns, tile.columns)):
        exact = isinstance(size, int) and size % step == 0
        f.emit(f"{name}_in = {name}" if exact else f"{name}_in = tl.minimum({name}, {f.extent(size)} - 1)")
    if split > 1:
        f.emit("part = tl.program_id(1)")
    return Site(f, tile, problem, "batch")


def _fetch_weights(build: CudaBuilder, site: Site, split: int, sides: Sides) -> None:
    """Few blocks begin before the launch before has ended: meanwhile their weights come into the cache."""
    f, tile, problem = site.f, site.tile, site.problem
    blocks = _tile_count(problem, tile) * split
    if sides.weights is None or problem.grouped or blocks > build.target.processors * _FETCHING_BLOCKS:
        return
    handle, width = sides.weights
    line = _LINE // size_of(problem.dtype)
    share = -(-width // split)
    lines = min(power_of_two(-(-share // line)), _MOST_LINES // tile.columns)
    start = f"part * {share} + " * (split > 1)
    places = f"tl.minimum({start}tl.arange(0, {lines}) * {line}, {width - 1})"
    f.prefetch(f"{f.pointer(handle)} + columns_in[:, None] * {width} + {places}[None, :]")


def _accumulate(build: CudaBuilder, site: Site, split: int, left: Load, right: Load) -> None:
    f, tile, problem = site.f, site.tile, site.problem
    type = LANGUAGE[problem.accumulator]
    f.emit(f"sums = tl.zeros(({tile.rows}, {tile.columns}), {type})")
    steps = steps_of(f, problem, tile)
    if split > 1:
        f.emit(f"share = ({steps} + {split - 1}) // {split}")
        steps = "part * share, tl.minimum(part * share + share, " + steps + ")"
    else:
        steps = f"0, {steps}"
    with f.block(f"for step in range({steps}):"):
        a, b = left(f, "step"), right(f, "step")
        f.emit(f"sums = tl.dot({a}, {b}, sums{_precision(problem, tile, build.target)})")


def steps_of(f: FunctionBuilder, problem: Problem, tile: Tile) -> str:
    """Steps over the depth."""
    assert problem.depth is not None
    return str(-(-problem.depth // tile.depth))


def _precision(problem: Problem, tile: Tile, target: Architecture) -> str:
    if problem.dtype == "int8":
        return ", out_dtype=tl.int32"
    if problem.dtype == FLOAT8:  # the tensor units add with 14 bits: no longer than a step
        return f", max_num_imprecise_acc={tile.depth}"
    return f', input_precision="{"tf32" if target.precision == "tf32" else "tf32x3"}"' * (problem.dtype == "float32")


def _finish(f: FunctionBuilder, build: CudaBuilder, problem: Problem, sums: str, columns: str, sides: Sides,
            rows: str = "rows[:, None]", operands: Mapping[int, str] | None = None) -> None:  # fmt: skip
    """The epilogue on a block of sums at `place`, stored where `inside`; each output takes its own columns. `operands`
    by input, where they have been loaded."""
    node, extras = build.node, sides.extras
    loaded = operands or {**_extras(f, build, columns, sides, True), **_extras(f, build, columns, sides, False)}
    texts = [loaded.get(k, "") for k in range(extras, len(node.inputs))]
    dtypes = [problem.accumulator, *(node.input(k).dtype for k in range(extras, len(node.inputs)))]
    value = render(f, node.epilogue, [sums, *texts], dtypes)
    held = node.epilogue.dtype or problem.accumulator
    made = f.let(converted(value, held, node.output.dtype))
    if not sides.sizes:
        f.emit(f"tl.store({f.pointer(build.output())} + place, {made}, inside)")
    start = 0
    for index, size in enumerate(sides.sizes):
        mine = f"inside & ({columns} >= {start}) & ({columns} < {start + size})"
        f.emit(f"tl.store({f.pointer(build.output(index))} + {rows} * {size} + ({columns} - {start}), {made}, {mine})")
        start += size


def _extras(f: FunctionBuilder, build: CudaBuilder, columns: str, sides: Sides, constant: bool) -> dict[int, str]:
    """Operands of the epilogue by input: those that are known at build, or the others."""
    node, wanted = build.node, operands_of(build.node.epilogue)
    return {
        k: _extra(f, build, k, columns)
        for k in range(sides.extras, len(node.inputs))
        if k - sides.extras + 1 in wanted and (node.input(k).constant is not None) == constant
    }


def _extra(f: FunctionBuilder, build: CudaBuilder, index: int, columns: str) -> str:
    """An operand of the epilogue: a number, one per column, or one per element."""
    port, pointer = build.node.input(index), f.pointer(build.input(index))
    if port.elements == 1:
        return f.let(f"tl.load({pointer})")
    if port.shape == build.node.output.shape:
        return f.let(f"tl.load({pointer} + place, inside)")
    return f.let(f"tl.load({pointer} + {columns}, ({columns}) < {f.extent(_columns_of(build.node))})")


def _columns_of(node: Node) -> Extent:
    if node.op == "ParallelLinear":
        return node.input(1).shape[1]
    if node.op == "ParallelConv":
        return node.input(1).shape[0]
    return node.output.shape[1] if node.op == "Conv" else node.output.shape[-1]


def _second_pass(build: CudaBuilder, problem: Problem, partial: Handle, split: int, sides: Sides) -> None:
    """The parts' sums and the epilogue, one element of the result after the other."""
    from ingot.kernels.cuda.pointwise import block_for

    total = product((problem.batch, problem.rows, problem.columns))
    block = block_for(total, build.target.processors)
    f = build.function(warps=max(block // 256, 1))
    f.emit(f"place = tl.program_id(0) * {block} + tl.arange(0, {block})\ninside = place < {f.extent(total)}")
    f.emit(f"columns = place % {f.extent(problem.columns)}\nrows = place // {f.extent(problem.columns)}")
    f.emit(f"sums = tl.load({f.pointer(partial)} + place, inside)")
    with f.block(f"for part in tl.static_range(1, {split}):"):
        f.emit(f"sums += tl.load({f.pointer(partial)} + part * {f.extent(total)} + place, inside)")
    _finish(f, build, problem, "sums", "columns", sides, "rows")
    f.launch(ceil_div(total, block))


def epilogue_fits(node: Node, extras: int, accumulator: str) -> bool:
    """Whether the epilogue can be written and its operands are numbers, per column, or like the result."""
    ports = [p for p in node.inputs[extras:] if p is not None]
    if not can_render(node.epilogue, [accumulator, *(p.dtype for p in ports)]):
        return False
    return all(p.elements == 1 or p.shape == node.output.shape or p.elements == _columns_of(node) for p in ports)


def extra_bytes(ports: Sequence[Port | None]) -> int:
    """Bytes of the epilogue's operands."""
    return sum(p.bytes for p in ports if p is not None and isinstance(p.bytes, int))
