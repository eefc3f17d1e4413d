"""Softmax against its numpy meaning: axes, types, logarithm, infinities, symbolic sizes, in place."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.dtypes import numpy_dtype
from ingot.ir.expression import parse
from ingot.ir.ops import meaning
from ingot.kernels import candidates
from ingot.kernels.cpu.standalone import Standalone
from ingot.kernels.node import Node, Port
from tests.kernels.harness import Array, check, isas, node_of

FEW = settings(max_examples=12, deadline=None, derandomize=True)
TOLERANCES = {"float32": 2e-6, "float64": 1e-14, "float16": 2e-3, "bfloat16": 1.6e-2}


def values(shape: tuple[int, ...], dtype: str = "float32") -> Array:
    return (np.random.default_rng(0).standard_normal(shape) * 4).astype(numpy_dtype(dtype))


def run(x: Array, axis: int, log: int) -> None:
    node, expected = node_of("Softmax", [x], {"axis": axis, "log": log})
    tolerance = TOLERANCES[x.dtype.name]
    check(node, [x], expected, rtol=tolerance, atol=tolerance)


@FEW
@given(st.lists(st.sampled_from([0, 1, 2, 5, 17, 64]), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 1))
def test_any_axis(shape: list[int], axis: int, log: int) -> None:
    shape = [size if np.prod(shape) < 20_000 else min(size, 5) for size in shape]
    run(values(tuple(shape)), axis % len(shape), log)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("log", [0, 1])
def test_types(dtype: str, axis: int, log: int) -> None:
    run(values((5, 150), dtype), axis, log)


def test_large_and_infinite_values() -> None:
    x = values((5, 40))
    x[0] += 1e4
    x[1] -= 1e4
    x[2, 3:9] = -np.inf
    x[3] = -np.inf
    x[4, 7] = np.nan
    for axis in (0, 1):
        run(x, axis, 0)
    run(x[:3], 1, 1)


@pytest.mark.parametrize("sizes", [(2, 70), (0, 3), (3, 1)])
@pytest.mark.parametrize("axis", [0, 1])
def test_symbolic_sizes_and_in_place(sizes: tuple[int, int], axis: int) -> None:
    names = ("N", "S")
    node = Node("Softmax", (Port("float32", names),), (Port("float32", names),), {"axis": axis, "log": 0}, parse(""))
    x = values(sizes)
    (expected,) = meaning("Softmax")(x, axis=axis)
    for isa in isas():
        for candidate in candidates(node, "cpu", isa):
            assert tuple(candidate.kernel.in_place(node)) == (0,)
            alone = Standalone(node, candidate, isa, dict(zip(names, sizes, strict=True)), level=1)
            (y,) = alone(x, chunks=2)
            np.testing.assert_allclose(y, expected, rtol=1e-5)
            alone.bind([x])
            alone.outputs[0][...] = x
            source = [handle.kind for handle in alone.build.handles].index("input")
            target = [handle.kind for handle in alone.build.handles].index("output")
            alone._arguments[source] = alone._arguments[target]
            alone.run()
            np.testing.assert_allclose(alone.outputs[0], expected, rtol=1e-5)
