"""`ingot compare`: engine, reference and onnxruntime; the first node that differs."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import ingot
from ingot.cli import main
from ingot.plan.assemble import Code
from ingot.tools.compare_layers import _counts


def test_all_runners_agree(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", str(digits), "--shapes", "image:3x1x8x8", "--save-outputs", str(tmp_path), "--validate"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("PASSED scores: engine against reference: largest ") for line in lines)
    saved = sorted(tmp_path.rglob("*.npy"))
    assert saved and all(np.load(path).shape == (3, 10) for path in saved)


def test_json_names_what_was_compared(tagger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tagger), "--runners", "reference,engine", "--shapes", "ids:2x9", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = report["rows"]
    assert (row["runner"], row["against"], row["passed"]) == ("engine", "reference", True)
    assert row["statistics"]["elements"] == 2 * 9 * 6 and report["seconds"]["engine"] > 0


def test_an_engine_of_another_model_differs(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    altered = onnx.load(digits)
    weight = next(w for w in altered.graph.initializer if len(w.dims) == 2)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
    ingot.build(altered, level=0).save(tmp_path / "other.engine")
    words = ["compare", str(digits), "--engine", str(tmp_path / "other.engine"), "--runners", "reference,engine"]
    assert main(words) == 1
    assert "FAILED scores: engine against reference" in capsys.readouterr().out


def chain() -> onnx.ModelProto:
    """Four nodes the third of which is the only Sin."""
    operators = ["Exp", "Sqrt", "Sin", "Cos"]
    names = ["x", "a", "b", "c", "y"]
    nodes = [helper.make_node(op, [names[i]], [names[i + 1]], f"the_{op}") for i, op in enumerate(operators)]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 64]) for n in "xy")
    graph = helper.make_graph(nodes, "chain", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_the_first_wrong_node_is_named(wrong_sin: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(chain(), tmp_path / "chain.onnx")
    assert main(["compare", str(tmp_path / "chain.onnx"), "--layers"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["PASSED a", "PASSED b", "FAILED c", "FAILED y"]


def test_bisection_names_the_wrong_kernel(wrong_sin: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(apart(), tmp_path / "apart.onnx")
    assert main(["compare", str(tmp_path / "apart.onnx"), "--bisect"]) == 1
    assert capsys.readouterr().out == "first difference: output 'b' of node 'the_Sin' (Sin)\n"
    assert main(["compare", str(tmp_path / "apart.onnx"), "--bisect", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"output": "b", "node": "the_Sin", "operator": "Sin"}


def apart() -> onnx.ModelProto:
    """A Sin between running sums, which nothing is fused with."""
    nodes = [
        helper.make_node("CumSum", ["x", "axis"], ["a"], "before"),
        helper.make_node("Sin", ["a"], ["b"], "the_Sin"),
        helper.make_node("CumSum", ["b", "axis"], ["y"], "after"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 64]) for n in "xy"]
    axis = numpy_helper.from_array(np.array(1), "axis")
    graph = helper.make_graph(nodes, "apart", ends[:1], ends[1:], [axis])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def layers() -> onnx.ModelProto:
    """Five matrix products of the same shape."""
    rng, names = np.random.default_rng(0), ["x", "a", "b", "c", "d", "y"]
    weights = [numpy_helper.from_array(rng.standard_normal((64, 64)).astype(np.float32), f"w{i}") for i in range(5)]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], f"layer{i}") for i in range(5)]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 64]) for n in "xy"]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_bisection_names_the_altered_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part of the fourth weight is lost on its way into the engine."""
    onnx.save(layers(), tmp_path / "layers.onnx")
    right = Code.add_weight

    def wrong(self: Code, array: np.ndarray) -> int:
        if len(self.weights) == 3:
            array = array.copy()
            array.reshape(-1)[: array.size // 8] = 0
        return right(self, array)

    monkeypatch.setattr(Code, "add_weight", wrong)
    assert main(["compare", str(tmp_path / "layers.onnx"), "--bisect"]) == 1
    assert "output 'd' of node 'layer3' (MatMul)" in capsys.readouterr().out


def test_inside_means_engines_of_the_model(digits: Path, engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(digits), "--engine", str(engine), "--bisect"]) == 1
    assert "cannot look into a file" in capsys.readouterr().err


@pytest.mark.parametrize("statistic", ["elemwise", "max", "mean", "median", "cosine"])
def test_every_statistic_can_decide(statistic: str, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", str(digits), "--runners", "reference,engine", "--check-error-stat", statistic]
    assert main(words) == 0
    assert main([*words, "--rtol", "0", "--atol", "0"]) == 1


def test_layers_as_json(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(digits), "--layers", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["rows"]
    assert len(rows) == 17 and all(row["passed"] for row in rows) and rows[-1]["output"] == "scores"


def test_bisection_without_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(chain(), tmp_path / "chain.onnx")
    assert main(["compare", str(tmp_path / "chain.onnx"), "--bisect"]) == 0
    assert "no output differs" in capsys.readouterr().out


def test_layers_become_a_page(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "layers.html"
    words = ["compare", str(digits), "--layers", "--shapes", "image:2x1x8x8", "--html", str(page)]
    assert main(words) == 0
    assert f"page written to {page}" in capsys.readouterr().out
    text = page.read_text()
    nodes = onnx.load(digits).graph.node
    assert text.count("<tr>") == 1 + len(nodes) and all(node.name in text for node in nodes)
    assert text.count('aria-label="histogram') == 2 * len(nodes)


def test_another_form_of_the_model_is_compared_by_names(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    altered = onnx.load(digits)
    weight = next(w for w in altered.graph.initializer if w.name.startswith("second.weight"))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.1), weight.name))
    onnx.save(altered, tmp_path / "other.onnx")
    words = ["compare", str(digits), "--layers", "--against", str(tmp_path / "other.onnx"), "--json"]
    assert main(words) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    passed = [row["passed"] for row in rows]
    first = next(i for i, node in enumerate(altered.graph.node) if node.name == "second")
    assert passed.index(False) == first and not any(passed[first:])


def test_a_model_without_a_name_in_common_is_refused(
    digits: Path, tagger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(digits), "--layers", "--against", str(tagger)]) == 1
    assert "is not a form of this model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "values", [[1.0, np.nextafter(1.0, 2)], [2.0, 2.0], [0.0, 5e-324], [9.2e18, 9.2e18], [1.0, 2.0, 2.0]]
)
def test_every_value_is_counted_however_narrow_the_span(values: list[float]) -> None:
    assert sum(_counts(np.array(values), min(values), max(values))) == len(values)


def test_counts_are_those_of_equal_bins() -> None:
    values = np.random.default_rng(0).standard_normal(1000)
    assert _counts(values, -1.0, 1.5) == tuple(np.histogram(values, 48, (-1.0, 1.5))[0])
