"""Experts against their meaning: drawn counts, widths and tokens; shares of all or of the chosen."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.harness import check, node_of

SILU = "Sigmoid %0 -> float32; Mul %0 $0 -> float32"


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**31), st.integers(0, 5), st.sampled_from([(1, 1), (4, 2), (9, 9)]), st.sampled_from([1, 20, 64]),
    st.sampled_from([1, 64, 70]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_experts(seed: int, tokens: int, counts: tuple[int, int], width: int, inner: int, normalised: bool,
                 narrow: bool) -> None:  # fmt: skip
    rng, (count, chosen) = np.random.default_rng(seed), counts
    shapes = [(tokens, width), (tokens, count), (count, width, inner), (count, width, inner), (count, inner, width)]
    inputs = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    if narrow:
        inputs[2:] = [weight.astype(ml_dtypes.bfloat16) for weight in inputs[2:]]
    attributes = {"chosen": chosen, "normalised": int(normalised), "activation": SILU}
    node, expected = node_of("Experts", inputs, attributes, constants=(2, 3, 4))
    check(node, inputs, expected, rtol=1e-3, atol=1e-3 * inner**0.5 * width**0.5)
