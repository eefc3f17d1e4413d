"""First layers of float32 in tile registers: few channels, wide windows, strides, pads, tails of rows."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.kernels.cpu.isa import AMX
from ingot.runtime.machine import cpu_features
from tests.kernels.test_conv import BIAS_RELU, Case
from tests.kernels.test_conv_tiles import check_tiles

pytestmark = pytest.mark.skipif(not AMX.machine <= cpu_features(), reason="needs a processor with AMX")

KERNELS = ("conv_stem_split", "conv_stem_rounded")
CASES = {
    "pictures": Case((2, 3, 20, 31), 20, (7, 7), 2, (3, 3, 3, 3)),
    "grey": Case((1, 1, 9, 16), 33, (3, 3), 1, (1, 1, 1, 1)),
    "four channels": Case((1, 4, 12, 40), 16, (3, 3), 2, (0, 0, 1, 1)),
    "dilated": Case((1, 2, 15, 18), 5, (3, 4), 3, (2, 2, 2, 2), 2),
    "widest window": Case((1, 3, 17, 17), 8, (1, 8), 1),
    "bias": Case((1, 3, 8, 8), 24, (3, 3), 1, (1, 1, 1, 1), extras=((24, 1, 1),), epilogue=BIAS_RELU),
}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    check_tiles(CASES[name], *KERNELS)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(8, 24), st.integers(8, 40)),
    st.integers(1, 40),
    st.tuples(st.integers(1, 7), st.integers(1, 8)),
    st.integers(1, 3),
    st.tuples(*[st.integers(0, 3)] * 4),
)
def test_drawn(
    shape: tuple[int, ...], outputs: int, kernel: tuple[int, ...], stride: int, pads: tuple[int, ...]
) -> None:
    check_tiles(Case(shape, outputs, kernel, stride, pads), *KERNELS)
