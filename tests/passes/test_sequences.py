"""Feature maps seen as sequences: the same results, and moves that cost nothing where channels lie last."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import ingot
from ingot.passes.sequences import see_as_sequences
from ingot.plan.plan import GraphSegment
from tests.passes.support import Net, Rewritten, assert_same, check_graph, model_of, rewritten

IMAGE, SEQUENCE = (2, 6, 3, 4), (2, 6, 12)


def net(perm: tuple[int, ...] = (0, 2, 1)) -> tuple[Net, str, str]:
    """(x + softmax over the channels of relu(x) by way of a sequence, its name, the result's)"""
    net = Net()
    shapes = [net.weight(f"shape{len(s)}", np.asarray(s, np.int64)) for s in (SEQUENCE, IMAGE)]
    flat = net.node("Reshape", net.node("Relu", "x"), shapes[0])
    rows = net.node("Softmax", net.node("Transpose", flat, perm=perm), axis=-1)
    back = net.node("Reshape", net.node("Transpose", rows, perm=perm), shapes[1])
    return net, flat, net.node("Add", back, "x")


def turned(perm: tuple[int, ...] = (0, 2, 1), read_twice: bool = False) -> tuple[Rewritten, int]:
    made, flat, result = net(perm)
    model = rewritten(model_of(made, {"x": ("float32", IMAGE)}, *[flat] * read_twice, result))
    return model, see_as_sequences(model.after)


def perms(loaded: ir.Model) -> list[tuple[int, ...]]:
    return [tuple(n.attributes["perm"].value) for n in loaded.graph if n.op_type == "Transpose"]


def test_both_ways() -> None:
    model, count = turned()
    assert count == 2 and perms(model.after) == [(0, 2, 3, 1), (0, 3, 1, 2)]
    check_graph(model.after)
    assert_same(model)


def test_what_is_no_exchange_stays() -> None:
    assert turned((0, 1, 2))[1] == 0


def test_a_sequence_that_is_read_twice_stays() -> None:
    model, count = turned(read_twice=True)
    assert count == 1 and perms(model.after) == [(0, 2, 1), (0, 3, 1, 2)]
    assert_same(model)


@pytest.mark.parametrize("target", ["cuda:sm_90"])
def test_no_copy_between_convolutions_and_rows(target: str) -> None:
    """A convolution, rows, a convolution: nothing is launched for the way between."""
    net = Net()
    flat, image = (net.weight(f"shape{len(s)}", np.asarray(s, np.int64)) for s in ((1, 64, 64), (1, 64, 8, 8)))
    first = net.node("Conv", "x", net.draw(64, 64, 3, 3), pads=[1] * 4)
    rows = net.node("Transpose", net.node("Reshape", first, flat), perm=(0, 2, 1))
    product = net.node("MatMul", rows, net.draw(64, 64))
    back = net.node("Reshape", net.node("Transpose", product, perm=(0, 2, 1)), image)
    result = net.node("Conv", back, net.draw(64, 64, 3, 3), pads=[1] * 4)
    model = model_of(net, {"x": ("float32", (1, 64, 8, 8))}, result)
    engine = ingot.build(model, target=target, level=0, verify=False)
    (segment,) = engine.variants[0].plan.segments
    assert isinstance(segment, GraphSegment)
    launched = [segment.steps[launch.step].op for launch in segment.launches]
    assert launched.count("Linear") == 1 and "Transpose" not in launched
    assert launched.count("Reorder") <= 2  # of the input, of the output


@pytest.mark.parametrize("turned_round", [False, True])
def test_what_is_added_to_an_image_is_added_in_the_product(turned_round: bool) -> None:
    """A convolution's result, rows of it through a product, and both together."""
    net = Net()
    flat, image = (net.weight(f"shape{len(s)}", np.asarray(s, np.int64)) for s in (SEQUENCE, IMAGE))
    first = net.node("Conv", "x", net.draw(6, 6, 3, 3), pads=[1] * 4)
    rows = net.node("Transpose", net.node("Reshape", first, flat), perm=(0, 2, 1))
    product = net.node("MatMul", net.node("Softmax", rows, axis=-1), net.draw(6, 6))
    back = net.node("Reshape", net.node("Transpose", product, perm=(0, 2, 1)), image)
    operands = (back, first) if turned_round else (first, back)
    model = rewritten(model_of(net, {"x": ("float32", IMAGE)}, net.node("Sub", *operands)))
    assert see_as_sequences(model.after) == 3
    check_graph(model.after)
    assert_same(model)
    assert "Pointwise" not in model.operators and len(model.only("Linear").inputs) == 3
    assert perms(model.after) == [(0, 2, 3, 1), (0, 2, 3, 1), (0, 3, 1, 2)]
