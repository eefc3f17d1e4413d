"""Norm against its numpy meaning: kinds, scale and bias, epilogues, types, symbolic sizes."""

from typing import Any

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

FEW = settings(max_examples=10, deadline=None, derandomize=True)
TOLERANCES = {"float32": 2e-5, "float64": 1e-12, "float16": 4e-3, "bfloat16": 3e-2}
SCALED = "Mul %0 %1 -> float32; Add $0 %2 -> float32; Relu $1 -> float32"


def values(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * 2 + 1).astype(numpy_dtype(dtype))


def run(inputs: list[Array | None], epilogue: str = "", **attributes: Any) -> set[str]:
    """The names of the kernels that ran."""
    node, expected = node_of("Norm", inputs, attributes, epilogue)
    tolerance = TOLERANCES[expected[0].dtype.name]
    return {c.kernel.name for c in check(node, inputs, expected, rtol=tolerance, atol=tolerance)}


@FEW
@given(st.lists(st.sampled_from([1, 2, 5, 16, 33, 130]), min_size=1, max_size=4), st.integers(0, 3), st.booleans(),
       st.sampled_from(["layer", "rms"]))  # fmt: skip
def test_layers(shape: list[int], axis: int, affine: bool, kind: str) -> None:
    shape = [size if np.prod(shape) < 20_000 else min(size, 5) for size in shape]
    axis %= len(shape)
    extras = [values(tuple(shape[axis:]), seed=1), values(tuple(shape[axis:]), seed=2)] if affine else [None, None]
    run([values(tuple(shape)), *extras], kind=kind, axis=axis)


@pytest.mark.parametrize("kind", ["instance", "group"])
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (1, 6, 40), (3, 6, 16), (2, 6, 1)])
def test_channels(kind: str, shape: tuple[int, ...]) -> None:
    run([values(shape), values((6,), seed=1), values((6,), seed=2)], kind=kind, groups=3)
    run([values(shape), None, None], kind=kind, groups=2)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("groups", [1, 2, 3, 6, 12, 24, 48])
def test_blocked_groups(groups: int, dtype: str) -> None:
    x, extras = values((2, 48, 3, 7), dtype), [values((48, 1, 1), seed=3), values((2, 48, 3, 7), seed=4)]
    ran = run([x, values((48,), seed=1), values((48,), seed=2), *extras], SCALED, kind="group", groups=groups)
    assert "norm_blocked" in ran or groups == 2


@pytest.mark.parametrize("channels", [3, 16, 21])
def test_blocked_instances(channels: int) -> None:
    for shape in ((2, channels, 5, 9), (2, channels, 40)):
        scale, bias = values((channels,), seed=1), values((channels,), seed=2)
        assert run([values(shape), scale, bias], kind="instance") == {"norm", "norm_blocked"}
        assert run([values(shape), None, bias], kind="instance") == {"norm", "norm_blocked"}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", ["layer", "rms", "group"])
def test_types(dtype: str, kind: str) -> None:
    size = 4 if kind == "group" else 70
    run([values((3, 4, 70), dtype), values((size,), dtype, 1), values((size,), dtype, 2)], kind=kind, axis=2, groups=2)


def test_scale_alone_one_number_and_mixed_types() -> None:
    run([values((3, 70)), values((70,), seed=1), None], kind="rms", axis=1)
    run([values((3, 70)), values((1,), seed=1), values((), seed=2)], kind="layer", axis=1)
    run([values((3, 70), "float16"), values((70,), seed=1), None], kind="layer", axis=1)


@pytest.mark.parametrize("kind, extras", [
    ("layer", [(3, 4, 70), (70,)]), ("layer", [(3, 1, 1), (4, 1)]), ("instance", [(4, 1), (3, 4, 70)]),
    ("group", [(1,), (3, 4, 1)]),
])  # fmt: skip
def test_epilogues(kind: str, extras: list[tuple[int, ...]]) -> None:
    operands = [values(shape, seed=seed) for seed, shape in enumerate(extras, 3)]
    run([values((3, 4, 70)), None, None, *operands], SCALED, kind=kind, axis=2, groups=2)


def test_the_mean_is_taken_off_before_squaring() -> None:
    run([values((2, 300)) + 3000, None, None], kind="layer", axis=1, epsilon=1e-6)


@pytest.mark.parametrize("sizes", [(2, 70), (0, 3), (5, 1), (2, 64)])
@pytest.mark.parametrize("kind", ["layer", "instance"])
def test_symbolic_sizes(sizes: tuple[int, int], kind: str) -> None:
    shape = ("N", 4, "S")
    node = Node("Norm", (Port("float32", shape),), (Port("float32", shape),), {"kind": kind, "axis": 2}, parse(""))
    x = values((sizes[0], 4, sizes[1]))
    expected = meaning("Norm")(x, kind=kind, axis=2)[0] if x.size else x
    for isa in isas():
        for candidate in candidates(node, "cpu", isa):
            (y,) = Standalone(node, candidate, isa, {"N": sizes[0], "S": sizes[1]}, level=1)(x, chunks=2)
            np.testing.assert_allclose(y, expected, rtol=2e-4, atol=2e-4)
