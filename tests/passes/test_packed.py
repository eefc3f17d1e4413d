"""Query, key and value stay in the product that makes them, and mean what they meant."""

from __future__ import annotations

import pytest

from ingot.passes.narrow import quantize_inside
from ingot.passes.packed import pack_heads
from ingot.passes.parallel import join_linears
from ingot.precision import half
from tests.passes.support import Net, Rewritten, assert_same, check_graph, model_of, rewritten
from tests.passes.test_fuse_float8 import qdq, weight

LENGTH, DEPTH = 6, 16


def heads(net: Net, x: str, count: int, perm: tuple[int, ...] = (0, 2, 1, 3)) -> str:
    y = net.node("Add", net.node("MatMul", x, net.draw(8, count * DEPTH, scale=0.1)), net.draw(count * DEPTH))
    return net.node("Transpose", net.node("Reshape", y, net.constant([0, LENGTH, count, DEPTH], "int64")), perm=perm)


def attention(net: Net, quantized: bool = False, share: bool = False) -> Rewritten:
    key, query, value = heads(net, "x", 2, (0, 2, 3, 1)), heads(net, "x", 2), heads(net, "x", 2)
    scores = net.node("Softmax", net.node("Mul", net.node("MatMul", query, key), net.constant(0.3)), axis=-1)
    y = net.node("MatMul", scores, value)
    y = net.node("MatMul", qdq(net, y), weight(net, DEPTH, 3, axis=1)) if quantized else net.node("Relu", y)
    outputs = [y, net.node("Relu", query)] if share else [y]
    result = rewritten(model_of(net, {"x": ("float32", (3, LENGTH, 8))}, *outputs), float8=True)
    half.convert(result.after, "float16")
    join_linears(result.after)
    quantize_inside(result.after)
    return result


@pytest.mark.parametrize("quantized", [False, True])
def test_all_three(quantized: bool) -> None:
    result = attention(Net(), quantized)
    assert pack_heads(result.after) == 6
    check_graph(result.after)
    node = result.only("PackedAttention")
    assert (node.attributes["heads"].value, node.attributes["groups"].value) == (2, 2)
    assert bool(node.attributes["epilogue"].value) == quantized
    assert "ParallelLinear" not in result.operators and "Attention" not in result.operators
    assert_same(result, rtol=0.2 if quantized else 2e-2, atol=5e-2)


def test_what_is_read_elsewhere_stays_apart() -> None:
    result = attention(Net(), share=True)
    assert pack_heads(result.after) == 0
    assert result.operators["ParallelLinear"] == 1
