"""Chains of views and transpositions, and moves that meet across other operators."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.writer import Shape
from tests.passes.support import Net, Rewritten, rewritten_same

Inputs = dict[str, tuple[str, Shape]]
X: Inputs = {"x": ("float32", ("N", "S", 24))}


def view(net: Net, x: str, *shape: int) -> str:
    return net.node("Reshape", x, net.constant(list(shape), "int64"))


def moved(net: Net, x: str, *perm: int) -> str:
    return net.node("Transpose", x, perm=list(perm))


def relu(net: Net, x: str) -> str:
    return net.node("Relu", x)


@st.composite
def chains(draw: st.DrawFn) -> list[tuple[str, list[int]]]:
    """Views and transpositions of a tensor of 2 x 3 x 4 x 5 elements."""
    shape, steps = [6, 4, 5], []
    for _ in range(draw(st.integers(2, 6))):
        if draw(st.booleans()):
            perm = draw(st.permutations(range(len(shape))))
            shape = [shape[axis] for axis in perm]
            steps.append(("Transpose", list(perm)))
        else:
            shape = draw(st.sampled_from(_views(shape)))
            steps.append(("Reshape", list(shape)))
    return steps


def _views(shape: list[int]) -> list[list[int]]:
    """Neighbours joined, an axis split, an axis of one element added."""
    joined = [[*shape[:i], shape[i] * shape[i + 1], *shape[i + 2 :]] for i in range(len(shape) - 1)]
    split = [[*shape[:i], 2, shape[i] // 2, *shape[i + 1 :]] for i, size in enumerate(shape) if size % 2 == 0]
    ones = [[*shape[:i], 1, *shape[i:]] for i in range(len(shape) + 1)] if len(shape) < 6 else []
    return joined + split + ones + [shape]


@settings(max_examples=60, deadline=None)
@given(chains())
def test_any_chain_is_the_same_with_fewer_moves(steps: list[tuple[str, list[int]]]) -> None:
    net, value = Net(), "x"
    for op, numbers in steps:
        value = view(net, value, *numbers) if op == "Reshape" else moved(net, value, *numbers)
    before = sum(op == "Transpose" for op, _ in steps)
    result = rewritten_same(net, {"x": ("float32", (6, 4, 5))}, relu(net, value))
    assert result.operators["Transpose"] <= before
    assert len(result.nodes) <= len(steps) + 1


def test_the_key_of_torchs_attention_is_transposed_once() -> None:
    """[N,S,H*D] -> heads -> [N*H,S,D] -> [N*H,D,S] -> [N,H,D,S], as torch's exporter writes it"""
    net = Net()
    heads = moved(net, view(net, "x", 0, 0, 4, 6), 0, 2, 1, 3)
    flat = moved(net, net.node("Reshape", heads, joined_sizes(net)), 0, 2, 1)
    split = net.node("Reshape", flat, split_sizes(net))
    result = rewritten_same(net, X, relu(net, split), N=2, S=5)
    assert result.operators == {"View": 1, "Transpose": 1, "Pointwise": 1}


def sizes(net: Net) -> tuple[str, str]:
    shape = net.node("Shape", "x")
    first, second = (net.node("Gather", shape, net.constant([axis], "int64")) for axis in (0, 1))
    return first, second


def joined_sizes(net: Net) -> str:
    batch, length = sizes(net)
    four, six = net.constant([4], "int64"), net.constant([6], "int64")
    return net.node("Concat", net.node("Mul", batch, four), length, six, axis=0)


def split_sizes(net: Net) -> str:
    batch, length = sizes(net)
    four, six = net.constant([4], "int64"), net.constant([6], "int64")
    return net.node("Concat", batch, four, six, length, axis=0)


def test_transpositions_that_undo_each_other_across_views_go() -> None:
    net = Net()
    y = view(net, moved(net, view(net, moved(net, "x", 1, 0, 2), 5, 3, 2, 4), 1, 0, 2, 3), 3, 5, 8)
    result = rewritten_same(net, {"x": ("float32", (3, 5, 8))}, relu(net, y))
    assert result.operators == {"Pointwise": 1} and result.fired("shuffles") == 1


def test_a_view_that_cuts_across_axes_stays() -> None:
    net = Net()
    y = moved(net, view(net, moved(net, "x", 1, 0), 3, 4), 1, 0)
    result = rewritten_same(net, {"x": ("float32", (6, 2))}, relu(net, y))
    assert not result.fired("shuffles") and result.operators["Transpose"] == 2


def test_a_transposed_value_used_elsewhere_is_not_made_twice() -> None:
    net = Net()
    first = moved(net, "x", 1, 0, 2)
    y = moved(net, view(net, first, 5, 3, 2, 4), 1, 0, 2, 3)
    result = rewritten_same(net, {"x": ("float32", (3, 5, 8))}, relu(net, y), relu(net, first))
    assert result.operators["Transpose"] == 2 and not result.fired("shuffles")


# across Linear


def in_time_order(net: Net, residual: bool = False) -> str:
    """A layer over [S,N,C] of a model over [N,S,C], as torch.nn.MultiheadAttention is exported."""
    x = moved(net, "x", 1, 0, 2)
    y = net.node("Add", net.node("MatMul", x, net.draw(24, 24)), net.draw(24))
    y = net.node("Add", y, x) if residual else y
    return moved(net, y, 1, 0, 2)


def test_a_transposition_meets_another_below_a_linear() -> None:
    net = Net()
    result = rewritten_same(net, X, relu(net, in_time_order(net)), N=2, S=3)
    assert result.operators == {"Linear": 1}
    assert result.fired("transpose below linear") + result.fired("transpose above linear") == 1


def test_a_transposition_meets_another_above_a_linear() -> None:
    """The result of attention, joined to [S,N,C], projected, and put back to [N,S,C]"""
    net = Net()
    joined = view(net, moved(net, "x", 2, 0, 1, 3), 5, 2, 24)
    y = moved(net, net.node("Add", net.node("MatMul", joined, net.draw(24, 7)), net.draw(7)), 1, 0, 2)
    result = rewritten_same(net, {"x": ("float32", (2, 4, 5, 6))}, relu(net, y))
    assert result.fired("transpose above linear") == 1
    assert result.operators == {"Transpose": 1, "View": 1, "Linear": 1}


def test_a_residual_in_the_other_order_holds_it_back() -> None:
    net = Net()
    result = rewritten_same(net, X, relu(net, in_time_order(net, residual=True)), N=2, S=3)
    assert result.operators["Transpose"] == 2
    reasons = result.reasons("transpose below linear") + result.reasons("transpose above linear")
    assert any("residual" in said or "used elsewhere" in said for said in reasons)


def test_channels_are_not_moved_across_a_linear() -> None:
    net = Net()
    y = moved(net, net.node("MatMul", moved(net, "x", 0, 2, 1), net.draw(5, 7)), 0, 2, 1)
    result = rewritten_same(net, {"x": ("float32", (2, 5, 3))}, relu(net, y))
    assert result.operators["Transpose"] == 2


def test_a_projection_used_elsewhere_keeps_its_order() -> None:
    net = Net()
    x = moved(net, "x", 1, 0, 2)
    product = net.node("MatMul", x, net.draw(24, 24))
    result = rewritten_same(net, X, relu(net, moved(net, product, 1, 0, 2)), relu(net, product), N=2, S=3)
    assert result.operators["Transpose"] == 2


# slices


def cut(net: Net, x: str, start: int, end: int, axis: int) -> str:
    return net.node("Slice", x, *(net.constant([number], "int64") for number in (start, end, axis)))


def test_slices_go_above_transpositions_that_then_meet() -> None:
    net = Net()
    x = moved(net, "x", 1, 0, 2)
    parts = [relu(net, moved(net, cut(net, x, start, start + 8, 2), 1, 0, 2)) for start in (0, 8, 16)]
    result = rewritten_same(net, {"x": ("float32", (2, 5, 24))}, *parts)
    assert result.operators == {"Slice": 3, "Pointwise": 3} and result.fired("slice of transposed") == 3


def test_slices_of_a_view_of_something_transposed() -> None:
    net = Net()
    x = view(net, moved(net, "x", 1, 0, 2), 5, 2, 3, 8)
    parts = [cut(net, x, index, index + 1, 2) for index in range(3)]
    parts = [relu(net, moved(net, view(net, part, 5, 2, 8), 1, 0, 2)) for part in parts]
    result = rewritten_same(net, {"x": ("float32", (2, 5, 24))}, *parts)
    assert result.operators == {"Slice": 3, "Pointwise": 3} and result.fired("slice of view") == 3


def test_a_slice_inside_the_pieces_of_a_view_stays() -> None:
    net = Net()
    x = view(net, moved(net, "x", 1, 0, 2), 5, 2, 3, 8)
    y = relu(net, moved(net, cut(net, x, 0, 4, 3), 1, 0, 2, 3))
    result = rewritten_same(net, {"x": ("float32", (2, 5, 24))}, y)
    assert not result.fired("slice of view")
    assert any("whole pieces" in said for said in result.reasons("slice of view"))


def test_a_slice_that_nothing_waits_for_stays_below() -> None:
    net = Net()
    y = relu(net, cut(net, moved(net, "x", 1, 0, 2), 0, 3, 0))
    result = rewritten_same(net, {"x": ("float32", (2, 5, 24))}, y)
    assert not result.fired("slice of transposed") and result.operators["Transpose"] == 1


# products over a joined batch


BATCHED: Inputs = dict.fromkeys("qkv", ("float32", (2, 3, 5, 4)))


def batched(net: Net, elsewhere: bool = False) -> Rewritten:
    """softmax(q kᵀ) v over [B*H,S,D], the scores seen as [B,H,S,T] in between, as fairseq's descendants write it."""
    q, k, v = (view(net, name, 6, 5, 4) for name in "qkv")
    scores = view(net, net.node("MatMul", net.node("Mul", q, net.constant(0.5)), moved(net, k, 0, 2, 1)), 2, 3, 5, 5)
    masked = net.node("Add", scores, "mask")
    shares = net.node("Softmax", view(net, masked, 6, 5, 5), axis=-1)
    y = view(net, net.node("MatMul", shares, v), 2, 3, 5, 4)
    outputs = [y, net.node("Exp", shares)] if elsewhere else [y]
    return rewritten_same(net, {**BATCHED, "mask": ("float32", (2, 1, 1, 5))}, *outputs)


def test_views_meet_across_products_and_softmax() -> None:
    result = batched(Net())
    assert result.operators == {"Attention": 1}
    assert result.fired("view above product") >= 2 and result.fired("view above softmax") == 1


def test_products_of_probabilities_used_elsewhere_stay() -> None:
    result = batched(Net(), elsewhere=True)
    assert result.operators["Attention"] == 0 and result.operators["Softmax"] == 1


def test_values_used_elsewhere_keep_their_view() -> None:
    net = Net()
    shares = net.node("Softmax", view(net, "x", 6, 8), axis=-1)
    product = net.node("MatMul", view(net, "x", 6, 2, 4), view(net, "y", 6, 4, 2))
    outputs = [relu(net, view(net, shares, 2, 3, 8)), shares, relu(net, view(net, product, 2, 3, 2, 2)), product]
    inputs: Inputs = {"x": ("float32", (2, 3, 8)), "y": ("float32", (2, 3, 8))}
    result = rewritten_same(net, inputs, *outputs)
    for name in ("view above softmax", "view above product"):
        assert not result.fired(name) and any("used elsewhere" in said for said in result.reasons(name))


def test_a_view_that_changes_the_matrices_stays_below() -> None:
    net = Net()
    product = net.node("MatMul", view(net, "q", 6, 5, 4), moved(net, view(net, "k", 6, 5, 4), 0, 2, 1))
    result = rewritten_same(net, BATCHED, relu(net, view(net, product, 6, 25)))
    assert not result.fired("view above product") and result.operators["MatMul"] == 1


@pytest.mark.parametrize("name", ["view above product", "view above softmax"])
def test_views_stay_where_none_is_above(name: str) -> None:
    net = Net()
    y = view(net, net.node("Softmax", net.node("MatMul", "a", "b"), axis=-1), 2, 3, 5, 5)
    inputs: Inputs = {"a": ("float32", (6, 5, 4)), "b": ("float32", (6, 4, 5))}
    assert not rewritten_same(net, inputs, relu(net, y)).fired(name)
