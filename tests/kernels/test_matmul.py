"""MatMul kernels against numpy: broadcasting, transposed operands, constant stacks, every dtype, run-time extents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.kernels import candidates
from ingot.kernels.cpu.standalone import Standalone
from ingot.kernels.node import Node, Port
from tests.kernels.harness import check, isas, node_of
from tests.kernels.test_linear import FEW, RELU, drawn, tolerance

Array = np.ndarray[Any, Any]
FLAGS = {"transpose_a": 0, "transpose_b": 0}


def run(a: Array, b: Array, extras: Sequence[Array] = (), epilogue: str = "", constants: Sequence[int] = (),
        limit: int = 2, **attributes: int) -> None:  # fmt: skip
    node, expected = node_of("MatMul", [a, b, *extras], {**FLAGS, **attributes}, epilogue, constants)
    allowed = tolerance(expected[0].dtype.name)
    scale = float(np.abs(expected[0].astype(np.float64)).max(initial=0))
    check(node, [a, b, *extras], expected, rtol=allowed, atol=allowed * max(scale, 1.0), limit=limit)


def operands(rows: int, columns: int, depth: int, flags: int, dtypes: Sequence[str],
             batch: Sequence[tuple[int, ...]] = ((), ())) -> tuple[Array, Array, Mapping[str, int]]:  # fmt: skip
    """a, b and attributes; bit 0 of `flags` transposes a, bit 1 b."""
    a = drawn(rows, (*batch[0], rows, depth), dtypes[0])
    b = drawn(columns, (*batch[1], depth, columns), dtypes[1])
    a = np.ascontiguousarray(np.swapaxes(a, -1, -2)) if flags & 1 else a
    b = np.ascontiguousarray(np.swapaxes(b, -1, -2)) if flags & 2 else b
    return a, b, {"transpose_a": flags & 1, "transpose_b": flags >> 1}


SIZES = {"rows": st.integers(1, 40), "columns": st.integers(1, 70), "depth": st.integers(1, 50)}


@FEW
@given(**SIZES, flags=st.integers(0, 3))
def test_float32(rows: int, columns: int, depth: int, flags: int) -> None:
    a, b, attributes = operands(rows, columns, depth, flags, ("float32", "float32"))
    run(a, b, [drawn(1, (columns,), "float32")], RELU.format("float32"), limit=3, **attributes)


@pytest.mark.parametrize("flags", range(4))
def test_depth_in_blocks(flags: int) -> None:
    a, b, attributes = operands(17, 37, 1029, flags, ("float32", "float32"))
    run(a, b, [drawn(1, (17, 37), "float32")], RELU.format("float32"), **attributes)


@pytest.mark.parametrize("batch", [
    ((3,), (3,)), ((3,), ()), ((), (3,)), ((2, 1), (1, 3)), ((2, 3), (3,)), ((1, 1), (2, 3)), ((0,), (1,)),
    ((4, 2), (1, 1)),
])  # fmt: skip
@pytest.mark.parametrize("flags", [0, 3])
def test_broadcasting(batch: Sequence[tuple[int, ...]], flags: int) -> None:
    a, b, attributes = operands(5, 19, 8, flags, ("float32", "float32"), batch)
    run(a, b, **attributes)
    run(a, b, constants=[1], **attributes)
    run(a, b, constants=[0], limit=1, **attributes)


def test_epilogue_of_a_batch() -> None:
    a, b, attributes = operands(5, 19, 8, 2, ("float32", "float32"), ((2, 3), (2, 3)))
    full, scalar = drawn(1, (2, 3, 5, 19), "float32"), drawn(2, (1,), "float32")
    run(a, b, [scalar, full], "Mul %0 %1 -> float32; Add $0 %2 -> float32; Tanh $1 -> float32", **attributes)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_empty_extents(shape: tuple[int, int, int]) -> None:
    for flags in range(4):
        a, b, attributes = operands(*shape, flags, ("float32", "float32"))
        run(a, b, limit=1, **attributes)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "int32", "uint32", "int64", "uint64"])
@settings(FEW, max_examples=3)
@given(**SIZES, flags=st.integers(0, 3))
def test_dtypes(dtype: str, rows: int, columns: int, depth: int, flags: int) -> None:
    a, b, attributes = operands(rows, columns, depth, flags, (dtype, dtype), ((2,), (2,)))
    run(a, b, **attributes)
    run(a, b, constants=[1], limit=1, **attributes)


@pytest.mark.parametrize("dtypes", [("int8", "int8"), ("uint8", "int8"), ("int8", "uint8"), ("uint8", "uint8")])
@settings(FEW, max_examples=4)
@given(**SIZES, flags=st.integers(0, 3), points=st.sampled_from([(0, 0), (7, 3)]))
def test_bytes(dtypes: Sequence[str], rows: int, columns: int, depth: int, flags: int, points: tuple[int, int]) -> None:
    a, b, attributes = operands(rows, columns, depth, flags, dtypes, ((2,), (2,)))
    zeros = {"x_zero_point": points[0], "weight_zero_point": points[1]}
    run(a, b, **attributes, **zeros)
    run(a, b, constants=[1], limit=1, **attributes, **zeros)


@pytest.mark.parametrize("dtypes", [("int8", "uint8"), ("uint8", "int8"), ("uint8", "uint8")])
@pytest.mark.parametrize("points", [(0, 0), (7, 0), (0, 3), (131, 119)])
@pytest.mark.parametrize("sizes", [(128, 32, 64), (70, 50, 130), (33, 19, 191)])
@pytest.mark.parametrize("flags", [0, 2])
def test_bytes_of_attention(
    dtypes: Sequence[str], points: tuple[int, int], sizes: tuple[int, int, int], flags: int
) -> None:
    a, b, attributes = operands(*sizes, flags, dtypes, ((2, 3), (1, 3)))
    zeros = {"x_zero_point": points[0], "weight_zero_point": points[1]}
    node, (expected,) = node_of("MatMul", [a, b], {**attributes, **zeros})
    for isa in isas():
        found = [c for c in candidates(node, "cpu", isa) if c.kernel.name == "matmul_tiles_bytes"]
        assert bool(found) == isa.has("amx_int8")
        for candidate in found:
            for chunks in (1, 3):
                assert np.array_equal(Standalone(node, candidate, isa)(a, b, chunks=chunks)[0], expected)


@pytest.mark.parametrize("flags", range(4))
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 40, 5), (15, 17, 33), (30, 70, 300), (2, 0, 3)])
def test_extents_known_at_run_time(sizes: tuple[int, int, int], flags: int) -> None:
    a, b, attributes = operands(*sizes, flags, ("float32", "float32"), ((2, 1), (1, 2)))
    bound, (expected,) = node_of("MatMul", [a, b], attributes)
    symbols = dict(zip("MNK", sizes, strict=True))
    left = ("B", 1, "K", "M") if flags & 1 else ("B", 1, "M", "K")
    right = (1, "B", "N", "K") if flags & 2 else (1, "B", "K", "N")
    ports = (Port("float32", left), Port("float32", right))
    node = Node("MatMul", ports, (Port("float32", ("B", "B", "M", "N")),), bound.attributes)
    for isa in isas():
        for candidate in [*candidates(node, "cpu", isa)][::3]:
            alone = Standalone(node, candidate, isa, {"B": 2, **symbols}, level=1)
            np.testing.assert_allclose(alone(a, b, chunks=2)[0], expected, rtol=1e-4, atol=1e-4)
