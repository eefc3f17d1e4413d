"""`ingot debug reduce`: the smallest part that fails, and how failing is told."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import ingot
from ingot.cli import main
from ingot.tools.debug_reduce import Parts, reduced


@pytest.mark.parametrize("culprits", [{7}, {0, 19}, {3, 4, 12}, set(range(20))])
def test_reduction_finds_just_the_culprits(culprits: set[int]) -> None:
    asked = 0

    def fails(part: Sequence[int]) -> bool:
        nonlocal asked
        asked += 1
        return culprits <= set(part)

    assert set(reduced(range(20), fails)) == culprits
    assert asked < 20 * 20


def model() -> onnx.ModelProto:
    """Ten nodes, the sixth a Sin; a shape computed on the way."""
    nodes = [
        helper.make_node("Exp", ["x"], ["a"], "exp"), helper.make_node("Shape", ["a"], ["s"], "shape"),
        helper.make_node("Sqrt", ["a"], ["b"], "sqrt"), helper.make_node("Reshape", ["b", "flat"], ["c"], "flatten"),
        helper.make_node("Sub", ["c", "one"], ["d"], "less"), helper.make_node("Sin", ["d"], ["e"], "sine"),
        helper.make_node("Reshape", ["e", "s"], ["f"], "back"), helper.make_node("Cos", ["f"], ["g"], "cosine"),
        helper.make_node("Relu", ["g"], ["h"], "relu"), helper.make_node("Neg", ["h"], ["y"], "negated"),
    ]  # fmt: skip
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 8]) for n in "xy")
    constants = [helper.make_tensor("flat", TensorProto.INT64, [1], [-1]),
                 helper.make_tensor("one", TensorProto.FLOAT, [], [1.0])]  # fmt: skip
    graph = helper.make_graph(nodes, "ten", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_parts_compute_what_the_whole_did() -> None:
    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    whole = Parts(model(), {"x": x})
    for places in ([5], [0, 9], [6, 7], [1], list(range(10))):
        part, feeds = whole.part(places)
        onnx.checker.check_model(part, full_check=True)
        outputs = ingot.Session(ingot.build(part, target="host", verify=False)).run(feeds)
        for name, value in outputs.items():
            np.testing.assert_array_equal(value, whole.values[name])


def test_a_command_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(model(), tmp_path / "ten.onnx")
    check = tmp_path / "check.py"
    check.write_text("import onnx, sys\nsys.exit(any(n.op_type == 'Sin' for n in onnx.load(sys.argv[1]).graph.node))")
    output = tmp_path / "small.onnx"
    words = ["debug", "reduce", str(tmp_path / "ten.onnx"), "-o", str(output), "--check", f"{sys.executable} {check}"]
    assert main(words) == 0
    assert [node.name for node in onnx.load(output).graph.node] == ["sine"]
    assert "1 of them fail still: Sin 'sine'" in capsys.readouterr().out
    assert np.load(tmp_path / "small.d.npy").shape == (32,)


def test_a_sound_model_is_not_reduced(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["debug", "reduce", str(digits), "--shapes", "image:2x1x8x8"]) == 0
    assert "does not fail" in capsys.readouterr().out


def test_a_wrong_kernel_is_cut_out(wrong_sin: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(model(), tmp_path / "ten.onnx")
    output = tmp_path / "small.onnx"
    assert main(["debug", "reduce", str(tmp_path / "ten.onnx"), "-o", str(output)]) == 0
    assert [node.op_type for node in onnx.load(output).graph.node] == ["Sin"]
    command = capsys.readouterr().out.splitlines()[-1].partition("with: ingot ")[2]
    assert main([*command.split(), "--runners", "reference,engine"]) == 1
