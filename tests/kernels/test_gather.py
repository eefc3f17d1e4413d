"""Gather, GatherElements, GatherND: numpy's elements, and nothing read outside for indices out of range."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.dtypes import numpy_dtype
from ingot.kernels import candidates
from ingot.kernels.cpu.standalone import Standalone
from ingot.kernels.node import Node, Port
from tests.kernels.harness import check, isas, node_of
from tests.kernels.symbolic import check_symbolic

DTYPES = ["uint8", "bool", "bfloat16", "float32", "float64"]
drawn = settings(max_examples=10, deadline=None, derandomize=True)


def numbers(dtype, *shape):
    values = np.random.default_rng(sum(shape)).integers(0, 2 if dtype == "bool" else 100, shape)
    return values.astype(numpy_dtype(dtype))


def places(size, *shape, dtype="int64"):
    return np.random.default_rng(sum(shape)).integers(-size, size, shape).astype(dtype)


def run(op, inputs, constants=(), **attributes):
    node, expected = node_of(op, inputs, attributes, constants=constants)
    return check(node, inputs, expected, rtol=0, atol=0)


@drawn
@given(st.data())
def test_gather(data):
    shape = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    axis = data.draw(st.integers(0, len(shape) - 1))
    picked = data.draw(st.lists(st.integers(0, 5), max_size=2))
    dtype, index = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(["int32", "int64"]))
    run("Gather", [numbers(dtype, *shape), places(shape[axis], *picked, dtype=index)], axis=axis)


def test_embedding_rows():
    run("Gather", [numbers("float32", 100, 384), places(100, 2, 17)], constants=(0,), axis=0)


@drawn
@given(st.data())
def test_gather_elements(data):
    shape = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    axis = data.draw(st.integers(0, len(shape) - 1))
    picked = [data.draw(st.integers(1, 25 if k == axis else size)) for k, size in enumerate(shape)]
    dtype, index = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(["int32", "int64"]))
    run("GatherElements", [numbers(dtype, *shape), places(shape[axis], *picked, dtype=index)], axis=axis)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "indices", "batch"), [
    ((5, 6, 7), (4, 2), 0), ((5, 6), (3, 2, 2), 0), ((3, 4, 5, 6, 70), (3, 4, 2), 2), ((4, 6, 3), (4, 1), 1),
    ((9,), (1,), 0),
])  # fmt: skip
def test_gather_nd(dtype, shape, indices, batch):
    smallest = min(shape[batch : batch + indices[-1]])
    run("GatherND", [numbers(dtype, *shape), places(smallest, *indices)], batch_dims=batch)


@pytest.mark.parametrize("sizes", [{"N": 1, "V": 7, "K": 3}, {"N": 4, "V": 2, "K": 30}])
def test_symbols(sizes):
    n, v, k = sizes.values()
    check_symbolic("Gather", [numbers("float32", n, v, 5), places(v, k)], [("N", "V", 5), ("K",)], sizes, axis=1)
    check_symbolic("GatherElements", [numbers("float32", n, v), places(v, n, k)], [("N", "V"), ("N", "K")], sizes,
                   axis=1)  # fmt: skip
    check_symbolic("GatherND", [numbers("int8", n, v, 5), places(v, n, k, 1)], [("N", "V", 5), ("N", "K", 1)], sizes,
                   batch_dims=1)  # fmt: skip


@pytest.mark.parametrize("op", ["Gather", "GatherElements", "GatherND"])
def test_indices_out_of_range_are_clamped(op):
    data, indices = numbers("float32", 6), np.array([[1 << 40], [-(1 << 40)], [6], [-7]])
    flat = indices if op != "GatherElements" else indices[:, 0]
    expected = data[[[5], [0], [5], [0]]] if op == "Gather" else data[[5, 0, 5, 0]]
    attributes = {"batch_dims": 0} if op == "GatherND" else {"axis": 0}
    ports = Port("float32", (6,)), Port("int64", flat.shape)
    node = Node(op, ports, (Port("float32", expected.shape),), attributes)
    for isa in isas():
        for candidate in candidates(node, "cpu", isa):
            (y,) = Standalone(node, candidate, isa)(data, flat)
            assert np.array_equal(y, expected)
