"""ScatterElements, ScatterND: every reduction, updates in order, results in place of the data."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.dtypes import numpy_dtype
from ingot.kernels import candidates
from ingot.kernels.cpu.build import Handle
from ingot.kernels.cpu.standalone import Standalone
from tests.kernels.harness import check, isas, node_of
from tests.kernels.symbolic import check_symbolic

REDUCTIONS = ["none", "add", "mul", "max", "min"]
DTYPES = ["int8", "uint8", "bool", "float32", "float64", "int64"]
drawn = settings(max_examples=12, deadline=None, derandomize=True)


def numbers(dtype, *shape):
    values = np.random.default_rng(sum(shape)).integers(0, 2 if dtype == "bool" else 5, shape)
    return values.astype(numpy_dtype(dtype))


def places(size, *shape, dtype="int64"):
    return np.random.default_rng(sum(shape)).integers(-size, size, shape).astype(dtype)


def run(op, inputs, **attributes):
    node, expected = node_of(op, inputs, attributes)
    return check(node, inputs, expected)


@drawn
@given(st.data())
def test_scatter_elements(data):
    shape = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    axis = data.draw(st.integers(0, len(shape) - 1))
    counts = [data.draw(st.integers(1, size)) for size in shape]
    dtype, index = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(["int32", "int64"]))
    indices = places(shape[axis], *counts, dtype=index)
    inputs = [numbers(dtype, *shape), indices, numbers(dtype, *counts)]
    run("ScatterElements", inputs, axis=axis, reduction=data.draw(st.sampled_from(REDUCTIONS)))


@pytest.mark.parametrize("dtype", [*DTYPES, "float16", "bfloat16"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_scatter_nd(dtype, reduction):
    if dtype in ("float16", "bfloat16") and reduction in ("add", "mul"):
        pytest.skip("sums of narrow floats stay with the host")
    indices = np.stack([places(5, 9), places(6, 9)], -1)
    run("ScatterND", [numbers(dtype, 5, 6, 70), indices, numbers(dtype, 9, 70)], reduction=reduction)
    run("ScatterND", [numbers(dtype, 5, 6), indices[None], numbers(dtype, 1, 9)], reduction=reduction)


def test_sums_of_narrow_floats_have_no_kernel():
    inputs = [numbers("float16", 5), places(5, 3, 1), numbers("float16", 3)]
    node, _ = node_of("ScatterND", inputs, {"reduction": "add"})
    assert not [c for isa in isas() for c in candidates(node, "cpu", isa)]


def test_nothing_to_scatter():
    run("ScatterND", [numbers("float32", 5, 6), np.zeros((0, 1), np.int64), numbers("float32", 0, 6)], reduction="none")


@pytest.mark.parametrize("sizes", [{"N": 3, "K": 1}, {"N": 20, "K": 7}])
def test_symbols(sizes):
    n, k = sizes.values()
    check_symbolic("ScatterND", [numbers("float32", n, 9), places(n, k, 1), numbers("float32", k, 9)],
                   [("N", 9), ("K", 1), ("K", 9)], sizes, reduction="add")  # fmt: skip
    check_symbolic("ScatterElements", [numbers("float32", n, 9), places(n, k, 9), numbers("float32", k, 9)],
                   [("N", 9), ("K", 9), ("K", 9)], sizes, axis=0, reduction="add")  # fmt: skip


@pytest.mark.parametrize("op", ["ScatterND", "ScatterElements"])
def test_in_place(op):
    data, updates = numbers("float32", 6, 4), numbers("float32", 3, 4)
    indices = places(6, 3, 1) if op == "ScatterND" else places(6, 3, 4)
    attributes = {"reduction": "add", **({"axis": 0} if op == "ScatterElements" else {})}
    node, (expected,) = node_of(op, [data, indices, updates], attributes)
    for isa in isas():
        for candidate in candidates(node, "cpu", isa):
            assert tuple(candidate.kernel.in_place(node)) == (0,)
            alone = Standalone(node, candidate, isa)
            alone.outputs[0][...] = data
            alone.bind([data, indices, updates])
            alone._arguments[alone.build.handles.index(Handle("input", 0))] = alone.outputs[0].ctypes.data
            alone.run()
            assert np.array_equal(alone.outputs[0], expected)
