"""CumSum against its numpy meaning: axes, directions, types, symbolic sizes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.dtypes import numpy_dtype
from tests.kernels.harness import Array, check, node_of
from tests.kernels.symbolic import check_symbolic

FEW = settings(max_examples=10, deadline=None, derandomize=True)
TOLERANCES = {"float32": 1e-4, "float64": 1e-12, "float16": 3e-2, "bfloat16": 2e-1}
FLAGS = [(0, 0), (1, 0), (0, 1), (1, 1)]


def values(shape: tuple[int, ...], dtype: str = "float32") -> Array:
    draw = np.random.default_rng(0)
    if "int" in dtype:
        return draw.integers(0, 100, shape).astype(dtype)
    return draw.standard_normal(shape).astype(numpy_dtype(dtype))


def run(x: Array, axis: int, exclusive: int = 0, reverse: int = 0, kind: str = "sum") -> None:
    node, expected = node_of("CumSum", [x], {"axis": axis, "exclusive": exclusive, "reverse": reverse, "kind": kind})
    tolerance = TOLERANCES.get(x.dtype.name, 0)
    check(node, [x], expected, rtol=tolerance, atol=tolerance)


@FEW
@given(st.lists(st.sampled_from([0, 1, 2, 5, 16, 33, 70]), min_size=1, max_size=3), st.integers(0, 2),
       st.sampled_from(FLAGS))  # fmt: skip
def test_any_axis(shape: list[int], axis: int, flags: tuple[int, int]) -> None:
    run(values(tuple(shape)), axis % len(shape), *flags)


@pytest.mark.parametrize("dtype", [*TOLERANCES, "int8", "uint8", "int32", "int64", "uint64"])
def test_types(dtype: str) -> None:
    for axis, (exclusive, reverse) in zip((0, 1, 1, 0), FLAGS, strict=True):
        run(values((5, 150), dtype), axis, exclusive, reverse)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "uint64"])
def test_products(dtype: str) -> None:
    x = (np.random.default_rng(0).uniform(0.6, 1.5, (5, 70)) * (3 if "int" in dtype else 1)).astype(dtype)
    for axis, (exclusive, reverse) in zip((1, 1, 1, 0), FLAGS, strict=True):
        run(x, axis, exclusive, reverse, "prod")


def test_infinities_and_nan_reach_what_comes_after() -> None:
    x = values((2, 40))
    x[0, 7], x[1, 33] = np.inf, np.nan
    for exclusive, reverse in FLAGS:
        run(x, 1, exclusive, reverse)


@pytest.mark.parametrize("sizes", [(2, 70), (0, 3), (3, 1), (1, 0)])
@pytest.mark.parametrize("axis", [0, 1])
def test_symbolic_sizes(sizes: tuple[int, int], axis: int) -> None:
    symbols = dict(zip(("N", "S"), sizes, strict=True))
    for exclusive, reverse in ((0, 0), (1, 1)):
        check_symbolic("CumSum", [values(sizes)], [("N", "S")], symbols, axis=axis, exclusive=exclusive,
                       reverse=reverse)  # fmt: skip
