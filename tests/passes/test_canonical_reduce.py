"""Reductions, softmaxes and norms of every opset against the oracle."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from ingot.importers.onnx import load
from ingot.ir import oracle
from ingot.ir.shapes import infer
from ingot.passes import run
from tests.passes.canonical_harness import canonical_model, check, check_symbolic, node_model, rejection, values

REDUCTIONS = ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(REDUCTIONS), st.data())
def test_reduce(kind: str, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 4))
    x = values(data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank)), low=0.5)
    axes = data.draw(st.none() | st.lists(st.sampled_from(range(-rank, 0)), min_size=1, unique=True))
    version, keepdims = data.draw(st.sampled_from([8, 11, 13, 18, 28])), data.draw(st.sampled_from([0, 1]))
    as_input = version >= (13 if kind == "Sum" else 18)
    if as_input or axes is None:
        inputs = [x] if axes is None else [x, np.array(axes)]
        check(f"Reduce{kind}", inputs, version=version, constants=[1], keepdims=keepdims, rtol=1e-4)
    else:
        check(f"Reduce{kind}", [x], version=version, axes=axes, keepdims=keepdims, rtol=1e-4)


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_reduce_forms(kind: str) -> None:
    x = values((2, 3, 4), low=0.5)
    empty = np.array([], np.int64)
    check(f"Reduce{kind}", [x, empty], constants=[1], rtol=1e-4)
    check(f"Reduce{kind}", [x, empty], constants=[1], noop_with_empty_axes=1)
    check_symbolic(f"Reduce{kind}", [x, np.array([1])], {0: ["N", "M", 4]}, constants=[1])
    check(f"Reduce{kind}", [values((2, 3), "float16", low=0.5)], rtol=2e-3, atol=2e-3)


def test_reduce_of_other_types() -> None:
    for dtype in ("int32", "int64"):
        check("ReduceSum", [values((3, 4), dtype), np.array([1])], constants=[1])
        check("ReduceMax", [values((3, 4), dtype), np.array([0])], constants=[1])
    check("ReduceMin", [values((3, 4), "bool"), np.array([0])], constants=[1])
    check("ReduceMax", [values((3, 4), "uint8"), np.array([0])], constants=[1])


def test_axes_that_vary_follow_from_the_shapes() -> None:
    x, axes = values((2, 3, 4)), np.array([1])
    proto = node_model("ReduceSum", [x, axes], keepdims=0)
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y0", 1, [2, 4]))
    model, report = canonical_model(proto)
    assert not report.remaining
    np.testing.assert_allclose(oracle.evaluate_model(model, {"x0": x, "x1": axes})["y0"], x.sum(1), rtol=1e-6)
    assert "axes vary" in rejection("ReduceSum", [x, axes], keepdims=0)


@pytest.mark.parametrize("noop", [0, 1])
def test_an_input_without_elements_is_known(noop: int) -> None:
    x, axes = values((2, 3)), np.empty(0, np.int64)
    proto = node_model("ReduceSum", [x, axes], noop_with_empty_axes=noop)
    model = load(proto)
    infer(model)
    outcome = run(model)
    assert not outcome.remaining
    expected = x if noop else x.sum(keepdims=True)
    found = oracle.evaluate_model(model, {"x0": x, "x1": axes})[model.graph.outputs[0].name or ""]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("last", [0, 1])
def test_arg_reduce(op: str, last: int) -> None:
    x = values((3, 4, 2), "int32").astype(np.float32)
    for keepdims in (0, 1):
        check(op, [x], axis=-2, keepdims=keepdims, select_last_index=last, only={"Reduce"})
        check(op, [x], version=11, axis=1, keepdims=keepdims)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("version", [8, 11, 13, 28])
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_softmax(op: str, version: int, axis: int | None) -> None:
    attributes = {} if axis is None else {"axis": axis}
    check(op, [values((2, 3, 4))], version=version, rtol=1e-4, **attributes)


def test_softmax_of_symbolic_shape() -> None:
    for version in (11, 13):
        check_symbolic("Softmax", [values((2, 3, 4))], {0: ["N", "S", "S2"]}, version=version, axis=1)
    check_symbolic("Hardmax", [values((2, 3, 4))], {0: ["N", "S", "T"]}, axis=-1)


@pytest.mark.parametrize("constants", [[], [1, 2, 3, 4]])
@pytest.mark.parametrize(("version", "rank"), [(7, 4), (9, 4), (14, 3), (15, 4), (15, 2)])
def test_batch_norm(constants: list[int], version: int, rank: int) -> None:
    x = values((2, 3, 4, 5)[:rank])
    inputs = [x, *(values((3,), seed=i, low=0.5) for i in range(1, 5))]
    check("BatchNormalization", inputs, version=version, constants=constants, rtol=1e-4, atol=1e-5, epsilon=1e-3)


def test_batch_norm_in_training_stays() -> None:
    inputs = [values((2, 3, 4, 5)), *(values((3,), seed=i, low=0.5) for i in range(1, 5))]
    assert "training" in rejection("BatchNormalization", inputs, version=15, outputs=3, training_mode=1)


@pytest.mark.parametrize("axis", [-1, 1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [1, 3])
def test_layer_norm(axis: int, bias: bool, outputs: int) -> None:
    x = values((2, 3, 4))
    inputs = [x, values(x.shape[axis:], seed=1), *([values(x.shape[axis:], seed=2)] if bias else [])]
    for constants in ([], [1, 2]):
        check(
            "LayerNormalization",
            inputs,
            version=17,
            constants=constants,
            outputs=outputs,
            axis=axis,
            rtol=1e-4,
            atol=1e-5,
        )


def test_layer_norm_broadcasts_its_scale() -> None:
    x = values((2, 3, 4))
    for constants in ([], [1, 2]):
        inputs = [x, values((4,), seed=1), values((1,), seed=2)]
        check("LayerNormalization", inputs, version=17, constants=constants, axis=1, rtol=1e-4, atol=1e-5)
    check_symbolic("LayerNormalization", [x, values((4,), seed=1)], {0: ["N", "S", 4]}, version=17, constants=[1])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_norms(dtype: str) -> None:
    x, coarse = values((2, 6, 4, 5), dtype), 1e-4 if dtype == "float32" else 5e-3
    affine = [values((6,), dtype, seed=1), values((6,), dtype, seed=2)]
    tolerance: dict[str, Any] = {"rtol": coarse, "atol": coarse}
    check("InstanceNormalization", [x, *affine], only={"Norm"}, **tolerance)
    check("RMSNormalization", [x, values((5,), dtype, seed=1)], only={"Norm"}, **tolerance)
    check("GroupNormalization", [x, *affine], version=21, num_groups=3, only={"Norm"}, **tolerance)


def test_norms_by_parts() -> None:
    x = values((2, 6, 4, 5), low=0.1)
    for p in (1, 2):
        check("LpNormalization", [x], axis=1, p=p, rtol=1e-4)
    check("LpNormalization", [np.zeros((2, 3), np.float32)])
    check("MeanVarianceNormalization", [values((2, 6, 4, 5))], rtol=1e-3, atol=1e-4)
    check("MeanVarianceNormalization", [values((2, 6, 4, 5))], axes=[0, 1], rtol=1e-3, atol=1e-4)
    for size in (1, 3, 4):
        check("LRN", [values((2, 6, 4, 5))], size=size, alpha=0.01, beta=0.5, bias=1.5, rtol=1e-4)
    check_symbolic("LRN", [values((2, 6, 4, 5))], {0: ["N", 6, "H", "W"]}, size=3)
