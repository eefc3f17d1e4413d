"""Pool and global pooling: every kind, layout and dtype; clipped windows; indices; nothing leaks from unused lanes."""

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

KERNELS = ["pool_blocked", "pool_plain"]


def numbers(shape, dtype="float32"):
    random = np.random.default_rng(2)
    if dtype in ("int8", "uint8"):
        return random.integers(np.iinfo(dtype).min, np.iinfo(dtype).max + 1, shape, dtype=dtype)
    return random.standard_normal(shape).astype(numpy_dtype(dtype))


def pool(kind, x, kernel, stride=1, pads=None, dilation=1, **attributes):
    rank = len(kernel)
    given = {"kind": kind, "kernel": tuple(kernel), "strides": (stride,) * rank, "dilations": (dilation,) * rank,
             "pads": tuple(pads or (0,) * 2 * rank), **attributes}  # fmt: skip
    node, expected = node_of("Pool", [x], given)
    return node, [x], [y for y in expected if y.dtype != object]


CASES = {
    "3x3 stride 2": ((2, 20, 15, 22), (3, 3), 2, (1, 1, 1, 1)),
    "dilated": ((1, 16, 9, 19), (3, 2), 1, (1, 1, 2, 0), 2),
    "one axis": ((2, 5, 40), (4,), 3, (1, 2)),
    "three axes": ((1, 17, 5, 6, 7), (2, 3, 2), 2, (1, 1, 0, 0, 1, 1)),
    "wide window": ((1, 16, 7, 7), (5, 5), 1, (2, 2, 2, 2)),
}


@pytest.mark.parametrize("only", KERNELS)
@pytest.mark.parametrize("kind", ["max", "average", "lp"])
@pytest.mark.parametrize("name", CASES)
def test_kinds(name, kind, only):
    shape, *rest = CASES[name]
    check(*pool(kind, numbers(shape), *rest), only=only)


@pytest.mark.parametrize("only", KERNELS)
def test_padding_that_counts(only):
    check(*pool("average", numbers((1, 20, 9, 12)), (3, 3), 2, (1, 1, 1, 1), count_include_pad=1), only=only)


@pytest.mark.parametrize("only", KERNELS)
@pytest.mark.parametrize("p", [1, 3])
def test_powers(p, only):
    check(*pool("lp", numbers((1, 20, 9, 12)), (3, 3), 2, (1, 1, 1, 1), p=p), only=only)


@pytest.mark.parametrize("only", KERNELS)
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "int8", "uint8"])
def test_dtypes(dtype, only):
    x = numbers((1, 20, 8, 21), dtype)
    check(*pool("max", x, (3, 3), 2, (1, 1, 1, 1)), only=only)
    if dtype.startswith(("float", "bfloat")):
        check(*pool("average", x, (2, 3), 1, (0, 1, 0, 1)), only=only, rtol=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int8", "uint8", "float16"])
def test_indices(dtype):
    x = np.round(numbers((2, 3, 9, 21), dtype))
    check(*pool("max", x, (3, 3), 2, (1, 1, 1, 1), indices=1), only="pool_plain")


@pytest.mark.parametrize("only", KERNELS)
def test_nan_stays(only):
    x = numbers((1, 16, 6, 6))
    x[0, 3, 2, 2] = np.nan
    check(*pool("max", x, (2, 2)), only=only)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.data())
def test_drawn(data):
    draw = data.draw
    rank = draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(rank))
    pads = tuple(draw(st.integers(0, k // 2)) for k in kernel * 2)
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 40)), *(draw(st.integers(k, 30)) for k in kernel))
    check(*pool(draw(st.sampled_from(["max", "average"])), numbers(shape), kernel, draw(st.integers(1, 3)), pads))


def test_symbolic_sizes():
    node, inputs, (expected,) = pool("average", numbers((2, 20, 9, 30)), (3, 3), 2, (1, 1, 1, 1))
    symbols = {"N": 2, "H": 9, "W": 30}
    shapes = ("N", 20, "H", "W"), ("N", 20, "(H-1)//2+1", "(W-1)//2+1")
    node = replace(node, inputs=(Port("float32", shapes[0]),), outputs=(Port("float32", shapes[1]),))
    for isa in isas():
        for candidate in candidates(node, "cpu", isa):
            kernel = Standalone(node, candidate, isa, symbols, level=1)
            for chunks in (1, 3):
                (y,) = kernel(*inputs, chunks=chunks)
                np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6, err_msg=candidate.label)


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("kind", ["mean", "max", "sum"])
@pytest.mark.parametrize("shape", [(2, 20, 7, 7), (1, 48, 13), (1, 5, 3, 2, 2)])
def test_global(shape, kind, keepdims):
    x = numbers(shape)
    attributes = {"kind": kind, "axes": tuple(range(2, len(shape))), "keepdims": keepdims}
    node, expected = node_of("Reduce", [x], attributes)
    check(node, [x], expected, only="reduce_spatial")


@pytest.mark.parametrize("keepdims", [0, 1])
def test_global_epilogue(keepdims):
    x, tail = numbers((2, 20, 4, 5)), (1, 1) if keepdims else ()
    extras = [numbers((20, *tail)), numbers((2, 20, *tail))]
    attributes = {"kind": "mean", "axes": (2, 3), "keepdims": keepdims}
    epilogue = "Mul %0 %1 -> float32; Add $0 %2 -> float32; Relu $1 -> float32"
    node, expected = node_of("Reduce", [x, *extras], attributes, epilogue, constants=[1])
    check(node, [x, *extras], expected, only="reduce_spatial")


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_global_integers(dtype):
    x = numbers((2, 20, 5, 5), dtype)
    attributes = {"kind": "sum", "axes": (2, 3), "keepdims": 1}
    epilogue = "Cast %0 -> float32; Mul $0 0.125 -> float32"
    node, expected = node_of("Reduce", [x], attributes, epilogue)
    check(node, [x], expected, only="reduce_spatial")
