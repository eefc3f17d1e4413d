"""Projection: a ladder of launches from one row, where weights stream through registers, to thousands in large tiles.

    one row      norm, product, expression in one launch; a block asks for its weights before it waits for the input
    few rows     rows normalised by a launch of their own, tiles of 16 to 64 rows, the depth split among blocks
    many rows    the same with large tiles
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.dtypes import size_of
from ingot.kernels import kernel
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.build import LANGUAGE, CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.gemm import Tile
from ingot.kernels.cuda.ladder import Rung, restrict
from ingot.kernels.cuda.render import NARROW, can_render, converted, render
from ingot.kernels.cuda.rows import power_of_two
from ingot.kernels.node import Node, Port
from ingot.plan.extent import Extent, ceil_div, product

_MAIN = 3  # x, weight, norm; the expression's operands follow
_WEIGHTS = (*NARROW, "float32", "float8_e4m3fn")
_BYTES_AHEAD = 256  # of weights that a thread asks for before it needs them
_GROUP = 8  # row tiles that share their columns in the second level of cache
_FLOAT = 4

# One row: columns of a block, depth of a step, warps.
STREAMS = ("4x1024w4", "8x512w4", "2x2048w4", "8x1024w8", "4x512w2", "2x1024w4", "16x512w4", "4x2048w4", "8x2048w4")


@dataclass(frozen=True)
class Work:
    """The sizes of a Projection: `columns` of the result, `parts` of them in the weights."""

    rows: Extent
    columns: int
    depth: int
    parts: int

    @classmethod
    def of(cls, node: Node) -> Work:
        """Of a node."""
        depth, width = map(int, node.input(1).shape)
        parts = int(node.attributes["parts"])
        return cls(product(node.input(0).shape[:-1]), width // parts, depth, parts)


@dataclass(frozen=True)
class Stream:
    """A block's columns, the depth of a step, its warps."""

    columns: int
    depth: int
    warps: int

    @classmethod
    def parse(cls, text: str) -> Stream:
        """Of "4x1024w4"."""
        sizes, _, warps = text.partition("w")
        columns, depth = map(int, sizes.split("x"))
        return cls(columns, depth, int(warps))


def _applies(node: Node, target: Any) -> bool:
    weight = node.input(1)
    if weight.constant is None or weight.dtype not in _WEIGHTS or node.dtype not in (*NARROW, "float32"):
        return False
    if weight.dtype == "float32" and node.dtype != "float32":
        return False
    work, ports = Work.of(node), _operands(node)
    fits = all(p.elements == 1 or p.shape == node.output.shape or p.elements == work.columns for p in ports)
    return fits and can_render(node.epilogue, [*["float32"] * work.parts, *(p.dtype for p in ports)])


def _operands(node: Node) -> list[Port]:
    return [p for p in node.inputs[_MAIN:] if p is not None]


def _streams(node: Node, target: Architecture) -> tuple[str, ...]:
    work = Work.of(node)

    def fits(stream: Stream) -> bool:
        size = stream.columns * stream.depth * work.parts
        return stream.depth <= max(power_of_two(work.depth), 512) and size <= 128 * 32 * stream.warps

    return tuple(text for text in STREAMS if fits(Stream.parse(text)))


def _cost(node: Node, target: Architecture, stream: str) -> float:
    """Of one row; the first of the streams, unless it is timed."""
    weight = node.input(1)
    assert isinstance(weight.bytes, int)
    return target.pace.step + weight.bytes / (target.bandwidth * 900) + 0.01 * STREAMS.index(stream)


@kernel("Projection", on="cuda", when=_applies, space={"stream": _streams}, cost=_cost)
def projection(build: CudaBuilder, node: Node, stream: str) -> None:
    """expression(parts of norm(x)[M, K] @ w[K, N]); the weights are stored [N, K]"""
    weight = node.input(1).constant
    assert weight is not None
    work, packed = Work.of(node), build.pack(np.ascontiguousarray(weight.T))
    one = Rung(1, 1)
    if one.takes(work.rows):
        _stream(build, work, packed, Stream.parse(stream))
        restrict(build, 0, one, work.rows)
    if not Rung(2).takes(work.rows):
        return
    first = len(build.launches)
    x = _normalised(build, work) if node.has_input(2) else build.input(0)
    restrict(build, first, Rung(2), work.rows)
    for rung, tile in rungs(work, node.input(1).dtype):
        if rung.takes(work.rows):
            first = len(build.launches)
            _tiles(build, work, (x, packed), tile, rung, build.target)
            restrict(build, first, rung, work.rows)


# one row


def _stream(build: CudaBuilder, work: Work, packed: Handle, shape: Stream) -> None:
    """Weights through registers, each once; the depth lies along the threads."""
    f, node = build.function(warps=shape.warps, stages=1), build.node
    f.emit(f"columns = tl.program_id(0) * {shape.columns} + tl.arange(0, {shape.columns})")
    inside = _inside(f, "columns", shape.columns, work.columns)
    f.emit(f"depths = tl.arange(0, {shape.depth})")
    pointer, steps = f.pointer(packed), -(-work.depth // shape.depth)
    f.emit(f"base = {pointer} + (columns_in * {work.depth})[:, None] + depths[None, :]")
    step_bytes = shape.columns * work.parts * shape.depth * size_of(packed.dtype) // (32 * shape.warps)
    together = max(min(_BYTES_AHEAD // max(step_bytes, 1), steps), 1)
    whole = steps // together * together
    held = _weights(f, work, shape, "0", together)
    norm = f.pointer(build.input(2)) if node.has_input(2) else ""
    constants = _loaded(f, build, "columns", inside, constant=True)
    f.wait()
    for part in range(work.parts):
        f.emit(f"sums{part} = tl.zeros(({shape.columns}, {shape.depth}), tl.float32)")
    f.emit(f"squares = tl.zeros(({shape.depth},), tl.float32)" * bool(norm))
    if whole > together:
        names = ", ".join(held)
        with f.block(f"for start in range({together}, {whole}, {together}):"):
            ahead = _weights(f, work, shape, "start", together)
            _multiply(f, build, work, shape, f"start - {together}", held)
            f.emit(f"{names} = {', '.join(ahead)}")
    _multiply(f, build, work, shape, str(whole - together), held)
    if whole < steps:
        held = _weights(f, work, shape, str(whole), steps - whole)
        _multiply(f, build, work, shape, str(whole), held)
    if norm:
        f.emit(f"factor = 1.0 / libdevice.sqrt(tl.sum(squares) / {work.depth} + {node.attributes['epsilon']!r})")
    scaled = " * factor" * bool(norm)
    sums = [f.let(f"tl.sum(sums{part}, 1){scaled}") for part in range(work.parts)]
    operands = {**constants, **_loaded(f, build, "columns", inside, constant=False)}
    _store(f, build, sums, operands, "columns", inside)
    f.launch(ceil_div(work.columns, shape.columns))


def _weights(f: FunctionBuilder, work: Work, shape: Stream, start: str, count: int) -> list[str]:
    """Variables with the weights of `count` steps from `start` on, for every part."""
    names = []
    for number in range(count):
        mask = ""
        if work.depth % shape.depth:
            mask = f", ((({start}) + {number}) * {shape.depth} + depths < {work.depth})[None, :], other=0.0"
        for part in range(work.parts):
            place = f"(({start}) + {number}) * {shape.depth} + {part * work.columns * work.depth}"
            names.append(f.let(f"tl.load(base + ({place}){mask}, eviction_policy='evict_first')", "w"))
    return names


def _multiply(f: FunctionBuilder, build: CudaBuilder, work: Work, shape: Stream, start: str,
              held: Sequence[str]) -> None:  # fmt: skip
    """The sums grow by the steps whose weights are there."""
    node = build.node
    for number in range(len(held) // work.parts):
        deep = f"(({start}) + {number}) * {shape.depth} + depths"
        mask = f", {deep} < {work.depth}, other=0.0" if work.depth % shape.depth else ""
        x = f.let(f"tl.load({f.pointer(build.input(0))} + {deep}{mask}).to(tl.float32)", "x")
        if node.has_input(2):
            f.emit(f"squares += {x} * {x}")
            x = f.let(f"{x} * tl.load({f.pointer(build.input(2))} + {deep}{mask}).to(tl.float32)", "x")
        for part in range(work.parts):
            f.emit(f"sums{part} += {held[number * work.parts + part]}.to(tl.float32) * {x}[None, :]")


# more rows


def rungs(work: Work, dtype: str) -> list[tuple[Rung, Tile]]:
    """Ranges of rows and their tiles; columns are those of one part."""
    half = work.parts > 1
    if dtype == "float32":
        return [(Rung(2, 16), Tile(16, 32, 64, 4, 3)), (Rung(17), Tile(64, 64, 32, 4, 3))]
    large = Tile(128, 128, 64, 8, 3) if half else Tile(128, 256, 64, 8, 3)
    return [
        (Rung(2, 16), Tile(16, 32 if half else 64, 128, 4, 4)),
        (Rung(17, 32), Tile(32, 32 if half else 64, 128, 4, 4)),
        (Rung(33, 64), Tile(64, 32 if half else 64, 128, 4, 4)),
        (Rung(65, 128), Tile(128, 32 if half else 64, 64, 4, 4)),
        (Rung(129, 512), Tile(128, 64 if half else 128, 64, 8 if half else 4, 4)),
        (Rung(513), large),
    ]


def _normalised(build: CudaBuilder, work: Work) -> Handle:
    """Rows divided by their root mean square, times the scale, in memory of the step."""
    node, f = build.node, build.function(warps=4, stages=1)
    made = build.temporary(product((work.rows, work.depth, size_of(node.dtype))), node.dtype)
    block = min(power_of_two(work.depth), 8192)
    f.emit(f"columns = tl.arange(0, {block})")
    x = f"{f.pointer(build.input(0))} + tl.program_id(0) * {work.depth}"
    f.wait()
    f.emit(f"squares = tl.zeros(({block},), tl.float32)")
    passes = range(0, work.depth, block)
    for start in passes:
        f.emit(f"x = tl.load({x} + {start} + columns, columns < {work.depth - start}, other=0.0).to(tl.float32)")
        f.emit("squares += x * x")
    f.emit(f"factor = 1.0 / libdevice.sqrt(tl.sum(squares) / {work.depth} + {node.attributes['epsilon']!r})")
    for start in passes:
        if len(passes) > 1:
            f.emit(f"x = tl.load({x} + {start} + columns, columns < {work.depth - start}, other=0.0).to(tl.float32)")
        f.emit(f"scale = tl.load({f.pointer(build.input(2))} + {start} + columns, columns < {work.depth - start})")
        f.emit(f"tl.store({f.pointer(made)} + tl.program_id(0) * {work.depth} + {start} + columns, "
               f"(x * factor * scale.to(tl.float32)).to({LANGUAGE[node.dtype]}), "
               f"columns < {work.depth - start})")  # fmt: skip
    f.launch(work.rows)
    return made


def _split_of(work: Work, tile: Tile, rung: Rung, target: Architecture) -> int:
    """How many blocks share a tile's depth: enough to keep the processors busy, while each has some steps."""
    if rung.high is None or rung.high > 128:
        return 1
    blocks, steps = -(-work.columns // tile.columns) * -(-rung.high // tile.rows), -(-work.depth // tile.depth)
    split = 1
    while blocks * split * 2 <= 3 * target.processors and steps // (split * 2) >= 4:
        split *= 2
    return split


def _tiles(build: CudaBuilder, work: Work, sides: tuple[Handle, Handle], tile: Tile, rung: Rung,
           target: Architecture) -> None:  # fmt: skip
    """Tiles of the result; where the depth is split, the last block of a tile adds the parts."""
    node, split = build.node, _split_of(work, tile, rung, target)
    f = build.function(warps=tile.warps, stages=tile.stages)
    rows = f.extent(work.rows)
    down, across = ceil_div(work.rows, tile.rows), -(-work.columns // tile.columns)
    _open(f, work, tile, down, across)
    steps = ceil_div(work.depth, tile.depth)
    f.emit(f"share = {ceil_div(steps, split)}\npart = tl.program_id(1)")
    inside = f"(rows < {rows})[:, None] & (columns < {work.columns})[None, :]"
    f.emit(f"inside = {inside}\nplace = rows[:, None] * {work.columns} + columns[None, :]")
    f.wait()
    _accumulate(f, node, work, tile, sides, split)
    sums = [f"sums{part}" for part in range(work.parts)]
    tiles = product((down, across))
    if split == 1:
        _finish(f, build, sums)
    else:
        _join(f, build, work, sums, rung, split, tiles)
    f.launch(tiles, split)


def _open(f: FunctionBuilder, work: Work, tile: Tile, down: Extent, across: int) -> None:
    """The block's rows and columns: tiles in groups of rows, so that what they share stays in the cache."""
    f.emit(f"number = tl.program_id(0)\ngroup = number // ({_GROUP * across})\nfirst = group * {_GROUP}")
    f.emit(f"height = tl.minimum({f.extent(down)} - first, {_GROUP})\nwithin = number % ({_GROUP * across})")
    f.emit("row = first + within % height\ncolumn = within // height")
    f.emit(f"rows = row * {tile.rows} + tl.arange(0, {tile.rows})")
    f.emit(f"columns = column * {tile.columns} + tl.arange(0, {tile.columns})")
    f.emit(f"depths = tl.arange(0, {tile.depth})\nrows_in = tl.minimum(rows, {f.extent(work.rows)} - 1)")
    exact = work.columns % tile.columns == 0
    f.emit("columns_in = columns" if exact else f"columns_in = tl.minimum(columns, {work.columns - 1})")


def _accumulate(f: FunctionBuilder, node: Node, work: Work, tile: Tile, sides: tuple[Handle, Handle],
                split: int) -> None:  # fmt: skip
    x, weight = sides
    f.emit(f"left = {f.pointer(x)} + rows_in.to(tl.int64)[:, None] * {work.depth} + depths[None, :]")
    f.emit(f"right = {f.pointer(weight)} + (columns_in * {work.depth})[None, :] + depths[:, None]")
    for part in range(work.parts):
        f.emit(f"sums{part} = tl.zeros(({tile.rows}, {tile.columns}), tl.float32)")
    steps = -(-work.depth // tile.depth)
    bounds = f"0, {steps}" if split == 1 else f"part * share, tl.minimum(part * share + share, {steps})"
    same = weight.dtype == x.dtype
    precision = ', input_precision="tf32x3"' if x.dtype == "float32" else ""
    with f.block(f"for step in range({bounds}):"):
        a, b = "", ""
        if work.depth % tile.depth:
            rest = f"(depths < {work.depth} - step * {tile.depth})"
            a, b = f", {rest}[None, :], other=0.0", f", {rest}[:, None], other=0.0"
        f.emit(f"a = tl.load(left + step * {tile.depth}{a})")
        for part in range(work.parts):
            place = f"right + step * {tile.depth} + {part * work.columns * work.depth}"
            cast = "" if same else f".to({LANGUAGE[x.dtype]})"
            f.emit(f"b{part} = tl.load({place}{b}){cast}")
            f.emit(f"sums{part} = tl.dot(a, b{part}, sums{part}{precision})")


def _join(f: FunctionBuilder, build: CudaBuilder, work: Work, sums: Sequence[str], rung: Rung, split: int,
          tiles: Extent) -> None:  # fmt: skip
    """The last block of a tile adds all parts of the depth, in their order, and leaves the counter as it was."""
    most = rung.cut(work.rows)
    partial = f.pointer(build.temporary(product((split, work.parts, most, work.columns, _FLOAT)), "float32"))
    ticket = f"{f.pointer(build.counter(product((tiles_cut(tiles, work, rung), _FLOAT))))} + tl.program_id(0)"
    f.emit(f"stride = {f.extent(work.rows)} * {work.columns}")
    for number, name in enumerate(sums):
        f.emit(f"tl.store({partial} + (part * {work.parts} + {number}) * stride + place, {name}, inside)")
    f.emit(f"tl.debug_barrier()\nticket = tl.atomic_add({ticket}, 1, sem='acq_rel')")
    with f.block(f"if ticket == {split - 1}:"):
        f.emit(f"tl.store({ticket}, 0)")
        wholes = []
        for number in range(work.parts):
            f.emit(f"whole{number} = tl.load({partial} + {number} * stride + place, inside, cache_modifier='.cg')")
            with f.block(f"for other in tl.static_range(1, {split}):"):
                f.emit(f"whole{number} += tl.load({partial} + (other * {work.parts} + {number}) * stride + place, "
                       "inside, cache_modifier='.cg')")  # fmt: skip
            wholes.append(f"whole{number}")
        _finish(f, build, wholes)


def tiles_cut(tiles: Extent, work: Work, rung: Rung) -> Extent:
    """Most tiles there are of a range of rows."""
    return tiles if isinstance(tiles, int) or rung.high is None else product((work.columns, rung.high // 16 + 1))


# the end


def _inside(f: FunctionBuilder, name: str, step: int, size: int) -> str:
    """Text of the mask of columns that exist, "" where all do; `name`_in stay within."""
    exact = size % step == 0
    f.emit(f"{name}_in = {name}" if exact else f"{name}_in = tl.minimum({name}, {size - 1})")
    return "" if exact else f"{name} < {size}"


def _finish(f: FunctionBuilder, build: CudaBuilder, sums: Sequence[str]) -> None:
    operands = {}
    for k in range(_MAIN, len(build.node.inputs)):
        port, pointer = build.node.input(k), f.pointer(build.input(k))
        if port.elements == 1:
            operands[k] = f.let(f"tl.load({pointer})")
        elif port.shape == build.node.output.shape:
            operands[k] = f.let(f"tl.load({pointer} + place, inside)")
        else:
            operands[k] = f.let(f"tl.load({pointer} + columns_in)[None, :]")
    _store(f, build, sums, operands, "place", "inside")


def _loaded(f: FunctionBuilder, build: CudaBuilder, columns: str, inside: str, constant: bool) -> dict[int, str]:
    """Operands of one row: those known at build, or the others."""
    mask = f", {inside}" if inside else ""
    loaded = {}
    for k in range(_MAIN, len(build.node.inputs)):
        port = build.node.input(k)
        if (port.constant is not None) == constant:
            place = "" if port.elements == 1 else f" + {columns}"
            loaded[k] = f.let(f"tl.load({f.pointer(build.input(k))}{place}{mask if place else ''})")
    return loaded


def _store(f: FunctionBuilder, build: CudaBuilder, sums: Sequence[str], operands: dict[int, str], place: str,
           inside: str) -> None:  # fmt: skip
    node = build.node
    dtypes = ["float32"] * len(sums) + [node.input(k).dtype for k in operands_in(node)]
    made = render(f, node.epilogue, [*sums, *(operands[k] for k in operands_in(node))], dtypes)
    held = node.epilogue.dtype or "float32"
    mask = f", {inside}" if inside else ""
    f.emit(f"tl.store({f.pointer(build.output())} + {place}, {converted(made, held, node.output.dtype)}{mask})")


def operands_in(node: Node) -> range:
    """Inputs that the expression reads."""
    return range(_MAIN, len(node.inputs))
