"""The oracle beside naive loops, onnx.reference and the specification's words."""

import itertools
import math

import numpy as np
import onnx
import onnx.parser
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from ingot.errors import InputError, UnsupportedOperator
from ingot.ir import oracle
from ingot.ir.oracle_ops.elementwise import erf
from ingot.ir.oracle_ops.quantize import spread

random = np.random.default_rng(3)


def run(op_type, inputs, opset=17, outputs=1, domain="", **attributes):
    names = ["" if value is None else f"x{i}" for i, value in enumerate(inputs)]
    node = helper.make_node(op_type, names, [f"y{i}" for i in range(outputs)], "n", domain=domain, **attributes)
    results = oracle.evaluate_node(node, inputs, {"": opset, domain: 1} if domain else {"": opset})
    return results[0] if outputs == 1 else results


def reference(op_type, inputs, opset=17, **attributes):
    """onnx.reference's answer."""
    names = [f"x{i}" for i in range(len(inputs))]
    node = helper.make_node(op_type, names, ["y"], **attributes)
    infos = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
             for n, x in zip(names, inputs, strict=True)]  # fmt: skip
    graph = helper.make_graph([node], "g", infos, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    return ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True)))[0]


def parsed(text, header='<ir_version: 8, opset_import: ["" : 17]>'):
    return onnx.parser.parse_model(f"{header} {text}")


# convolutions and pools

small = st.integers(1, 3)


@st.composite
def convolutions(draw):
    rank = draw(st.integers(1, 3))
    group = draw(st.sampled_from([1, 2, 3]))
    channels = group * draw(st.integers(1, 2))
    kernel = [draw(small) for _ in range(rank)]
    dilations = [draw(st.integers(1, 2)) for _ in range(rank)]
    sizes = [(k - 1) * d + 1 + draw(st.integers(0, 4)) for k, d in zip(kernel, dilations, strict=True)]
    attributes = {"group": group, "strides": [draw(small) for _ in range(rank)], "dilations": dilations}
    automatic = draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if automatic == "NOTSET":
        attributes["pads"] = [draw(st.integers(0, 2)) for _ in range(2 * rank)]
    else:
        attributes["auto_pad"] = automatic
    x = random.standard_normal((draw(small), channels, *sizes)).astype(np.float32)
    weight = random.standard_normal((group * draw(small), channels // group, *kernel)).astype(np.float32)
    return x, weight, attributes


@given(convolutions())
@settings(max_examples=60, deadline=None)
def test_conv_is_onnx_references(case):
    x, weight, attributes = case
    bias = random.standard_normal(weight.shape[0]).astype(np.float32)
    expected = reference("Conv", [x, weight, bias], **attributes)
    np.testing.assert_allclose(run("Conv", [x, weight, bias], **attributes), expected, rtol=1e-4, atol=1e-4)


@given(convolutions())
@settings(max_examples=40, deadline=None)
def test_conv_transpose_is_the_gradient_of_conv(case):
    """<conv(x), y> == <x, conv_transpose(y)>"""
    x, weight, attributes = case
    if "auto_pad" in attributes:
        del attributes["auto_pad"]
    y = run("Conv", [x, weight], **attributes)
    other = random.standard_normal(y.shape).astype(np.float32)
    rank = x.ndim - 2
    pads = attributes.get("pads", [0] * 2 * rank)
    extents = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], attributes["dilations"], strict=True)]
    spans = zip(x.shape[2:], pads, pads[rank:], extents, attributes["strides"], strict=False)
    extra = [(n + a + b - e) % s for n, a, b, e, s in spans]
    back = run("ConvTranspose", [other, weight], output_padding=extra, **attributes)
    assert back.shape == x.shape
    np.testing.assert_allclose(np.vdot(y, other), np.vdot(x, back), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
def test_conv_transpose_with_automatic_pads_multiplies_the_size(mode):
    x, weight = random.standard_normal((1, 2, 5, 4)).astype(np.float32), np.ones((2, 3, 3, 3), np.float32)
    assert run("ConvTranspose", [x, weight], auto_pad=mode, strides=[2, 3]).shape == (1, 3, 10, 12)
    assert run("ConvTranspose", [x, weight], output_shape=[9, 13], strides=[2, 3]).shape == (1, 3, 9, 13)


def windows(x, kernel, strides, dilations, pads, ceil_mode):
    """For every output position the window's elements inside x, how many it has inside the padding, and where."""
    sizes = x.shape[2:]
    axes = []
    for n, k, s, d, begin, end in zip(sizes, kernel, strides, dilations, pads, pads[len(sizes):], strict=False):
        span = n + begin + end - (k - 1) * d - 1
        count = (-(-span // s) if ceil_mode else span // s) + 1
        if ceil_mode and (count - 1) * s >= n + begin:
            count -= 1
        axes.append([[o * s + t * d - begin for t in range(k)] for o in range(count)])
    for where in itertools.product(*map(enumerate, axes)):
        places = list(itertools.product(*(places for _, places in where)))
        inside = [p for p in places if all(0 <= i < n for i, n in zip(p, sizes, strict=True))]
        ends = [n + end for n, end in zip(sizes, pads[len(sizes) :], strict=True)]
        padded = [p for p in places if all(i < end for i, end in zip(p, ends, strict=True))]
        yield tuple(index for index, _ in where), inside, len(padded)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_pools_are_what_they_say(data):
    rank = data.draw(st.integers(1, 2))
    kernel = [data.draw(small) for _ in range(rank)]
    dilations = [data.draw(st.integers(1, 2)) for _ in range(rank)]
    strides = [data.draw(small) for _ in range(rank)]
    pads = [data.draw(st.integers(0, (k - 1) // 2)) for k in kernel * 2]
    sizes = [(k - 1) * d + 1 + data.draw(st.integers(0, 4)) for k, d in zip(kernel, dilations, strict=True)]
    ceil_mode, include = data.draw(st.booleans()), data.draw(st.booleans())
    x = random.standard_normal((1, 1, *sizes)).astype(np.float32)
    shared = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "pads": pads}
    shared["ceil_mode"] = int(ceil_mode)
    average = run("AveragePool", [x], 19, **shared, count_include_pad=int(include))
    largest, indices = run("MaxPool", [x], 19, outputs=2, **shared)
    power = run("LpPool", [x], 18, **shared, p=3)
    for where, inside, padded in windows(x, kernel, strides, dilations, pads, ceil_mode):
        values = [float(x[(0, 0, *p)]) for p in inside]
        if not values:
            continue
        at = (0, 0, *where)
        mean = sum(values) / (padded if include else len(values))
        np.testing.assert_allclose(average[at], mean, rtol=1e-4, atol=1e-6)
        assert largest[at] == max(values) == x.reshape(-1)[indices[at]]
        np.testing.assert_allclose(power[at], sum(abs(v) ** 3 for v in values) ** (1 / 3), rtol=1e-4)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.float16])
def test_max_pool_of_other_types(dtype):
    x = np.array([[[-5, 3, -7, 2]]]).astype(dtype)
    y = run("MaxPool", [x], kernel_shape=[2], strides=[2], pads=[1, 1])
    assert y.dtype == dtype and y.tolist() == [[[x[0, 0, 0], max(x[0, 0, 1:3]), x[0, 0, 3]]]]


# elementwise and quantised


@given(st.floats(-8, 8))
def test_erf(value):
    assert math.isclose(float(erf(np.array(value))), math.erf(value), rel_tol=1e-13, abs_tol=1e-300)


def test_erf_of_the_special_values():
    np.testing.assert_array_equal(erf(np.array([np.inf, -np.inf, 0.0, np.nan])), [1, -1, 0, np.nan])


@pytest.mark.parametrize("opset", [10, 13, 19, 21])
def test_quantisation_of_every_opset(opset):
    x = np.float32([-2, -0.05, 0, 0.05, 0.15, 3, 500])
    scale, zero = np.float32(0.1), np.uint8(10)
    q = run("QuantizeLinear", [x, scale, zero], opset)
    assert q.tolist() == [0, 10, 10, 10, 12, 40, 255]  # halves go to the even neighbour
    np.testing.assert_allclose(run("DequantizeLinear", [q, scale, zero], opset), (q - 10.0) * 0.1, rtol=1e-6)


def test_quantisation_along_an_axis_and_in_blocks():
    x = np.arange(12, dtype=np.int8).reshape(3, 4)
    scales = np.float32([1, 10, 100])
    np.testing.assert_array_equal(run("DequantizeLinear", [x, scales], 13, axis=0), x * scales[:, None])
    blocks = np.float32([[1, 2], [3, 4], [5, 6]])
    y = run("DequantizeLinear", [x, blocks], 21, axis=1, block_size=2)
    np.testing.assert_array_equal(y, x * blocks.repeat(2, 1))
    assert spread(np.float32([7]), (3, 4), 1).shape == ()


def test_integer_products_are_exact():
    a, b = random.integers(0, 256, (5, 300)).astype(np.uint8), random.integers(-128, 128, (300, 7)).astype(np.int8)
    zero = random.integers(0, 256, 5).astype(np.uint8)
    expected = (a.astype(np.int64) - zero[:, None]) @ (b.astype(np.int64) - 3)
    np.testing.assert_array_equal(run("MatMulInteger", [a, b, zero, np.int8(3)]), expected)


def test_half_precision_convolution_accumulates_in_float32():
    x, weight = np.full((1, 4096, 1, 1), 0.1, np.float16), np.ones((1, 4096, 1, 1), np.float16)
    y = run("Conv", [x, weight])
    assert y.dtype == np.float16
    np.testing.assert_allclose(float(y.item()), 4096 * float(np.float16(0.1)), rtol=1e-3)


# control flow

LOOP = """g (int64 n, float[2] x) => (float[2] y, float[T,2] all) {
  true = Constant<value = bool {1}>()
  y, all = Loop(n, true, x) <body = b (int64 i, bool c, float[2] s) => (bool go, float[2] t, float[2] kept) {
      go = Identity(c)
      t = Add(s, x)
      kept = Identity(t)
  }>
}"""


@pytest.mark.parametrize("trips", [0, 1, 3])
def test_loop_with_an_outer_value_and_a_scan_output(trips):
    x = np.float32([1, 2])
    outputs = oracle.evaluate_model(parsed(LOOP), {"n": np.array(trips), "x": x})
    np.testing.assert_array_equal(outputs["y"], x * (trips + 1))
    np.testing.assert_array_equal(outputs["all"], np.arange(2, trips + 2)[:, None] * x)
    assert outputs["all"].dtype == np.float32


def test_nested_branches_see_every_scope():
    model = parsed("""g (bool a, bool b, float[2] x) => (float[2] y) {
      h = Add(x, x)
      y = If(a) <then_branch = t () => (float[2] p) {
            k = Mul(h, h)
            p = If(b) <then_branch = tt () => (float[2] q) { q = Add(k, x) },
                       else_branch = te () => (float[2] r) { r = Sub(k, x) }> },
          else_branch = e () => (float[2] o) { o = Identity(x) }>
    }""")
    x = np.float32([3, 5])
    for a, b, expected in ((1, 1, 4 * x * x + x), (1, 0, 4 * x * x - x), (0, 1, x)):
        feeds = {"a": np.array(bool(a)), "b": np.array(bool(b)), "x": x}
        np.testing.assert_array_equal(oracle.evaluate_model(model, feeds)["y"], expected)
    node = next(node for node in model.graph.node if node.op_type == "If")
    assert oracle.captures(node) == ("h", "b", "x")


def test_scan_along_other_axes_and_backwards():
    model = parsed("""g (float[2] s, float[2,3] x) => (float[2] t, float[2,3] sums) {
      t, sums = Scan(s, x) <num_scan_inputs = 1, scan_input_axes = [1], scan_output_axes = [1],
        scan_input_directions = [1], scan_output_directions = [1],
        body = b (float[2] a, float[2] e) => (float[2] n, float[2] o) { n = Add(a, e) o = Identity(n) }>
    }""")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    outputs = oracle.evaluate_model(model, {"s": np.zeros(2, np.float32), "x": x})
    np.testing.assert_array_equal(outputs["t"], x.sum(1))
    np.testing.assert_array_equal(outputs["sums"], x[:, ::-1].cumsum(1)[:, ::-1])


def test_functions_take_attributes_by_reference():
    model = parsed("""g (float[2] x) => (float[2] y) { a = local.Lift<by = 2.0>(x) y = local.Lift(a) }
      <domain: "local", opset_import: ["" : 17]>
      Lift <by: float = 5.0>(v) => (r) { c = Constant<value_float: float = @by>() r = Add(v, c) }""",
                   '<ir_version: 9, opset_import: ["" : 17, "local" : 1]>')  # fmt: skip
    x = np.float32([1, 2])
    np.testing.assert_array_equal(oracle.evaluate_model(model, {"x": x})["y"], x + 7)
    np.testing.assert_array_equal(oracle.evaluate_model(onnx_ir.from_proto(model), {"x": x})["y"], x + 7)


# entries


def test_compiled_nodes_are_kept():
    node = helper.make_node("Relu", ["x"], ["y"]).SerializeToString()
    first = oracle.compile_node(node, {"": 17})
    assert oracle.compile_node(node, {"": 17}) is first
    assert oracle.compile_node(node, {"": 13}) is not first
    assert first([np.float32([-1, 2])])[0].tolist() == [0, 2]


def test_captures_follow_the_inputs():
    model = parsed(LOOP)
    node = model.graph.node[1]
    assert oracle.captures(node) == ("x",)
    inputs = [np.array(2), np.array(True), np.float32([0, 0]), np.float32([1, 2])]
    y, kept = oracle.evaluate_node(node, inputs, {"": 17})
    assert (y.tolist(), kept.shape) == ([2, 4], (2, 2))


def test_overflow_is_a_result_not_a_warning():
    node = helper.make_node("Exp", ["x"], ["y"])
    assert oracle.evaluate_node(node, [np.float32([1000])], {"": 17})[0][0] == np.inf


def test_a_node_that_cannot_be_computed_is_named():
    model = parsed("g (float[N] x, int64[M] i) => (float[K] y) { y = Gather(x, i) }")
    model.graph.node[0].name = "pick"
    with pytest.raises(InputError, match=r"node 'pick' \(Gather\).*IndexError"):
        oracle.evaluate_model(model, {"x": np.zeros(2, np.float32), "i": np.array([9])})


def test_unknown_operators():
    with pytest.raises(UnsupportedOperator, match="acme::Nothing at opset 1"):
        run("Nothing", [np.zeros(1)], domain="acme")
    assert oracle.is_known("", "Conv", 17) and oracle.is_known("com.microsoft", "FastGelu", 1)
    assert not oracle.is_known("", "Nothing", 17)


def test_intermediate_values_are_dropped_but_can_be_traced():
    model = parsed("g (float[2] x) => (float[2] y) { a = Relu(x) b = Neg(a) y = Abs(b) }")
    x = np.float32([-1, 2])
    assert list(oracle.evaluate_model(model, {"x": x})) == ["y"]
    traced = oracle.trace_model(model, {"x": x})
    assert {name: value.tolist() for name, value in traced.items()} == {
        "x": [-1, 2], "a": [0, 2], "b": [0, -2], "y": [0, 2]}  # fmt: skip


def test_canonical_nodes_know_symbolic_sizes():
    x = onnx_ir.val("x", onnx_ir.DataType.FLOAT, ["N", 4])
    node = onnx_ir.node("View", [x], {"shape": ["N*2", "2"]}, domain="ingot", name="v")
    node.outputs[0].name = "y"
    graph = onnx_ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 17, "ingot": 1}, name="g")
    outputs = oracle.evaluate_model(onnx_ir.Model(graph, ir_version=10), {"x": np.zeros((3, 4), np.float32)})
    assert outputs["y"].shape == (6, 2)
