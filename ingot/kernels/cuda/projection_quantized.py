"""Projection with weights of four or eight bits: a ladder as projection.py's.

    a few rows    integers times rows of sixteen bits, one after the other (projection_integers.py)
    to 128 rows   a tile's weights become numbers of the rows' type in registers, scales and zeros included
    more          the whole matrix does so once in a launch of its own, which the products that follow read
    w8a8          rows rounded to eight bits, each with its size, and products of integers

Rows of many lie in the order that the weights have in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ingot.dtypes import compact, size_of
from ingot.kernels import kernel
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.build import LANGUAGE, CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.gemm import Tile
from ingot.kernels.cuda.ladder import Rung, only
from ingot.kernels.cuda.projection import Sides, by_tiles, operands_fit, prepared, rungs
from ingot.kernels.cuda.projection_integers import Integers, packed_norm, packed_words, place_of, run_of, unsigned
from ingot.kernels.cuda.projection_integers import stream as stream_row
from ingot.kernels.cuda.projection_row import Work
from ingot.kernels.cuda.render import NARROW
from ingot.kernels.cuda.rows import power_of_two
from ingot.kernels.cuda.streaming import Block
from ingot.kernels.node import Node
from ingot.plan.extent import product

Accumulate = Callable[[FunctionBuilder, Work, Tile, int], None]
_BITS = (4, 8)
_PAIRS = 2  # numbers of the row that are loaded together
_MORE = {4: 9, 8: 6}  # rows, from which tiles are faster, for weights of so many bits
_RESTORED = Rung(129)
_MOST_RESTORED = 10**9  # bytes of a matrix in 16 bits that are taken for it
_WORDS = 1024  # of a block that restores
STREAMS = (
    "8x4096w4", "16x4096w4", "4x4096w4", "8x4096w8", "4x2048w4", "8x2048w4",
)  # fmt: skip


def _bits(node: Node) -> int:
    return int(node.attributes.get("bits", 8))


def _known(node: Node, first: int, last: int) -> bool:
    """Whether those of the inputs that are there are constants."""
    return all(node.input(k).constant is not None for k in range(first, last) if node.has_input(k))


def _applies(node: Node, target: Any) -> bool:
    """Groups are those of whole threads, or there is one."""
    if node.input(1).dtype not in ("int8", "uint8") or node.dtype not in (*NARROW, "float32"):
        return False
    depth, bits = int(node.input(1).shape[0]), _bits(node)
    group = int(node.attributes.get("group", depth))
    shared = bits in _BITS and (group >= depth or group % run_of(bits) == 0)
    return shared and depth % _PAIRS == 0 and _known(node, 1, 5 if _grouped(node) else 3) and operands_fit(node)


def _grouped(node: Node) -> bool:
    return node.op == "QuantizedProjection"


def _streams(node: Node, target: Architecture) -> tuple[str, ...]:
    work, bits = Work.of(node), _bits(node)

    def fits(block: Block) -> bool:
        threads = 32 * block.warps
        held = block.columns * block.depth * work.parts * bits // 8 // threads  # bytes of a thread
        return block.depth <= max(power_of_two(work.depth), threads * run_of(bits)) and held <= 256

    return tuple(text for text in STREAMS if fits(Block.parse(text)))


def _cost(node: Node, target: Architecture, stream: str) -> float:
    """Of one row; what was best for a Llama's shapes on an H200, unless it is timed."""
    work, bits = Work.of(node), _bits(node)
    size = work.parts * work.columns * work.depth * bits / 8
    few = work.parts > 1 or work.depth > 4096
    usual = ("8x4096w4" if few else "16x4096w4") if bits == 4 else "4x4096w4" if few else "4x2048w4"
    return target.pace.step + size / (target.bandwidth * 900) + 0.01 * (stream != usual)


def stored(node: Node, build: CudaBuilder, streamed: Rung) -> Integers:
    """The node's weights as they lie in the engine, and where rows may be `streamed` the norm's scales."""
    weights, norm = _weights(node, build), node.input(2).constant if node.has_input(2) else None
    if norm is None or not streamed.takes(Work.of(node).rows):
        return weights
    return replace(weights, norm=build.pack(packed_norm(norm, weights)))


def _weights(node: Node, build: CudaBuilder) -> Integers:
    weight, bits = node.input(1).constant, _bits(node)
    assert weight is not None
    depth = len(weight)
    filled = -(-depth // run_of(bits)) * run_of(bits)
    words = build.pack(packed_words(weight, bits))
    if not _grouped(node):
        return Integers(words, bits, filled, filled)
    scale, group = node.input(3).constant, int(node.attributes["group"])
    assert scale is not None
    zero = node.input(4).constant if node.has_input(4) else np.zeros(1, weight.dtype)
    assert zero is not None
    zeros = unsigned(zero, bits).view(np.int8)
    same = (zeros == zeros.flat[0]).all()
    kept = int(zeros.flat[0]) if same else build.pack(np.ascontiguousarray(zeros))
    group = filled if group >= depth else group
    return Integers(words, bits, filled, group, build.pack(np.ascontiguousarray(compact(scale))), kept)


@kernel("QuantizedProjection", on="cuda", when=_applies, space={"stream": _streams}, cost=_cost)
def quantized_projection(build: CudaBuilder, node: Node, stream: str) -> None:
    """expression(parts of norm(x)[M, K] @ ((w - zero) * scale)[K, N])"""
    most = _MORE[_bits(node)] - 1
    work, weights, some, more = Work.of(node), stored(node, build, Rung(1, most)), Rung(2, most), Rung(most + 1)
    _one(build, work, weights, stream)
    if some.takes(work.rows):
        with only(build, some, work.rows):
            stream_row(build, work, weights, Block.parse(stream), several=True)
    if not more.takes(work.rows):
        return
    with only(build, more, work.rows):
        rows, _ = prepared(build, work, node.dtype, weights.depth, place_of(weights.bits, "columns"))
    filled, size = replace(work, depth=weights.depth), size_of(node.dtype)
    total = work.parts * work.columns * weights.depth * size
    whole = size == 2 and total <= _MOST_RESTORED and _RESTORED.takes(work.rows)
    few = Sides(rows, weights.words, accumulate=_in_registers(weights, rows))
    by_tiles(build, filled, few, _few(work, more.low, size, whole))
    if whole:
        with only(build, _RESTORED, work.rows):
            restored = _restored(build, filled, weights)
        many = [(Rung(max(r.low, _RESTORED.low), r.high), t) for r, t in rungs(work, node.dtype)
                if r.high is None or r.high >= _RESTORED.low]  # fmt: skip
        by_tiles(build, filled, Sides(rows, restored, accumulate=_loaded(rows, restored)), many)


@kernel("Projection", on="cuda", when=_applies, space={"stream": _streams}, cost=_cost)
def integer_projection(build: CudaBuilder, node: Node, stream: str) -> None:
    """expression(parts of norm(x)[M, K] @ w[K, N]), w and the rows of many int8"""
    work, weights = Work.of(node), stored(node, build, Rung(1, 1))
    _one(build, work, weights, stream)
    if not Rung(2).takes(work.rows):
        return
    with only(build, Rung(2), work.rows):
        rows, sizes = prepared(build, work, "int8", weights.depth, place_of(8, "columns"))
    sides = Sides(rows, weights.words, sizes, accumulate=_loaded(rows, weights.words))
    by_tiles(build, replace(work, depth=weights.depth), sides, rungs(work, "float8_e4m3fn"))


def _one(build: CudaBuilder, work: Work, weights: Integers, stream: str) -> None:
    if Rung(1, 1).takes(work.rows):
        with only(build, Rung(1, 1), work.rows):
            stream_row(build, work, weights, Block.parse(stream))


def _few(work: Work, low: int, size: int, to_many: bool) -> list[tuple[Rung, Tile]]:
    """Ranges whose tiles restore weights for themselves: all, or those up to what is restored as a whole."""
    half = work.parts > 1
    if size == 4:
        return [(Rung(low, 16), Tile(16, 32, 64, 4, 3)), (Rung(17), Tile(64, 64, 32, 4, 3))]
    columns = 32 if half else 64
    rest = [] if to_many else [(_RESTORED, Tile(128, 64 if half else 128, 64, 8, 3))]
    return [
        (Rung(low, 16), Tile(16, columns, 128, 4, 4)),
        (Rung(17, 32), Tile(32, columns, 128, 4, 4)),
        (Rung(33, 64), Tile(64, columns, 128, 4, 3)),
        (Rung(65, 128), Tile(128, columns, 64, 4, 4)),
        *rest,
    ]


# sums of tiles


def _opened(f: FunctionBuilder, work: Work, tile: Tile, rows: Handle, split: int, kind: str) -> str:
    """Sums, the rows' places; the loop's head."""
    f.emit(f"left = {f.pointer(rows)} + rows_in.to(tl.int64)[:, None] * {work.depth} + depths[None, :]")
    f.emit(f"there = (rows < {f.extent(work.rows)})[:, None]")
    for part in range(work.parts):
        f.emit(f"sums{part} = tl.zeros(({tile.rows}, {tile.columns}), {kind})")
    steps = -(-work.depth // tile.depth)
    bounds = f"0, {steps}" if split == 1 else f"part * share, tl.minimum(part * share + share, {steps})"
    return f"for step in range({bounds}):"


def _rest(work: Work, tile: Tile, places: str, each: int, across: str) -> str:
    """The condition of a load of the last step, where it is not whole."""
    rest = f"({places} < {work.depth // each} - step * {tile.depth // each})"
    return f"{rest}{across}" if work.depth % tile.depth else ""


def _masked(*conditions: str) -> str:
    found = " & ".join(filter(None, conditions))
    return f", {found}, other=0" if found else ""


def _rows(work: Work, tile: Tile) -> str:
    """A step of the rows; those beyond the last one are not asked for: all blocks would ask for the same line."""
    return f"a = tl.load(left + step * {tile.depth}{_masked('there', _rest(work, tile, 'depths', 1, '[None, :]'))})"


def _loaded(rows: Handle, weights: Handle) -> Accumulate:
    """Both sides as they lie in memory, [rows, K] and [columns, K] of the rows' type."""
    whole = rows.dtype == "int8"

    def accumulate(f: FunctionBuilder, work: Work, tile: Tile, split: int) -> None:
        kind = "tl.int32" if whole else "tl.float32"
        head = _opened(f, work, tile, rows, split, kind)
        pointer = f"{f.pointer(weights)}{'.to(tl.pointer_type(tl.int8))' if whole else ''}"
        f.emit(f"right = {pointer} + (columns_in.to(tl.int64) * {work.depth})[None, :] + depths[:, None]")
        with f.block(head):
            f.emit(_rows(work, tile))
            for part in range(work.parts):
                place = f"right + step * {tile.depth} + {part * work.columns * work.depth}"
                f.emit(f"b{part} = tl.load({place}{_masked(_rest(work, tile, 'depths', 1, '[:, None]'))})")
                f.emit(f"sums{part} = tl.dot(a, b{part}, sums{part}, out_dtype={kind})")
        for part in range(work.parts if whole else 0):
            f.emit(f"sums{part} = sums{part}.to(tl.float32)")

    return accumulate


def _in_registers(weights: Integers, rows: Handle) -> Accumulate:
    """Weights restored on their way from words to products: [columns, words] with a scale for each."""

    def accumulate(f: FunctionBuilder, work: Work, tile: Tile, split: int) -> None:
        head = _opened(f, work, tile, rows, split, "tl.float32")
        words, each = tile.depth // weights.each, weights.each
        f.emit(f"words = tl.arange(0, {words})")
        f.emit(f"right = {f.pointer(weights.words)} + (columns_in * {weights.line})[:, None] + words[None, :]")
        precision = ', input_precision="tf32x3"' if rows.dtype == "float32" else ""
        with f.block(head):
            f.emit(_rows(work, tile))
            groups = f"tl.minimum((step * {words} + words) * {each} // {weights.group}, {weights.groups - 1})"
            f.emit(f"groups = {groups}")
            for part in range(work.parts):
                place = f"right + step * {words} + {part * work.columns * weights.line}"
                word = f.let(f"tl.load({place}{_masked(_rest(work, tile, 'words', each, '[None, :]'))})", "w")
                column = f"(columns_in + {part * work.columns})[:, None]"
                of_group = f.let(f"groups[None, :] * {work.parts * work.columns} + {column}", "g")
                f.emit(f"b{part} = tl.trans({_numbers(f, weights, word, of_group, rows.dtype)})")
                f.emit(f"sums{part} = tl.dot(a, b{part}, sums{part}{precision})")

    return accumulate


def _numbers(f: FunctionBuilder, weights: Integers, words: str, groups: str, dtype: str) -> str:
    """What a block of words holds, in a type; groups: for each word the place of its scale."""
    nibbles = weights.bits == 4
    scale = f.let(f"tl.load({f.pointer(_handle(weights.scales))} + {groups}).to(tl.float32)", "s")
    zero = f"{weights.zeros}.0"
    if not isinstance(weights.zeros, int):
        zero = f"tl.load({f.pointer(weights.zeros)} + {groups}).to(tl.float32)"
    whole = (f"{scale} * 16.0", f"({zero} + 16.0) * {scale}") if nibbles else (scale, f"{zero} * {scale}")
    function = f.core("integers", "eight_nibbles" if nibbles else "four_octets")
    return f.let(f"{function}({words}, {whole[0]}, {whole[1]}, {LANGUAGE[dtype]})", "b")


def _handle(handle: Handle | None) -> Handle:
    assert handle is not None
    return handle


def _restored(build: CudaBuilder, work: Work, weights: Integers) -> Handle:
    """The whole matrix [columns, K] in the rows' type, by a launch of its own for runs of many rows alone."""
    dtype, each = build.node.dtype, weights.each
    columns = work.parts * work.columns
    size = product((columns * work.depth * size_of(dtype), _RESTORED.factor(work.rows)))
    made, f = build.temporary(size, dtype), build.function(warps=4, stages=1)
    f.emit(f"place = tl.program_id(0) * {_WORDS} + tl.arange(0, {_WORDS})\ninside = place < {columns * weights.line}")
    f.emit(f"word = tl.load({f.pointer(weights.words)} + place, inside, other=0)")
    group = f"place % {weights.line} * {each} // {weights.group}"
    f.emit(f"groups = tl.where(inside, {group} * {columns} + place // {weights.line}, 0)")
    f.wait()
    numbers = _numbers(f, weights, "word", "groups", dtype)
    f.emit(f"place = tl.program_id(0).to(tl.int64) * {_WORDS * each} + tl.arange(0, {_WORDS * each})")
    f.emit(f"tl.store({f.pointer(made)} + place, {numbers}, place < {columns * work.depth})")
    f.launch(-(-columns * weights.line // _WORDS))
    return made
