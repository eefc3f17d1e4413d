"""`ingot gate`: a new engine in the place of an old one."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import ingot
from ingot.cli import main

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
DATA = ["--data", str(EXAMPLES / "digits" / "samples.py"), "--metric", str(EXAMPLES / "digits" / "accuracy.py")]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits engine with a class that is hardly ever chosen."""
    model = onnx.load(EXAMPLES / "digits" / "digits.onnx")
    bias = next(w for w in model.graph.initializer if w.name == "scores.bias")
    values = numpy_helper.to_array(bias).copy()
    values[3] -= 5
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    path = tmp_path_factory.mktemp("damaged") / "new.engine"
    ingot.build(model, level=0, verify=False).save(path)
    return path


def test_the_same_engine_passes(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gate", str(engine), str(engine), *DATA]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("PASSED") and lines[-1] == "0 of 450 samples changed"


def test_a_worse_engine_fails_and_the_samples_are_named(
    engine: Path, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gate", str(engine), str(damaged), *DATA, "--max-drop", "0.5%", "--json"]) == 1
    verdict = json.loads(capsys.readouterr().out)
    labels = np.load(EXAMPLES / "digits" / "heldout.npz")["labels"]
    flipped = [c for c in verdict["changes"] if len(c["was"]) == 1]  # another decision; the others are farther only
    assert not verdict["passed"] and verdict["new"] < verdict["old"] - 0.005
    assert {c["was"] for c in flipped} == {"3"} and {int(labels[c["index"]]) for c in flipped} == {3}


def test_a_drop_that_is_allowed_passes(engine: Path, damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gate", str(engine), str(damaged), *DATA, "--max-drop", "20%"]) == 0
    assert "changed\n  sample " in capsys.readouterr().out
    assert main(["gate", str(engine), str(damaged), *DATA, "--max-drop", "20%", "--max-changed", "1"]) == 1


def test_without_a_metric_closeness_decides(engine: Path, damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["gate", str(engine), str(damaged), *DATA[:2], "--samples", "20"]
    assert main([*words, "--max-drop", "0.001%"]) == 1
    assert main([*words, "--metric", "snr", "--max-drop", "1dB"]) == 0
    assert "of 20 samples" in capsys.readouterr().out


def test_engines_of_different_models_are_refused(
    engine: Path, tagger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ingot.build(tagger, level=0, verify=False).save(tmp_path / "tagger.engine")
    assert main(["gate", str(engine), str(tmp_path / "tagger.engine"), *DATA]) == 1
    assert "not two engines of one model" in capsys.readouterr().err
