"""Fusions whose inner values are read elsewhere too: those values stay, and the reason names them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from examples.writer import Shape
from ingot.passes.idioms import IDIOMS
from tests.passes import test_fuse_attention as attention
from tests.passes import test_fuse_linear as linear
from tests.passes import test_fuse_norm as norm
from tests.passes import test_idioms as idioms
from tests.passes.support import Net, assert_same, model_of, rewritten, rewritten_same, through

Inputs = dict[str, tuple[str, Shape]]


def output_of(net: Net, op: str, number: int = 0) -> str:
    """What the n-th node of an operator makes."""
    return str([node.output[0] for node in net.nodes if node.op_type == op][number])


# (rewrite, what is written, the operator whose result is an output too)
IDIOMS_SHARED: list[tuple[str, Callable[[Net], str], str]] = [
    ("gelu", idioms.gelu, "Erf"),
    ("gelu tanh", idioms.gelu_tanh, "Tanh"),
    ("sigmoid", idioms.sigmoid, "Exp"),
    ("silu", lambda net: net.node("Mul", "x", net.node("Sigmoid", "x")), "Sigmoid"),
    ("hard swish", lambda net: idioms.hard_swish(net, "outside"), "Clip"),
    ("hard sigmoid", idioms.hard_swish, "Clip"),
    ("softmax", lambda net: idioms.softmax(net, shift=False), "ReduceSum"),
    ("l2 norm", lambda net: net.node("Sqrt", idioms.summed(net, net.node("Mul", "x", "x"))), "ReduceSum"),
    ("l1 norm", lambda net: idioms.summed(net, net.node("Abs", "x")), "Abs"),
    ("log sum exp", lambda net: net.node("Log", idioms.summed(net, net.node("Exp", "x"))), "Exp"),
    ("stable log sum exp", idioms.stable_log_sum_exp, "Log"),
]


@pytest.mark.parametrize(("name", "write", "op"), IDIOMS_SHARED, ids=[case[0] for case in IDIOMS_SHARED])
def test_idioms(name: str, write: Callable[[Net], str], op: str) -> None:
    net = Net()
    y = write(net)
    result = through(model_of(net, idioms.X, y, output_of(net, op)), IDIOMS)
    assert not result.fired(name)
    assert_same(result)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms(kind: str) -> None:
    net = Net()
    y = norm.layer(net) if kind == "layer" else norm.rms(net)
    result = rewritten_same(net, norm.SEQUENCE, y, output_of(net, "Sqrt"), N=2)
    assert not result.fired(f"{kind} norm")
    assert any("used elsewhere" in said for said in result.reasons(f"{kind} norm"))


def test_the_scale_of_a_norm() -> None:
    net = Net()
    plain = norm.layer(net)
    result = rewritten_same(net, norm.SEQUENCE, norm.affine(net, plain, 16, bias=False), plain, N=2)
    assert result.fired("layer norm") == 1 and not result.fired("norm scale")
    assert any("used elsewhere" in said for said in result.reasons("norm scale"))


def test_instance_norm() -> None:
    net = Net()
    plain = norm.layer(net, axes=(2, 3))
    result = rewritten_same(net, norm.IMAGE, norm.affine(net, plain, 8, 1, 1), plain)
    assert [node.attributes["kind"].value for node in result.nodes if node.op_type == "Norm"] == ["layer"]


def test_group_norm() -> None:
    net = Net()
    y = norm.grouped(net, 4)
    result = rewritten_same(net, norm.IMAGE, y, output_of(net, "InstanceNormalization"))
    assert not result.fired("group norm")
    assert any("used elsewhere" in said for said in result.reasons("group norm"))


def test_batch_norm_after_a_convolution() -> None:
    net = Net()
    plain = linear.conv(net)
    result = rewritten_same(net, linear.IMAGE, linear.batch_norm(net, plain, 12), plain)
    assert not result.fired("scaled weight") and result.operators == {"Conv": 1, "Pointwise": 1}
    assert any("used elsewhere" in said for said in result.reasons("epilogue"))


def test_masked_scores() -> None:
    net = Net()
    masked = net.node("Add", attention.scores(net), "mask")
    inputs: Inputs = {**attention.qkv(), "mask": ("float32", (2, 1, 1, 6))}
    result = rewritten_same(net, inputs, attention.context(net, masked), masked)
    assert result.operators["Attention"] == 0
    assert any("used elsewhere" in said for said in result.reasons("masked attention"))


def test_probabilities() -> None:
    net = Net()
    y = attention.context(net, attention.scores(net))
    result = rewritten_same(net, attention.qkv(), y, output_of(net, "Softmax"))
    assert result.operators["Attention"] == 0
    assert any("used elsewhere" in said for said in result.reasons("attention"))


def test_repeated_key_heads() -> None:
    net = Net()
    sizes = [net.constant(shape, "int64") for shape in ([2, 2, 2, 6, 8], [2, 4, 6, 8])]

    def repeated(x: str) -> str:
        column = net.node("Unsqueeze", x, net.constant([2], "int64"))
        return net.node("Reshape", net.node("Expand", column, sizes[0]), sizes[1])

    key = repeated("k")
    y = attention.context(net, attention.scores(net, k=key), repeated("v"))
    result = rewritten_same(net, attention.qkv(2), y, net.node("Relu", key))
    assert result.operators["Attention"] == 1 and not result.fired("shared heads")
    assert any("used elsewhere" in said for said in result.reasons("shared heads"))


def test_projections() -> None:
    net = Net()
    y = attention.self_attention(net)
    query = output_of(net, "Reshape")
    result = rewritten(model_of(net, attention.X, y, net.node("Relu", query)), merge_heads=True)
    assert not result.fired("one projection")
    assert any("used elsewhere" in said for said in result.reasons("one projection"))
    assert_same(result, N=2)
