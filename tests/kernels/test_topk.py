"""TopK against its numpy meaning: order, ties, NaN, types, axes, symbolic sizes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.dtypes import numpy_dtype
from tests.kernels.harness import Array, check, node_of
from tests.kernels.symbolic import check_symbolic

FEW = settings(max_examples=12, deadline=None, derandomize=True)


def values(shape: tuple[int, ...], dtype: str = "float32", span: int = 50) -> Array:
    """Few different numbers, so that many are equal."""
    draw = np.random.default_rng(0)
    low = 0 if dtype.startswith("uint") or dtype == "bool" else -span
    return draw.integers(low, span, shape).astype(numpy_dtype(dtype))


def run(x: Array, axis: int, k: int, largest: int = 1) -> None:
    node, expected = node_of("TopK", [x], {"axis": axis, "k": k, "largest": largest})
    check(node, [x], expected, rtol=0, atol=0)


@FEW
@given(st.lists(st.sampled_from([1, 2, 5, 16, 33, 150]), min_size=1, max_size=3), st.integers(0, 2),
       st.floats(0, 1), st.integers(0, 1))  # fmt: skip
def test_any_axis_and_count(shape: list[int], axis: int, part: float, largest: int) -> None:
    axis %= len(shape)
    run(values(tuple(shape)), axis, max(round(part * shape[axis]), 1), largest)


@pytest.mark.parametrize("dtype", [
    "float64", "float16", "bfloat16", "bool", "int8", "uint8", "int16", "int32", "uint32", "int64", "uint64",
])  # fmt: skip
def test_types(dtype: str) -> None:
    x = values((3, 130), dtype)
    if "int" in dtype:
        x[0, [7, 90]] = np.iinfo(dtype).max
        x[1, [3, 91]] = np.iinfo(dtype).min
    for largest in (0, 1):
        run(x, 1, 9, largest)
        run(x, 0, 2, largest)


@pytest.mark.parametrize("order", ["up", "down"])
def test_sorted_rows(order: str) -> None:
    x = np.arange(3000, dtype=np.float32)[None] * (1 if order == "up" else -1)
    for k in (1, 40, 3000):
        run(x, 1, k)
        run(x, 1, k, 0)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_zeros_infinities_and_nan(dtype: str) -> None:
    x = values((4, 60), dtype, 3)
    x[0, ::3], x[1, 5], x[2] = -0.0, np.nan, np.nan
    x[1, [20, 59]] = np.inf, -np.inf
    x[3, ::7] = -np.nan
    for largest in (0, 1):
        run(x, 1, 30, largest)
        run(x, 0, 2, largest)


def test_none_of_none() -> None:
    run(values((3, 5)), 1, 0)
    run(values((0, 5)), 1, 2)


@pytest.mark.parametrize("sizes", [(2, 70), (0, 3), (3, 4), (5, 1)])
@pytest.mark.parametrize("axis", [0, 1])
def test_symbolic_sizes(sizes: tuple[int, int], axis: int) -> None:
    symbols = dict(zip(("N", "S"), sizes, strict=True))
    k = min(2, sizes[axis])
    check_symbolic("TopK", [values(sizes)], [("N", "S")], symbols, axis=axis, k=k, largest=1)
