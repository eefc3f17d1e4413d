"""Elementwise operators of every opset form against the oracle."""

import numpy as np
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from ingot.dtypes import numpy_dtype
from ingot.ir import oracle
from tests.passes.canonical_harness import canonical_model, check, check_symbolic, node_model, rejection, values

UNARY = (
    "Neg", "Abs", "Sign", "Floor", "Ceil", "Round", "Exp", "Sigmoid", "Sin", "Cos", "Tan", "Atan", "Sinh", "Cosh",
    "Tanh", "Asinh", "Relu", "Softplus", "Softsign", "HardSwish", "Mish", "Erf", "Reciprocal", "Identity", "LeakyRelu",
    "Elu",
    "Selu", "Celu", "ThresholdedRelu", "HardSigmoid", "Shrink", "Gelu", "Swish", "IsNaN", "IsInf",
)  # fmt: skip


@pytest.mark.parametrize("op", UNARY)
def test_unary(op: str) -> None:
    check(op, [values((2, 3, 5))], only={"Pointwise", "View"})


@pytest.mark.parametrize("op", ["Log", "Sqrt", "Acosh"])
def test_unary_of_positive(op: str) -> None:
    check(op, [values((2, 3), low=1.0)], only={"Pointwise"})


@pytest.mark.parametrize("op", ["Asin", "Acos", "Atanh"])
def test_unary_within_one(op: str) -> None:
    check(op, [values((2, 3), low=-0.9, high=0.9)], only={"Pointwise"})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("op", ["Exp", "Tanh", "Sigmoid", "Gelu"])
def test_other_floats(op: str, dtype: str) -> None:
    coarse = {"float16": 2e-3, "bfloat16": 2e-2, "float64": 1e-6}[dtype]
    check(op, [values((3, 4), dtype)], rtol=coarse, atol=coarse)


@pytest.mark.parametrize(("op", "attributes"), [
    ("LeakyRelu", {"alpha": 0.3}), ("Elu", {"alpha": 0.7}), ("Selu", {"alpha": 2.0, "gamma": 0.5}),
    ("Celu", {"alpha": 2.0}), ("ThresholdedRelu", {"alpha": 0.5}), ("HardSigmoid", {"alpha": 0.5, "beta": 0.1}),
    ("Shrink", {"bias": 0.2, "lambd": 1.0}),
    ("Gelu", {"approximate": "tanh"}), ("Swish", {"alpha": 1.5}), ("IsInf", {"detect_negative": 0}),
    ("IsInf", {"detect_positive": 0}), ("IsInf", {"detect_positive": 0, "detect_negative": 0}),
])  # fmt: skip
def test_attributes(op: str, attributes: dict[str, object]) -> None:
    x = values((2, 6))
    x[0, :3] = [np.inf, -np.inf, 0.0] if op == "IsInf" else x[0, :3]
    check(op, [x], only={"Pointwise"}, **attributes)


@pytest.mark.parametrize(
    "op", ["Add", "Sub", "Mul", "Div", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Pow"]
)
@pytest.mark.parametrize("shapes", [((2, 3, 4), (4,)), ((3, 1), (1, 4)), ((), (2,)), ((2, 1, 3), (5, 1))])
def test_binary(op: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    check(op, [values(shapes[0], low=0.5), values(shapes[1], seed=1, low=0.5)], only={"Pointwise"})


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Mod", "BitwiseAnd", "BitwiseOr", "BitwiseXor"])
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
def test_integers(op: str, dtype: str) -> None:
    a, b = values((4, 5), dtype), values((5,), dtype, seed=1)
    check(op, [a, np.where(b == 0, 3, b).astype(dtype)], only={"Pointwise"})


@pytest.mark.parametrize("op", ["And", "Or", "Xor"])
def test_logic(op: str) -> None:
    check(op, [values((3, 4), "bool"), values((4,), "bool", seed=1)], only={"Pointwise"})
    check("Not", [values((3, 4), "bool")], only={"Pointwise"})


@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
def test_bit_shift(direction: str) -> None:
    shifts = np.array([0, 1, 3], np.uint32)
    check("BitShift", [values((2, 3), "uint32"), shifts], only={"Pointwise"}, direction=direction)


@pytest.mark.parametrize(("dtypes", "exponents"), [
    (("float32", "int64"), [2, 0, 3]), (("int32", "float32"), [2.0, 1.0, 0.0]), (("int64", "int32"), [2, 3, 1]),
])  # fmt: skip
def test_power_of_mixed_types(dtypes: tuple[str, str], exponents: list[float]) -> None:
    base, exponent = np.array([1, 2, 3], dtypes[0]), np.array(exponents, dtypes[1])
    check("Pow", [base, exponent], only={"Pointwise"})
    check("Pow", [base, exponent[:1]], constants=[1], only={"Pointwise"})


@pytest.mark.parametrize("fmod", [0, 1])
def test_mod_of_both_signs(fmod: int) -> None:
    check("Mod", [np.array([-7, 7, -7, 7]), np.array([3, -3, -3, 3])], fmod=fmod)


@pytest.mark.parametrize("op", ["Sum", "Mean", "Max", "Min"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_variadic(op: str, count: int) -> None:
    check(op, [values((3,) if i % 2 else (2, 3), seed=i) for i in range(count)])


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Less", "Greater", "Equal"])
@pytest.mark.parametrize(("shape", "axis"), [((3,), 1), ((3, 4), 1), ((4, 5), 2), ((2,), 0)])
def test_operands_placed_along_an_axis(op: str, shape: tuple[int, ...], axis: int) -> None:
    """Opset 6, for which the oracle has no meaning: the same operand with trailing ones at opset 7 is the yardstick."""
    dtype = "int32" if op == "Equal" else "float32"
    x, operand = values((2, 3, 4, 5), dtype, low=0.5), values(shape, dtype, seed=1, low=0.5)
    placed = operand.reshape(*shape, *[1] * (4 - axis - len(shape)))
    modern = node_model(op, [x, placed], version=7)
    old = node_model(op, [x, placed], version=7)
    old.opset_import[0].version = 6
    old.graph.node[0].attribute.extend([helper.make_attribute("broadcast", 1), helper.make_attribute("axis", axis)])
    old.graph.input[1].CopyFrom(node_model("Neg", [operand]).graph.input[0])
    old.graph.input[1].name = "x1"
    model, report = canonical_model(old)
    assert not report.remaining
    expected = oracle.evaluate_model(modern, {"x0": x, "x1": placed})["y0"]
    actual = oracle.evaluate_model(model, {"x0": x, "x1": operand})["y0"]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_clip_bounds_from_everywhere() -> None:
    x, low, high = values((3, 4)), np.float32(-0.5).reshape(()), np.float32(0.7).reshape(())
    check("Clip", [x], version=6, min=-0.5, max=0.7)
    check("Clip", [x], version=6, max=0.7)
    check("Clip", [x, low, high], only={"Pointwise"})
    check("Clip", [x, low, high], constants=[1, 2], only={"Pointwise"})
    check("Clip", [x, None, high], constants=[2])
    check("Clip", [x, low], constants=[1])
    check("Clip", [values((3, 4), "int64"), np.array(-2), np.array(5)], constants=[1, 2])


def test_where_and_prelu() -> None:
    check("Where", [values((3, 1), "bool"), values((3, 4)), values((4,), seed=1)], only={"Pointwise"})
    check("PRelu", [values((2, 3, 4)), values((3, 1), seed=1)], only={"Pointwise"})
    check("PRelu", [values((2, 3, 4)), values((3, 1), seed=1)], constants=[1], only={"Pointwise"})


@pytest.mark.parametrize("source", ["float32", "float16", "int32", "bool", "uint8", "bfloat16"])
@pytest.mark.parametrize(
    "target", ["float32", "float64", "float16", "int64", "int8", "bool", "bfloat16", "float8_e4m3fn"]
)
def test_casts(source: str, target: str) -> None:
    x = values((3, 4), source, low=0.0, high=9.0)
    kind = onnx_ir.DataType.from_numpy(numpy_dtype(target)).value
    check("Cast", [x], to=kind)
    check("CastLike", [x, np.zeros(1, numpy_dtype(target))], constants=[1])


def test_a_cast_may_overflow_instead_of_saturating() -> None:
    x = np.array([1.0, 1e6, -1e6, 300.0], np.float32)
    for saturate in (0, 1):
        for kind in (onnx_ir.DataType.FLOAT8E4M3FN, onnx_ir.DataType.FLOAT8E5M2):
            check("Cast", [x], to=kind.value, saturate=saturate)


def test_scalar_constants_become_literals() -> None:
    model = check("Add", [values((3, 4)), np.array([0.1], np.float32)], constants=[1])
    node = model.graph[0]
    assert len(node.inputs) == 1
    assert node.attributes["expression"].value == "Add %0 0.1 -> float32"


def test_a_constant_that_adds_axes_stays_an_operand() -> None:
    model = check("Add", [values((3,)), np.ones((1, 1), np.float32)], constants=[1])
    assert len(model.graph[0].inputs) == 2


def test_equal_operands_are_one() -> None:
    x = values((2, 3))
    proto = node_model("Mul", [x, x])
    proto.graph.node[0].CopyFrom(helper.make_node("Mul", ["x0", "x0"], ["y0"], name="square"))
    del proto.graph.input[1]
    model, _ = canonical_model(proto)
    assert len(model.graph[0].inputs) == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), max_size=4), st.data())
def test_any_broadcast(shape: list[int], data: st.DataObject) -> None:
    keep = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    other = [size if kept else 1 for size, kept in zip(shape, keep, strict=True)][
        data.draw(st.integers(0, len(shape))) :
    ]
    check("Sub", [values(shape), values(other, seed=1)], constants=data.draw(st.sampled_from([[], [1]])))


def test_symbolic_shapes() -> None:
    check_symbolic("Add", [values((2, 3)), values((3,), seed=1)], {0: ["N", "M"], 1: ["M"]})


def test_strings_stay() -> None:
    assert "string" in rejection("Equal", [np.array(["a"], object), np.array(["b"], object)])
