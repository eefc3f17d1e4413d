"""Inferred shapes hold for every run: beside the oracle on the backend suite, and case by case."""

import numpy as np
import onnx.parser
import onnx_ir
import pytest
import sympy
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.conformance import load_cases
from ingot.errors import ConfigError, ImportFailure
from ingot.importers.onnx import load
from ingot.ir import oracle, shapes
from ingot.ir.symbolic import canonical, substituted, translated
from ingot.plan import extent


def imported(text, header='<ir_version: 8, opset_import: ["" : 17]>'):
    model = load(onnx.parser.parse_model(f"{header} {text}"))
    shapes.infer(model)
    return model


def outputs_of(model):
    return [shapes.shape_of(value) for value in model.graph.outputs]


def value_of(model, name):
    return next(value for value in shapes.values_of(model.graph) if value.name == name)


# expressions

SYMBOLS = sympy.symbols("N H W", integer=True, nonnegative=True)
atoms = st.sampled_from(SYMBOLS) | st.integers(-3, 70).map(sympy.Integer)


def compounds(inner):
    pairs = st.tuples(inner, inner)
    return (
        pairs.map(lambda p: p[0] + p[1]) | pairs.map(lambda p: p[0] - p[1]) | pairs.map(lambda p: p[0] * p[1])
        | pairs.map(lambda p: sympy.Max(*p)) | pairs.map(lambda p: sympy.Min(*p))
        | st.tuples(inner, st.integers(2, 9)).map(lambda p: sympy.floor(p[0] / p[1]))
        | st.tuples(inner, st.integers(2, 9)).map(lambda p: sympy.Mod(p[0], p[1]))
    )  # fmt: skip


@given(st.recursive(atoms, compounds, max_leaves=6), st.tuples(*[st.integers(1, 50)] * 3))
@example(SYMBOLS[0] - SYMBOLS[0] ** 2, (3, 1, 1))
@example(sympy.Max(SYMBOLS[1], 9 - SYMBOLS[0] ** 2), (2, 1, 1))
def test_translation_keeps_the_value(expression, sizes):
    """For sizes from 1 on: the parser of onnx_ir takes symbols as positive and makes Max(1, N) N."""
    text = translated(str(expression))
    bound = dict(zip("NHW", sizes, strict=True))
    expected = expression.subs({symbol: bound[symbol.name] for symbol in SYMBOLS})
    if text is None:
        assert expression.atoms(sympy.Pow), "only powers of symbols cannot be said"
    else:
        assert extent.evaluate(text, bound) == int(expected)
        assert canonical(str(text)) == text, "canonical text stays as it is"


@given(st.recursive(atoms, compounds, max_leaves=4), st.integers(0, 20), st.integers(0, 20))
def test_substitution_keeps_the_value(expression, n, h):
    text = translated(str(expression))
    if isinstance(text, str):
        changed = substituted(text, {"N": n, "H": "W+1"})
        assert extent.evaluate(changed, {"W": h}) == extent.evaluate(text, {"N": n, "H": h + 1, "W": h})


def test_examples_of_translation():
    assert canonical("floor(H/2 + 1/2)") == "(H+1)//2"
    assert canonical("2*N + 1") == "N*2+1"
    assert canonical("Max(0, floor(N/128) - 1)") == "max(0,N//128-1)"
    assert canonical("3*5") == 15
    with pytest.raises(ValueError, match="sqrt"):
        canonical("sqrt(N)")


# inference


def test_shapes_follow_computed_sizes():
    model = imported("""g (float[N,12] x) => (float[A,B,C] y) {
      s = Shape(x)
      zero = Constant<value_int = 0>()
      n = Gather(s, zero)
      axes = Constant<value_ints = [0]>()
      n1 = Unsqueeze(n, axes)
      rest = Constant<value_ints = [3, 4]>()
      shape = Concat<axis = 0>(n1, rest)
      y = Reshape(x, shape)
    }""")
    assert outputs_of(model) == [("N", 3, 4)]
    assert shapes.known_elements(value_of(model, "shape")) == ("N", 3, 4)


def test_what_the_file_states_in_symbols_of_its_own_is_expressed_in_the_inputs():
    model = imported("g (float[N,1,H] x, float[8,1,3] w) => (float[a,b,c] y) { y = Conv<strides = [2]>(x, w) }")
    ((batch, channels, length),) = outputs_of(model)
    assert (batch, channels) == ("N", 8)
    assert [extent.evaluate(length, {"H": size}) for size in (3, 8, 9)] == [1, 3, 4]


def test_constants_are_followed_through_static_shapes_and_branches():
    model = imported("""g (float[2,6] x) => (float[A,B] y) {
      s = Shape(x)
      one = Constant<value_int = 1>()
      k = Gather(s, one)
      six = Constant<value_int = 6>()
      is = Equal(k, six)
      shape = If(is) <then_branch = t () => (int64[2] p) { p = Constant<value_ints = [3, 4]>() },
                      else_branch = e () => (int64[1] q) { q = Constant<value_ints = [12]>() }>
      y = Reshape(x, shape)
    }""")
    assert outputs_of(model) == [(3, 4)]
    assert value_of(model, "is").const_value.numpy().item() is True


def test_data_dependent_extents_get_symbols_that_last():
    text = """g (float[N] x) => (int64[A,B] y, float[C] z) {
      y = NonZero(x)
      t = Transpose(y)
      z = Unique(x)
    }"""
    model = imported(text)
    (y, z) = outputs_of(model)
    assert y[0] == 1 and {y[1], z[0]} == {"u0", "u1"}
    assert shapes.is_data_dependent(y[1]) and shapes.is_data_dependent(f"{z[0]}*2")
    assert not shapes.is_data_dependent("N") and not shapes.is_data_dependent(3)
    assert shapes.shape_of(value_of(model, "t")) == (y[1], 1)
    before = {value.name: shapes.shape_of(value) for value in shapes.values_of(model.graph)}
    shapes.infer(model)
    assert {value.name: shapes.shape_of(value) for value in shapes.values_of(model.graph)} == before


def test_fused_nodes_keep_their_shapes_and_learn_better_symbols():
    model = imported("g (float[N,4] x, int64[2] s) => (float[A,B] y) { r = Reshape(x, s) y = Relu(r) }")
    symbol = outputs_of(model)[0][0]
    relu = model.graph.node("Relu_1")
    relu.domain, relu.op_type = "ingot", "Pointwise"
    relu.attributes["shape"] = onnx_ir.AttrStrings("shape", [f"{symbol}*2"])
    constant = onnx_ir.val("fixed", const_value=onnx_ir.tensor(np.array([2, -1])))
    model.graph.register_initializer(constant)
    model.graph.node("Reshape_0").replace_input_with(1, constant)
    shapes.infer(model)
    assert outputs_of(model) == [(2, "N*2")]
    assert relu.attributes["shape"].as_strings() == ("4",)


def test_branches_that_differ_leave_only_what_they_share():
    model = imported("""g (bool c, float[N,4] x) => (float[A,B] y, float[Z] z) {
      y, z = If(c) <
        then_branch = t () => (float[D,E] p, float[F] q) { p = Identity(x) q = Constant<value_floats = [1.0]>() },
        else_branch = e () => (float[G,H] r, float[I,J] s) { r = Concat<axis = 0>(x, x) s = Identity(x) }>
    }""")
    y, z = outputs_of(model)
    assert shapes.is_data_dependent(y[0]) and y[1] == 4
    assert z is None or all(map(shapes.is_data_dependent, z)), "the branches differ in rank"


def test_a_loop_whose_state_grows_has_no_static_state():
    model = imported("""g (int64 n, float[2] x) => (float[A] y, float[T,2] kept) {
      go = Constant<value = bool {1}>()
      y, kept = Loop(n, go, x) <body = b (int64 i, bool c, float[S] s) => (bool d, float[U] t, float[2] k) {
          d = Identity(c)
          t = Concat<axis = 0>(s, x)
          k = Identity(x)
      }>
    }""")
    (y, kept) = outputs_of(model)
    assert shapes.is_data_dependent(y[0]) and shapes.is_data_dependent(kept[0]) and kept[1] == 2


def test_a_contradiction_names_its_node():
    model = load(onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[2,3] x, float[4,N] w) => (float[A,B] y) { y = Relu(x) }'))
    matmul = onnx_ir.node("MatMul", model.graph.inputs, name="clash")
    model.graph.append(matmul)
    with pytest.raises(ImportFailure, match="clash"):
        shapes.infer(model)


@pytest.mark.parametrize("condition", ["is", "c"])
def test_a_contradiction_in_a_branch_is_left_to_the_run(condition):
    model = imported("""g (float[N,K] x, bool c) => (float[A] y) {
      s = Shape(x)
      one = Constant<value_int = 1>()
      axes = Constant<value_ints = [1]>()
      k = Gather(s, one)
      is = Equal(k, one)
      y = If(CONDITION) <then_branch = t () => (float[B] p) { p = Squeeze(x, axes) },
                         else_branch = e () => (float[C] q) { q = ReduceSum<keepdims = 0>(x, axes) }>
    }""".replace("CONDITION", condition))
    assert outputs_of(shapes.specialize(model, {"K": 3})) == [("N",)], "only the sum can be computed"
    assert outputs_of(shapes.specialize(model, {"K": 1})) == [("N",)]


# binding symbols

RESIZED = """g (float[N,3,H,W] x, float[8,3,3,3] w) => (float[A,B,C,D] y) {
  y = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, w)
}"""


def test_specialize_by_symbol_and_by_input():
    model = imported(RESIZED)
    assert outputs_of(shapes.specialize(model, {"N": 2, "H": 9, "W": 8})) == [(2, 8, 5, 4)]
    assert outputs_of(shapes.specialize(model, {"x": (1, 3, 7, 7)})) == [(1, 8, 4, 4)]
    partly = outputs_of(shapes.specialize(model, {"H": 16}))[0]
    assert partly[:3] == ("N", 8, 8) and extent.evaluate(partly[3], {"W": 9}) == 5
    assert outputs_of(model)[0][0] == "N", "the model itself is unchanged"


@pytest.mark.parametrize("sizes", [{"K": 1}, {"x": (1, 4, 7, 7)}, {"x": (1, 3, 7)}, {"N": 2, "x": (1, 3, 7, 7)}])
def test_specialize_refuses_what_does_not_fit(sizes):
    with pytest.raises(ConfigError, match="cannot bind"):
        shapes.specialize(imported(RESIZED), sizes)


# the whole suite, sampled

SAMPLE = load_cases()[::7]


def check(model, feeds, name):
    traced = oracle.trace_model(model, feeds)
    sizes = {}
    for value in model.graph.inputs:
        if isinstance(feeds.get(value.name), np.ndarray):
            sizes.update(zip(shapes.shape_of(value) or (), feeds[value.name].shape, strict=False))
    for value in (output for node in model.graph for output in node.outputs):
        actual, inferred = traced.get(value.name), shapes.shape_of(value)
        if not isinstance(actual, np.ndarray):
            continue
        for size, known in zip(actual.shape, inferred or (), strict=inferred is not None):
            assert shapes.is_data_dependent(known) or extent.evaluate(known, sizes) == size, (name, value.name)
        if value.const_value is not None and actual.dtype != object:
            np.testing.assert_array_equal(value.const_value.numpy(), actual, err_msg=f"{name} {value.name}")
        for element, known in zip(actual.reshape(-1), shapes.known_elements(value) or (), strict=False):
            assert shapes.is_data_dependent(known) or extent.evaluate(known, sizes) == element, (name, value.name)


def test_inferred_shapes_are_the_oracles():
    checked = 0
    for case in SAMPLE:
        if case.name.startswith(("test_bernoulli", "test_gradient")):
            continue
        model = load(case.model)
        shapes.infer(model)
        names = [value.name for value in case.model.graph.input]
        for inputs, _ in case.data_sets():
            check(model, dict(zip(names, inputs, strict=False)), case.name)
            checked += 1
    assert checked > 250


def test_numbers_with_fractions_are_no_sizes():
    """A slice of a constant list of floats is not a list of sizes, which are whole."""
    model = imported("""g (float[2] x) => (float[2] y)
        <float[3] w = {0.5, 2.25, 9.5}, int64[1] a = {0}, int64[1] b = {2}>
        { part = Slice(w, a, b, a) y = Add(x, part) }""")
    assert shapes.known_elements(value_of(model, "part")) is None
    np.testing.assert_array_equal(oracle.evaluate_model(model, {"x": np.ones(2, np.float32)})["y"], [1.5, 3.25])
