"""What is allowed of sums of float8 that stay in the tensor units covers what such a unit does, as modelled."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import ingot
from benchmarks.cuda_sums import LIMIT, compared, draw, modelled
from ingot.kernels.cuda.cublaslt import fast_error
from ingot.kernels.node import Node, Port

FLOAT8 = ml_dtypes.float8_e4m3fn


def allowed(weight: np.ndarray[Any, Any]) -> float:
    ports = Port("float8_e4m3fn", (1, len(weight))), Port("float8_e4m3fn", weight.shape, weight.astype(FLOAT8))
    return fast_error(Node("Linear", ports, (Port("float16", (1, weight.shape[1])),), {}))


@pytest.mark.parametrize("depth", [64, 768, 4096])
@pytest.mark.parametrize("kind", ["both signs", "inputs of one sign", "at the limit", "one sign"])
def test_the_model_stays_within_what_is_allowed(kind: str, depth: int) -> None:
    row = compared(kind, depth, lambda x, weight: {})
    assert 0 < row["share of allowed"] <= 1


def test_weights_of_one_sign_are_not_for_fast_sums() -> None:
    limit = ingot.BuildConfig(target="cuda:sm_90", precision="fp16").tolerance
    random = np.random.default_rng(0)
    for depth in (256, 768, 3072, 16384):
        weight = random.standard_normal((depth, 64))
        assert allowed(weight) <= limit
        weight[:, 7] = np.abs(weight[:, 7])  # one column suffices
        assert allowed(weight) > limit
    assert allowed(np.zeros((64, 16))) <= limit  # columns that nothing is multiplied with


def test_drawn_weights_lean_as_far_as_is_allowed() -> None:
    _, weight = draw("at the limit", 768)
    assert 0.99 * LIMIT < allowed(weight) <= LIMIT


def test_sums_of_the_model() -> None:
    """Exact where 14 bits suffice; cut towards zero where not."""
    ones = np.ones((1, 64))
    assert modelled(ones, np.ones((64, 1))) == 64
    small = np.full((33, 1), 2.0**-7)
    small[0] = 64.0
    assert modelled(np.ones((1, 33)), small) == 64 + 31 * 2.0**-7 + 2.0**-7
    assert modelled(np.ones((1, 33)), small / 2 + math.copysign(32, 1) * (small > 1)) == 64.0
    assert modelled(np.ones((1, 33)), -small / 2 - 32 * (small > 1)) == -64.0
