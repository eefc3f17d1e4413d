"""Instruction sets the CPU kernels are generated for: vector width, features the machine must have, LLVM's words for
them."""

from __future__ import annotations

from dataclasses import dataclass

from ingot.kernels.target import Pace


@dataclass(frozen=True)
class Isa:
    """`lanes` fp32 numbers a vector; `registers` of them; `machine` features as /proc/cpuinfo spells them."""

    name: str
    lanes: int
    registers: int
    llvm_cpu: str
    llvm_features: str
    machine: frozenset[str]
    triple: str = "x86_64-unknown-linux-gnu"
    target: str = "cpu"

    def has(self, feature: str) -> bool:
        """Whether kernels may use a feature by its /proc/cpuinfo name."""
        return feature in self.machine

    @property
    def pace(self) -> Pace:
        """Of one core: one multiply-add unit at 2.6 GHz, half of two."""
        return Pace(0.5, 8000.0, 5200.0 / 2 * self.lanes, 1.0, 6000.0)

    @property
    def attributes(self) -> str:
        """LLVM function attributes of every generated function."""
        width = self.lanes * 32
        return f'nounwind "no-builtins" "prefer-vector-width"="{width}" "min-legal-vector-width"="{width}"'


_V3 = frozenset({"avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "sse4_2", "popcnt"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

AVX2 = Isa("avx2", 8, 16, "x86-64-v3", "", _V3)
AVX512 = Isa("avx512", 16, 32, "x86-64-v4", "", _V4)
AVX512_VNNI = Isa("avx512_vnni", 16, 32, "x86-64-v4", "+avx512vnni", _V4 | {"avx512_vnni"})
AVX512_BF16 = Isa(
    "avx512_bf16", 16, 32, "x86-64-v4", "+avx512vnni,+avx512bf16", _V4 | {"avx512_vnni", "avx512_bf16"}
)  # fmt: skip
AMX = Isa(
    "amx", 16, 32, "x86-64-v4", "+avx512vnni,+avx512vbmi,+avx512bf16,+amx-tile,+amx-int8,+amx-bf16",
    _V4 | {"avx512_vnni", "avx512vbmi", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"},
)  # fmt: skip

BEST_FIRST = (AMX, AVX512_BF16, AVX512_VNNI, AVX512, AVX2)
BY_NAME = {isa.name: isa for isa in BEST_FIRST}
