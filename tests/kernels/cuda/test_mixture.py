"""Mixture against its meaning: one row, a few, many; experts that nobody chooses and one that all choose; scores that
are equal, infinite or no numbers; weights of all kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.dtypes import numpy_dtype
from ingot.ir.expression import parse
from ingot.ir.ops import meaning
from ingot.kernels.cuda.architecture import architecture
from ingot.kernels.cuda.mixture_work import NORM, SCALES, X
from ingot.kernels.node import Node, Port

Array = np.ndarray[Any, Any]
SILU = "Sigmoid %0 -> float32; Mul %0 $0 -> float32"
JOINED = "Cast %1 -> float32; Add %0 $0 -> float32"
SYMBOLIC = (X, 1, 9)


def drawn(seed: int, rows: int, counts: tuple[int, int], sizes: tuple[int, int], kept: str, dtype: str,
          normed: bool = True) -> list[Array | None]:  # fmt: skip
    """A Mixture's inputs, with a residual."""
    rng, (count, _), (width, inner) = np.random.default_rng(seed), counts, sizes
    x, stream = (rng.standard_normal((rows, width)).astype(numpy_dtype(dtype)) for _ in range(2))
    shapes = [(count, width, inner), (count, width, inner), (count, inner, width)]
    weights = [(rng.standard_normal(shape) * shape[1] ** -0.5).astype(numpy_dtype(kept)) for shape in shapes]
    scales: list[Array | None] = [None] * 3
    if kept == "float8_e4m3fn":
        scales = [rng.uniform(0.5, 2, (shape[0], shape[2])).astype(numpy_dtype("bfloat16")) for shape in shapes]
    norm = rng.uniform(0.5, 1.5, width).astype(numpy_dtype(dtype)) if normed else None
    return [x, rng.standard_normal((rows, count)).astype(numpy_dtype(dtype)), *weights, *scales, norm, stream]


def checked(inputs: Sequence[Array | None], chosen: int, normalised: bool, within: float, limit: int = 1,
            fixed: bool = False, expected: Sequence[Array] = ()) -> None:  # fmt: skip
    """The kernel, made for a number of rows called T unless it is `fixed`, against the operator's meaning, unless
    something else is expected."""
    from tests.kernels.cuda.harness import check

    x = inputs[X]
    assert x is not None
    text = JOINED if x.dtype == np.float32 else f"{JOINED}; Cast $1 -> {x.dtype.name}"
    attributes = {"chosen": chosen, "normalised": int(normalised), "activation": SILU, "epsilon": 1e-5}
    expected = expected or meaning("Mixture")(*inputs, **attributes, expression=text)
    ports = tuple(
        None if a is None else Port(a.dtype.name, ("T" if k in SYMBOLIC and not fixed else len(a), *a.shape[1:]),
                                    None if k in SYMBOLIC else a)
        for k, a in enumerate(inputs)
    )  # fmt: skip
    output = Port(expected[0].dtype.name, ("T" if not fixed else len(x), x.shape[1]))
    node = Node("Mixture", ports, (output,), attributes, parse(text), name="under_test")
    with np.errstate(all="ignore"):
        assert check(node, inputs, expected, within, within, limit, symbols={"T": len(x)})


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**31), st.sampled_from([1, 2, 3, 20]), st.sampled_from([(1, 1), (4, 2), (9, 9), (20, 3)]),
    st.sampled_from([(16, 48), (80, 16), (48, 100)]), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_meaning(seed: int, rows: int, counts: tuple[int, int], sizes: tuple[int, int], normalised: bool,
                 normed: bool, fixed: bool) -> None:  # fmt: skip
    inputs = drawn(seed, rows, counts, sizes, "float32", "float32", normed)
    checked(inputs, counts[1], normalised, 2e-4, fixed=fixed)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize(("kept", "dtype"), [("bfloat16", "bfloat16"), ("float8_e4m3fn", "bfloat16"),
                                             ("bfloat16", "float32"), ("float16", "float16")])  # fmt: skip
def test_narrow_weights(rows: int, kept: str, dtype: str) -> None:
    """Where weights have eight bits many rows have too, and what lies between the products."""
    inputs = drawn(rows, rows, (16, 2), (64, 48), kept, dtype)
    rounds = kept == "float8_e4m3fn" and rows > 4
    checked(inputs, 2, True, 0.1 if rounds else 4e-2, expected=[in_eighths(inputs, 2)] if rounds else ())


def in_eighths(inputs: Sequence[Array | None], chosen: int) -> Array:
    """What a Mixture gives that rounds rows."""
    x, scores, gate, up, down, *scales, norm, stream = (np.asarray(a).astype(np.float32) for a in inputs)
    gate, up, down = (a * s[:, None] for a, s in zip((gate, up, down), scales, strict=True))
    normed = x if inputs[NORM] is None else x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5) * norm
    rows, result = in_rows(normed), stream.copy()
    powers = np.exp(scores - scores.max(1, keepdims=True))
    for t, row in enumerate(rows):
        picked = np.argsort(-scores[t], kind="stable")[:chosen]
        for e in picked:
            made = row @ gate[e]
            inner = made / (1 + np.exp(-made)) * (row @ up[e])
            between = in_rows(inner.astype(numpy_dtype("bfloat16")).astype(np.float32)[None])
            result[t] += powers[t, e] / powers[t, picked].sum() * (between @ down[e])[0]
    return result.astype(numpy_dtype("bfloat16"))


def in_rows(x: Array) -> Array:
    """To eight bits and back, each row with its scale."""
    size = np.abs(x).max(1, keepdims=True) / np.float32(448)
    return np.asarray((x / size).astype(numpy_dtype("float8_e4m3fn")).astype(np.float32) * size)


@pytest.mark.parametrize(("kept", "sizes"), [("bfloat16", (1040, 16)), ("float8_e4m3fn", (16, 752))])
def test_forms_of_few_rows(kept: str, sizes: tuple[int, int]) -> None:
    """Ends that fill no step; steps that hold the ends of some experts and the beginnings of others."""
    inputs = drawn(3, 1, (4, 3), sizes, kept, "bfloat16")
    checked(inputs, 3, True, 4e-2)


@pytest.mark.parametrize("rows", [1, 30])
def test_scores_that_decide_nothing_or_everything(rows: int) -> None:
    """Equal ones: the first; one expert for all; infinite ones; those that are no numbers spoil their own row alone."""
    inputs = drawn(5, rows, (6, 2), (32, 32), "float32", "float32")
    scores = np.zeros((rows, 6), np.float32)
    scores[::3, 4] = 9
    scores[1::3, 1:] = -np.inf
    scores[2::3] = np.nan
    inputs[1] = scores
    checked(inputs, 2, True, 2e-4)


@pytest.mark.parametrize("rows", [1, 3, 30])
@pytest.mark.parametrize("kept", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("normed", [True, False])
def test_a_row_that_is_no_number_gives_none(rows: int, kept: str, normed: bool) -> None:
    """Found by reading: NaN among rows of eight bits became their smallest number."""
    inputs = drawn(7, rows, (16, 2), (64, 48), kept, "bfloat16", normed)
    assert inputs[X] is not None
    inputs[X][rows // 2, 5] = np.nan
    expected = [in_eighths(inputs, 2)] if kept == "float8_e4m3fn" and rows > 4 else []
    checked(inputs, 2, True, 0.2 if expected else 4e-2, expected=expected)


def test_what_is_left_to_others() -> None:
    from ingot.kernels import candidates

    def found(target: str, *changes: tuple[int, Port]) -> int:
        inputs = drawn(1, 4, (4, 2), (32, 32), "float8_e4m3fn", "bfloat16")
        ports = [None if a is None else Port(a.dtype.name, a.shape, None if k in SYMBOLIC else a)
                 for k, a in enumerate(inputs)]  # fmt: skip
        for index, port in changes:
            ports[index] = port
        attributes = {"chosen": 2, "normalised": 1, "activation": SILU, "epsilon": 1e-5}
        assert ports[0] is not None
        node = Node("Mixture", tuple(ports), (Port("float32", ports[0].shape),), attributes, parse(JOINED))
        return len(list(candidates(node, "cuda", architecture(target))))

    assert found("sm_90") and not found("sm_80")  # which has no eighths
    assert not found("sm_90", (NORM, Port("bfloat16", (32,))))
    assert not found("sm_90", (SCALES[0], Port("bfloat16", (4, 32))))
    assert not found("sm_90", (9, Port("bfloat16", (4, 1))))
