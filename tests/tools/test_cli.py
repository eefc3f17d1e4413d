"""The command line: overview, help, wrong usage, and `ingot build`."""

import json
import shlex
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import ingot
from ingot.cli import VERBS, main
from tests.llm.checkpoints import write_family


def test_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0 and main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown and verb.example in shown for name, verb in VERBS.items())
    assert main(["--version"]) == 0 and ingot.__version__ in capsys.readouterr().out


def test_an_unknown_verb_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bild"]) == 2
    assert "no verb 'bild'" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([verb, "--help"])
    except SystemExit as left:
        code = left.code  # type: ignore[assignment]
    shown = capsys.readouterr().out
    assert code == 0 and "ingot " + verb in shown and "example" in shown.lower()


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_gets_as_far_as_the_missing_file(
    verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(VERBS[verb].example)[1:]) == 1
    told = capsys.readouterr()
    assert ("No such file" in told.err + told.out or "no folder" in told.err) and "Traceback" not in told.err + told.out
    assert not list(tmp_path.iterdir())


def images() -> onnx.ModelProto:
    """x[N, 3, 224, 224] halved."""
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 3, 224, 224]) for n in "xy"]
    half = helper.make_tensor("half", TensorProto.FLOAT, [], [0.5])
    graph = helper.make_graph([helper.make_node("Mul", ["x", "half"], ["y"], "halve")], "g", ends[:1], ends[1:], [half])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("serve", "doctor", "release")])
def test_the_example_runs(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a model.onnx and a model.engine; `serve` would stay, `doctor` wants a repository, `release` a
    rollout (tests/release)."""
    monkeypatch.chdir(tmp_path)
    onnx.save(images(), "model.onnx")
    if verb in ("inspect", "report", "infer", "advise"):
        ingot.build("model.onnx", level=0).save("model.engine")
    if verb == "gate":
        for name in ("old", "new"):
            ingot.build("model.onnx", level=0, verify=False).save(f"{name}.engine")
        np.savez("samples.npz", x=np.ones((4, 3, 224, 224), np.float32))
    if verb == "llm":
        write_family(tmp_path / "FOLDER", "llama")
    assert main(shlex.split(VERBS[verb].example)[1:]) == 0


def test_build_reports(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "d.engine"
    assert main(["build", str(digits), "-o", str(target), "--level", "0", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "steps: 6 native, 0 host" in shown and "verified scores at image[1, 1, 8, 8]" in shown
    ingot.Engine.load(target).verified()


def test_build_as_json(tagger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, cache = tmp_path / "t.engine", tmp_path / "times"
    words = ["build", str(tagger), "-o", str(target), "--level", "1", "--quiet", "--json", "--exact",
             "--minShapes", "ids:1x1", "--optShapes", "ids:1x16", "--maxShapes", "ids:4x32",
             "--timingCacheFile", str(cache)]  # fmt: skip
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"] == target.stat().st_size and cache.exists()
    assert not [n for n in report["notices"] if n["kind"] == "approximation"]
    assert {tuple(e["shapes"]["ids"]) for e in report["evidence"]} == {(1, 1), (1, 16), (4, 32)}
    assert all(e["passed"] for e in report["evidence"]) and report["activation_bytes"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--level", "9"], "level must be 0 to 5"),
        (["--variants", "sse9"], "no variant 'sse9'"),
        (["--shapes", "picture:1x1x8x8"], "picture"),
        (["--shapes", "image:1xax8x8"], "image"),
        (["--memory-limit", "0.000001"], "MiB of activations"),
    ],
)
def test_build_refuses_with_a_reason(
    words: list[str], said: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "d.engine"
    shapes = [] if "--shapes" in words else ["--shapes", "image:1x1x8x8"]
    assert main(["build", str(digits), "-o", str(target), "--quiet", "--level", "0", *shapes, *words]) == 1
    told = capsys.readouterr()
    assert said in told.err and told.err.startswith("ingot: error: ") and not target.exists()
