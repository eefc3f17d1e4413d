"""The first layer of pictures (conv_stem.py) in float32: a position holds four channels in bfloat16, rounded to one
part or as two parts whose sum is nearly the number.
"""

from __future__ import annotations

from ingot.config import BFLOAT16_ERROR, SPLIT_ERROR
from ingot.kernels import kernel
from ingot.kernels.cpu.build import KernelBuilder, PhaseFunction
from ingot.kernels.cpu.conv_epilogue import epilogue_of
from ingot.kernels.cpu.conv_finish import Job
from ingot.kernels.cpu.conv_maps import size_of
from ingot.kernels.cpu.conv_stem import LANES, Stem, is_stem, prepare, spread, stem_of
from ingot.kernels.cpu.conv_tiles import declaration, emit_prepared
from ingot.kernels.cpu.gemm_tiles import ROUNDED, ROW_BYTES, SPLIT, TileDot, pack_tiles
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Value
from ingot.kernels.cpu.tile_rows import rounded_parts
from ingot.kernels.node import Node


def _applies(node: Node, isa: Isa) -> bool:
    floats = isa.has("amx_bf16") and node.dtype == node.input(1).dtype == "float32"
    return floats and is_stem(node, ROUNDED, "float32")


@kernel("Conv", on="cpu", tolerance=SPLIT_ERROR,
        **declaration(_applies, lambda node: stem_of(node, SPLIT).maps, "plain"))  # fmt: skip
def conv_stem_split(build: KernelBuilder, node: Node, wide: int) -> None:
    """float32 as the sum of two bfloat16 numbers."""
    _emit(build, node, SPLIT, wide)


@kernel("Conv", on="cpu", tolerance=BFLOAT16_ERROR,
        **declaration(_applies, lambda node: stem_of(node, ROUNDED).maps, "plain"))  # fmt: skip
def conv_stem_rounded(build: KernelBuilder, node: Node, wide: int) -> None:
    """float32 rounded to bfloat16, sums in float32."""
    _emit(build, node, ROUNDED, wide)


def _emit(build: KernelBuilder, node: Node, dot: TileDot, wide: int) -> None:
    stem, weight = stem_of(node, dot), node.input(1).constant
    assert weight is not None
    prepared = prepare(build, stem, lambda f, read, write: _row(f, stem, read, write),
                       lambda f, write: _zero(f, stem, write, range(stem.length)))  # fmt: skip
    packed = build.pack(pack_tiles(spread(weight, stem), dot, wide))
    emit_prepared(build, Job(stem.maps, wide, packed, None, epilogue_of(build, node, 2)), prepared)


def _row(f: PhaseFunction, stem: Stem, read: Value, write: Value) -> None:
    """A row of the input between its padding, channels side by side."""
    size, area = size_of(stem.columns.input), size_of(stem.rows.input) * size_of(stem.columns.input)
    begin, whole = stem.columns.begin, size // LANES * LANES

    def vector(x: Value, mask: Value | None) -> None:
        channels = []
        for channel in range(stem.inputs):
            there = f.at(read, channel * area * 4 + x * 4)
            numbers = f.load("<16 x float>", there) if mask is None else f.load_masked("<16 x float>", there, mask, 0)
            channels.append(rounded_parts(f, stem.dot, numbers))
        for part, words in enumerate(zip(*channels, strict=True)):
            target = f.at(write, (x + begin) * stem.position + part * stem.part_bytes)
            for half, joined in enumerate(_side_by_side(f, words)):
                f.store(joined, target, half * ROW_BYTES, align=stem.position)

    _zero(f, stem, write, range(begin))
    f.loop(0, whole, lambda x: vector(x, None), step=LANES)
    if size > whole:
        vector(f.index(whole), f.first_lanes(size - whole, LANES))
    _zero(f, stem, write, range(begin + -(-size // LANES) * LANES, stem.length))


def _side_by_side(f: PhaseFunction, words: tuple[Value, ...]) -> tuple[Value, Value]:
    """Up to four vectors of 16 positions → two of 8 positions × 4 channels."""
    wide = [f.cast("zext", f.bitcast(word, "<16 x i16>"), "i32") for word in words]
    pairs = [f.constant("<16 x i32>", 0)] * 2
    for channel, word in enumerate(wide):
        shifted = f.binary("shl", word, 16) if channel % 2 else word
        pairs[channel // 2] = f.binary("or", pairs[channel // 2], shifted)
    low, high = ([lane for i in range(8) for lane in (first + i, 16 + first + i)] for first in (0, 8))
    return f.shuffle(pairs[0], pairs[1], low), f.shuffle(pairs[0], pairs[1], high)


def _zero(f: PhaseFunction, stem: Stem, write: Value, columns: range) -> None:
    """Padding: zeros in all parts of these columns."""
    nothing = f.constant("i64", 0)

    def column(x: Value) -> None:
        for part in range(stem.dot.parts):
            f.store(nothing, write, x * stem.position + part * stem.part_bytes, align=stem.position)

    if len(columns):
        f.loop(columns.start, columns.stop, column)
