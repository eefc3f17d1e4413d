"""The layers that break accuracy: halving finds exactly those; a layer with an outlier among its inputs is named."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ingot.cli import main
from ingot.precision.culprits import failing

EXTENT, LAYERS = 32, 6
BROKEN = 4  # the layer that reads the outlier


@given(st.integers(1, 24), st.data())
def test_halving_finds_every_layer_that_fails_by_itself(count: int, data: st.DataObject) -> None:
    bad = data.draw(st.sets(st.integers(0, count - 1)))
    layers = [str(i) for i in range(count)]
    found = failing(layers, lambda some: any(int(name) in bad for name in some))
    assert found == [(str(i),) for i in sorted(bad)]


def test_layers_that_fail_only_together_are_one_run() -> None:
    def fails(some: Sequence[str]) -> bool:
        return {"b", "c"} <= set(some)

    assert failing(["a", "b", "c", "d"], fails) == [("a", "b", "c", "d")]
    assert failing(["b", "c", "d", "e"], fails) == [("b", "c")]


@pytest.fixture(scope="module")
def outlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain of products; one channel is 3,000 times the others where layer 4 reads it, and does not count."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("outlier")
    weights, nodes, value = [], [], "x"
    for layer in range(LAYERS):
        weight = rng.standard_normal((EXTENT, EXTENT)) * np.sqrt(2 / EXTENT)
        if layer == BROKEN - 1:
            weight[:, 7] *= 3000
        if layer == BROKEN:
            weight[7] = 0
        weights.append(numpy_helper.from_array(weight.astype(np.float32), f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [value, f"w{layer}"], [f"h{layer}"], f"layer{layer}"))
        nodes.append(helper.make_node("Relu", [f"h{layer}"], [f"r{layer}"], f"relu{layer}"))
        value = f"r{layer}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", EXTENT]) for name in ("x", value)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, folder / "chain.onnx")
    np.save(folder / "data.npy", rng.standard_normal((96, EXTENT)).astype(np.float32))
    return folder


def words(folder: Path, *more: str) -> list[str]:
    return ["debug", "precision", str(folder / "chain.onnx"), "--int8", "--data", str(folder / "data.npy"), "--quiet",
            "--calibrator=minmax", "--shapes=x:1..8x32", *more]  # fmt: skip


def test_the_layer_that_reads_an_outlier_is_named_with_its_range(
    outlier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(outlier, "--metric=snr", "--budget=20dB", "--json")) == 1
    found = json.loads(capsys.readouterr().out)
    (culprit,) = found["culprits"]
    assert culprit["node"] == f"layer{BROKEN}" and culprit["alone"] and culprit["decibels"] < 20 < found["mended"]
    assert culprit["tensor"] == f"r{BROKEN - 1}" and culprit["high"] > 1000
    assert culprit["weights"] > culprit["decibels"] + 10


def test_what_it_tells_to_do_helps(outlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(outlier, "--metric=snr")) == 1
    said = capsys.readouterr().out
    assert "it is the tensor it reads" in said
    flags = [word.strip("'") for word in said.splitlines()[-1].replace("='", "=").split()]
    assert main(words(outlier, "--metric=snr", *flags)) == 0
    assert "no layer breaks it" in capsys.readouterr().out


def test_an_error_that_adds_up_is_told_apart(outlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep = [f"--layerPrecisions=layer{BROKEN}:fp32", "--precisionConstraints=obey"]
    assert main(words(outlier, "--metric=snr", "--budget=37dB", *keep)) == 1
    said = capsys.readouterr().out
    assert "break it together with others" in said and "by themselves" not in said


def test_without_samples_there_is_nothing_to_find(capsys: pytest.CaptureFixture[str], outlier: Path) -> None:
    assert main(["debug", "precision", str(outlier / "chain.onnx"), "--int8"]) == 1
    assert "needs a narrow format and samples" in capsys.readouterr().err
