"""`ingot trtexec` says and writes what trtexec's users read and parse."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ingot
from ingot.cli import main
from ingot.tools.trtexec_flags import FLAGS

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
    assert re.search(r"--useCudaGraph.*CPU", shown) and re.search(r"--fp16.*arithmetic", shown)


VALUES = {
    "file": "unused.bin", "count": "1", "text": "a:b", "shapes": "image:1x1x8x8", "milliseconds": "1", "seconds": "0",
    "number": "1", "percentages": "50,90", "optional": "", "": "",
}  # fmt: skip
SPELLED = """
    --onnx --saveEngine --loadEngine --minShapes --optShapes --maxShapes --shapes --profile --inputIOFormats
    --outputIOFormats --workspace --memPoolSize --avgTiming --profilingVerbosity --refit --stripWeights
    --refitFromOnnx --versionCompatible --sparsity --noTF32 --stronglyTyped --tacticSources --timingCacheFile
    --noBuilderCache --errorOnTimingCacheMiss --builderOptimizationLevel --maxTactics --hardwareCompatibilityLevel
    --maxAuxStreams --allowWeightStreaming --markDebug --skipInference --getPlanVersionOnly --fp16 --bf16 --int8
    --fp8 --int4 --best --calib --calibrationData --layerPrecisions --layerOutputTypes --precisionConstraints
    --loadInputs --iterations --warmUp --duration --sleepTime --idleTime --infStreams --streams --batch --exposeDMA
    --noDataTransfers --useSpinWait --threads --useCudaGraph --noCudaGraph --timeDeserialize --timeRefit
    --separateProfileRun --persistentCacheRatio --useProfile --allocationStrategy --verbose --avgRuns --percentile
    --dumpRefit --dumpOutput --dumpRawBindingsToFile --dumpProfile --dumpLayerInfo --exportTimes --exportOutput
    --exportProfile --exportLayerInfo --device --staticPlugins --plugins --loadRefOutputs --refPair
    --accuracyAlgorithm --atol --rtol --accuracyThreshold --persistentCache
""".split()


def test_every_flag_of_trtexec_is_known() -> None:
    assert [name for name in SPELLED if name[2:] not in FLAGS] == []


def test_flags_that_are_not_real_here_change_nothing_and_say_so(
    engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them in one command."""
    unreal = {name: flag for name, flag in FLAGS.items() if flag.here}
    words = [f"--{name}" + ("=" if flag.value not in ("", "optional") else "") + _value(flag.value)
             for name, flag in unreal.items()]  # fmt: skip
    assert main(["trtexec", f"--loadEngine={engine}", *QUICK, *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [name for name, flag in unreal.items() if f"[I] --{name}: {flag.here}" not in lines] == []
    assert lines[-1].startswith("&&&& PASSED")


def _value(kind: str) -> str:
    return kind.removeprefix("choice:").split(",")[0] if kind.startswith("choice:") else VALUES[kind]


@pytest.mark.parametrize(
    ("given", "meant"), [("--saveengine=x", "--saveEngine"), ("--iteration=3", "--iterations"), ("onnx=m", "--onnx")]
)
def test_an_unknown_flag_names_the_nearest(given: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trtexec", given]) == 1
    told = capsys.readouterr()
    assert f"did you mean {meant}?" in told.err and told.out.startswith("&&&& FAILED Ingot.trtexec [v")


@pytest.mark.parametrize("algorithm", ["l0", "l1", "l2", "lInf", "cos"])
@pytest.mark.parametrize("right", [True, False])
def test_the_accuracy_gate(
    algorithm: str, right: bool, engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """References that are right pass; others end in FAILED and exit code 1."""
    image = np.random.default_rng(0).uniform(0, 16, (2, 1, 8, 8)).astype(np.float32)
    with ingot.Session(ingot.Engine.load(engine)) as session:
        scores = session.run({"image": image})["scores"]
    np.save(tmp_path / "image.npy", image)
    np.save(tmp_path / "scores.npy", scores if right else scores[:, ::-1])
    words = [f"--loadEngine={engine}", "--shapes=image:2x1x8x8", f"--loadInputs=image:{tmp_path / 'image.npy'}",
             f"--loadRefOutputs=scores:{tmp_path / 'scores.npy'}", f"--accuracyAlgorithm={algorithm}"]  # fmt: skip
    assert main(["trtexec", *words, *QUICK]) == (0 if right else 1)
    lines = capsys.readouterr().out.splitlines()
    verdict = "PASSED" if right else "FAILED"
    assert lines[-1].startswith(f"&&&& {verdict} Ingot.trtexec")
    assert any(re.fullmatch(rf"Accuracy {algorithm} of scores: .* {verdict}", line) for line in lines)


def test_streams_run_side_by_side(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = tmp_path / "times.json"
    assert main(["trtexec", f"--loadEngine={engine}", "--streams=3", f"--exportTimes={times}", *QUICK]) == 0
    rows = json.loads(times.read_text())
    assert len(rows) == 3 * 20 and "3 stream(s)" in capsys.readouterr().out
    assert rows == sorted(rows, key=lambda row: row["startComputeMs"])


def test_dumps(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--dumpOutput", "--dumpRawBindingsToFile", "--percentile=50,99.9", "--json"]
    assert main(["trtexec", f"--loadEngine={engine}", *words, *QUICK]) == 0
    shown = capsys.readouterr().out
    assert "Output Tensor scores: " in shown and "percentile(50%) = " in shown and "percentile(99.9%) = " in shown
    assert np.fromfile(tmp_path / "scores.float32.raw", np.float32).shape == (10,)
    data = json.loads(shown.splitlines()[-2])
    assert data["runs"] == 20 and {"min", "median", "p50", "p99.9"} <= data["latency_ms"].keys()


@pytest.mark.parametrize(
    ("flag", "said"), [("--getPlanVersionOnly", "Plan format: 1"), ("--timeDeserialize", "Engine loaded in "),
                       ("--skipInference", "Skipped inference phase")]
)  # fmt: skip
def test_what_ends_before_inference(flag: str, said: str, engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trtexec", f"--loadEngine={engine}", flag]) == 0
    shown = capsys.readouterr().out
    assert said in shown and "&&&& PASSED" in shown and "Performance summary" not in shown


def test_the_process_exits_as_the_last_line_says(engine: Path, tmp_path: Path) -> None:
    for path, code, verdict in ((engine, 0, "PASSED"), (tmp_path / "gone.engine", 1, "FAILED")):
        command = [sys.executable, "-m", "ingot", "trtexec", f"--loadEngine={path}", *QUICK]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == code and done.stdout.splitlines()[-1].startswith(f"&&&& {verdict} Ingot.trtexec")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--iteratons=5"], "iteratons"),
        (["--iterations=many"], "iterations"),
        (["--shapes=image:1x2x8x8"], "image"),
        (["--shapes=images:1x1x8x8"], "images"),
        (["--percentile=150"], "percentages such as 90,99"),
        (["--sparsity=perhaps"], "choose from disable, enable, force"),
        (["--useCudaGraph=1"], "is a switch"),
        (["--plugins=gone.py"], "gone.py"),
        (["--memPoolSize=workspace:much"], "not a memory size"),
        (["--errorOnTimingCacheMiss"], "needs --timingCacheFile"),
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
