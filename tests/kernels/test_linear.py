"""Linear kernels against numpy: every dtype, epilogues, tails of all three extents, run-time rows, zero points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.dtypes import numpy_dtype
from ingot.kernels import candidates
from ingot.kernels.cpu.build import KernelBuilder
from ingot.kernels.cpu.compile import assembly
from ingot.kernels.cpu.isa import AVX512, BEST_FIRST
from ingot.kernels.cpu.standalone import Standalone
from ingot.kernels.node import Node, Port
from ingot.runtime.machine import cpu_features
from tests.kernels.harness import check, isas, node_of

Array = np.ndarray[Any, Any]
FEW = settings(max_examples=8, deadline=None, derandomize=True)
FAST = (("uint8", "avx512_vnni", "linear_vnni"), ("bfloat16", "avx512_bf16", "linear_bfloat16"))
RELU = "Add %0 %1 -> {0}; Relu $0 -> {0}"
QUANTIZE = (
    "Cast %0 -> float32; Mul $0 %1 -> float32; Add $1 %2 -> float32; Relu $2 -> float32; Quantize $3 0.37 7 -> {0}"
)


def drawn(seed: int, shape: Sequence[int], dtype: str) -> Array:
    """Numbers of a dtype whose products stay moderate; 8-bit ones use their whole range."""
    rng = np.random.default_rng(seed)
    if dtype in ("int8", "uint8"):
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max + 1, shape).astype(dtype)
    if dtype.startswith(("int", "uint")):
        return rng.integers(0 if dtype[0] == "u" else -9, 10, shape).astype(dtype)
    return rng.standard_normal(shape).astype(numpy_dtype(dtype))


def tolerance(dtype: str) -> float:
    return {"float16": 4e-3, "bfloat16": 3e-2, "float64": 1e-10}.get(dtype, 1e-4)


def run(
    x: Array, weight: Array, extras: Sequence[Array] = (), epilogue: str = "", limit: int = 3, **attributes: int
) -> None:  # fmt: skip
    inputs = [x, weight, *extras]
    vectors = [i for i, a in enumerate(inputs) if i >= 2 and a.ndim == 1]
    node, expected = node_of("Linear", inputs, attributes, epilogue, constants=[1, *vectors])
    allowed = tolerance(expected[0].dtype.name)
    scale = float(np.abs(expected[0].astype(np.float64)).max(initial=0))
    check(node, inputs, expected, rtol=allowed, atol=allowed * max(scale, 1.0), limit=limit)


@FEW
@given(st.integers(1, 40), st.integers(1, 150), st.integers(1, 90), st.integers(0, 999))
def test_float32(rows: int, columns: int, depth: int, seed: int) -> None:
    x, weight = drawn(seed, (rows, depth), "float32"), drawn(seed + 1, (depth, columns), "float32")
    run(x, weight, [drawn(seed + 2, (columns,), "float32")], RELU.format("float32"), limit=6)


@pytest.mark.parametrize("shape", [(5,), (0, 5), (3, 0), (2, 3, 5), (2, 0, 5), (1, 1, 2, 5)])
def test_ranks_and_empty_extents(shape: tuple[int, ...]) -> None:
    run(drawn(1, shape, "float32"), drawn(2, (shape[-1], 7), "float32"))


def test_no_columns() -> None:
    run(drawn(1, (3, 4), "float32"), drawn(2, (4, 0), "float32"))


@pytest.mark.parametrize("rows", [1, 3, 14, 31])
@pytest.mark.parametrize("columns", [32, 41])
def test_depth_in_blocks(rows: int, columns: int) -> None:
    x, weight = drawn(3, (rows, 1027), "float32"), drawn(4, (1027, columns), "float32")
    run(x, weight, [drawn(5, (rows, columns), "float32")], RELU.format("float32"), limit=4)


@pytest.mark.parametrize("rows", [1023, 1100])
def test_more_rows_than_pass_a_panel_at_once(rows: int) -> None:
    x, weight = drawn(3, (rows, 9), "float32"), drawn(4, (9, 70), "float32")
    run(x, weight, [drawn(5, (rows, 70), "float32")], RELU.format("float32"))


@pytest.mark.parametrize(("rows", "tactic"), [(126, "rows=14, vectors=2"), (128, "rows=8, vectors=3")])
def test_sums_stay_in_registers(rows: int, tactic: str) -> None:
    """Compiling needs no such machine, so this holds for AVX-512 wherever it runs."""
    x, weight = drawn(1, (rows, 64), "float32"), drawn(2, (64, 96), "float32")
    node, _ = node_of("Linear", [x, weight], constants=[1])
    candidate = next(c for c in candidates(node, "cpu", AVX512) if tactic in c.label)
    build = KernelBuilder(node, AVX512)
    candidate.kernel.generate(build, node, **candidate.tactic)
    lines = assembly(build.text(), AVX512).splitlines()
    assert sum("vfmadd" in line for line in lines) >= 24
    assert not [line for line in lines if "zmm" in line and "rsp" in line]


@pytest.mark.parametrize("epilogue", [
    "",
    "Mul %0 %1 -> float32; Add $0 %2 -> float32; Add $1 %3 -> float32",
    "Add %0 %2 -> float32; Gelu $0 -> float32; Mul $1 %3 -> float32; Add $2 %1 -> float32",
    "Add %0 %2 -> float32; Sigmoid $0 -> float32; Mul $0 $1 -> float32; Less $2 %3 -> bool",
])  # fmt: skip
def test_epilogues(epilogue: str) -> None:
    extras = [drawn(6, (1,), "float32"), drawn(7, (37,), "float32"), drawn(8, (2, 9, 37), "float32")]
    run(drawn(9, (2, 9, 20), "float32"), drawn(10, (20, 37), "float32"), extras if epilogue else (), epilogue)


def test_epilogue_vector_that_varies() -> None:
    x, weight, bias = drawn(1, (5, 8), "float32"), drawn(2, (8, 35), "float32"), drawn(3, (35,), "float32")
    node, expected = node_of("Linear", [x, weight, bias], {}, RELU.format("float32"), constants=[1])
    check(node, [x, weight, bias], expected)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "int32", "uint32", "int64", "uint64"])
@settings(FEW, max_examples=3)
@given(rows=st.integers(1, 20), columns=st.integers(1, 70), depth=st.integers(1, 70))
def test_dtypes(dtype: str, rows: int, columns: int, depth: int) -> None:
    x, weight = drawn(rows, (rows, depth), dtype), drawn(depth, (depth, columns), dtype)
    run(x, weight, [drawn(columns, (columns,), dtype)], RELU.format(dtype), limit=2)
    run(x, weight, limit=2)


@pytest.mark.parametrize("weight_dtype", ["int8", "uint8"])
@pytest.mark.parametrize("x_dtype", ["int8", "uint8"])
@settings(FEW, max_examples=4)
@given(rows=st.integers(1, 20), columns=st.integers(1, 70), depth=st.integers(1, 70), zeros=st.booleans())
def test_bytes(x_dtype: str, weight_dtype: str, rows: int, columns: int, depth: int, zeros: bool) -> None:
    x, weight = drawn(rows, (rows, depth), x_dtype), drawn(depth, (depth, columns), weight_dtype)
    points = {"x_zero_point": 11, "weight_zero_point": 3 if weight_dtype == "int8" else 131} if zeros else {}
    run(x, weight, limit=4, **points)
    scales, bias = np.full(columns, 0.001, np.float32), drawn(1, (columns,), "float32")
    run(x, weight, [scales, bias], QUANTIZE.format(x_dtype), limit=4, **points)


@pytest.mark.parametrize("dtype", ["float32", "uint8", "bfloat16"])
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 13, 14, 15, 29, 230])
def test_rows_known_at_run_time(dtype: str, rows: int) -> None:
    weight = drawn(2, (300, 50), dtype)
    x = drawn(3, (rows, 300), dtype)
    bound, expected = node_of("Linear", [x, weight], {"x_zero_point": 0, "weight_zero_point": 0}, constants=[1])
    ports = (Port(dtype, ("N", 300)), bound.inputs[1])
    node = Node("Linear", ports, (Port(expected[0].dtype.name, ("N", 50)),), bound.attributes)
    for isa in isas():
        for candidate in [*candidates(node, "cpu", isa)][::4]:
            alone = Standalone(node, candidate, isa, {"N": rows}, level=1)
            result = alone(x, weight, chunks=2)[0].astype(np.float64)
            np.testing.assert_allclose(result, expected[0].astype(np.float64), rtol=tolerance(dtype), atol=0.2)


def test_faster_instructions_come_as_candidates() -> None:
    for isa in (isa for isa in BEST_FIRST if isa.machine <= cpu_features()):
        for dtype, feature, name in FAST:
            x, weight = drawn(1, (8, 64), dtype), drawn(2, (64, 64), dtype)
            node, _ = node_of("Linear", [x, weight], constants=[1])
            names = {candidate.kernel.name for candidate in candidates(node, "cpu", isa)}
            assert (name in names) == isa.has(feature), (isa.name, names)


def test_few_candidates() -> None:
    for rows, columns, depth in ((1, 1000, 2048), (128, 768, 768), (128, 768, 3072), (4096, 4096, 4096)):
        x = Port("float32", (rows, depth))
        weight = Port("float32", (depth, columns), np.zeros((depth, columns), np.float32))
        node = Node("Linear", (x, weight), (Port("float32", (rows, columns)),))
        for isa in isas():
            assert 0 < len([*candidates(node, "cpu", isa)]) <= 24
