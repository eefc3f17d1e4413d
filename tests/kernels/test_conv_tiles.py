"""Conv in tile registers against numpy: windows, strides, dilations, pads, tails of positions and channels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.ir.ops import meaning
from ingot.kernels import candidates
from ingot.kernels.cpu.isa import AMX
from ingot.kernels.cpu.standalone import Standalone
from ingot.kernels.node import Node
from ingot.runtime.machine import cpu_features
from tests.kernels.harness import Array, _allowed, _compare, node_of
from tests.kernels.symbolic import symbolic_node
from tests.kernels.test_conv import BIAS_RELU, RESIDUAL, Case, check_case

pytestmark = pytest.mark.skipif(not AMX.machine <= cpu_features(), reason="needs a processor with AMX")


FLOATS = ("conv_split", "conv_rounded")


def check_tiles(form: Case | Bytes, *kernels: str) -> None:
    """All candidates of these kernels (those for floats unless named); bytes exactly."""
    node, inputs, expected = form.build()
    found = [c for c in candidates(node, "cpu", AMX) if c.kernel.name in (kernels or FLOATS)]
    assert {c.kernel.name for c in found} == set(kernels or FLOATS)
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


@dataclass(frozen=True)
class Bytes:
    """A convolution of bytes with zero points."""

    case: Case
    dtypes: tuple[str, str] = ("uint8", "int8")
    zero_points: tuple[int, int] = (120, 0)
    epilogue: str = "Cast %0 -> float32; Mul $0 0.013 -> float32; Quantize $1 0.7 117 -> uint8"
    whole_range: bool = False  # of weights

    def build(self) -> tuple[Node, list[Array], list[Array]]:
        """(node, inputs, expected)"""
        random, case = np.random.default_rng(2), self.case
        shapes = (case.shape, (case.outputs, case.shape[1] // case.group, *case.kernel), *case.extras)
        kinds = (*self.dtypes, *["uint8"] * len(case.extras))
        limits = [np.iinfo(kind) for kind in kinds]
        ranges = [(limit.min, limit.max) for limit in limits]
        if not self.whole_range:
            ranges[1] = (self.zero_points[1] - 120, self.zero_points[1] + 120)
        inputs = [random.integers(*bounds, shape, endpoint=True).astype(kind)
                  for bounds, shape, kind in zip(ranges, shapes, kinds, strict=True)]  # fmt: skip
        rank = len(case.kernel)
        attributes = {"strides": (case.stride,) * rank, "dilations": (case.dilation,) * rank,
                      "pads": case.pads or (0,) * 2 * rank, "group": case.group,
                      "x_zero_point": self.zero_points[0], "weight_zero_point": self.zero_points[1]}  # fmt: skip
        node, expected = node_of("Conv", inputs, attributes, self.epilogue, (1,))
        return node, inputs, expected


BYTES_CASES = {
    "1x1": Bytes(Case((1, 64, 14, 14), 64, (1, 1))),
    "1x1 stride 2": Bytes(Case((2, 80, 9, 11), 48, (1, 1), 2)),
    "3x3": Bytes(Case((1, 16, 14, 14), 32, (3, 3), pads=(1, 1, 1, 1))),
    "3x3 stride 2": Bytes(Case((1, 130, 15, 13), 40, (3, 3), 2, (1, 1, 1, 1))),
    "few outputs": Bytes(Case((2, 24, 5, 6), 7, (3, 2), pads=(0, 1, 2, 1))),
    "signed": Bytes(Case((1, 40, 8, 9), 33, (3, 3), pads=(1, 1, 1, 1)), ("int8", "int8"), (-3, 0)),
    "unsigned weights": Bytes(Case((1, 64, 7, 7), 24, (3, 3), pads=(2, 1, 1, 2)), ("uint8", "uint8"), (7, 131)),
    "bare sums": Bytes(Case((1, 64, 7, 7), 24, (3, 3), pads=(2, 1, 1, 2)), epilogue=""),
    "residual": Bytes(
        Case((2, 32, 6, 6), 24, (1, 1), extras=((2, 24, 6, 6),)),
        epilogue="Cast %0 -> float32; Dequantize %1 0.02 128 -> float32; Mul $0 0.001 -> float32; "
        "Add $1 $2 -> float32; Quantize $3 0.031 100 -> uint8",
    ),
}


@pytest.mark.parametrize("name", BYTES_CASES)
def test_bytes(name: str) -> None:
    check_tiles(BYTES_CASES[name], "conv_tiles_bytes")


STEMS = {
    "pictures": Bytes(Case((2, 3, 20, 31), 20, (7, 7), 2, (3, 3, 3, 3))),
    "grey, signed": Bytes(Case((1, 1, 9, 16), 33, (3, 3), 1, (1, 1, 1, 1)), ("int8", "int8"), (-3, 0)),
    "four channels": Bytes(Case((1, 4, 12, 40), 16, (3, 3), 2, (0, 0, 1, 1))),
    "dilated": Bytes(Case((1, 2, 15, 18), 5, (3, 4), 3, (2, 2, 2, 2), 2)),
    "wide window": Bytes(Case((1, 3, 17, 17), 8, (1, 16), 1)),
}


@pytest.mark.parametrize("name", STEMS)
def test_stem(name: str) -> None:
    check_tiles(STEMS[name], "conv_stem_bytes")


DEPTHWISE = {
    "3x3": Bytes(Case((2, 32, 14, 15), 32, (3, 3), 1, (1, 1, 1, 1), group=32)),
    "3x3 stride 2": Bytes(Case((1, 40, 15, 18), 40, (3, 3), 2, (0, 0, 1, 1), group=40)),
    "5x5, signed": Bytes(Case((1, 24, 9, 7), 24, (5, 5), 1, (2, 2, 2, 2), group=24), ("int8", "int8"), (-3, 0)),
    "high, dilated rows": Bytes(Case((1, 16, 80, 90), 16, (3, 1), 1, (1, 0, 1, 0), group=16)),
    "unsigned weights": Bytes(Case((1, 16, 5, 5), 16, (2, 9), 1, (0, 4, 1, 5), group=16), ("uint8", "uint8"), (7, 131)),
}


@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise(name: str) -> None:
    check_tiles(DEPTHWISE[name], "depthwise_bytes")


NEAR = {
    "odd groups of channels": (Case((2, 48, 7, 7), 72, (1, 1)), Bytes(Case((2, 80, 7, 7), 72, (1, 1)))),
    "few positions": (Case((3, 32, 3, 3), 33, (1, 1)), Bytes(Case((3, 24, 3, 3), 33, (1, 1)))),
    "large": (Case((1, 64, 20, 20), 96, (1, 1)), Bytes(Case((1, 128, 20, 20), 96, (1, 1)), ("int8", "int8"), (-3, 0))),
}


@pytest.mark.parametrize("name", NEAR)
def test_near(name: str) -> None:
    floats, integers = NEAR[name]
    check_tiles(floats, "conv_split_near", "conv_rounded_near")
    check_tiles(integers, "conv_near_bytes")


FAR = {"dtypes": ("uint8", "uint8"), "zero_points": (7, 60), "whole_range": True}
SUMS_OF_TWO = {
    "conv_tiles_bytes": Bytes(Case((1, 70, 9, 9), 24, (3, 3), pads=(1, 1, 1, 1)), **FAR),
    "conv_near_bytes": Bytes(Case((1, 70, 9, 9), 24, (1, 1)), **FAR),
    "conv_stem_bytes": Bytes(Case((1, 3, 9, 9), 24, (3, 3), 2, (1, 1, 1, 1)), **FAR),
    "depthwise_bytes": Bytes(Case((1, 40, 9, 9), 40, (3, 3), 1, (1, 1, 1, 1), group=40), **FAR),
}


@pytest.mark.parametrize("kernel", SUMS_OF_TWO)
def test_weights_far_from_their_zero_point(kernel: str) -> None:
    check_tiles(SUMS_OF_TWO[kernel], kernel)


DYNAMIC = {
    "3x3": (64, 40, 3, 1, (1, 1, 1, 1)),
    "5x5, stride 2": (32, 16, 3, 2, (2, 2, 2, 2)),
    "1x1": (48, 33, 1, 1, (0, 0, 0, 0)),
}


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("name", DYNAMIC)
def test_sizes_known_at_run_time(name: str, dtype: str) -> None:
    inputs, outputs, kernel, stride, pads = DYNAMIC[name]
    random = np.random.default_rng(4)
    shape = (outputs, inputs, kernel, kernel)
    weight = (random.standard_normal(shape) / 24).astype(np.float32)
    if dtype == "uint8":
        weight = random.integers(-128, 127, shape).astype(np.int8)
    attributes = {"strides": (stride,) * 2, "dilations": (1, 1), "pads": pads, "group": 1,
                  "x_zero_point": 100 if dtype == "uint8" else 0, "weight_zero_point": 0}  # fmt: skip
    for size in ((1, inputs, 9, 33), (2, inputs, 21, 6)):
        x = random.integers(0, 255, size).astype(dtype)
        node = symbolic_node("Conv", [x, weight], [("N", inputs, "H", "W"), None], attributes)
        wanted = meaning("Conv")(x, weight, **attributes)[0]
        names = ("conv_split", "conv_rounded", "conv_tiles", "conv_near")
        tiles = [c for c in candidates(node, "cpu", AMX) if c.kernel.name.startswith(names)]
        assert tiles
        for candidate in tiles:
            alone = Standalone(node, candidate, AMX, {"N": size[0], "H": size[2], "W": size[3]}, level=1)
            for chunks in (1, 3):
                _compare(alone(x, weight, chunks=chunks)[0], wanted, 1e-4, 2e-5 + _allowed(candidate, wanted), "")
