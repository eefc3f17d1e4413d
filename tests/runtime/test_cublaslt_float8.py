"""cuBLASLt's products of float8 whose sums stay in the tensor units: an approximation, offered where one is allowed;
algorithms that do without a workspace."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np

import ingot
from ingot.kernels.cuda.standalone import Standalone
from ingot.runtime import cuda
from ingot.runtime.cublaslt import Algorithm, Matmul, Product, recipe_of
from tests.kernels.harness import node_of
from tests.runtime.fake_cublaslt import FakeLt
from tests.runtime.test_cublaslt import TARGET, W, X, drawn, lt, offered

__all__ = ["lt"]
FLOAT8 = ml_dtypes.float8_e4m3fn


def test_both_ways_are_offered(lt: FakeLt) -> None:
    text = "Cast %0 -> float32; Mul $0 0.5 -> float32; Gelu $1 -> float32; Quantize $2 0.25 0.0 -> float8_e4m3fn"
    inputs = [X.astype(FLOAT8), W.astype(FLOAT8)]
    node, (expected,) = node_of("Linear", inputs, {}, text, constants=(1,))
    found = {c.kernel.name: c for c in offered(node)}
    assert set(found) == {"cublaslt_gelu", "cublaslt_swift"}
    configs = (ingot.BuildConfig(target="cuda:sm_90", precision="fp16", exact=exact) for exact in (False, True))
    allowed = [config.tolerance for config in configs]
    assert allowed[0] >= found["cublaslt_swift"].kernel.error(node) > allowed[1]
    (mine,) = Standalone(node, found["cublaslt_swift"], TARGET, cuda.context_of(cuda.select("cuda")))(*inputs)
    np.testing.assert_allclose(mine.astype(np.float32), expected.astype(np.float32), rtol=0.13, atol=2e-2)


def test_several_products_at_once(lt: FakeLt) -> None:
    inputs = [X.astype(FLOAT8), drawn(128, 192).astype(FLOAT8), drawn(192, dtype="float32")]
    attributes = {"sizes": (64,) * 3, "scale": 0.5, "dtype": "float16"}
    node, expected = node_of("ParallelLinear", inputs, attributes, constants=(1, 2))
    (found,) = {c.kernel.name: c for c in offered(node) if c.kernel.name != "cublaslt_parallel"}.values()
    mine = Standalone(node, found, TARGET, cuda.context_of(cuda.select("cuda")))(inputs[0], None, None)
    for y, wanted in zip(mine, expected, strict=True):
        np.testing.assert_allclose(y.astype(np.float32), wanted.astype(np.float32), atol=2e-2)


def test_engines_from_before_there_were_two_ways() -> None:
    product = Product("float8_e4m3fn", "float16", "float16", 64, 64, 128)
    recipe = recipe_of(product, Algorithm(130100, 0, "00"))
    del recipe["fast"]
    assert Product.of(recipe, {}) == product != replace(product, fast=True)


def test_an_algorithm_may_do_without_the_workspace_that_it_wants(lt: FakeLt) -> None:
    matmul = Matmul(cuda.context_of(cuda.select("cuda")), Product("float16", "float16", "float16", 64, 64, 128))
    refused = replace(matmul.algorithms(2)[-1], workspace=0)
    assert "wants 64 bytes for it, not 0" in matmul.accepts(refused)
    lt.frugal = True
    assert [a.workspace for a in matmul.algorithms(2)] == [0, 0, 64]
    assert not any(map(matmul.accepts, matmul.algorithms(2)))
