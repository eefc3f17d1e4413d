"""QuantizedLinear: weights of four or eight bits stay so in memory; x is float32.

Few rows wait for the weights' bytes, so that what is done with them matters little: x becomes integers of 15 bits, a
scale for each block along K, and products are summed as integers. Many rows go through tile registers where there are
any: as bytes where rounding is allowed, else as bfloat16 in two parts.
"""

from __future__ import annotations

from math import lcm
from typing import Any

from ingot.config import BFLOAT16_ERROR, SPLIT_ERROR
from ingot.kernels import kernel
from ingot.kernels.cpu.build import KernelBuilder
from ingot.kernels.cpu.gemm_epilogue import can_finish, epilogue_of
from ingot.kernels.cpu.gemm_plan import GIGAHERTZ, known
from ingot.kernels.cpu.gemm_tiles import BYTES, HALVED, SPLIT, TileDot
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.linear import rows_of
from ingot.kernels.cpu.tile_rows import tile_rows
from ingot.kernels.cpu.weight_only_byte_tiles import multiply_bytes
from ingot.kernels.cpu.weight_only_byte_unpack import blocks_fit
from ingot.kernels.cpu.weight_only_bytes import BLOCK
from ingot.kernels.cpu.weight_only_pack import digits_for, pack_words, weights_of
from ingot.kernels.cpu.weight_only_product import TALLEST, multiply_rows, packed
from ingot.kernels.cpu.weight_only_rows import integer_rows
from ingot.kernels.cpu.weight_only_tiles import multiply_tiles
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

EXTRAS = 4  # the inputs before the epilogue's operands
_VECTORS = (4, 2, 1)
_MOST_STREAMED = 32  # rows that may be faster without tiles
_BYTES_PER_MICROSECOND = 20_000
_TILE_CYCLES, _UNPACK_CYCLES = 18, 26  # a product of tiles; 64 bytes of tiles made of weights
_LOOKUP_CYCLES, _SCALE_CYCLES = 8, 16  # the same where they are not scaled; 16 rows of sums scaled afterwards
_BLOCK_CYCLES = 280  # 32 rows by 32 columns by 128 of K in bytes, scaled
_PROMPT = 512  # rows where only the run knows how many there are: tiles are for prompts


def _applies(node: Node, isa: Isa) -> bool:
    weight, scale, bits = node.input(1), node.input(2), node.attributes["bits"]
    constants = [weight, scale, *([node.input(3)] if node.has_input(3) else [])]
    if node.dtype != "float32" or bits not in (4, 8) or any(port.constant is None for port in constants):
        return False
    depth = weight.shape[0]
    grouped = node.attributes["group"] >= depth or node.attributes["group"] % 8 == 0
    return isa.triple.startswith("x86") and grouped and weight.elements != 0 and can_finish(node, "float32", EXTRAS)


def _vectors(node: Node, isa: Isa) -> tuple[int, ...]:
    columns = int(node.input(1).shape[1])
    return tuple(v for v in _VECTORS if v == 1 or (v // 2) * isa.lanes < columns)


def _streams(node: Node, isa: Isa) -> bool:
    """Whether the kernel without tiles is worth having."""
    rows = rows_of(node)
    return _applies(node, isa) and (not isa.has("amx_bf16") or (isinstance(rows, int) and rows <= _MOST_STREAMED))


def _tiled(node: Node, isa: Isa) -> bool:
    rows = rows_of(node)
    return _applies(node, isa) and isa.has("amx_bf16") and (isinstance(rows, str) or rows > TALLEST)


def _in_bytes(node: Node, isa: Isa) -> bool:
    depth = int(node.input(1).shape[0])
    return _tiled(node, isa) and isa.has("amx_int8") and blocks_fit(int(node.attributes["group"]), depth)


def split_dot(node: Node) -> TileDot:
    """How products with x in two parts are made: weights are exact in one where their scale can wait, as all of a
    tile have it in common."""
    group = node.attributes["group"]
    return HALVED if group >= node.input(1).shape[0] or group % HALVED.depth == 0 else SPLIT


def _bytes(node: Node) -> float:
    return float(node.input(1).shape[0] * node.input(1).shape[1]) * int(node.attributes["bits"]) / 8  # type: ignore[operator]


def _stream_cost(node: Node, isa: Isa, vectors: int) -> float:
    """Microseconds on one core."""
    rows, (depth, columns) = known(rows_of(node)), node.input(1).shape
    digits = digits_for(int(node.attributes["bits"]), isa)
    tiles, height = -(-rows // TALLEST), min(rows, TALLEST)
    words = float(depth * columns) / digits.count / isa.lanes  # type: ignore[operator]
    products = digits.fields * (1 + height * 16 // digits.unit / 2)
    cycles = tiles * words * (1 + products) * (1 + 0.05 * (4 - vectors))
    return 1 + max(cycles / (GIGAHERTZ * 1000), _bytes(node) / _BYTES_PER_MICROSECOND)


def _split_cost(node: Node, isa: Isa, vectors: int) -> float:
    """Microseconds on one core."""
    dot, rows, (depth, columns) = split_dot(node), _tiled_rows(node), node.input(1).shape
    steps, panels = -(-int(depth) // dot.depth), -(-int(columns) // 16)
    lines = _LOOKUP_CYCLES if dot.exact else dot.parts * _UNPACK_CYCLES
    scaled = _SCALE_CYCLES * dot.depth / max(int(node.attributes["group"]), dot.depth) if dot.exact else 0
    product = len(dot.products) * _TILE_CYCLES + scaled
    return _priced(node, vectors, steps * panels * (16 * lines + -(-rows // 16) * product))


def _byte_cost(node: Node, isa: Isa, vectors: int) -> float:
    """Microseconds on one core."""
    rows, (depth, columns) = _tiled_rows(node), node.input(1).shape
    blocks = -(-int(depth) // BLOCK) * -(-int(columns) // 32)
    return _priced(node, vectors, blocks * (4 * _BLOCK_CYCLES + -(-rows // 32) * _BLOCK_CYCLES))


def _tiled_rows(node: Node) -> int:
    rows = known(rows_of(node))
    return rows if rows > TALLEST else _PROMPT


def _priced(node: Node, vectors: int, cycles: float) -> float:
    prepared = _tiled_rows(node) * int(node.input(1).shape[0]) * 4 / 30_000
    odd = 1.1 if vectors == 1 else 1.0
    return 2 + prepared + max(cycles * odd / (GIGAHERTZ * 1000), _bytes(node) / _BYTES_PER_MICROSECOND)


def _declared(applies: Any, price: Any) -> dict[str, Any]:
    return {"when": applies, "cost": price, "space": {"vectors": _vectors}}


@kernel("QuantizedLinear", on="cpu", **_declared(_streams, _stream_cost), tolerance=SPLIT_ERROR)
def weight_only(build: KernelBuilder, node: Node, vectors: int) -> None:
    """x in integers of 15 bits, products in integers."""
    _emit(build, node, vectors, None)


@kernel("QuantizedLinear", on="cpu", **_declared(_tiled, _split_cost), tolerance=SPLIT_ERROR)
def weight_only_split(build: KernelBuilder, node: Node, vectors: int) -> None:
    """Many rows by tiles, x in two bfloat16 parts, weights as the integers they are, or in two parts too where a tile
    takes them of several groups; few as in weight_only."""
    _emit(build, node, vectors, split_dot(node))


@kernel("QuantizedLinear", on="cpu", **_declared(_in_bytes, _byte_cost), tolerance=BFLOAT16_ERROR,
        instead_of=("weight_only_split",))  # fmt: skip
def weight_only_rounded(build: KernelBuilder, node: Node, vectors: int) -> None:
    """Many rows by tiles of bytes: x rounded to eight bits, 2^-8 of the largest number of a block of 128, and so are
    weights of several groups a block; few as in weight_only. Never slower than weight_only_split, which few rows
    cannot tell it from: only they are timed where the run alone knows how many there are."""
    _emit(build, node, vectors, BYTES)


def _emit(build: KernelBuilder, node: Node, vectors: int, dot: TileDot | None) -> None:
    """Phases for few rows, for many, or for both where only the run knows how many there are."""
    weights, rows = weights_of(node), rows_of(node)
    digits = digits_for(weights.bits, build.isa)
    words = pack_words(weights, digits, vectors * build.isa.lanes, lcm(weights.block, BLOCK if dot is BYTES else 32))
    stored = packed(build, weights, build.pack(words), words.shape[1], vectors)
    epilogue = epilogue_of(build, node, "float32", build.isa.lanes, EXTRAS)
    if dot is None or isinstance(rows, str):
        count, runs = (rows, 1) if dot is None else (_few(rows), _few(rows, 1))
        most = rows if dot is None else f"min({rows},{TALLEST})"
        integers = integer_rows(build, weights, digits, count, most)
        multiply_rows(build, weights, digits, stored, integers, rows, epilogue, runs)
    if dot is None:
        return
    count, runs = (rows, 1) if isinstance(rows, int) else (_many(rows), _many(rows, 1))
    if dot is BYTES:
        multiply_bytes(build, weights, digits, stored, rows, count, epilogue, runs)
        return
    x = tile_rows(build, 0, count, weights.depth, dot, apart=True)
    multiply_tiles(build, weights, digits, stored, dot, x, rows, epilogue, runs)


def _few(rows: Extent, value: Extent | None = None) -> Extent:
    """The rows (or `value`) where there are at most TALLEST of them, else 0."""
    return product((rows if value is None else value, f"min(max({TALLEST + 1}-({rows}),0),1)"))


def _many(rows: Extent, value: Extent | None = None) -> Extent:
    """The rows (or `value`) where there are more than TALLEST of them, else 0."""
    return product((rows if value is None else value, f"min(max(({rows})-{TALLEST},0),1)"))
