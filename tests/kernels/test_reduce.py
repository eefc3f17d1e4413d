"""Reduce against its numpy meaning: every kind, type and arrangement of axes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.dtypes import numpy_dtype
from ingot.ir.expression import parse
from ingot.ir.ops import meaning
from ingot.kernels import candidates
from ingot.kernels.cpu.reduce_kinds import KINDS
from ingot.kernels.cpu.standalone import Standalone
from ingot.kernels.node import Node, Port
from tests.kernels.harness import Array, check, isas, node_of

FEW = settings(max_examples=15, deadline=None, derandomize=True)
TOLERANCES = {"float32": 2e-5, "float64": 1e-12, "float16": 2e-3, "bfloat16": 1.6e-2}
INDEX_KINDS = ("argmax", "argmin")


def positive(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> Array:
    """Values whose logarithms and products are tame."""
    values = np.random.default_rng(seed).uniform(0.5, 1.6, shape)
    return (values * 2 if "int" in dtype else values).astype(numpy_dtype(dtype))


def run(x: Array, kind: str, axes: tuple[int, ...], keepdims: int = 1, epilogue: str = "",
        extras: tuple[Array, ...] = (), **attributes: int) -> None:  # fmt: skip
    stated = {"kind": kind, "axes": axes, "keepdims": keepdims, **attributes}
    node, expected = node_of("Reduce", [x, *extras], stated, epilogue)
    tolerance = TOLERANCES.get(expected[0].dtype.name, 0)
    check(node, [x, *extras], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", [(2,), (1,), (0, 2)], ids=["rows", "columns", "both"])
def test_kinds(kind: str, axes: tuple[int, ...]) -> None:
    run(positive((3, 5, 150)) - (0.2 if kind == "l1" else 0), kind, axes)


@FEW
@given(st.lists(st.sampled_from([0, 1, 2, 3, 16, 35]), max_size=5), st.sets(st.integers(0, 4)), st.booleans(),
       st.sampled_from(["sum", "max", "logsumexp"]))  # fmt: skip
def test_axes(shape: list[int], axes: set[int], keepdims: bool, kind: str) -> None:
    shape = [size if np.prod(shape) < 20_000 else min(size, 3) for size in shape]
    run(positive(tuple(shape)), kind, tuple(sorted(a for a in axes if a < len(shape))), int(keepdims))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("axes", [(1,), (0,)])
def test_other_floats(dtype: str, axes: tuple[int, ...]) -> None:
    for kind in ("sum", "mean", "max", "l2", "logsumexp"):
        run(positive((4, 70), dtype), kind, axes)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("axes", [(1,), (0,)])
def test_integers(dtype: str, axes: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).integers(1, 100, (4, 70)).astype(dtype)
    for kind in ("sum", "max", "min", "prod", "mean", "l1", "sumsquare"):
        run(x, kind, axes)


@pytest.mark.parametrize("axes", [(1,), (0,), (0, 1)])
def test_truth_values(axes: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).integers(0, 5, (6, 70)) > 0
    for kind in ("max", "min"):
        run(x, kind, axes)


def test_nan_wins_and_infinities_stay() -> None:
    x = positive((4, 40))
    x[0, 3], x[1, 39], x[2, 1] = np.nan, np.inf, -np.inf
    for kind in ("max", "min", "logsumexp"):
        for axes in ((1,), (0,)):
            run(x, kind, axes)
    run(np.full((3, 20), -np.inf, np.float32), "logsumexp", (1,))


def test_long_rows_stay_exact() -> None:
    run(positive((2, 50_000)), "sum", (1,))
    run(positive((2, 50_000)), "mean", (0, 1), 0)


@pytest.mark.parametrize("axes, keepdims, shapes", [
    ((2,), 1, [(3, 5, 1), (5, 1), ()]), ((1,), 1, [(3, 1, 40), (40,), (3, 1, 1)]), ((1,), 0, [(3, 40), (40,), (1,)]),
    ((2, 1), 0, [(3,), (1,), (3,)]),
])  # fmt: skip
def test_epilogues(axes: tuple[int, ...], keepdims: int, shapes: list[tuple[int, ...]]) -> None:
    extras = tuple(positive(shape, seed=seed) for seed, shape in enumerate(shapes, 1))
    chain = "Add %0 %1 -> float32; Mul $0 %2 -> float32; Sub $1 %3 -> float32; Sqrt $2 -> float32"
    run(positive((3, 5, 40)), "mean", tuple(sorted(axes)), keepdims, chain, extras)


def test_the_epilogue_sees_the_unrounded_sum() -> None:
    x = positive((3, 100), "float16") * np.float16(100)
    run(x, "sum", (1,), 1, "Mul %0 0.001 -> float32; Cast $0 -> float16")


@pytest.mark.parametrize("sizes", [(3, 50), (1, 1), (0, 4), (2, 0), (2, 65)])
@pytest.mark.parametrize("axes", [(1,), (0,), (0, 1)])
def test_symbolic_sizes(sizes: tuple[int, int], axes: tuple[int, ...]) -> None:
    names = ("N", "S")
    kept = tuple(1 if axis in axes else name for axis, name in enumerate(names))
    node = Node("Reduce", (Port("float32", names),), (Port("float32", kept),),
                {"kind": "sum", "axes": axes, "keepdims": 1}, parse(""))  # fmt: skip
    x = positive(sizes)
    (expected,) = meaning("Reduce")(x, kind="sum", axes=axes)
    for isa in isas():
        for candidate in candidates(node, "cpu", isa):
            (y,) = Standalone(node, candidate, isa, dict(zip(names, sizes, strict=True)), level=1)(x, chunks=2)
            np.testing.assert_allclose(y, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", INDEX_KINDS)
@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_places(kind: str, last: int, axis: int) -> None:
    x = np.random.default_rng(0).integers(0, 20, (3, 5, 70)).astype(np.float32)
    run(x, kind, (axis,), axis % 2, select_last_index=last)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int8", "uint8", "bool", "int32", "uint32", "int64", "uint64"])
def test_places_in_other_types(dtype: str) -> None:
    draw = np.random.default_rng(0)
    x = draw.integers(0, 2**40 if dtype.endswith("64") else 100, (4, 70)).astype(dtype)
    x[0, 5] = np.iinfo(dtype).max if "int" in dtype else 1
    for axis in (0, 1):
        run(x, "argmax", (axis,))
        run(x, "argmin", (axis,), select_last_index=1)


def test_places_of_infinities_and_nan() -> None:
    rows = np.stack([np.full(40, -np.inf), np.full(40, np.nan), np.arange(40), -np.arange(40.0)]).astype(np.float32)
    rows[2, [7, 30]] = np.nan
    for kind in INDEX_KINDS:
        for axis in (0, 1):
            run(rows, kind, (axis,), 0)
            run(rows, kind, (axis,), 0, select_last_index=1)
