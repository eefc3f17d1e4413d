"""What a Norm or an Attention gives is quantized where it is computed, and means what it meant."""

from __future__ import annotations

import pytest

from ingot.passes.narrow import quantize_inside
from ingot.passes.parallel import join_linears
from tests.passes.support import Net, Rewritten, assert_same, check_graph, model_of, rewritten
from tests.passes.test_fuse_float8 import qdq, weight

WIDTH = 6


def norm(net: Net, x: str) -> str:
    return net.node("LayerNormalization", x, net.draw(WIDTH), net.draw(WIDTH), axis=-1)


def product(net: Net, x: str) -> str:
    return net.node("MatMul", qdq(net, x), weight(net, WIDTH, WIDTH, axis=1))


def made(net: Net, *outputs: str) -> Rewritten:
    result = rewritten(model_of(net, {"x": ("float32", ("N", 5, WIDTH))}, *outputs), float8=True)
    quantize_inside(result.after)
    check_graph(result.after)
    assert_same(result, rtol=0.13, atol=1e-3, N=2)
    return result


def test_a_norm_that_is_added_to_later() -> None:
    net = Net()
    y = norm(net, "x")
    result = made(net, net.node("Add", product(net, y), y))
    node = result.only("NarrowNorm")
    assert [str(v.dtype) for v in node.outputs] == ["FLOAT", "FLOAT8E4M3FN"]
    assert {value for value in result.only("Linear").inputs if value.producer()} == set(node.outputs)


def test_a_norm_that_nothing_else_reads_keeps_its_epilogue() -> None:
    net = Net()
    result = made(net, product(net, norm(net, "x")))
    assert "NarrowNorm" not in result.operators and result.operators["Norm"] == 1


def test_a_result_stays_as_it_is() -> None:
    net = Net()
    y = norm(net, "x")
    assert "NarrowNorm" not in made(net, product(net, y), y).operators


@pytest.mark.parametrize("shared", [True, False])
def test_attention(shared: bool) -> None:
    net = Net()
    x = net.node("Reshape", "x", net.constant([0, 1, 5, WIDTH], "int64"))
    scores = net.node("Softmax", net.node("MatMul", x, net.node("Transpose", x, perm=[0, 1, 3, 2])), axis=-1)
    y = net.node("MatMul", scores, x)
    z = product(net, y)
    result = made(net, net.node("Add", z, y) if shared else z)
    assert ("NarrowAttention" in result.operators) != shared


def test_products_of_one_tensor_with_one_scale() -> None:
    net = Net()
    y = qdq(net, "x")
    weights = [net.node("DequantizeLinear", narrow, net.constant(0.5, "float32")) for narrow in _narrow(net, 3)]
    sums = [net.node("Softmax", net.node("Add", net.node("MatMul", y, w), net.draw(WIDTH))) for w in weights]
    result = rewritten(model_of(net, {"x": ("float32", ("N", 5, WIDTH))}, *sums), float8=True)
    assert join_linears(result.after) == 2
    check_graph(result.after)
    assert_same(result, N=2)
    (node,) = [n for n in result.after.graph if n.op_type == "ParallelLinear"]
    assert node.attributes["scale"].value == pytest.approx(0.005)


def _narrow(net: Net, count: int) -> list[str]:
    import ml_dtypes
    from onnx import numpy_helper

    arrays = [net.random.uniform(-2, 2, (WIDTH, WIDTH)).astype(ml_dtypes.float8_e4m3fn) for _ in range(count)]
    net.weights += [numpy_helper.from_array(a, f"narrow{i}") for i, a in enumerate(arrays)]
    return [f"narrow{i}" for i in range(count)]
