"""What the doctor finds, and what the adviser advises."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

import ingot
from ingot.cli import main
from ingot.errors import ConfigError, DeviceError
from ingot.server import advise
from ingot.server.config import read_config
from tests.server.models import CHAIN_CONFIG, SUM_CONFIG, add_sub, add_version, identity, scale


@pytest.fixture
def root(tmp_path: Path) -> Path:
    add_version(tmp_path, "simple", 1, add_sub(), SUM_CONFIG)
    (tmp_path / "simple" / "labels.txt").write_text("")
    return tmp_path


def examined(
    capsys: pytest.CaptureFixture[str], root: Path, *flags: str, cache: Path | None = None
) -> tuple[int, dict[str, dict[str, str]]]:
    ports = ["--http-port=0", "--grpc-port=0", "--metrics-port=0"]
    code = main(["doctor", str(root), "--json", f"--engine-cache={cache or root.parent}", *ports, *flags])
    content = json.loads(capsys.readouterr().out)
    assert content["ok"] == (code == 0) == all(item["verdict"] != "fail" for item in content["findings"])
    assert all(item["remedy"] for item in content["findings"] if item["verdict"] == "warn")
    return code, {item["what"]: item for item in content["findings"]}


def test_nothing_stops_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = examined(capsys, root)
    assert code == 0 and found["model simple"]["verdict"] == found["packages"]["verdict"] == "ok"
    assert {"file limit", "shared memory", "processor", "user", "engine cache", "memory"} <= found.keys()
    assert (
        main(["doctor", str(root), f"--engine-cache={root}", "--http-port=0", "--grpc-port=0", "--metrics-port=0"]) == 0
    )
    assert "ok    model simple: version 1: model.onnx" in capsys.readouterr().out


def test_a_port_that_is_taken(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, found = examined(capsys, root, f"--http-port={port}")
        assert code == 1 and found[f"port {port} (http)"]["verdict"] == "fail"
        code, found = examined(capsys, root, f"--http-port={port}", "--allow-http=false")
        assert code == 0
    code, found = examined(capsys, root, "--http-port=45455", "--grpc-port=45455")
    assert code == 1 and "same port" in found["port 45455 (http)"]["detail"]


BROKEN = {
    "garbage": ({"1/model.onnx": "junk"}, "not an ONNX model"),
    "damaged": ({"1/model.engine": "junk"}, "engine"),
    "empty": ({"1/readme": ""}, "holds none of model.engine"),
    "versionless": ({"readme": ""}, "needs a folder 1/"),
    "malformed": ({"config.pbtxt": "max_batch_size: many", "1/model.onnx": ""}, "config.pbtxt"),
    "unsupported": ({"config.pbtxt": "model_transaction_policy { decoupled: true }", "1/model.onnx": ""}, "decoupled"),
    "syntax": ({"config.pbtxt": 'backend: "python"', "1/model.py": "def f(:"}, "invalid syntax"),
    "alone": ({"config.pbtxt": CHAIN_CONFIG}, "uses scale, scale, which the repository does not hold"),
    "foreign": ({"config.pbtxt": 'backend: "pytorch"', "1/model.pt": ""}, "no backend 'pytorch'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_models_that_would_not_load(root: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    files, reason = BROKEN[name]
    for path, content in files.items():
        (root / name / path).parent.mkdir(parents=True, exist_ok=True)
        (root / name / path).write_text(content)
    code, found = examined(capsys, root)
    assert code == 1 and reason in found[f"model {name}"]["detail"], found[f"model {name}"]
    assert found["model simple"]["verdict"] == "ok"


def test_engines_and_their_machine(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "built" / "1").mkdir(parents=True)
    ingot.build(scale(2.0), ingot.BuildConfig(target="cpu", level=0)).save(root / "built" / "1" / "model.engine")
    assert "model.engine for cpu" in examined(capsys, root)[1]["model built"]["detail"]
    monkeypatch.setattr("ingot.runtime.session.cpu_features", frozenset)
    code, found = examined(capsys, root)
    assert code == 1 and "holds no variant for this machine" in found["model built"]["detail"]


def test_a_gpu_that_is_not_there(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(wanted: str) -> None:
        raise DeviceError(f"no {wanted} here")

    monkeypatch.setattr("ingot.server.doctor.select", absent)
    (root / "simple" / "config.pbtxt").write_text("instance_group { kind: KIND_GPU }")
    code, found = examined(capsys, root)
    assert code == 1 and "no cuda here" in found["model simple"]["detail"]
    (root / "built" / "1").mkdir(parents=True)
    ingot.build(scale(2.0), ingot.BuildConfig(target="cpu", level=0)).save(root / "built" / "1" / "model.engine")
    (root / "built" / "config.pbtxt").write_text("instance_group { kind: KIND_GPU }")
    assert "its engine runs on the CPU" in examined(capsys, root)[1]["model built"]["detail"]


def test_limits_of_the_machine(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (256, 256))
    monkeypatch.setattr("ingot.server.doctor.memory_bytes", lambda: 100)
    monkeypatch.setattr("ingot.server.doctor._quota", lambda: 0.5)
    code, found = examined(capsys, root, cache=root / "simple" / "labels.txt")
    verdicts = {what: item["verdict"] for what, item in found.items()}
    assert code == 1 and verdicts["file limit"] == verdicts["memory"] == verdicts["engine cache"] == "fail"
    assert verdicts["processor"] == "warn" and "--threads=1" in found["processor"]["remedy"]
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 1024))
    assert examined(capsys, root)[1]["file limit"]["verdict"] == "warn"
    assert examined(capsys, root, "--max-connections=100")[1]["file limit"]["verdict"] == "ok"


def test_access(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "use inference and management" in examined(capsys, root)[1]["access"]["detail"]
    assert "access" not in examined(capsys, root, "--http-address=127.0.0.1")[1]
    (tmp_path.parent / "key.pem").write_text("junk")
    code, found = examined(
        capsys, root, f"--tls-cert={tmp_path.parent}/key.pem", f"--tls-key={tmp_path.parent}/key.pem"
    )
    assert code == 1 and found["TLS"]["verdict"] == "fail"


def test_missing_packages(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingot.server.doctor._MODULES", ("numpy", "no_such_module"))
    code, found = examined(capsys, root)
    assert code == 1 and "no_such_module" in found["packages"]["detail"]


# -- advice -----------------------------------------------------------------------------------------------------------
def point(instances: int, threads: int, rows: int, rate: float, median: float, late: float) -> advise.Point:
    return advise.Point(instances, threads, rows, rate, median, late)


POINTS = [
    point(1, 1, 1, 100, 10, 12), point(1, 1, 8, 390, 20, 30), point(1, 1, 16, 400, 40, 60), point(2, 1, 8, 200, 80, 90)
]  # fmt: skip


@pytest.mark.parametrize(("latency", "rows"), [(None, 8), (100, 8), (29, 1), (30, 8)])
def test_the_choice(latency: float | None, rows: int) -> None:
    """Nearly the best rate at the lower latency, within the latency asked for."""
    assert advise.chosen(POINTS, latency).rows == rows


def test_nothing_is_fast_enough() -> None:
    with pytest.raises(ConfigError, match=r"takes 12\.00 ms"):
        advise.chosen(POINTS, 5)


@pytest.mark.parametrize("best", POINTS)
def test_the_snippet_is_a_configuration(best: advise.Point) -> None:
    config = read_config(advise.snippet(best, POINTS), "advice")
    assert config.max_batch_size == best.rows and config.instance_group[0].count == best.instances
    assert config.HasField("dynamic_batching") == (best.rows > 1)


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 8])
def test_divisions_fill_the_cores_and_no_more(cores: int) -> None:
    found = list(advise.divisions(cores))
    assert (1, cores) in found and (cores, 1) in found and len(set(found)) == len(found)
    assert all(1 <= instances * threads <= cores for instances, threads in found)


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ((1, 4), (2, 4), (6, 4))
    config = ingot.BuildConfig(target="cpu", level=0, profiles=[ingot.Profile(x=shapes)])
    ingot.build(scale(2.0), config).save(tmp_path / "m.engine")
    assert main(["advise", str(tmp_path / "m.engine"), "--seconds=0.02", "--cores=2", "--json"]) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    measured = {(p["instances"], p["threads"], p["rows"]) for p in content["points"]}
    assert measured == {(i, t, r) for i, t in ((1, 1), (1, 2), (2, 1)) for r in (1, 2, 4, 6)}
    assert content["best"] in content["points"] and f"--threads={content['best']['threads']}" == content["flags"]
    assert main(["advise", str(tmp_path / "m.engine"), "--seconds=0.02", "--cores=1"]) == 0
    assert "max_batch_size:" in capsys.readouterr().out
    assert main(["advise", str(tmp_path / "m.engine"), "--shapes", "q:1"]) == 1


def test_a_model_that_does_not_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:

    ingot.build(identity(1, [2, 3]), ingot.BuildConfig(target="cpu", level=0)).save(tmp_path / "m.engine")
    assert main(["advise", str(tmp_path / "m.engine"), "--seconds=0.02", "--cores=1"]) == 0
    assert "max_batch_size: 0" in capsys.readouterr().out
