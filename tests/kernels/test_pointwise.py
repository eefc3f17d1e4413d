"""Pointwise kernels: broadcasting, layouts, tails, symbolic sizes, operands in place. Instructions: test_render.py."""

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.ir.expression import parse
from ingot.kernels import Candidate, candidates, kernels_for
from ingot.kernels.cpu.pointwise_dims import merged
from ingot.kernels.cpu.standalone import Standalone
from ingot.kernels.node import Node, Port
from ingot.runtime.buffers import address_of
from tests.kernels.harness import Array, check, isas, node_of

FEW = settings(max_examples=12, deadline=None, derandomize=True)
SHORT_KINDS = ["rows", "cyclic", "both"]
CHAIN = "Mul %0 %1 -> float32; Add $0 %2 -> float32; Relu $1 -> float32"


def floats(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def labels(ran: list[Candidate]) -> set[str]:
    return {candidate.kernel.name for candidate in ran}


@st.composite
def broadcast_shapes(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """Three shapes that broadcast: some axes missing, some 1, some empty."""
    output = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 17, 33]), max_size=5))
    output = [size if np.prod(output) < 3000 else min(size, 4) for size in output]
    shapes = []
    for _ in range(3):
        kept = tuple(size if draw(st.booleans()) else 1 for size in output)
        shapes.append(kept[draw(st.integers(0, len(kept))) :])
    return shapes


@FEW
@given(broadcast_shapes())
def test_operands_broadcast(shapes: list[tuple[int, ...]]) -> None:
    operands = [floats(shape, seed) for seed, shape in enumerate(shapes)]
    node, expected = node_of("Pointwise", operands, {}, CHAIN)
    check(node, operands, expected)


def test_eight_axes_alternating() -> None:
    operands = [floats((2, 1) * 4), floats((1, 3) * 4, 1), floats((1,) * 8, 2)]
    node, expected = node_of("Pointwise", operands, {}, CHAIN)
    check(node, operands, expected)


@FEW
@given(st.integers(1, 3), st.sampled_from([1, 2, 15, 16, 40]), st.integers(2, 4), st.sampled_from(SHORT_KINDS))
def test_short_rows(outer: int, rows: int, inner: int, kind: str) -> None:
    second = {"rows": (rows, 1), "cyclic": (inner,), "both": (outer, rows, inner)}[kind]
    operands = [floats((outer, rows, inner)), floats(second, 1), floats((outer, 1, 1), 2)]
    node, expected = node_of("Pointwise", operands, {}, CHAIN)
    check(node, operands, expected)


def test_short_rows_take_several_at_a_time() -> None:
    operands = [floats((50, 3)), floats((50, 1)), floats((3,))]
    node, expected = node_of("Pointwise", operands, {}, CHAIN)
    assert "pointwise_short" in labels(check(node, operands, expected))


@FEW
@given(st.integers(0, 2), st.sampled_from([1, 5, 8, 16, 20, 33]), st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_blocked_feature_maps(batch: int, channels: int, spatial: list[int]) -> None:
    full = (batch, channels, *spatial)
    ones = (1,) * len(spatial)
    shapes = [full, (channels, *ones), (batch, channels, *ones), (batch, 1, *spatial), (1, 1, *spatial), full, ()]
    operands = [floats(shape, seed) for seed, shape in enumerate(shapes)]
    chain = "; ".join(["Add %0 %1 -> float32", *(f"Add ${k} %{k + 2} -> float32" for k in range(5))])
    node, expected = node_of("Pointwise", operands, {}, chain)
    assert "pointwise_blocked" in labels(check(node, operands, expected))


def test_blocked_constants_are_packed() -> None:
    operands = [floats((1, 20, 3, 3)), floats((20, 3, 3), 1), floats((1, 20, 1, 1), 2)]
    node, expected = node_of("Pointwise", operands, {}, CHAIN, constants=(1, 2))
    assert "pointwise_blocked" in labels(check(node, operands, expected))


def test_blocked_bytes_between_dequantize_and_quantize() -> None:
    draw = np.random.default_rng(0)
    operands = [draw.integers(0, 256, (2, 24, 3, 5)).astype(np.uint8) for _ in range(2)]
    chain = ("Dequantize %0 0.1 128 -> float32; Dequantize %1 0.2 3 -> float32; Add $0 $1 -> float32; "
             "Quantize $2 0.3 128 -> uint8")  # fmt: skip
    node, expected = node_of("Pointwise", operands, {}, chain)
    assert "pointwise_blocked" in labels(check(node, operands, expected))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "float16", "float64", "int64"])
@pytest.mark.parametrize("count", [1, 63, 64, 200])
def test_tails_of_every_width(dtype: str, count: int) -> None:
    x = np.arange(count).astype(dtype)
    y = np.arange(count)[::-1].astype(dtype)
    node, expected = node_of("Pointwise", [x, y], {}, "Greater %0 %1 -> bool")
    check(node, [x, y], expected)
    op = "Xor" if dtype == "bool" else "Max"
    node, expected = node_of("Pointwise", [x, y], {}, f"{op} %0 %1 -> {dtype}")
    check(node, [x, y], expected)


@pytest.mark.parametrize("sizes", [(2, 37), (0, 3), (3, 0), (1, 1), (1, 16)])
def test_symbolic_sizes(sizes: tuple[int, int]) -> None:
    shape = ("N", 4, "S")
    ports = Port("float32", shape), Port("float32", (4, 1)), Port("float32", ("S",))
    node = Node("Pointwise", ports, (Port("float32", shape),), {}, parse(CHAIN))
    rows, length = sizes
    operands = [floats((rows, 4, length)), floats((4, 1), 1), floats((length,), 2)]
    for isa in isas():
        found = list(candidates(node, "cpu", isa))
        assert found
        for candidate in found:
            symbols = {"N": rows, "S": length}
            alone = Standalone(node, candidate, isa, symbols, level=1)
            for chunks in (1, 2):
                (y,) = alone(*operands, chunks=chunks)
                np.testing.assert_allclose(y, np.maximum(operands[0] * operands[1] + operands[2], 0), rtol=1e-5)


def test_in_place_of_a_full_operand_only() -> None:
    operands = [floats((40, 3)), floats((40, 1), 1), floats((40, 3), 2)]
    node, expected = node_of("Pointwise", operands, {}, CHAIN)
    for isa in isas():
        for candidate in candidates(node, "cpu", isa):
            assert list(candidate.kernel.in_place(node)) == [0, 2]
            for index in (0, 2):
                alone = Standalone(node, candidate, isa, level=1)
                alone.bind(operands)
                target = alone._inputs[index]
                slot = [h.kind for h in alone.build.handles].index("output")
                alone._arguments[slot] = ctypes.c_void_p(address_of(target)).value
                alone.run(2)
                np.testing.assert_allclose(target, expected[0], rtol=1e-5)


def test_in_place_wants_the_same_element_size() -> None:
    x = floats((5,))
    node, _ = node_of("Pointwise", [x], {}, "Less %0 0 -> bool")
    assert all(not list(kernel.in_place(node)) for kernel in kernels_for(node, "cpu", isas()[0]))
    node, _ = node_of("Pointwise", [x], {}, "Cast %0 -> int32")
    assert list(kernels_for(node, "cpu", isas()[0])[0].in_place(node)) == [0]


def test_dimensions_merge_where_all_operands_agree() -> None:
    dims = merged((2, 3, 4, 5), [(2, 3, 4, 5), (4, 5), (2, 3, 1, 1)])
    assert dims.extents == (6, 20)
    assert dims.present == ((True, True), (False, True), (True, False))
    assert merged(("N", 1, 8), [("N", 1, 8), ()]).extents == ("N*8",)


def test_shapes_that_contradict_have_no_kernel() -> None:
    three, four = Port("float32", (3,)), Port("float32", (4,))
    node = Node("Pointwise", (three, four), (four,), {}, parse("Add %0 %1 -> float32"))
    assert not kernels_for(node, "cpu", isas()[0])
