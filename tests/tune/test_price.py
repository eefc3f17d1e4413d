"""Estimates: finite, positive, growing with the work; each work is bound once."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ingot.kernels import candidates
from ingot.kernels.cpu.isa import AVX2, AVX512, Isa
from ingot.kernels.node import Node
from ingot.tune.price import Estimates, estimate
from tests.tune.support import entry, node, tensor, work

NOTHING = entry("no_cost")


def linear(rows: int) -> Node:
    return node("Linear", (rows, 256), (256, 128), (rows, 128), weight=np.ones((256, 128), np.float32))


def conv(extent: int) -> Node:
    weight = np.ones((64, 32, 3, 3), np.float32)
    attributes = {"strides": (1, 1), "pads": (1, 1, 1, 1), "dilations": (1, 1), "group": 1}
    return node("Conv", (1, 32, extent, extent), weight.shape, (1, 64, extent, extent), weight=weight, **attributes)


@pytest.mark.parametrize("isa", [AVX2, AVX512], ids=lambda isa: isa.name)
@pytest.mark.parametrize("make", [linear, conv])
def test_every_candidate_has_a_finite_price_that_grows(make: type, isa: Isa) -> None:
    small, large = make(16), make(64)
    pairs = list(zip(candidates(small, "cpu", isa), candidates(large, "cpu", isa), strict=False))
    assert pairs
    for a, b in pairs:
        cheap, dear = estimate(small, a, isa), estimate(large, b, isa)
        assert 0 < cheap < math.inf and (a.label != b.label or cheap < dear)


def test_a_kernel_without_a_model_costs_its_roofline() -> None:
    from ingot.kernels import Candidate

    plain = Candidate(NOTHING, {})
    moved, computed = node("Pointwise", (1 << 20,), (1 << 20,)), linear(4096)
    assert estimate(moved, plain, AVX2) == pytest.approx(0.5 + 8 * 2**20 / 8000)
    assert estimate(computed, plain, AVX2) > estimate(computed, plain, AVX512) > 100


def test_a_work_is_bound_once_at_typical_sizes() -> None:
    shapes = [tensor("x", ("N", 8)), tensor("y", ("N", 8))]
    symbolic = work("w", shapes[:1], shapes[1:], [])
    estimates = Estimates(AVX2, {"N": 12})
    assert estimates.bound(symbolic).output.shape == (12, 8) and estimates.bound(symbolic) is estimates.bound(symbolic)
