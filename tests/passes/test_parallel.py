"""Linears of one input become one ParallelLinear, which means what they meant."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from ingot import passes
from ingot.importers import onnx as onnx_importer
from ingot.ir import shapes
from ingot.ir.ops import meaning
from ingot.ir.provenance import origins
from ingot.passes.parallel import divide_convolutions, gate_linears, join_linears
from ingot.precision import half
from tests.passes.support import Net, Rewritten, assert_same, check_graph, model_of, rewritten


def model(activation: str = "Identity") -> ir.Model:
    """y_i = activation(x w_i + b_i) + 1, three of them, of which the last has no bias and no activation."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for index, columns in enumerate((4, 6, 5)):
        names = [f"w{index}", f"b{index}"]
        arrays = [rng.standard_normal((8, columns)), rng.standard_normal(columns)]
        weights += [numpy_helper.from_array(a.astype(np.float32), n) for a, n in zip(arrays, names, strict=True)]
        nodes.append(helper.make_node("MatMul", ["x", names[0]], [f"m{index}"], f"product{index}"))
        nodes.append(helper.make_node("Add", [f"m{index}", names[1]], [f"a{index}"], f"bias{index}"))
        chosen = activation if index < 2 else "Identity"
        nodes.append(helper.make_node(chosen, [f"a{index}"], [f"r{index}"], f"act{index}"))
        nodes.append(helper.make_node("Softmax", [f"r{index}"], [f"y{index}"], f"softmax{index}"))
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["N", n]) for i, n in enumerate((4, 6, 5))]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])
    graph = helper.make_graph(nodes, "parallel", [x], outputs, weights)
    loaded = onnx_importer.load(helper.make_model(graph, opset_imports=[onnx.OperatorSetIdProto(version=18)]))
    shapes.infer(loaded)
    passes.run(loaded)
    return loaded


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_three_become_one(precision: str) -> None:
    joined = model()
    if precision != "float32":
        half.convert(joined, precision)
    assert join_linears(joined) == 2
    (node,) = [n for n in joined.graph if n.op_type == "ParallelLinear"]
    assert not [n for n in joined.graph if n.op_type == "Linear"]
    assert tuple(node.attributes["sizes"].value) == (4, 6, 5)
    assert [str(v.shape) for v in node.outputs] == ["[N,4]", "[N,6]", "[N,5]"]


def test_what_does_more_than_add_a_bias_stays() -> None:
    joined = model("Relu")
    assert join_linears(joined) == 0
    assert sum(n.op_type == "Linear" for n in joined.graph) == 3


def test_meaning() -> None:
    rng = np.random.default_rng(1)
    x, weight, bias = (rng.standard_normal(s).astype(np.float32) for s in ((2, 3, 8), (8, 10), (10,)))
    first, second = meaning("ParallelLinear")(x, weight, bias, sizes=(4, 6))
    np.testing.assert_allclose(np.concatenate([first, second], -1), x @ weight + bias, rtol=1e-5, atol=1e-5)


def test_a_linear_that_is_split() -> None:
    rng = np.random.default_rng(2)
    weight = numpy_helper.from_array(rng.standard_normal((8, 10)).astype(np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], "product"),
             helper.make_node("Split", ["m"], ["a", "b"], "halves", axis=-1, num_outputs=2),
             helper.make_node("Mul", ["a", "b"], ["y"], "gate")]  # fmt: skip
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", w]) for n, w in (("x", 8), ("y", 5)))
    graph = helper.make_graph(nodes, "gated", [x], [y], [weight])
    loaded = onnx_importer.load(helper.make_model(graph, opset_imports=[onnx.OperatorSetIdProto(version=18)]))
    shapes.infer(loaded)
    passes.run(loaded)
    assert join_linears(loaded) == 1
    (node,) = [n for n in loaded.graph if n.op_type == "ParallelLinear"]
    assert tuple(node.attributes["sizes"].value) == (5, 5)
    assert origins(node) == ("product", "halves")


def test_a_convolution_that_is_split() -> None:
    net = Net()
    product = net.node("Conv", "x", net.draw(6, 4, 3, 3), net.draw(6), pads=[1] * 4)
    halves = net.nodes_of("Split", net.node("Mul", product, net.node("Sigmoid", product)), outputs=2, axis=1,
                          num_outputs=2)  # fmt: skip
    result = net.node("Concat", halves[1], net.node("Relu", halves[0]), axis=1)
    model = rewritten(model_of(net, {"x": ("float32", ("N", 4, 5, 5))}, result))
    assert divide_convolutions(model.after) == 1
    check_graph(model.after)
    assert_same(model, N=2)
    node = model.only("ParallelConv")
    assert tuple(node.attributes["sizes"].value) == (3, 3) and len(origins(node)) == 4
    assert "Split" not in model.operators and "Conv" not in model.operators


def test_a_residual_keeps_the_split() -> None:
    net = Net()
    product = net.node("Add", net.node("Conv", "x", net.draw(4, 4, 3, 3), pads=[1] * 4), "x")
    halves = net.nodes_of("Split", product, outputs=2, axis=1, num_outputs=2)
    model = rewritten(model_of(net, {"x": ("float32", (1, 4, 5, 5))}, net.node("Mul", *halves)))
    assert divide_convolutions(model.after) == 0


def gated(rows: int, *, read_twice: bool = False) -> Rewritten:
    """b * gelu(a) for the halves a, b of x w + c."""
    net = Net()
    product = net.node("Add", net.node("MatMul", "x", net.draw(8, 12)), net.draw(12))
    first, second = net.nodes_of("Split", product, outputs=2, axis=2, num_outputs=2)
    result = net.node("Mul", second, net.node("Gelu", first))
    model = rewritten(model_of(net, {"x": ("float32", (1, rows, 8))}, result, *[first] * read_twice))
    join_linears(model.after)
    return model


def test_halves_of_which_one_tensor_is_made() -> None:
    model = gated(600)
    assert gate_linears(model.after) == 1
    check_graph(model.after)
    assert_same(model)
    assert "Pointwise" not in model.operators and len(origins(model.only("GatedLinear"))) == 5


@pytest.mark.parametrize(("rows", "read_twice"), [(16, False), (600, True)])
def test_few_rows_and_halves_that_others_read_stay(rows: int, read_twice: bool) -> None:
    assert gate_linears(gated(rows, read_twice=read_twice).after) == 0
