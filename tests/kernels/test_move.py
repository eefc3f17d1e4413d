"""Transpose, Slice, Concat, Split, Pad, Expand, Tile, Copy: bytes end up where numpy puts them."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.dtypes import numpy_dtype
from ingot.kernels import candidates
from ingot.kernels.cpu.build import Handle
from ingot.kernels.cpu.copying import static_pieces
from ingot.kernels.cpu.isa import AVX2
from ingot.kernels.cpu.standalone import Standalone
from ingot.kernels.cpu.strided import UNIT, Axis, Move, Stride, row_major, simplified
from ingot.kernels.node import Node, Port
from ingot.plan.extent import evaluate
from tests.kernels.harness import check, node_of
from tests.kernels.symbolic import check_symbolic

DTYPES = ["uint8", "bool", "int16", "bfloat16", "float32", "int32", "float64", "int64", "complex128"]
drawn = settings(max_examples=10, deadline=None, derandomize=True)


def numbers(dtype, *shape):
    values = np.random.default_rng(sum(shape)).integers(0, 2 if dtype == "bool" else 100, shape)
    return values.astype(numpy_dtype(dtype))


def run(op, inputs, **attributes):
    node, expected = node_of(op, inputs, attributes)
    return check(node, inputs, expected, rtol=0, atol=0)


def blocked_too(ran):
    return any("blocked" in c.ports.inputs for c in ran)


# Transpose, Copy


@pytest.mark.parametrize("dtype", DTYPES[:-1])
def test_transposes_of_every_dtype(dtype):
    shapes = {(37, 41): (1, 0), (2, 35, 3, 20): (0, 2, 3, 1), (3, 5, 2): (2, 0, 1), (1, 9, 4, 8): (0, 2, 1, 3)}
    for shape, perm in shapes.items():
        run("Transpose", [numbers(dtype, *shape)], perm=perm)


@drawn
@given(st.lists(st.integers(1, 19), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_transposes_of_drawn_shapes(shape, random):
    perm = list(range(len(shape)))
    random.shuffle(perm)
    run("Transpose", [numbers("float32", *shape)], perm=perm)


@pytest.mark.parametrize(("shape", "perm"), [
    ((), ()), ((7,), (0,)), ((0, 3), (1, 0)), ((3, 0, 2), (2, 0, 1)),
    ((2, 1, 2, 3, 1, 2, 2, 3), (7, 3, 0, 5, 1, 6, 4, 2)),
    ((130, 70), (1, 0)), ((5000, 3), (1, 0)), ((3, 5000), (1, 0)),
])  # fmt: skip
def test_transposes_of_odd_shapes(shape, perm):
    run("Transpose", [numbers("float32", *shape)], perm=perm)


def test_wide_elements():
    x = numbers("complex128", 5, 7)
    node = Node("Transpose", (Port("complex128", (5, 7)),), (Port("complex128", (7, 5)),), {"perm": (1, 0)})
    halves = np.ascontiguousarray(x.T).view(np.float64)
    for candidate in candidates(node, "cpu", AVX2):
        (y,) = Standalone(node, candidate, AVX2)(x)
        assert np.array_equal(y.view(np.float64), halves)


@pytest.mark.parametrize("sizes", [{"N": 1, "S": 5}, {"N": 3, "S": 40}])
def test_symbolic_transposes(sizes):
    x = numbers("float32", sizes["N"], sizes["S"], 4, 8)
    check_symbolic("Transpose", [x], [("N", "S", 4, 8)], sizes, perm=(0, 2, 1, 3))
    check_symbolic("Transpose", [x], [("N", "S", 4, 8)], sizes, perm=(0, 2, 3, 1))
    check_symbolic("Transpose", [x], [("N", "S", 4, 8)], sizes, perm=(3, 1, 0, 2))


@pytest.mark.parametrize("shape", [(), (3,), (7, 100), (0, 4)])
def test_copies(shape):
    x = numbers("int16", *shape)
    node = Node("Copy", (Port("int16", shape),), (Port("int16", shape),))
    check(node, [x], [x])


# Slice


@drawn
@given(st.data())
def test_slices(data):
    shape = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    parts = []
    for extent in shape:
        step = data.draw(st.sampled_from([1, 1, 2, 3, -1, -2]))
        start = data.draw(st.integers(0, extent - 1))
        most = (extent - start + step - 1) // step if step > 0 else start // -step + 1
        parts.append((start, step, data.draw(st.integers(0, most))))
    starts, steps, sizes = zip(*parts, strict=True)
    dtype = data.draw(st.sampled_from(DTYPES[:-1]))
    run("Slice", [numbers(dtype, *shape)], starts=starts, steps=steps, sizes=sizes)


def test_slices_of_blocked_maps():
    x = numbers("uint8", 2, 70, 5, 6)
    assert blocked_too(run("Slice", [x], starts=(0, 16, 1, 0), steps=(1, 1, 2, 1), sizes=(2, 41, 2, 6)))
    assert not blocked_too(run("Slice", [x], starts=(0, 15, 1, 0), steps=(1, 1, 2, 1), sizes=(2, 41, 2, 6)))


@pytest.mark.parametrize("size", [5, 33])
def test_symbolic_slices(size):
    x = numbers("int64", 2, size, 3)
    sizes = {"S": size}
    check_symbolic("Slice", [x], [(2, "S", 3)], sizes, starts=(0, 1, 0), steps=(1, 1, 1), sizes=(2, "S-1", 3))
    check_symbolic("Slice", [x], [(2, "S", 3)], sizes, starts=(0, "S-1", 2), steps=(1, -1, -1), sizes=(2, "S", 3))


# Concat, Split


@drawn
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 2), st.sampled_from(DTYPES[:-1]))
def test_concat_and_split(sizes, axis, dtype):
    parts = [numbers(dtype, *[size if k == axis else 5 + k for k in range(3)]) for size in sizes]
    run("Concat", parts, axis=axis)
    run("Split", [np.concatenate(parts, axis)], axis=axis, sizes=sizes)


def test_blocked_parts():
    parts = [numbers("float32", 2, channels, 3, 5) for channels in (16, 48, 7)]
    assert blocked_too(run("Concat", parts, axis=1))
    assert blocked_too(run("Split", [np.concatenate(parts, 1)], axis=1, sizes=(16, 48, 7)))
    assert not blocked_too(run("Concat", parts[::-1], axis=1))
    assert blocked_too(run("Concat", [parts[2], parts[2]], axis=3))


def test_a_blocked_constant():
    parts = [numbers("float32", 2, 16, 3), numbers("float32", 2, 16, 3)]
    node, expected = node_of("Concat", parts, {"axis": 1}, constants=(1,))
    assert blocked_too(check(node, parts, expected))


@pytest.mark.parametrize("sizes", [{"A": 0, "B": 3}, {"A": 20, "B": 1}])
def test_symbolic_parts(sizes):
    parts = [numbers("float16", 2, sizes["A"], 3), numbers("float16", 2, sizes["B"], 3)]
    check_symbolic("Concat", parts, [(2, "A", 3), (2, "B", 3)], sizes, axis=1)
    check_symbolic("Split", [np.concatenate(parts, 1)], [(2, "A+B", 3)], sizes, axis=1, sizes=("A", "B"))


# Expand, Tile


@drawn
@given(st.lists(st.tuples(st.integers(1, 20), st.booleans()), max_size=4), st.lists(st.integers(0, 3), max_size=2))
def test_expands(axes, outer):
    x = numbers("float32", *[1 if still else size for size, still in axes])
    run("Expand", [x], shape=[*outer, *[size for size, _ in axes]])


@drawn
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=4), st.sampled_from(DTYPES[:-1]))
def test_tiles(axes, dtype):
    shape, repeats = zip(*axes, strict=True)
    run("Tile", [numbers(dtype, *shape)], repeats=repeats)


@pytest.mark.parametrize("size", [1, 7])
def test_symbolic_repetition(size):
    check_symbolic("Expand", [numbers("int8", size, 1)], [("N", 1)], {"N": size, "M": 7}, shape=("M", 40))
    check_symbolic("Tile", [numbers("int8", size, 3)], [("N", 3)], {"N": size}, repeats=(2, "N"))


# Pad


@drawn
@given(st.data())
def test_pads(data):
    shape = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    pads = data.draw(st.lists(st.integers(0, 4), min_size=2 * len(shape), max_size=2 * len(shape)))
    mode = data.draw(st.sampled_from(["constant", "reflect", "edge", "wrap"]))
    dtype = data.draw(st.sampled_from(DTYPES[:-1]))
    run("Pad", [numbers(dtype, *shape)], pads=pads, mode=mode, **({"value": 1} if mode == "constant" else {}))


@pytest.mark.parametrize("mode", ["reflect", "wrap", "edge"])
def test_pads_wider_than_the_input(mode):
    run("Pad", [numbers("float32", 3, 4)], pads=(7, 9, 5, 11), mode=mode)


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_pads_of_blocked_maps(mode):
    for dtype in ("float32", "uint8"):
        assert blocked_too(run("Pad", [numbers(dtype, 1, 19, 5, 7)], pads=(0, 0, 1, 2, 0, 0, 3, 0), mode=mode))


def test_cropping():
    x = numbers("float32", 4, 30)
    attributes = {"pads": (2, -3, 0, -2), "mode": "constant", "value": 7.5}
    node = Node("Pad", (Port("float32", x.shape),), (Port("float32", (6, 25)),), attributes)
    check(node, [x], [np.pad(x[:, 3:-2], ((2, 0), (0, 0)), constant_values=7.5)])


@pytest.mark.parametrize("mode", ["constant", "edge"])
def test_symbolic_pads(mode):
    for height in (1, 12):
        x = numbers("float32", 1, 3, height, 9)
        check_symbolic("Pad", [x], [(1, 3, "H", 9)], {"H": height}, pads=(0, 0, 1, 1, 0, 0, 2, 1), mode=mode)


# the algebra


def axes_of(shape, perm):
    source, target = row_major(shape), row_major([shape[p] for p in perm])
    return tuple(Axis(shape[p], source[p], t) for p, t in zip(perm, target, strict=True))


def test_axes_collapse():
    def simple(shape, perm, element=8):
        return simplified(Move(element, None, None, axes_of(shape, perm)))

    assert simple((2, 3, 4), (0, 1, 2)).axes == (Axis(24, UNIT, UNIT),)
    assert [a.extent for a in simple((2, 1, 3, 4), (3, 0, 1, 2)).axes] == [4, 6]
    (flat,) = simple(("N", "S", 4), (0, 1, 2)).axes
    assert flat.contiguous and evaluate(flat.extent, {"N": 3, "S": 5}) == 60
    assert simple((1, 1), (1, 0)).axes == ()


def test_elements_widen():
    move = Move(1, Handle("input", 0), Handle("output", 0), axes_of(("N", 6, 4), (1, 0, 2)), source_offset=8)
    wide = simplified(move)
    assert wide.element == 4 and wide.source_offset == 2
    assert wide.axes == (Axis(6, UNIT, Stride(1, ("N",))), Axis("N", Stride(6), UNIT))
    assert simplified(Move(1, move.source, move.target, move.axes, source_offset=6)).element == 1


@pytest.mark.parametrize("size", range(1, 64))
def test_pieces_cover(size):
    pieces = static_pieces(size)
    assert sorted(set(itertools.chain(*(range(at, at + n) for at, n in pieces)))) == list(range(size))


# Range


@pytest.mark.parametrize("dtype", ["int64", "int32", "float32"])
def test_ranges(dtype):
    for start, step, size in ((0, 1, 0), (3, -2, 17), (-5, 7, 1)):
        run("Range", [], start=start, step=step, size=size, dtype=dtype)
    check_symbolic("Range", [], [], {"N": 9}, start="N-1", step=-1, size="N", dtype=dtype)
