"""`ingot compare`: engine, reference and onnxruntime; the first node that differs."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import ingot
from ingot import kernels
from ingot.cli import main
from ingot.kernels.cpu.build import KernelBuilder, PhaseFunction
from ingot.kernels.cpu.llvm import Value
from ingot.kernels.node import Node


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


@pytest.fixture
def wrong_sin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A kernel, cheaper than any other, that takes Sin for the identity."""
    kernels._load("cpu")
    monkeypatch.setattr(kernels, "_TABLE", {key: list(entries) for key, entries in kernels._TABLE.items()})

    def applies(node: Node, isa: object) -> bool:
        return [step.op for step in node.epilogue.instructions] == ["Sin"]

    @kernels.kernel("Pointwise", on="cpu", when=applies, cost=lambda node, isa, **tactic: 0.0)
    def identity(build: KernelBuilder, node: Node) -> None:
        x, y = build.input(0), build.output(0)

        def body(f: PhaseFunction, begin: Value, end: Value) -> None:
            def one(i: Value) -> None:
                f.store(f.load("float", f.pointer(x), i * 4), f.pointer(y), i * 4)

            f.loop(begin, end, one)  # type: ignore[arg-type]

        build.phase(node.output.elements, body)

    yield


def test_the_first_wrong_node_is_named(wrong_sin: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(chain(), tmp_path / "chain.onnx")
    assert main(["compare", str(tmp_path / "chain.onnx"), "--layers"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["PASSED a", "PASSED b", "FAILED c", "FAILED y"]


def test_bisection_without_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(chain(), tmp_path / "chain.onnx")
    assert main(["compare", str(tmp_path / "chain.onnx"), "--bisect"]) == 0
    assert "no output differs" in capsys.readouterr().out
