"""ConvTranspose: strides, dilations, groups, output padding, kernels shorter than the stride, both layouts."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.dtypes import numpy_dtype
from ingot.kernels import candidates
from ingot.kernels.cpu.standalone import Standalone
from ingot.kernels.node import Port
from tests.kernels.harness import check, isas, node_of

EPILOGUE = "Add %0 %1 -> float32; Add $0 %2 -> float32; Relu $1 -> float32"
KERNELS = ["conv_transpose_direct", "conv_transpose_plain"]


def transposed(shape, outputs, kernel, stride=1, pads=None, dilation=1, group=1, output_padding=0, dtype="float32",
               constants=(1, 2), extras=(), epilogue=""):  # fmt: skip
    random = np.random.default_rng(4)
    rank = len(kernel)
    shapes = [shape, (shape[1], outputs // group, *kernel), *extras]
    inputs = [random.standard_normal(s).astype(numpy_dtype(dtype)) for s in shapes]
    attributes = {"strides": (stride,) * rank, "dilations": (dilation,) * rank, "pads": tuple(pads or (0,) * 2 * rank),
                  "group": group, "output_padding": (output_padding,) * rank}  # fmt: skip
    node, expected = node_of("ConvTranspose", inputs, attributes, epilogue, constants)
    return node, inputs, expected


def case(**options):
    return options


CASES = {
    "stride 2": case(shape=(2, 20, 6, 9), outputs=18, kernel=(3, 3), stride=2, pads=(1, 1, 1, 1), output_padding=1),
    "4x4": case(shape=(1, 16, 5, 7), outputs=32, kernel=(4, 4), stride=2, pads=(1, 1, 1, 1)),
    "2x2": case(shape=(1, 33, 5, 17), outputs=16, kernel=(2, 2), stride=2),
    "plain input": case(shape=(1, 3, 5, 7), outputs=16, kernel=(3, 3), stride=2),
    "stride 1": case(shape=(1, 16, 5, 7), outputs=20, kernel=(3, 2), pads=(1, 0, 1, 0)),
    "dilated": case(shape=(1, 16, 5, 7), outputs=16, kernel=(3, 3), stride=2, dilation=2, pads=(2, 2, 2, 2)),
    "dilated by three": case(shape=(1, 16, 9), outputs=16, kernel=(3,), stride=2, dilation=3),
    "gaps": case(shape=(1, 16, 4, 5), outputs=16, kernel=(2, 1), stride=3, output_padding=1),
    "groups": case(shape=(1, 32, 4, 5), outputs=32, kernel=(3, 3), stride=2, group=2),
    "three axes": case(shape=(1, 16, 3, 4, 5), outputs=16, kernel=(2, 3, 2), stride=2, pads=(0, 1, 0, 0, 1, 1)),
    "large pads": case(shape=(1, 16, 6, 6), outputs=16, kernel=(3, 3), stride=2, pads=(3, 2, 4, 2)),
}


@pytest.mark.parametrize("only", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_cases(name, only):
    check(*transposed(**CASES[name]), rtol=1e-4, atol=5e-5, only=only)


@pytest.mark.parametrize("only", KERNELS)
def test_epilogue(only):
    given = case(shape=(1, 20, 4, 5), outputs=20, kernel=(2, 2), stride=2, extras=((20, 1, 1), (1, 20, 8, 10)))
    node, inputs, expected = transposed(**given, epilogue=EPILOGUE)
    check(node, inputs, expected, rtol=1e-4, atol=5e-5, only=only)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_plain_dtypes(dtype):
    node, inputs, expected = transposed((1, 4, 5, 9), 6, (3, 3), 2, (1, 1, 0, 1), group=2, dtype=dtype)
    check(node, inputs, expected, rtol=2e-2, atol=2e-2, only="conv_transpose_plain")


def test_weight_at_run_time():
    check(*transposed((1, 4, 5, 9), 6, (3, 3), 2, constants=()), rtol=1e-4, atol=5e-5, only="conv_transpose_plain")


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_drawn(data):
    draw = data.draw
    rank = draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 5)) for _ in range(rank))
    stride = draw(st.integers(1, 3))
    pads = tuple(draw(st.integers(0, 1)) for _ in range(2 * rank))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 36)), *(draw(st.integers(2, 12)) for _ in range(rank)))
    drawn = transposed(shape, draw(st.integers(1, 40)), kernel, stride, pads, draw(st.integers(1, 2)))
    check(*drawn, rtol=1e-4, atol=5e-5, limit=3)


def test_symbolic_sizes():
    node, inputs, (expected,) = transposed((2, 16, 5, 18), 16, (3, 3), 2, (1, 1, 1, 1), output_padding=1)
    shapes = ("N", 16, "H", "W"), ("N", 16, "H*2", "W*2")
    node = replace(node, inputs=(Port("float32", shapes[0]), node.inputs[1]), outputs=(Port("float32", shapes[1]),))
    for isa in isas():
        for candidate in candidates(node, "cpu", isa):
            kernel = Standalone(node, candidate, isa, {"N": 2, "H": 5, "W": 18}, level=1)
            for chunks in (1, 3):
                (y,) = kernel(*inputs, chunks=chunks)
                np.testing.assert_allclose(y, expected, rtol=1e-4, atol=5e-5, err_msg=candidate.label)
