"""`ingot explain`: what fired where, in the user's words, and why another rewrite did not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from examples.writer import Writer
from ingot.cli import main
from ingot.tools.explain import explain


def block() -> onnx.ModelProto:
    """A layer whose GELU reads a value that is an output too, a second one that fuses, and a sort for the host."""
    writer, random = Writer(), np.random.default_rng(0)

    def weight(name: str, *shape: int) -> str:
        return writer.weight(name, random.standard_normal(shape).astype(np.float32))

    def gelu(x: str, name: str) -> str:
        gate = writer.node("Erf", writer.node("Div", x, writer.constant(2.0**0.5)), name=f"{name}.erf")
        gate = writer.node("Add", gate, writer.constant(1.0), name=f"{name}.add")
        return writer.node("Mul", writer.node("Mul", x, gate), writer.constant(0.5), name=f"{name}.half")

    first = writer.node("MatMul", "x", weight("w1", 8, 8), name="first.matmul")
    first = writer.node("Add", first, weight("b1", 8), name="first.bias")
    product = writer.node("MatMul", gelu(first, "open"), weight("w2", 8, 8), name="second.matmul")
    kept = writer.node("Relu", product, name="second.relu")
    found = writer.node("NonZero", kept, name="places")
    outputs: dict[str, Any] = {"y": (kept, "float32", ("N", 8)), "product": (product, "float32", ("N", 8)),
                               "found": (found, "int64", (2, "K"))}  # fmt: skip
    return writer.model("block", {"x": ("float32", ("N", 8))}, outputs)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "block.onnx"
    onnx.save(block(), path)
    return path


def entry(content: dict[str, Any], name: str) -> dict[str, Any]:
    """The one rewrite of this name that fired."""
    (found,) = [entry for entry in content["fired"] if entry["rewrite"] == name]
    return found


def told(model: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["explain", str(model), *options]) == 0
    return capsys.readouterr().out


def test_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(told(model, capsys, "--json"))
    assert content["model"] == "block.onnx"
    assert content["nodes_before"] > content["nodes_after"] == sum(content["operators"].values())
    gelu = entry(content, "gelu")
    assert gelu["algebra"] == "x * (erf(x / √2) + 1) / 2 => Gelu(x)"
    assert gelu["count"] == 1 and {"open.erf", "open.add", "open.half"} <= set(gelu["places"][0])
    assert any({"first.matmul", "first.bias"} <= set(place) for place in entry(content, "epilogue")["places"])
    (held,) = [held for held in content["held_back"] if held["rewrite"] == "epilogue"]
    assert held["origins"] == ["second.relu"] and "the result is used elsewhere too" in held["reason"]
    assert "second.matmul" in held["reason"]
    (host,) = content["host"]
    assert (host["node"], host["operator"]) == ("places", "NonZero") and host["reason"]
    assert set(content["milliseconds"]) >= {"canonicalise", "simplify", "idioms", "epilogues"}


def test_text(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = told(model, capsys)
    head, fired, held, host = shown.split("\n\n")
    assert head.startswith("block.onnx: ") and "Linear 2" in head
    assert fired.startswith("fired:") and "1 × gelu: x * (erf(x / √2) + 1) / 2 => Gelu(x)" in fired
    assert "first.bias, first.matmul" in fired
    assert held.startswith("held back:")
    assert "second.relu: the result is used elsewhere too (Linear second.matmul)" in held
    assert host.startswith("on the host:") and "NonZero" in host and "places" in host


def test_what_is_not_shown_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = Writer()
    outputs: dict[str, Any] = {}
    for index in range(5):
        weight = writer.weight(f"w{index}", np.full((8, 8), index + 1, np.float32))
        product = writer.node("MatMul", "x", weight, name=f"layer{index}.matmul")
        outputs[f"y{index}"] = (writer.node("Relu", product, name=f"layer{index}.relu"), "float32", ("N", 8))
    path = tmp_path / "wide.onnx"
    onnx.save(writer.model("wide", {"x": ("float32", ("N", 8))}, outputs), path)
    shown = told(path, capsys)
    assert "5 × epilogue" in shown and "… and 2 more (--all)" in shown and "layer4.relu" not in shown
    every = told(path, capsys, "--all")
    assert "--all" not in every and "layer4.relu" in every


def test_nothing_to_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = Writer()
    y = writer.node("Softmax", "x", axis=1)
    path = tmp_path / "plain.onnx"
    onnx.save(writer.model("plain", {"x": ("float32", (2, 8))}, {"y": (y, "float32", (2, 8))}), path)
    shown = told(path, capsys)
    assert "held back" not in shown and "on the host" not in shown and "Softmax 1" in shown


def test_a_transformer_is_told_layer_by_layer(tagger: Path) -> None:
    content = explain(tagger, as_json=True)
    assert entry(content, "allowed attention")["count"] == 2 and entry(content, "gelu tanh")["count"] == 2
    assert not content["host"] and content["operators"]["Attention"] == 2
    names = {name for fired in content["fired"] for place in fired["places"] for name in place}
    assert {"blocks.0.project", "blocks.1.wide"} <= names


def test_the_text_of_a_model_in_memory() -> None:
    shown = explain(block())
    assert isinstance(shown, str) and shown.startswith("block: ")


@pytest.mark.parametrize("content", [b"", b"not a model"])
def test_what_is_no_model_is_one_error(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    assert main(["explain", str(path)]) != 0
    said = capsys.readouterr()
    assert "broken.onnx" in said.err and "Traceback" not in said.err


def test_a_missing_file_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(tmp_path / "absent.onnx")]) != 0
    assert "absent.onnx" in capsys.readouterr().err
