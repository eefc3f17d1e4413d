"""`ingot trtexec` says and writes what trtexec's users read and parse."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import ingot
from ingot.cli import main

QUICK = ["--warmUp=0", "--duration=0", "--iterations=20", "--avgRuns=10", "--builderOptimizationLevel=0"]


def test_build_and_time(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "d.engine"
    assert main(["trtexec", f"--onnx={digits}", "--shapes=image:4x1x8x8", f"--saveEngine={saved}", *QUICK]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("&&&& RUNNING Ingot.trtexec [v") and lines[-1].startswith("&&&& PASSED Ingot.trtexec [v")
    assert "=== Trace details ===" in lines and "=== Performance summary ===" in lines
    summary = lines[lines.index("=== Performance summary ===") :]
    assert re.fullmatch(r"Throughput: [\d.e+]+ qps", summary[1])
    names = ["Latency", "Enqueue Time", "H2D Latency", "GPU Compute Time", "D2H Latency"]
    for name in names:
        line = next(line for line in summary if line.startswith(f"{name}: "))
        assert re.search(r"min = \S+ ms, max = \S+ ms, mean = \S+ ms, median = \S+ ms, percentile\(90%\) = ", line)
    assert any(line.startswith("Total Host Walltime: ") for line in summary)
    assert sum(line.startswith("Average on 10 runs - GPU latency: ") for line in lines) >= 2
    assert ingot.Engine.load(saved).verified().inputs[0].opt == (4, 1, 8, 8)


def test_exports(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"{name}.json" for name in ("Times", "Profile", "Output", "LayerInfo")}
    exports = [f"--export{name}={path}" for name, path in files.items()]
    words = ["trtexec", f"--loadEngine={engine}", "--dumpProfile", "--dumpLayerInfo", "--profilingVerbosity=detailed"]
    assert main([*words, *exports, *QUICK]) == 0
    shown = capsys.readouterr().out
    assert "=== Profile (" in shown and "   Total" in shown
    read = {name: json.loads(path.read_text()) for name, path in files.items()}
    assert len(read["Times"]) >= 20
    assert {"startComputeMs", "endComputeMs", "computeMs", "latencyMs", "h2dMs", "d2hMs"} <= read["Times"][0].keys()
    assert all(row["computeMs"] == pytest.approx(row["endComputeMs"] - row["startComputeMs"]) for row in read["Times"])
    count, *layers = read["Profile"]
    assert count["count"] > 0 and sum(layer["percentage"] for layer in layers) == pytest.approx(100)
    assert "stem" in " ".join(layer["name"] for layer in layers)
    assert read["Output"][0]["name"] == "scores" and read["Output"][0]["dimensions"] == "1x10"
    assert len(read["LayerInfo"]["Layers"]) == len(layers)


def test_inputs_from_files(digits: Path, engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = np.random.default_rng(0).uniform(0, 16, (1, 1, 8, 8)).astype(np.float32)
    raw, out = tmp_path / "image.bin", tmp_path / "out.json"
    raw.write_bytes(image.tobytes())
    words = ["trtexec", f"--loadEngine={engine}", "--shapes=image:1x1x8x8", f"--loadInputs=image:{raw}"]
    assert main([*words, f"--exportOutput={out}", *QUICK]) == 0
    values = json.loads(out.read_text())[0]["values"]
    with ingot.Session(ingot.Engine.load(engine)) as session:
        np.testing.assert_allclose(values, session.run({"image": image})["scores"].ravel(), rtol=1e-5)


def test_flags_without_a_meaning_here_are_explained(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["trtexec", f"--onnx={digits}", "--shapes=image:1x1x8x8", "--useCudaGraph", "--fp16", "--noTF32"]
    assert main([*words, *QUICK]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"--useCudaGraph.*CPU", shown) and re.search(r"--fp16.*precision", shown)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--iteratons=5"], "iteratons"),
        (["--iterations=many"], "iterations"),
        (["--shapes=image:1x2x8x8"], "image"),
        (["--shapes=images:1x1x8x8"], "images"),
    ],
)
def test_what_cannot_be_fails(
    words: list[str], said: str, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {word.split("=")[0] for word in words}
    quick = [word for word in QUICK if word.split("=")[0] not in given]
    assert main(["trtexec", f"--onnx={digits}", *quick, *words]) != 0
    told = capsys.readouterr()
    text = told.out + told.err
    assert said in text and "Traceback" not in text and "&&&& PASSED" not in text
