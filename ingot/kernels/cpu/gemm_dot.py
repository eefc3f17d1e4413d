"""How products are summed in registers: the dtypes of both sides in memory, the instruction that adds a step of K."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Function, Index, Value, lanes_of, vector
from ingot.kernels.cpu.render import MEMORY, load, register_element, widen

Product = Callable[[Function, Value, Value, Value], Value]
SHORT = ("int8", "uint8")
NARROW = ("float16", "bfloat16")
WORDS = ("int32", "uint32", "int64", "uint64", "int16", "uint16")


@dataclass(frozen=True)
class Dot:
    """`sums += left · right` over `group` values of K at a time.

    left: dtype x must have in memory, its rows padded to whole groups. right: dtype of packed weights. result: dtype of
    the sums, `lanes` to a vector. Groups of more than one value take 32 bits on either side.
    """

    left: str
    right: str
    result: str
    lanes: int
    product: Product
    group: int = 1
    cycles: float = 0.5  # a product takes of a core, others of its kind following

    @property
    def sums(self) -> str:
        """LLVM type of a vector of sums."""
        return vector(register_element(self.result), self.lanes)

    @property
    def sum_bytes(self) -> int:
        """Bytes of a vector of sums."""
        return self.lanes * size_of(self.result)

    @property
    def left_bytes(self) -> int:
        """Bytes of one step of a row of x."""
        return self.group * size_of(self.left)

    @property
    def right_bytes(self) -> int:
        """Bytes of one step of a vector of weights."""
        return self.lanes * self.group * size_of(self.right)

    def broadcast(self, f: Function, pointer: Value, offset: Index) -> Value:
        """A step of x in every lane."""
        if self.group > 1:
            return f.splat(f.load("i32", pointer, offset, align=1), self.lanes)
        return widen(f, f.splat(f.load(MEMORY[self.left], pointer, offset), self.lanes), self.left)

    def weights(self, f: Function, pointer: Value, offset: Index) -> Value:
        """A step of a vector of packed weights."""
        if self.group > 1:
            return f.load(vector("i32", self.lanes), pointer, offset)
        return load(f, self.right, pointer, offset, self.lanes)


def dot_for(dtype: str, isa: Isa) -> Dot | None:
    """The general way to multiply two operands of a dtype; None where there is none."""
    if dtype in ("float32", "float64"):
        return Dot(dtype, dtype, dtype, lanes_for(dtype, isa), _fused)
    if dtype in NARROW:
        return Dot("float32", dtype, "float32", isa.lanes, _fused)
    if dtype in SHORT:
        return Dot("int16", "int16", "int32", isa.lanes, _pairs_of_words, 2, 0.5 if isa.has("avx512_vnni") else 1.0)
    if dtype in WORDS:
        return Dot(dtype, dtype, dtype, lanes_for(dtype, isa), _integer)
    return None


def vnni_dot(isa: Isa) -> Dot:
    """uint8 x by int8 weights, four at a time, exactly (AVX512-VNNI)."""
    return Dot("uint8", "int8", "int32", isa.lanes, _quads_of_bytes, 4)


def bfloat16_dot(isa: Isa) -> Dot:
    """Pairs of bfloat16 into float32 (AVX512-BF16); subnormal numbers count as zero."""
    # Processors that multiply bfloat16 by tiles do it slowly by vectors (Sapphire Rapids: half of float32's speed).
    cycles = 2.0 if isa.has("amx_bf16") else 0.5
    return Dot("bfloat16", "bfloat16", "float32", isa.lanes, _pairs_of_bfloat16, 2, cycles)


def lanes_for(dtype: str, isa: Isa) -> int:
    """Numbers of a dtype per vector register, counting those narrower than 32 bits as 32."""
    return isa.lanes * 4 // max(size_of(dtype), 4)


def _fused(f: Function, x: Value, weights: Value, sums: Value) -> Value:
    return f.fma(x, weights, sums)


def _integer(f: Function, x: Value, weights: Value, sums: Value) -> Value:
    return x * weights + sums


def _pairs_of_words(f: Function, x: Value, weights: Value, sums: Value) -> Value:
    lanes = lanes_of(sums.type)
    name = "llvm.x86.avx512.pmaddw.d.512" if lanes == 16 else "llvm.x86.avx2.pmadd.wd"
    words = vector("i16", 2 * lanes)
    return f.intrinsic(name, sums.type, f.bitcast(x, words), f.bitcast(weights, words)) + sums


def _quads_of_bytes(f: Function, x: Value, weights: Value, sums: Value) -> Value:
    return f.intrinsic("llvm.x86.avx512.vpdpbusd.512", sums.type, sums, x, weights)


def _pairs_of_bfloat16(f: Function, x: Value, weights: Value, sums: Value) -> Value:
    pairs = "<32 x bfloat>"
    return f.intrinsic(
        "llvm.x86.avx512bf16.dpbf16ps.512", sums.type, sums, f.bitcast(x, pairs), f.bitcast(weights, pairs)
    )
