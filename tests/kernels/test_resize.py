"""Resize: every coordinate and rounding mode, static and symbolic, plain and blocked; integers to the last bit."""

import numpy as np
import pytest

from ingot.dtypes import numpy_dtype
from ingot.kernels import candidates
from ingot.kernels.cpu.isa import AVX2
from tests.kernels.harness import check, node_of
from tests.kernels.symbolic import check_symbolic, symbolic_node

COORDINATES = ["half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel", "half_pixel_symmetric",
               "tf_half_pixel_for_nn"]  # fmt: skip
NEAREST = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]


def numbers(dtype, *shape):
    return (np.random.default_rng(sum(shape)).random(shape) * 100).astype(numpy_dtype(dtype))


def run(x, sizes, mode, tolerance=1e-4, **attributes):
    node, expected = node_of("Resize", [x], {"sizes": sizes, "mode": mode, **attributes})
    return check(node, [x], expected, rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("coordinate", COORDINATES)
def test_coordinates(coordinate):
    x = numbers("float32", 1, 3, 6, 7)
    for mode in ("nearest", "linear", "cubic"):
        run(x, (1, 3, 12, 5), mode, coordinate=coordinate)
    run(x, (1, 3, 13, 17), "linear", coordinate=coordinate, scales=(1.0, 1.0, 2.3, 2.5), exclude_outside=1)
    run(x, (1, 3, 6, 1), "linear", coordinate=coordinate)


@pytest.mark.parametrize("nearest", NEAREST)
def test_roundings(nearest):
    for sizes in ((2, 3, 9, 10), (2, 3, 3, 2)):
        run(numbers("int64", 2, 3, 6, 5), sizes, "nearest", nearest=nearest, coordinate="half_pixel")


@pytest.mark.parametrize("dtype", ["bool", "uint8", "bfloat16", "float16", "float64", "int32"])
def test_dtypes(dtype):
    x = numbers(dtype, 2, 5, 4, 6)
    run(x, (2, 5, 8, 3), "nearest")
    if dtype != "bool":
        run(x, (2, 5, 8, 9), "linear", 1e-2 if "16" in dtype else 1e-4)
        run(x, (2, 5, 8, 9), "cubic", 1e-2 if "16" in dtype else 1e-4)


@pytest.mark.parametrize("shape", [(5,), (4, 7), (2, 3, 9), (1, 2, 3, 4, 5)])
def test_ranks(shape):
    x = numbers("float32", *shape)
    for mode in ("nearest", "linear", "cubic"):
        run(x, tuple(2 * size - 1 for size in shape), mode)
    run(x, shape, "linear")


def test_antialias():
    for mode in ("linear", "cubic"):
        run(numbers("float32", 1, 2, 20, 24), (1, 2, 7, 5), mode, antialias=1)
        run(numbers("uint8", 1, 2, 20, 24), (1, 2, 7, 5), mode, antialias=1, exclude_outside=1)


def test_extrapolation():
    region = (0.0, 0.0, -0.3, 0.2, 1.0, 1.0, 0.8, 1.2)
    for mode in ("nearest", "linear"):
        run(numbers("float32", 1, 3, 6, 7), (1, 3, 9, 8), mode, coordinate="tf_crop_and_resize", roi=region,
            extrapolation=7.5)  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_blocked_maps(dtype):
    x = numbers(dtype, 2, 19, 5, 6)
    for mode in ("nearest", "linear"):
        assert any("blocked" in c.ports.inputs for c in run(x, (2, 19, 10, 12), mode))
        assert not any("blocked" in c.ports.inputs for c in run(x, (2, 24, 5, 6), mode))


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("coordinate", COORDINATES)
def test_symbolic_sizes(mode, coordinate):
    x = numbers("float32", 1, 3, 5, 6)
    check_symbolic("Resize", [x], [(1, 3, "H", 6)], {"H": 5}, mode=mode, coordinate=coordinate,
                   sizes=(1, 3, "H*2", 9), scales=(1.0, 1.0, 2.0, 1.5), atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_symbolic_ratios(mode):
    for height in (1, 12):
        x = numbers("uint8", 1, 2, height, 6)
        check_symbolic("Resize", [x], [(1, 2, "H", 6)], {"H": height}, mode=mode, sizes=(1, 2, 7, 6))


def test_symbolic_antialias():
    x = numbers("float32", 1, 2, 9, 6)
    check_symbolic("Resize", [x], [(1, 2, "H", 6)], {"H": 9}, mode="cubic", sizes=(1, 2, "H//2", 6), antialias=1,
                   scales=(1.0, 1.0, 0.5, 1.0), exclude_outside=1)  # fmt: skip


def test_what_cannot_be_computed_at_run_time_has_no_kernel():
    x = numbers("float32", 1, 2, 9, 6)
    for attributes in ({"antialias": 1}, {"coordinate": "tf_crop_and_resize"}):
        node = symbolic_node("Resize", [x], [(1, 2, "H", 6)], {"mode": "linear", "sizes": (1, 2, 7, 6), **attributes})
        assert not list(candidates(node, "cpu", AVX2))
