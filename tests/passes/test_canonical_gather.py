"""Lookups, scatters, searches, sums and losses against the oracle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.canonical_harness import check, check_symbolic, rejection, values


@settings(max_examples=40, deadline=None)
@given(st.integers(-3, 2), st.sampled_from([(), (1,), (4,), (2, 3)]), st.booleans(), st.booleans())
def test_gather(axis: int, shape: tuple[int, ...], constant: bool, negative: bool) -> None:
    x = values((3, 4, 5))
    low = -x.shape[axis] if negative else 0
    indices = np.random.default_rng(1).integers(low, x.shape[axis], shape)
    check("Gather", [x, indices], constants=[1] if constant else [], axis=axis)


def test_one_constant_index_is_a_slice() -> None:
    model = check("Gather", [values((3, 4)), np.array(-1)], constants=[1], axis=1)
    assert {node.op_type for node in model.graph} == {"Slice", "View"}
    check_symbolic("Gather", [values((3, 4)), np.array(1)], {0: ["N", 4]}, constants=[1], axis=1)
    check_symbolic("Gather", [values((3, 4)), np.array([0, 2])], {0: ["N", 4], 1: ["M"]}, axis=0)


def test_gather_elements_and_nd() -> None:
    x = values((3, 4))
    check("GatherElements", [x, np.array([[0, 2], [-1, 1]])], axis=1)
    check("GatherElements", [x, np.array([[0, 2, 1, -1]])], axis=0)
    check("GatherND", [x, np.array([[0, 1], [2, 3]])])
    check("GatherND", [x, np.array([[1], [-1]])])
    check("GatherND", [values((2, 3, 4)), np.array([[1], [2]])], batch_dims=1)
    check("GatherND", [values((2, 3, 4, 5)), np.array([[[1, 0], [2, 3]], [[0, 0], [1, 1]]])], batch_dims=1)


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
@pytest.mark.parametrize("dtype", ["float32", "int64", "float16"])
def test_scatters(reduction: str, dtype: str) -> None:
    x = values((4, 5), dtype)
    indices = np.array([[0, 1, 2, 3, 0], [3, 2, -3, 0, 1]])
    check("ScatterElements", [x, indices, values((2, 5), dtype, seed=1)], axis=0, reduction=reduction, rtol=5e-3)
    places = np.array([[0], [2]])
    check("ScatterND", [x, places, values((2, 5), dtype, seed=1)], reduction=reduction, rtol=5e-3)
    check("ScatterND", [x, np.array([[0, 1], [3, 4]]), values((2,), dtype, seed=1)], reduction=reduction, rtol=5e-3)


def test_old_scatter_and_tensor_scatter() -> None:
    check("Scatter", [values((3, 3)), np.array([[1, 0, 2]]), values((1, 3), seed=1)], version=9)
    cache, update = values((2, 3, 6, 4)), values((2, 3, 2, 4), seed=1)
    check("TensorScatter", [cache, update, np.array([0, 3])])
    check("TensorScatter", [cache, update])
    check("TensorScatter", [cache, update, np.array([5, 4])], mode="circular")


@pytest.mark.parametrize("largest", [0, 1])
def test_topk(largest: int) -> None:
    x = values((3, 6), "int32").astype(np.float32)
    check("TopK", [x, np.array([3])], constants=[1], outputs=2, largest=largest, only={"TopK"})
    check("TopK", [values((3, 6, 2), "int64"), np.array([2])], constants=[1], outputs=2, largest=largest, axis=1)


def test_topk_with_an_attribute() -> None:
    from onnx import helper

    from ingot.ir import oracle
    from tests.passes.canonical_harness import canonical_model, node_model

    x = values((3, 6))
    proto = node_model("TopK", [x, np.array([2])], version=11, constants=[1], outputs=2)
    del proto.graph.initializer[:]
    proto.opset_import[0].version = 9
    proto.graph.node[0].CopyFrom(helper.make_node("TopK", ["x0"], ["y0", "y1"], name="old", k=2))
    model, report = canonical_model(proto)
    assert not report.remaining
    np.testing.assert_array_equal(oracle.evaluate_model(model, {"x0": x})["y0"], -np.sort(-x, axis=1)[:, :2])


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
def test_cumsum(exclusive: int, reverse: int) -> None:
    for dtype in ("float32", "int32"):
        inputs = [values((3, 4), dtype), np.array(-1)]
        check("CumSum", inputs, constants=[1], exclusive=exclusive, reverse=reverse, only={"CumSum"})
        check("CumProd", inputs, version=26, constants=[1], exclusive=exclusive, reverse=reverse, only={"CumSum"})
    assert "axis varies" in rejection("CumSum", inputs)


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_one_hot(axis: int) -> None:
    for dtype in ("int64", "float32", "int32"):
        inputs = [np.array([[0, 2], [-1, 3]], dtype), np.array(4), np.array([2.0, 5.0], np.float32)]
        check("OneHot", inputs, constants=[1], axis=axis)
        check("OneHot", inputs, constants=[1, 2], axis=axis)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("ignore", [None, 1])
def test_losses(reduction: str, weighted: bool, ignore: int | None) -> None:
    scores, target = values((3, 4, 2)), np.random.default_rng(0).integers(0, 4, (3, 2))
    inputs = [scores, target, *([values((4,), seed=1, low=0.5)] if weighted else [])]
    attributes = {"reduction": reduction, **({} if ignore is None else {"ignore_index": ignore})}
    check("NegativeLogLikelihoodLoss", inputs, rtol=1e-4, **attributes)
    check("SoftmaxCrossEntropyLoss", inputs, rtol=1e-4, **attributes)
    check("SoftmaxCrossEntropyLoss", inputs, outputs=2, rtol=1e-4, **attributes)
