"""If, Loop, Scan and SequenceMap in engines, beside the numpy oracle."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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


def same(proto: onnx.ModelProto, *feeds: dict[str, Any]) -> ingot.Engine:
    """The engine gives what the oracle gives, for each of the feeds."""
    engine = ingot.build(proto, level=0, inputs=feeds[0])
    assert not engine.variants[0].plan.host_steps
    with ingot.Session(engine) as session:
        for x in feeds:
            expected = oracle.evaluate_model(proto, x)
            for name, y in session.run(x).items():
                agree(y, expected[name], name)
    return engine


def agree(found: Any, expected: Any, name: str) -> None:
    """Equal arrays, or sequences of them."""
    if isinstance(expected, list):
        assert isinstance(found, list) and len(found) == len(expected), name
        for one, other in zip(found, expected, strict=True):
            agree(one, other, name)
        return
    np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)
    assert found.shape == expected.shape and found.dtype == expected.dtype, name


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


def repeated(name: str, count: str, body: onnx.GraphProto, start: str, result: str) -> onnx.NodeProto:
    """A Loop without a condition."""
    return helper.make_node("Loop", [count, "", start], [result], name=name, body=body)


def test_loop_in_a_loop_reads_values_of_both_scopes() -> None:
    """y = x; outer times: y += i; inner times: y = y · factor + i · step, where i is the outer iteration."""
    going = helper.make_node("Identity", ["on"], ["on_again"], name="on_again")
    inner = helper.make_graph(
        [helper.make_node("Identity", ["on2"], ["on2_again"], name="on2_again"),
         helper.make_node("Mul", ["w", "factor"], ["scaled"], name="scale"),
         helper.make_node("Add", ["scaled", "shift"], ["w_next"], name="shift")],
        "inner", [info("j", INT, []), info("on2", BOOL, []), info("w", FLOAT, ["N"])],
        [info("on2_again", BOOL, []), info("w_next", FLOAT, ["N"])],
    )  # fmt: skip
    outer = helper.make_graph(
        [going, helper.make_node("Cast", ["i"], ["i_float"], name="cast", to=FLOAT),
         helper.make_node("Mul", ["i_float", "step"], ["shift"], name="product"),
         helper.make_node("Add", ["v", "i_float"], ["moved"], name="move"),
         repeated("inner", "inner_count", inner, "moved", "v_next")],
        "outer", [info("i", INT, []), info("on", BOOL, []), info("v", FLOAT, ["N"])],
        [info("on_again", BOOL, []), info("v_next", FLOAT, ["N"])],
    )  # fmt: skip
    inputs = [info("outer_count", INT, []), info("inner_count", INT, []), info("x", FLOAT, ["N"]),
              info("factor", FLOAT, []), info("step", FLOAT, ["N"])]  # fmt: skip
    proto = model([repeated("outer", "outer_count", outer, "x", "y")], inputs, [info("y", FLOAT, ["N"])])
    rng = np.random.default_rng(3)
    same(proto, *(
        {"outer_count": np.array(i), "inner_count": np.array(j), "x": rng.standard_normal(n).astype(np.float32),
         "factor": np.array(0.75, np.float32), "step": rng.standard_normal(n).astype(np.float32)}
        for i, j, n in ((3, 2, 5), (3, 0, 5), (0, 4, 17), (1, 1, 1), (2, 3, 0))
    ))  # fmt: skip


def test_branches_within_a_loop() -> None:
    """Even iterations add the captured x, odd ones double: an If whose condition is computed in the body."""

    def branch(name: str, op: str, other: str) -> onnx.GraphProto:
        return helper.make_graph([helper.make_node(op, ["v", other], [name], name=name)], name, [],
                                 [info(name, FLOAT, ["N", 4])])  # fmt: skip

    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["on_again"], name="again"),
         helper.make_node("Mod", ["i", "two"], ["odd"], name="mod"),
         helper.make_node("Cast", ["odd"], ["is_odd"], name="is_odd", to=BOOL),
         helper.make_node("If", ["is_odd"], ["v_next"], name="choice", then_branch=branch("doubled", "Add", "v"),
                          else_branch=branch("added", "Add", "x"))],
        "body", [info("i", INT, []), info("on", BOOL, []), info("v", FLOAT, ["N", 4])],
        [info("on_again", BOOL, []), info("v_next", FLOAT, ["N", 4])],
    )  # fmt: skip
    two = helper.make_tensor("two", INT, [], [2])
    proto = model([repeated("steps", "count", body, "x", "y")], [info("count", INT, []), info("x", FLOAT, ["N", 4])],
                  [info("y", FLOAT, ["N", 4])], [two])  # fmt: skip
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    same(proto, *({"count": np.array(count), "x": x[:rows]} for count in (0, 1, 2, 5) for rows in (1, 3)))


def test_a_state_that_grows() -> None:
    """The carried tensor is longer after every iteration: its size is known only while the loop runs."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["on_again"], name="again"),
         helper.make_node("Concat", ["v", "x"], ["v_next"], name="longer", axis=0)],
        "body", [info("i", INT, []), info("on", BOOL, []), info("v", FLOAT, ["M", 2])],
        [info("on_again", BOOL, []), info("v_next", FLOAT, ["K", 2])],
    )  # fmt: skip
    after = helper.make_node("Mul", ["grown", "grown"], ["y"], name="square")
    proto = model([repeated("growth", "count", body, "x", "grown"), after],
                  [info("count", INT, []), info("x", FLOAT, ["N", 2])], [info("y", FLOAT, ["L", 2])])  # fmt: skip
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    engine = ingot.build(proto, level=0, inputs={"count": np.array(2), "x": x})
    with ingot.Session(engine) as session:
        for count in (3, 0, 1):
            grown = np.concatenate([x] * (count + 1))
            np.testing.assert_array_equal(session.run({"count": np.array(count), "x": x})["y"], grown * grown)


def test_scan_of_two_sequences_with_axes_of_their_own() -> None:
    """Column a[:, t] and row b[t] meet the captured bias; one result is stacked on its last axis, backwards."""
    body = helper.make_graph(
        [helper.make_node("Mul", ["a_t", "b_t"], ["product"], name="product"),
         helper.make_node("Add", ["product", "bias"], ["y_t"], name="bias"),
         helper.make_node("Add", ["sum", "y_t"], ["next"], name="sum")],
        "body", [info("sum", FLOAT, [3]), info("a_t", FLOAT, [3]), info("b_t", FLOAT, [3])],
        [info("next", FLOAT, [3]), info("y_t", FLOAT, [3])],
    )  # fmt: skip
    node = helper.make_node("Scan", ["start", "a", "b"], ["last", "y"], name="scan", body=body, num_scan_inputs=2,
                            scan_input_axes=[1, 0], scan_input_directions=[0, 1], scan_output_axes=[-1],
                            scan_output_directions=[1])  # fmt: skip
    inputs = [info("start", FLOAT, [3]), info("a", FLOAT, [3, "T"]), info("b", FLOAT, ["T", 3]),
              info("bias", FLOAT, [3])]  # fmt: skip
    proto = model([node], inputs, [info("last", FLOAT, [3]), info("y", FLOAT, [3, "T"])])
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    same(proto, *({"start": draw(3), "a": draw(3, t), "b": draw(t, 3), "bias": draw(3)} for t in (4, 1, 0)))


def sequence(name: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_sequence_value_info(name, FLOAT, shape)


def mapped(other: onnx.ValueInfoProto, rows: int | str = "R") -> onnx.ModelProto:
    """(element + other) · captured and its number of rows, for every element."""
    body = helper.make_graph(
        [helper.make_node("Add", ["e", "o"], ["sum"], name="add"),
         helper.make_node("Mul", ["sum", "c"], ["scaled"], name="scale"),
         helper.make_node("Shape", ["e"], ["size"], name="size", end=1)],
        "body", [info("e", FLOAT, ["R", 3]), info("o", FLOAT, [rows, 3])],
        [info("scaled", FLOAT, ["R", 3]), info("size", INT, [1])],
    )  # fmt: skip
    node = helper.make_node("SequenceMap", ["s", "t"], ["ys", "sizes"], name="map", body=body)
    results = [sequence("ys", ["R", 3]), helper.make_tensor_sequence_value_info("sizes", INT, [1])]
    return model([node], [sequence("s", ["R", 3]), other, info("c", FLOAT, [])], results)


@pytest.mark.parametrize("rows", [(2, 5, 1), (4,), ()], ids=str)
def test_sequence_map_beside_another_sequence(rows: Sequence[int]) -> None:
    rng = np.random.default_rng(2)
    first, second = ([rng.standard_normal((n, 3)).astype(np.float32) for n in rows] for _ in range(2))
    proto = mapped(sequence("t", ["R", 3]))
    same(proto, {"s": first, "t": second, "c": np.array(2, np.float32)})


def test_sequence_map_beside_a_tensor_and_a_sequence_too_short() -> None:
    elements = [np.full((n, 3), n, np.float32) for n in (2, 6)]
    same(mapped(info("t", FLOAT, [1, 3]), rows=1),
         {"s": elements, "t": np.ones((1, 3), np.float32), "c": np.array(3, np.float32)})  # fmt: skip
    engine = ingot.build(mapped(sequence("t", ["R", 3])), level=0, verify=False)
    with ingot.Session(engine) as session, pytest.raises(ingot.IngotError, match="2 and 1 elements"):
        session.run({"s": elements, "t": elements[:1], "c": np.array(3, np.float32)})


def test_a_branch_may_hand_a_constant_or_an_outer_value_through() -> None:
    stored = helper.make_graph([helper.make_node("Reshape", ["table", "wanted"], ["p"], name="p")], "stored", [],
                               [info("p", FLOAT, [2, 2])])  # fmt: skip
    outer = helper.make_graph([helper.make_node("Identity", ["x"], ["q"], name="q")], "outer", [],
                              [info("q", FLOAT, [2, 2])])  # fmt: skip
    node = helper.make_node("If", ["a"], ["y"], name="choice", then_branch=stored, else_branch=outer)
    table = helper.make_tensor("table", FLOAT, [4], [1, 2, 3, 4])
    wanted = helper.make_tensor("wanted", INT, [2], [2, 2])
    proto = model([node], [info("a", BOOL, []), info("x", FLOAT, [2, 2])], [info("y", FLOAT, [2, 2])], [table, wanted])
    same(proto, *({"a": np.array(a), "x": np.full((2, 2), 9, np.float32)} for a in (True, False, True)))


def test_loops_of_one_session_run_side_by_side() -> None:
    proto = loop()
    feeds = [{"count": np.array(k % 7), "start": np.array(True), "x": np.full((1 + k % 3, 3), k, np.float32),
              "limit": np.array(1e9, np.float32)} for k in range(40)]  # fmt: skip
    with ingot.Session(ingot.build(proto, level=0, inputs=feeds[1])) as session, ThreadPoolExecutor(4) as pool:
        for x, found in zip(feeds, pool.map(session.run, feeds), strict=True):
            np.testing.assert_array_equal(found["y"], x["x"] * 2 ** int(x["count"]))
            assert len(found["all"]) == int(x["count"])
