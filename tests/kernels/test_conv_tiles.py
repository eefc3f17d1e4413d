"""Conv in tile registers against numpy: windows, strides, dilations, pads, tails of positions and channels."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.kernels import candidates
from ingot.kernels.cpu.isa import AMX
from ingot.runtime.machine import cpu_features
from tests.kernels.test_conv import BIAS_RELU, RESIDUAL, Case, check_case

pytestmark = pytest.mark.skipif(not AMX.machine <= cpu_features(), reason="needs a processor with AMX")


KERNELS = {"conv_split", "conv_rounded"}


def check_tiles(case: Case) -> None:
    """All candidates of the tile kernel on the machine's best instruction set."""
    node, inputs, expected = case.build()
    from ingot.kernels.cpu.standalone import Standalone
    from tests.kernels.harness import _allowed, _compare

    found = [c for c in candidates(node, "cpu", AMX) if c.kernel.name in KERNELS]
    assert {c.kernel.name for c in found} == KERNELS
    for candidate in found:
        alone = Standalone(node, candidate, AMX, level=1)
        for chunks in (1, 3):
            mine, wanted = alone(*inputs, chunks=chunks)[0], expected[0]
            _compare(mine, wanted, 1e-4, 2e-5 + _allowed(candidate, wanted), f"{candidate.label}, {chunks} chunks")


CASES = {
    "1x1": Case((1, 64, 14, 14), 64, (1, 1)),
    "1x1 stride 2": Case((2, 32, 9, 11), 48, (1, 1), 2),
    "3x3": Case((1, 16, 14, 14), 32, (3, 3), pads=(1, 1, 1, 1)),
    "3x3 stride 2": Case((1, 32, 15, 13), 40, (3, 3), 2, (1, 1, 1, 1)),
    "dilated": Case((1, 32, 12, 13), 16, (3, 3), 1, (2, 2, 2, 2), 2),
    "dilated with stride": Case((1, 32, 13, 13), 16, (3, 3), 2, (2, 2, 2, 2), 2),
    "odd groups of channels": Case((2, 48, 7, 7), 72, (3, 3), pads=(1, 1, 1, 1)),
    "asymmetric pads": Case((1, 32, 8, 9), 32, (3, 2), pads=(0, 1, 2, 1)),
    "few positions": Case((3, 32, 3, 3), 33, (3, 3)),
    "wide pads": Case((1, 32, 4, 4), 32, (3, 3), pads=(3, 3, 3, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    check_tiles(CASES[name])


@pytest.mark.parametrize("extras", [((24, 1, 1),), ((24, 1, 1), (2, 24, 6, 6))], ids=["bias", "residual"])
def test_epilogue(extras: tuple[tuple[int, ...], ...]) -> None:
    epilogue = BIAS_RELU if len(extras) == 1 else RESIDUAL
    case = Case((2, 32, 6, 6), 24, (3, 3), pads=(1, 1, 1, 1), extras=extras, epilogue=epilogue)
    check_tiles(case)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 2), st.sampled_from([16, 32, 48, 80]), st.integers(3, 19), st.integers(3, 19)),
    st.integers(16, 70),
    st.sampled_from([(1, 1), (3, 3), (1, 3), (2, 2)]),
    st.integers(1, 3),
    st.tuples(*[st.integers(0, 2)] * 4),
)
def test_drawn(
    shape: tuple[int, ...], outputs: int, kernel: tuple[int, ...], stride: int, pads: tuple[int, ...]
) -> None:
    check_tiles(Case(shape, outputs, kernel, stride, pads))


def test_the_whole_choice_is_right() -> None:
    check_case(replace(CASES["3x3"], shape=(1, 32, 10, 10)), limit=12)
