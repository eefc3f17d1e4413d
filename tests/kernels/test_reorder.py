"""Reorder: plain ↔ blocked is lossless for every dtype, size and split."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.kernels import candidates
from ingot.kernels.cpu.standalone import Standalone
from ingot.kernels.node import Node, Port
from tests.kernels.harness import isas

DIRECTIONS = [("plain", "blocked"), ("blocked", "plain")]
DTYPES = ["float32", "int32", "float16", "bfloat16", "uint8", "int8", "bool", "float64"]


def node_of(dtype, shape, direction):
    attributes = {"layout_from": direction[0], "layout_to": direction[1]}
    return Node("Reorder", (Port(dtype, shape),), (Port(dtype, shape),), attributes)


def numbers(dtype, shape):
    from ingot.dtypes import numpy_dtype

    return np.random.default_rng(0).integers(0, 100, shape).astype(numpy_dtype(dtype))


def round_trip(dtype, shape, symbolic=None):
    x = numbers(dtype, shape)
    symbols = {name: size for name, size in zip(symbolic or shape, shape, strict=True) if isinstance(name, str)}
    for isa in isas():
        for direction in DIRECTIONS:
            node = node_of(dtype, symbolic or shape, direction)
            (candidate,) = candidates(node, "cpu", isa)
            kernel = Standalone(node, candidate, isa, symbols, level=1)
            for chunks in (1, 3):
                (y,) = kernel(x, chunks=chunks)
                assert np.array_equal(x, y), (dtype, shape, direction, isa.name, chunks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype):
    round_trip(dtype, (2, 35, 5, 7))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 40), st.lists(st.integers(1, 20), min_size=1, max_size=3))
def test_drawn_shapes(batch, channels, spatial):
    round_trip("float32", (batch, channels, *spatial))


@pytest.mark.parametrize("shape", [(0, 16, 4, 4), (2, 16, 0, 4), (1, 16, 1, 1), (1, 16, 1, 300)])
def test_corner_sizes(shape):
    round_trip("float32", shape)


@pytest.mark.parametrize("shape", [(2, 19, 6, 11), (1, 19, 40, 40)])
def test_symbolic_sizes(shape):
    round_trip("uint8", shape, ("N", 19, "H", "W"))
