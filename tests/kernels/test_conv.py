"""Conv, blocked: drawn shapes, clipped borders, tails, epilogues, symbolic sizes; nothing leaks from unused lanes."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.dtypes import numpy_dtype
from ingot.kernels import candidates
from ingot.kernels.cpu.standalone import Standalone
from ingot.kernels.node import Port
from tests.kernels.harness import _allowed, check, isas, node_of

BIAS_RELU = "Add %0 %1 -> float32; Relu $0 -> float32"
RESIDUAL = "Add %0 %1 -> float32; Add $0 %2 -> float32; Relu $1 -> float32"


@dataclass(frozen=True)
class Case:
    """A convolution; sizes per axis or the same for all."""

    shape: tuple[int, ...]
    outputs: int
    kernel: tuple[int, ...]
    stride: int = 1
    pads: tuple[int, ...] = ()
    dilation: int = 1
    group: int = 1
    extras: tuple[tuple[int, ...], ...] = ()
    epilogue: str = ""
    constants: tuple[int, ...] = field(default=(1, 2))

    def build(self):
        """(node, inputs, expected)"""
        random = np.random.default_rng(1)
        rank = len(self.kernel)
        weight_shape = (self.outputs, self.shape[1] // self.group, *self.kernel)
        shapes = (self.shape, weight_shape, *self.extras)
        inputs = [random.standard_normal(shape).astype(np.float32) for shape in shapes]
        inputs[1] /= np.float32(np.sqrt(np.prod(weight_shape[1:])))
        attributes = {"strides": (self.stride,) * rank, "dilations": (self.dilation,) * rank,
                      "pads": self.pads or (0,) * 2 * rank, "group": self.group}  # fmt: skip
        node, expected = node_of("Conv", inputs, attributes, self.epilogue, self.constants)
        return node, inputs, expected


def check_case(case, **options):
    node, inputs, expected = case.build()
    return check(node, inputs, expected, rtol=1e-4, atol=2e-5, **options)


CASES = {
    "3x3": Case((1, 16, 14, 14), 32, (3, 3), pads=(1, 1, 1, 1)),
    "first layer": Case((2, 3, 20, 31), 20, (7, 7), 2, (3, 3, 3, 3)),
    "1x1 flattened": Case((2, 33, 6, 9), 50, (1, 1)),
    "1x1 with stride": Case((1, 32, 9, 7), 16, (1, 1), 2),
    "dilated": Case((1, 5, 12, 13), 16, (3, 3), 1, (2, 2, 2, 2), 2),
    "groups": Case((1, 32, 8, 9), 64, (3, 3), 1, (1, 1, 1, 1), group=2),
    "one axis": Case((2, 17, 50), 16, (5,), 2, (2, 1)),
    "long one axis": Case((1, 4, 700), 24, (9,), 1, (4, 4)),
    "three axes": Case((1, 17, 5, 6, 7), 16, (3, 2, 3), 1, (1, 0, 1, 1, 1, 1)),
    "window larger than the map": Case((1, 16, 2, 3), 16, (5, 5), 1, (2, 2, 2, 2)),
    "much padding": Case((1, 16, 3, 3), 16, (3, 3), 1, (4, 4, 4, 4)),
    "one row, one column": Case((1, 48, 1, 1), 40, (1, 1)),
    "empty batch": Case((0, 16, 4, 4), 16, (3, 3), 1, (1, 1, 1, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_cases(name):
    check_case(CASES[name], limit=3, only="conv_direct")


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.data())
def test_drawn(data):
    draw = data.draw
    rank = draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(rank))
    pads = tuple(draw(st.integers(0, 3)) for _ in range(2 * rank))
    dilation = draw(st.integers(1, 2))
    spatial = tuple(draw(st.integers((k - 1) * dilation + 1, 24)) for k in kernel)
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 36)), *spatial)
    case = Case(shape, draw(st.integers(1, 70)), kernel, draw(st.integers(1, 3)), pads, dilation)
    check_case(case, limit=2, only="conv_direct")


SHAPE = (1, 20, 7, 9)
LANEWISE = {
    "depthwise": Case((2, 35, 9, 20), 35, (3, 3), 1, (1, 1, 1, 1), group=35),
    "stride": Case((1, 16, 15, 33), 16, (5, 5), 2, (2, 2, 2, 2), group=16),
    "dilated": Case((1, 8, 12, 13), 8, (3, 3), 1, (2, 2, 2, 2), 2, group=8),
    "pairs": Case((1, 36, 6, 7), 36, (3, 3), 1, (1, 1, 1, 1), group=18),
    "fours": Case((1, 40, 6, 7), 40, (2, 3), 2, (1, 0, 0, 1), group=10),
    "one axis": Case((1, 20, 44), 20, (7,), 1, (3, 3), group=20),
    "three axes": Case((1, 20, 4, 5, 6), 20, (3, 3, 3), 1, (1,) * 6, group=20),
    "epilogue": Case(SHAPE, 20, (3, 3), pads=(1,) * 4, group=20, extras=((20, 1, 1), SHAPE), epilogue=RESIDUAL),
}


@pytest.mark.parametrize("name", LANEWISE)
def test_groups_of_few_channels(name):
    check_case(LANEWISE[name], only="conv_lanewise")


EPILOGUES = {
    "bias, relu": Case(SHAPE, 20, (1, 1), extras=((20, 1, 1),), epilogue=BIAS_RELU),
    "residual": Case(SHAPE, 20, (3, 3), pads=(1,) * 4, extras=((20, 1, 1), SHAPE), epilogue=RESIDUAL),
    "constant residual": Case(SHAPE, 20, (1, 1), extras=((20, 1, 1), SHAPE), epilogue=RESIDUAL, constants=(1, 2, 3)),
    "scalar": Case(SHAPE, 20, (1, 1), extras=((), (1, 1, 1)), epilogue="Mul %0 %1 -> float32; Sub $0 %2 -> float32"),
    "run-time vectors": Case(
        SHAPE, 20, (1, 1), extras=((20, 1, 1), (1, 20, 1, 1)), constants=(1,),
        epilogue="Mul %0 %1 -> float32; Add $0 %2 -> float32",
    ),
    "long": Case(
        SHAPE, 20, (3, 3), pads=(1,) * 4, extras=((20, 1, 1),),
        epilogue="Add %0 %1 -> float32; Sigmoid $0 -> float32; Mul $0 $1 -> float32",
    ),
    "another dtype": Case(SHAPE, 20, (1, 1), epilogue="Relu %0 -> float32; Cast $0 -> float16"),
}  # fmt: skip


@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues(name):
    check_case(EPILOGUES[name], limit=2, only="conv_direct")


SYMBOLIC = [
    (Case((2, 16, 13, 40), 20, (3, 3), pads=(1, 1, 1, 1)), ("N", 16, "H", "W"), ("N", 20, "H", "W")),
    (Case((1, 3, 30, 21), 16, (5, 5), 2, (2, 2, 2, 2)), (1, 3, "H", "W"), (1, 16, "(H-1)//2+1", "(W-1)//2+1")),
    (Case((3, 24, 5, 6), 33, (1, 1)), ("N", 24, "H", "W"), ("N", 33, "H", "W")),
    (Case((3, 24, 7, 7), 33, (3, 3), pads=(1, 1, 1, 1)), ("N", 24, 7, 7), ("N", 33, 7, 7)),
    (Case((1, 16, 9, 2), 16, (3, 5), pads=(1, 2, 1, 2)), (1, 16, "H", "W"), (1, 16, "H", "W")),
    (Case((1, 20, 9, 29), 20, (3, 3), pads=(1, 1, 1, 1), group=20), (1, 20, "H", "W"), (1, 20, "H", "W")),
]


@pytest.mark.parametrize(("case", "x_shape", "y_shape"), SYMBOLIC)
def test_symbolic_sizes(case, x_shape, y_shape):
    node, inputs, (expected,) = case.build()
    symbols = {name: size for name, size in zip(x_shape, inputs[0].shape, strict=True) if isinstance(name, str)}
    node = replace(node, inputs=(Port("float32", x_shape), *node.inputs[1:]), outputs=(Port("float32", y_shape),))
    for isa in isas():
        found = [c for c in candidates(node, "cpu", isa) if c.ports.outputs == ("blocked",)]
        for candidate in found[:: max(len(found) // 3, 1)]:
            kernel = Standalone(node, candidate, isa, symbols, level=1)
            for chunks in (1, 3):
                (y,) = kernel(*inputs, chunks=chunks)
                atol = 2e-5 + _allowed(candidate, expected)
                np.testing.assert_allclose(y, expected, rtol=1e-4, atol=atol, err_msg=f"{candidate.label} {isa.name}")


PLAIN = {
    "two axes": Case((2, 3, 9, 21), 7, (3, 3), 1, (1, 1, 1, 1)),
    "stride, groups": Case((1, 4, 12, 37), 10, (3, 2), 2, (1, 0, 1, 1), 2, group=2),
    "one axis": Case((2, 3, 40), 5, (4,), 1, (1, 2)),
    "three axes": Case((1, 3, 5, 6, 7), 5, (2, 3, 3), 1, (0, 1, 1, 1, 1, 1)),
    "epilogue": Case(SHAPE, 20, (3, 3), pads=(1,) * 4, group=4, extras=((20, 1, 1), SHAPE), epilogue=RESIDUAL),
    "run-time weight": Case((1, 3, 9, 21), 7, (3, 3), 1, (1, 1, 1, 1), constants=()),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain(name):
    check_case(PLAIN[name], only="conv_plain")


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "int8", "uint8"])
@pytest.mark.parametrize("stride", [1, 2])
def test_plain_dtypes(dtype, stride):
    random = np.random.default_rng(3)
    integers = dtype in ("int8", "uint8")
    weight_dtype = "int8" if integers else dtype
    x = random.integers(0 if integers else -8, 100 if integers else 8, (1, 4, 6, 19)).astype(numpy_dtype(dtype))
    weight = random.integers(-8, 8, (4, 2, 3, 3)).astype(numpy_dtype(weight_dtype))
    zero_points = {"x_zero_point": 7, "weight_zero_point": -3} if integers else {}
    attributes = {"strides": (stride,) * 2, "dilations": (1, 1), "pads": (1, 1, 0, 1), "group": 2, **zero_points}
    node, expected = node_of("Conv", [x, weight], attributes, constants=[1])
    check(node, [x, weight], expected, only="conv_plain")


def test_space_is_small_and_costs_rank_it():
    node, _, _ = Case((1, 64, 56, 56), 64, (3, 3), pads=(1, 1, 1, 1)).build()
    for isa in isas():
        found = [c for c in candidates(node, "cpu", isa) if c.kernel.name == "conv_direct"]
        costs = {c.label: c.kernel.cost(node, isa, **c.tactic) for c in found}
        assert 2 <= len(found) <= 24
        assert min(costs.values()) * 1.05 < max(costs.values())
