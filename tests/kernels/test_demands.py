"""Extents with two names: what a node relies on is found, and a run that contradicts it is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import ingot
from ingot.errors import InputError
from ingot.kernels.demands import Pair, demands_of
from ingot.kernels.node import Node, Port
from ingot.plan.extent import Extent

Shape = tuple[Extent, ...]


def node(op: str, inputs: list[Shape | None], output: Shape, **attributes: Any) -> Node:
    ports = tuple(None if shape is None else Port("float32", shape) for shape in inputs)
    return Node(op, ports, (Port("float32", output),), attributes)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (node("Pointwise", [("R", 3), ("Q", 1), (3,)], ("R", 3)), {("Q", "R")}),
        (node("Pointwise", [("N+1",), ("1+N",)], ("N+1",)), set()),
        (node("Pointwise", [("R",), (4,)], (4,)), {("R", 4)}),
        (node("Linear", [("N", "K"), (8, 5), ("M", 5)], ("N", 5)), {("K", 8), ("M", "N")}),
        (node("MatMul", [("A", 2, "K"), ("B", 4, "J")], ("A", 2, 4), transpose_b=1), {("K", "J"), ("B", "A")}),
        (node("Conv", [("N", "C", 5, 5), (4, 3, 3, 3)], ("N", 4, 3, 3), group=2), {("C", 6)}),
        (node("ConvTranspose", [("N", "C", 5), (4, 2, 3)], ("N", 2, 7)), {("C", 4)}),
        (node("Attention", [("B", 2, "S", 8), ("B", 2, "T", 8), ("B", 2, "U", 8), ("S", "S")], ("B", 2, "S", 8)),
         {("T", "U"), ("S", "T")}),
        (node("Concat", [("A", "N"), ("B", "M")], ("A+B", "N"), axis=0), {("M", "N")}),
        (node("Split", [("N", 2)], ("M", 2), axis=0, sizes=("M", "3")), {("N", "M+3")}),
        (node("View", [("N", 6)], ("N*2", 3)), set()),
        (node("View", [("N", 6)], ("M", 3)), {("N*6", "M*3")}),
        (node("Expand", [("M", 1)], ("N", "K")), {("M", "N")}),
        (node("Norm", [("N", "C"), ("D",)], ("N", "C"), kind="layer"), {("D", "C")}),
        (node("Norm", [("N", "C", "H"), ("D",)], ("N", "C", "H"), kind="instance"), {("D", "C")}),
        (node("ScatterElements", [("N",), ("K",), ("L",)], ("N",)), {("K", "L")}),
        (node("ScatterND", [("N", "D"), ("K", 1), ("L", "E")], ("N", "D")), {("K", "L"), ("D", "E")}),
        (node("RNN", [("T", "B", 4), (1, 8, 4), (1, 8, 8), None, ("L",), (1, "B", 8)], ("T", 1, "B", 8)), {("L", "B")}),
        (node("Reduce", [("N", "C"), ("M", 1)], ("N", 1), kind="sum", axes=[1]), {("M", "N")}),
        (node("Softmax", [("N", "C")], ("N", "C"), axis=-1), set()),
    ],
    ids=lambda case: case.op if isinstance(case, Node) else "",
)  # fmt: skip
def test_pairs(given: Node, expected: set[Pair]) -> None:
    assert set(demands_of(given)) == expected


def addition() -> onnx.ModelProto:
    names = {"e": "R", "o": "Q", "s": "S"}
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, 3]) for name, rows in names.items()]
    graph = helper.make_graph([helper.make_node("Add", ["e", "o"], ["s"], name="plus")], "add", infos[:2], infos[2:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_run_with_other_sizes_is_refused_by_name(tmp_path: Path) -> None:
    def rows(count: int) -> np.ndarray:
        return np.full((count, 3), count, np.float32)

    ingot.build(addition(), level=0, verify=False).save(tmp_path / "add.engine")
    with ingot.Session(ingot.Engine.load(tmp_path / "add.engine")) as session:
        np.testing.assert_array_equal(session.run({"e": rows(2), "o": rows(2)})["s"], rows(2) * 2)
        for e, o in ((2, 1), (1, 2), (5, 4)):
            with pytest.raises(InputError, match=rf"plus .*make them {o} and {e}"):
                session.run({"e": rows(e), "o": rows(o)})
        np.testing.assert_array_equal(session.run({"e": rows(4), "o": rows(4)})["s"], rows(4) * 2)


def test_an_axis_that_is_declared_as_one_repeats() -> None:
    proto = addition()
    proto.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 1
    with ingot.Session(ingot.build(proto, level=0, verify=False)) as session:
        found = session.run({"e": np.ones((4, 3), np.float32), "o": np.ones((1, 3), np.float32)})["s"]
    np.testing.assert_array_equal(found, np.full((4, 3), 2, np.float32))
