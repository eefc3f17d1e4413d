"""If, Loop and Scan in engines, beside the numpy oracle."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import ingot
from ingot.ir import oracle

FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def info(name: str, kind: int, shape: Sequence[int | str] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes: Sequence[onnx.NodeProto], inputs: Sequence[Any], outputs: Sequence[Any],
          constants: Sequence[onnx.TensorProto] = (), opset: int = 17) -> onnx.ModelProto:  # fmt: skip
    graph = helper.make_graph(list(nodes), "control", list(inputs), list(outputs), list(constants))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def same(proto: onnx.ModelProto, *feeds: dict[str, np.ndarray]) -> ingot.Engine:
    """The engine gives what the oracle gives, for each of the feeds."""
    engine = ingot.build(proto, level=0, inputs=feeds[0])
    assert not engine.variants[0].plan.host_steps
    with ingot.Session(engine) as session:
        for x in feeds:
            expected = oracle.evaluate_model(proto, x)
            for name, y in session.run(x).items():
                np.testing.assert_allclose(y, expected[name], rtol=1e-6, err_msg=name)
                assert y.shape == expected[name].shape
    return engine


def loop(scans: bool = True) -> onnx.ModelProto:
    """x doubles `count` times, or until its sum exceeds `limit`, which the body reads from outside."""
    body = helper.make_graph(
        [helper.make_node("Add", ["v", "v"], ["w"], name="double"),
         helper.make_node("ReduceSum", ["w"], ["total"], name="total", keepdims=0),
         helper.make_node("Less", ["total", "limit"], ["more"], name="more"),
         helper.make_node("Identity", ["w"], ["seen"], name="seen")],
        "body", [info("i", INT, []), info("going", BOOL, []), info("v", FLOAT, ["N", 3])],
        [info("more", BOOL, []), info("w", FLOAT, ["N", 3]), *([info("seen", FLOAT, ["N", 3])] if scans else [])],
    )  # fmt: skip
    node = helper.make_node("Loop", ["count", "start", "x"], ["y", "all"][: 1 + scans], name="doubling", body=body)
    outputs = [info("y", FLOAT, ["N", 3]), info("all", FLOAT, ["K", "N", 3])]
    inputs = [info("count", INT, []), info("start", BOOL, []), info("x", FLOAT, ["N", 3]), info("limit", FLOAT, [])]
    return model([node], inputs, outputs[: 1 + scans])


@pytest.mark.parametrize("scans", [True, False])
@pytest.mark.parametrize(
    ("count", "start", "limit"), [(3, True, 1e9), (0, True, 1e9), (5, False, 1e9), (9, True, 40.0)]
)
def test_loop(scans: bool, count: int, start: bool, limit: float) -> None:
    feeds = [
        {"count": np.array(count), "start": np.array(start), "x": np.ones((rows, 3), np.float32),
         "limit": np.array(limit, np.float32)}
        for rows in (2, 5)
    ]  # fmt: skip
    same(loop(scans), *feeds)


def scan(**attributes: Any) -> onnx.ModelProto:
    """Running sums over a sequence."""
    body = helper.make_graph(
        [helper.make_node("Add", ["sum", "x_t"], ["next"], name="add"),
         helper.make_node("Mul", ["next", "next"], ["y_t"], name="square")],
        "body", [info("sum", FLOAT, [4]), info("x_t", FLOAT, [4])], [info("next", FLOAT, [4]), info("y_t", FLOAT, [4])],
    )  # fmt: skip
    node = helper.make_node("Scan", ["s", "x"], ["last", "y"], name="sums", body=body, num_scan_inputs=1, **attributes)
    axis = (attributes.get("scan_output_axes") or [0])[0]
    return model([node], [info("s", FLOAT, [4]), info("x", FLOAT, ["T", 4])],
                 [info("last", FLOAT, [4]), info("y", FLOAT, [4, "T"] if axis else ["T", 4])])  # fmt: skip


@pytest.mark.parametrize(
    "attributes",
    [{}, {"scan_input_directions": [1]}, {"scan_output_directions": [1]}, {"scan_output_axes": [1]}],
    ids=str,
)
def test_scan(attributes: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    feeds = [{"s": np.zeros(4, np.float32), "x": rng.standard_normal((t, 4)).astype(np.float32)} for t in (6, 1)]
    same(scan(**attributes), *feeds)


def test_scan_before_opset_9_has_a_batch_and_lengths() -> None:
    body = helper.make_graph(
        [helper.make_node("Add", ["sum", "x_t"], ["next"], name="add"),
         helper.make_node("Identity", ["next"], ["y_t"], name="copy")],
        "body", [info("sum", FLOAT, [2]), info("x_t", FLOAT, [2])], [info("next", FLOAT, [2]), info("y_t", FLOAT, [2])],
    )  # fmt: skip
    node = helper.make_node("Scan", ["n", "s", "x"], ["last", "y"], name="sums", body=body, num_scan_inputs=1)
    proto = model([node], [info("n", INT, [2]), info("s", FLOAT, [2, 2]), info("x", FLOAT, [2, 3, 2])],
                  [info("last", FLOAT, [2, 2]), info("y", FLOAT, [2, 3, 2])], opset=8)  # fmt: skip
    x = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    engine = ingot.build(proto, level=0, verify=False)
    with ingot.Session(engine) as session:
        found = session.run({"n": np.array([3, 2]), "s": np.zeros((2, 2), np.float32), "x": x})
    sums = x.cumsum(axis=1)
    np.testing.assert_array_equal(found["last"], [sums[0, 2], sums[1, 1]])
    np.testing.assert_array_equal(found["y"], [sums[0], [*sums[1, :2], [0, 0]]])


def test_nested_branches_read_outer_values() -> None:
    def leaf(name: str, op: str) -> onnx.GraphProto:
        node = helper.make_node(op, ["x", "x"], [name], name=name)
        return helper.make_graph([node], name, [], [info(name, FLOAT, None)])

    inner = helper.make_node("If", ["b"], ["inner"], name="inner", then_branch=leaf("p", "Add"),
                             else_branch=leaf("q", "Mul"))  # fmt: skip
    outer = helper.make_node(
        "If", ["a"], ["y"], name="outer", else_branch=leaf("r", "Sub"),
        then_branch=helper.make_graph([inner], "then", [], [info("inner", FLOAT, None)]),
    )  # fmt: skip
    proto = model([outer], [info("a", BOOL, []), info("b", BOOL, []), info("x", FLOAT, ["N", 2])],
                  [info("y", FLOAT, ["N", 2])])  # fmt: skip
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    same(proto, *({"a": np.array(a), "b": np.array(b), "x": x} for a in (False, True) for b in (False, True)))
