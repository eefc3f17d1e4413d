"""Attention from the primitives that frameworks export, and what is close to it but is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from examples.writer import Shape
from tests.passes.support import Net, Rewritten, assert_same, model_of, rewritten, rewritten_same

B, H, S, T, D = 2, 4, 5, 6, 8
LOWEST = float(np.finfo(np.float32).min)
Inputs = dict[str, tuple[str, Shape]]


def qkv(heads: int = H, batch: int | str = B) -> Inputs:
    return {
        "q": ("float32", (batch, H, S, D)),
        "k": ("float32", (batch, heads, T, D)),
        "v": ("float32", (batch, heads, T, D)),
    }


def transposed(net: Net, k: str, rank: int = 4) -> str:
    return net.node("Transpose", k, perm=[*range(rank - 2), rank - 1, rank - 2])


def scores(net: Net, q: str = "q", k: str = "k", scale: str = "div", rank: int = 4) -> str:
    key = transposed(net, k, rank)
    if scale == "operands":
        root = net.constant(D**-0.25)
        return net.node("MatMul", net.node("Mul", q, root), net.node("Mul", key, root))
    if scale == "query":
        return net.node("MatMul", net.node("Mul", q, net.constant(D**-0.5)), key)
    product = net.node("MatMul", q, key)
    if scale == "none":
        return product
    number = net.constant(D**0.5 if scale == "div" else D**-0.5)
    return net.node("Div" if scale == "div" else "Mul", product, number)


def context(net: Net, masked: str, v: str = "v", axis: int = -1) -> str:
    return net.node("MatMul", net.node("Softmax", masked, axis=axis), v)


def settings(result: Rewritten) -> dict[str, Any]:
    node = result.only("Attention")
    return {name: node.attributes[name].value for name in ("scale", "causal", "softcap")}


@pytest.mark.parametrize("scale", ["none", "mul", "div", "query", "operands"])
def test_scale(scale: str) -> None:
    net = Net()
    result = rewritten_same(net, qkv(), context(net, scores(net, scale=scale)))
    assert result.operators == {"Attention": 1}
    assert np.isclose(settings(result)["scale"], 1 if scale == "none" else D**-0.5)


@pytest.mark.parametrize("shape", [(B, 1, 1, T), (1, 1, S, T), (B, H, S, T), (S, T)])
def test_an_additive_mask(shape: tuple[int, ...]) -> None:
    net = Net()
    inputs: Inputs = {**qkv(), "mask": ("float32", shape)}
    result = rewritten_same(net, inputs, context(net, net.node("Add", scores(net), "mask")))
    assert result.operators == {"Attention": 1} and result.fired("masked attention") == 1
    assert [value.name for value in result.only("Attention").inputs] == ["q", "k", "v", "mask"]


def test_two_masks_become_one() -> None:
    net = Net()
    inputs: Inputs = {**qkv(), "bias": ("float32", (1, H, S, T)), "mask": ("float32", (B, 1, 1, T))}
    masked = net.node("Add", net.node("Add", scores(net), "bias"), "mask")
    result = rewritten_same(net, inputs, context(net, masked))
    assert result.operators == {"Attention": 1, "Pointwise": 1} and result.fired("biased attention") == 1


@pytest.mark.parametrize("fill", [-np.inf, LOWEST, -1e9])
@pytest.mark.parametrize("hidden", [True, False])
def test_a_mask_of_truths(fill: float, hidden: bool) -> None:
    net = Net()
    inputs: Inputs = {**qkv(), "mask": ("bool", (B, 1, S, T))}
    number = net.constant(fill)
    order = ("mask", number, scores(net)) if hidden else ("mask", scores(net), number)
    result = rewritten_same(net, inputs, context(net, net.node("Where", *order)))
    assert result.fired("hidden attention" if hidden else "allowed attention") == 1
    assert result.operators["Attention"] == 1 and result.operators["Softmax"] == 0


def test_the_guard_against_empty_rows_is_part_of_attention() -> None:
    net = Net()
    inputs: Inputs = {**qkv(), "mask": ("bool", (B, 1, S, T))}
    weights = net.node("Softmax", net.node("Where", "mask", scores(net), net.constant(-np.inf)), axis=-1)
    guarded = net.node("Where", net.node("IsNaN", weights), net.constant(0.0), weights)
    result = rewritten_same(net, inputs, net.node("MatMul", guarded, "v"))
    assert result.operators == {"Attention": 1}


def causal_mask(size: int, fill: float) -> np.ndarray[Any, Any]:
    return np.where(np.tri(size, dtype=bool), 0, fill).astype(np.float32)[None, None]


@pytest.mark.parametrize("form", ["added", "where"])
def test_a_constant_triangle_is_causal(form: str) -> None:
    net = Net()
    inputs: Inputs = dict.fromkeys("qkv", ("float32", (B, H, S, D)))
    if form == "added":
        masked = net.node("Add", scores(net), net.weight("mask", causal_mask(S, LOWEST)))
    else:
        triangle = net.weight("mask", np.tri(S, dtype=bool)[None, None])
        masked = net.node("Where", triangle, scores(net), net.constant(-np.inf))
    result = rewritten_same(net, inputs, context(net, masked))
    assert result.operators == {"Attention": 1} and settings(result)["causal"] == 1


def test_a_constant_band_is_not_causal() -> None:
    net = Net()
    mask = causal_mask(S, LOWEST)
    mask[..., 4, 0] = LOWEST
    inputs: Inputs = dict.fromkeys("qkv", ("float32", (B, H, S, D)))
    result = rewritten_same(net, inputs, context(net, net.node("Add", scores(net), net.weight("mask", mask))))
    assert settings(result)["causal"] == 0 and len(result.only("Attention").inputs) == 4


@pytest.mark.parametrize(("cap", "inverse"), [(30.0, 30.0), (30.0, 25.0)])
def test_capped_scores(cap: float, inverse: float) -> None:
    net = Net()
    capped = net.node("Mul", net.node("Tanh", net.node("Div", scores(net), net.constant(inverse))), net.constant(cap))
    result = rewritten_same(net, qkv(), context(net, capped))
    if cap == inverse:
        assert result.operators == {"Attention": 1} and settings(result)["softcap"] == cap
    else:
        assert result.operators["Attention"] == 0
        assert any("capped at another value" in reason for reason in result.reasons("attention"))


@pytest.mark.parametrize("way", ["expand", "tile"])
def test_shared_key_heads(way: str) -> None:
    net = Net()

    def repeated(x: str) -> str:
        column = net.node("Unsqueeze", x, net.constant([2], "int64"))
        if way == "expand":
            spread = net.node("Expand", column, net.constant([B, 2, 2, T, D], "int64"))
        else:
            spread = net.node("Tile", column, net.constant([1, 1, 2, 1, 1], "int64"))
        return net.node("Reshape", spread, net.constant([B, H, T, D], "int64"))

    result = rewritten_same(net, qkv(2), context(net, scores(net, k=repeated("k")), repeated("v")))
    assert result.operators == {"Attention": 1} and result.fired("shared heads") == 1


def test_heads_repeated_in_turn_are_not_shared() -> None:
    net = Net()
    repeated = {name: net.node("Concat", name, name, axis=1) for name in "kv"}
    result = rewritten_same(net, qkv(2), context(net, scores(net, k=repeated["k"]), repeated["v"]))
    assert result.operators["Attention"] == 1 and not result.fired("shared heads")


def test_three_axes() -> None:
    net = Net()
    inputs: Inputs = {"q": ("float32", (B, S, D)), "k": ("float32", (B, T, D)), "v": ("float32", (B, T, D)),
                      "mask": ("float32", (B, S, T))}  # fmt: skip
    masked = net.node("Add", scores(net, rank=3), "mask")
    result = rewritten_same(net, inputs, context(net, masked))
    assert result.operators["Attention"] == 1 and result.operators["Softmax"] == 0


def test_the_key_of_a_linear_is_transposed_once() -> None:
    """[B,T,H*D] -> View -> Transpose(0,2,3,1) -> MatMul, as older exporters write it"""
    net = Net()
    inputs: Inputs = {"x": ("float32", ("N", S, H * D))}

    def heads(perm: list[int]) -> str:
        projected = net.node("Add", net.node("MatMul", "x", net.draw(H * D, H * D, scale=0.2)), net.draw(H * D))
        return net.node("Transpose", net.node("Reshape", projected, net.constant([0, 0, H, D], "int64")), perm=perm)

    product = net.node("MatMul", heads([0, 2, 1, 3]), heads([0, 2, 3, 1]))
    y = context(net, net.node("Div", product, net.constant(D**0.5)), heads([0, 2, 1, 3]))
    result = rewritten_same(net, inputs, y, N=3)
    assert result.operators == {"Linear": 3, "View": 3, "Transpose": 3, "Attention": 1}
    assert {node.attributes["perm"].value for node in result.nodes if node.op_type == "Transpose"} == {(0, 2, 1, 3)}


def test_scores_used_elsewhere_keep_the_primitives() -> None:
    net = Net()
    masked = scores(net)
    result = rewritten_same(net, qkv(), context(net, masked), masked)
    assert result.operators["Attention"] == 0
    assert any("used elsewhere" in reason for reason in result.reasons("attention"))


def test_a_softmax_over_the_queries_is_not_attention() -> None:
    net = Net()
    result = rewritten_same(net, qkv(), context(net, scores(net), axis=2))
    assert result.operators["Attention"] == 0
    assert any("not over the keys" in reason for reason in result.reasons("attention"))


def test_a_fill_that_does_not_forbid_is_no_mask() -> None:
    net = Net()
    inputs: Inputs = {**qkv(), "mask": ("bool", (B, 1, S, T))}
    result = rewritten_same(net, inputs, context(net, net.node("Where", "mask", scores(net), net.constant(-3.0))))
    assert result.operators["Attention"] == 0
    assert any("does not forbid" in reason for reason in result.reasons("allowed attention"))


def test_one_key_head_that_is_broadcast() -> None:
    net = Net()
    result = rewritten_same(net, qkv(1), context(net, scores(net)))
    assert result.operators == {"Attention": 1}


def test_a_broadcast_batch_is_not_attention() -> None:
    net = Net()
    inputs: Inputs = {**qkv(), "q": ("float32", (1, H, S, D))}
    result = rewritten_same(net, inputs, context(net, scores(net)))
    assert result.operators["Attention"] == 0
    assert any("same batch and heads" in reason for reason in result.reasons("attention"))


# one Linear for query, key and value


def self_attention(net: Net, widths: tuple[int, int, int] = (H * D, H * D, H * D), act: bool = False) -> str:
    def heads(width: int) -> str:
        projected = net.node("Add", net.node("MatMul", "x", net.draw(H * D, width, scale=0.2)), net.draw(width))
        projected = net.node("Relu", projected) if act else projected
        split = net.node("Reshape", projected, net.constant([0, 0, H, width // H], "int64"))
        return net.node("Transpose", split, perm=[0, 2, 1, 3])

    q, k, v = map(heads, widths)
    return context(net, scores(net, q, k), v)


X: Inputs = {"x": ("float32", ("N", S, H * D))}


def test_one_projection() -> None:
    net = Net()
    result = rewritten(model_of(net, X, self_attention(net)), merge_heads=True)
    assert result.operators == {"Linear": 1, "View": 4, "Transpose": 1, "Split": 1, "Attention": 1}
    assert_same(result, N=3)


@pytest.mark.parametrize(
    ("given", "reason"),
    [({"widths": (H * D, H * D, 2 * H * D)}, "not projected alike"), ({"act": True}, "more than to add a bias")],
)
def test_unlike_projections_stay(given: dict[str, Any], reason: str) -> None:
    net = Net()
    result = rewritten(model_of(net, X, self_attention(net, **given)), merge_heads=True)
    assert result.operators["Linear"] == 3
    assert any(reason in said for said in result.reasons("one projection"))
    assert_same(result, N=2)


def test_projections_stay_unless_asked() -> None:
    net = Net()
    assert rewritten_same(net, X, self_attention(net), N=2).operators["Linear"] == 3
