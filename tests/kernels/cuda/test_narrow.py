"""float8 and int8: products whose epilogue quantizes, and what is quantized between layers."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ingot.kernels import candidates
from ingot.kernels.cuda.architecture import architecture
from tests.kernels.cuda.harness import check
from tests.kernels.harness import node_of

Array = np.ndarray[Any, Any]
FLOAT8 = ml_dtypes.float8_e4m3fn
BEGIN = "Cast %0 -> float32; Mul $0 0.01 -> float32; Add $1 %1 -> float32; Gelu $2 -> float32"
ENDS = {"float8": "Quantize $3 0.01 0.0 -> float8_e4m3fn", "float16": "Cast $3 -> float16"}


def drawn(*shape: int, dtype: Any = np.float16, scale: float = 1.0) -> Array:
    return (np.random.default_rng(shape[0]).standard_normal(shape) * scale).astype(dtype)


@pytest.mark.parametrize("end", ENDS)
def test_a_linear_of_float8(end: str) -> None:
    inputs = [drawn(40, 128, dtype=FLOAT8), drawn(128, 64, dtype=FLOAT8, scale=4), drawn(64, dtype=np.float32)]
    node, expected = node_of("Linear", inputs, {}, f"{BEGIN}; {ENDS[end]}", constants=(1, 2))
    step = 0.13 if end == "float8" else 2e-2
    assert check(node, inputs, expected, rtol=step, atol=2e-2, limit=2)


@pytest.mark.parametrize("shape", [(3, 5, 7, 11), (600,)])
def test_quantizing(shape: tuple[int, ...]) -> None:
    x = drawn(*shape, scale=3)
    node, expected = node_of("Pointwise", [x], {}, "Cast %0 -> float32; Quantize $0 0.005 0.0 -> float8_e4m3fn")
    assert check(node, [x], expected, rtol=0, atol=0)


def test_what_attention_gives_is_quantized_where_it_lies() -> None:
    node, _ = node_of("Pointwise", [drawn(2, 3, 8, 16)], {}, "Cast %0 -> float32; Quantize $0 0.05 0 -> int8")
    found = [c.ports.inputs for c in candidates(node, "cuda", architecture("sm_90"))]
    assert ("heads_inside",) in found


QUANTIZE = "Cast %0 -> float32; Quantize $0 {} 0 -> {}"
NORM = {"kind": "layer", "axis": 2, "groups": 1, "epsilon": 1e-5}


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_a_norm_and_what_it_is_quantized_to(dtype: str) -> None:
    inputs = [drawn(2, 7, 96), drawn(96), drawn(96)]
    node, expected = node_of("NarrowNorm", inputs, {**NORM, "narrow": QUANTIZE.format(0.05, dtype)}, constants=(1, 2))
    assert [y.dtype.name for y in expected] == ["float16", dtype]
    assert check(node, inputs, expected, rtol=0.13, atol=1.01 if dtype == "int8" else 2e-2)


def test_attention_that_quantizes_its_result() -> None:
    inputs = [drawn(2, 3, 20, 32), drawn(2, 3, 24, 32), drawn(2, 3, 24, 32), drawn(2, 1, 1, 24)]
    settings = {"scale": 0.2, "causal": 0, "softcap": 0.0}
    node, expected = node_of("NarrowAttention", inputs, settings, QUANTIZE.format(0.01, "float8_e4m3fn"))
    assert expected[0].dtype == FLOAT8
    assert check(node, inputs, expected, rtol=0.13, atol=2e-2, limit=3)


def test_joined_products_of_float8() -> None:
    inputs = [drawn(20, 64, dtype=FLOAT8), drawn(64, 40, dtype=FLOAT8), drawn(40, dtype=np.float32)]
    attributes = {"sizes": (24, 16), "scale": 0.01, "dtype": "float16"}
    node, expected = node_of("ParallelLinear", inputs, attributes, constants=(1, 2))
    assert [y.dtype.name for y in expected] == ["float16"] * 2
    assert check(node, inputs, expected, rtol=2e-2, atol=2e-2, limit=2)
