"""What one core can do at most, measured by generated loops that keep everything in registers, or only read memory.

    python -m benchmarks.peaks
"""

import ctypes
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from benchmarks.timing import milliseconds
from ingot.kernels.cpu.compile import compile_object
from ingot.kernels.cpu.gemm_tiles import configuration
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.link import link
from ingot.kernels.cpu.llvm import Function, Value, module, vector
from ingot.kernels.cpu.standalone import native_isa
from ingot.runtime.buffers import Array, address_of, aligned_bytes
from ingot.runtime.image import Image

STEPS, REPEATS = 100_000, 15
READ_BYTES = 64 << 20  # beyond the private caches: what weights are read from
_TILE_BYTES = 1024


@dataclass(frozen=True)
class Peaks:
    """Operations (a multiplication and an addition are two) per microsecond of one core, and bytes read."""

    operations: dict[str, float]
    bytes: float


def _fma(f: Function, isa: Isa) -> None:
    """As many independent sums as the registers hold beside two factors."""
    type_ = vector("float", isa.lanes)
    x, y = (f.load(type_, f["data"], i * isa.lanes * 4) for i in range(2))
    sums = [f.constant(type_, 0.0)] * _sums(isa)
    done = f.loop(0, f["count"], lambda _, *state: [f.fma(x, y, s) for s in state], sums)
    for i, total in enumerate(done):
        f.store(total, f["data"], (2 + i) * isa.lanes * 4)


def _sums(isa: Isa) -> int:
    return isa.registers - 4


def _quads(f: Function, isa: Isa) -> None:
    """The same with four bytes for each float: products of bytes summed in int32 (VNNI)."""
    type_ = vector("i32", isa.lanes)
    x, y = (f.load(type_, f["data"], i * isa.lanes * 4) for i in range(2))
    name, sums = "llvm.x86.avx512.vpdpbusd.512", [f.constant(type_, 0)] * _sums(isa)
    done = f.loop(0, f["count"], lambda _, *state: [f.intrinsic(name, type_, s, x, y) for s in state], sums)
    for i, total in enumerate(done):
        f.store(total, f["data"], (2 + i) * isa.lanes * 4)


def _tiles(instruction: str) -> Callable[[Function, Isa], None]:
    def emit(f: Function, isa: Isa) -> None:
        """Four sums by two tiles of rows and two of weights, as the kernels have them."""

        def number(register: int) -> Value:
            return Value(f, "i8", str(register))

        f.intrinsic("llvm.x86.ldtilecfg", "void", f["data"])
        for register in range(4, 8):
            place = f.at(f["data"], 64 + (register - 4) * _TILE_BYTES)
            f.intrinsic("llvm.x86.tileloadd64", "void", number(register), place, f.index(64))
        for register in range(4):
            f.intrinsic("llvm.x86.tilezero", "void", number(register))

        def step(_: Value) -> None:
            for i in range(4):
                f.intrinsic(f"llvm.x86.{instruction}", "void", number(i), number(4 + i // 2), number(6 + i % 2))

        f.loop(0, f["count"], step)
        f.intrinsic("llvm.x86.tilerelease", "void")

    return emit


def _read(f: Function, isa: Isa) -> None:
    """A maximum over all of it, four vectors a step."""
    type_ = vector("i32", isa.lanes)
    size = isa.lanes * 4

    def step(i: Value, *state: Value) -> list[Value]:
        place = f.at(f["data"], i * (4 * size))
        return [f.binary("or", s, f.load(type_, place, k * size)) for k, s in enumerate(state)]

    for k, total in enumerate(f.loop(0, f["count"], step, [f.constant(type_, 0)] * 4)):
        f.store(total, f["data"], k * size)


def _compiled(emit: Callable[[Function, Isa], None], isa: Isa) -> Callable[[int, int], object]:
    f = Function("peak", (("ptr", "data"), ("i64", "count")))
    emit(f, isa)
    code, exported = link([compile_object(module([f], isa.attributes), isa)])
    image = Image(code, exported)
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(image.address("peak"))
    function.image = image  # type: ignore[attr-defined]  # the code lives as long as the function
    return function


def _fastest(function: Callable[[int, int], object], data: Array, count: int) -> float:
    """Microseconds of the best of several runs: what the machine can do undisturbed."""
    return min(milliseconds(lambda: function(address_of(data), count)) for _ in range(REPEATS)) * 1e3


def _operands(dtype: str) -> Array:
    """Numbers that are no zeros: those heat less, and the clock rises."""
    data = aligned_bytes(64 + 8 * _TILE_BYTES)
    random = np.random.default_rng(0)
    if dtype == "bfloat16":
        bits = random.uniform(0.5, 1.0, (data.size - 64) // 2).astype(np.float32).view(np.uint32) >> 16
        data[64:] = bits.astype(np.uint16).view(np.uint8)
    else:
        data[64:] = random.integers(1, 128, data.size - 64)
    data[:64] = configuration()
    return data


def peaks(isa: Isa) -> Peaks:
    """All that the instruction set has."""
    floats = aligned_bytes(64 * isa.lanes * 4)
    floats.view(np.float32)[: 2 * isa.lanes] = np.random.default_rng(0).uniform(0.5, 1.0, 2 * isa.lanes)
    found = {"fma": 2 * isa.lanes * _sums(isa) * STEPS / _fastest(_compiled(_fma, isa), floats, STEPS)}
    if isa.has("avx512_vnni"):
        found["vnni"] = 4 * 2 * isa.lanes * _sums(isa) * STEPS / _fastest(_compiled(_quads, isa), floats, STEPS)
    for feature, name, instruction, depth in _TILE_PRODUCTS:
        if isa.has(feature):
            time = _fastest(_compiled(_tiles(instruction), isa), _operands(name), STEPS // 10)
            found[f"tiles {name}"] = 4 * 2 * 16 * 16 * depth * (STEPS // 10) / time
    read = aligned_bytes(READ_BYTES)
    read[:] = 1
    time = _fastest(_compiled(_read, isa), read, READ_BYTES // (16 * isa.lanes))
    return Peaks({name: round(rate) for name, rate in found.items()}, round(READ_BYTES / time))


_TILE_PRODUCTS: Sequence[tuple[str, str, str, int]] = (
    ("amx_bf16", "bfloat16", "tdpbf16ps", 32),
    ("amx_int8", "uint8", "tdpbusd", 64),
)


def reading(isa: Isa, threads: int, size: int = READ_BYTES) -> Callable[[], float]:
    """A function that measures once how many bytes a microsecond `threads` threads read together, `size` each."""
    function, buffers = _compiled(_read, isa), [aligned_bytes(size) for _ in range(threads)]
    for buffer in buffers:
        buffer[:] = 1
    pool = ThreadPoolExecutor(threads)
    steps = size // (16 * isa.lanes)

    def once() -> float:
        start = time.perf_counter()
        list(pool.map(lambda buffer: function(address_of(buffer), steps), buffers))
        return threads * size / (time.perf_counter() - start) / 1e6

    return once


def describe(found: Peaks) -> str:
    rates = ", ".join(f"{name} {rate / 1e3:,.0f}" for name, rate in found.operations.items())
    return f"one core, from registers alone: {rates} GFLOP/s; reading memory {found.bytes / 1e3:.1f} GB/s"


def main() -> None:
    isa = native_isa()
    print("this machine has no instruction set Ingot generates code for" if isa is None else describe(peaks(isa)))


if __name__ == "__main__":
    main()
