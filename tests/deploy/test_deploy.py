"""The image's file system, built into a folder and run; compose, Prometheus, alerts and the dashboard against what the
server really exports."""

import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ingot
from ingot.server.app import Server
from tests.server.conftest import engine_cache, server  # noqa: F401 - fixtures
from tests.server.models import scale
from tests.server.test_metrics import page, parsed

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
USER = 10001
FUNCTIONS = {
    "sum", "min", "max", "avg", "count", "by", "rate", "increase", "histogram_quantile", "clamp_min", "label_values"
}  # fmt: skip


# -- the image --------------------------------------------------------------------------------------------------------
def interpreter() -> str:
    """One that every user may run, if the system has it: root's own home is closed to the image's user."""
    script = "import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))"
    common = Path("/usr/bin/python3")
    if common.exists() and subprocess.run([common, "-c", script], capture_output=True).returncode == 0:
        return str(common)
    return sys.executable


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ingot-image-") as folder:
        root = Path(folder)
        root.chmod(0o755)
        command = [DEPLOY / "build-image", "--root", root, "--variant", "serve", "--python", interpreter()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("image: serve in ")
        yield root


@pytest.fixture(scope="module")
def models(image: Path) -> Path:
    folder = image / "models"
    (folder / "scale" / "1").mkdir(parents=True)
    engine = ingot.build(scale(2.0), ingot.BuildConfig(target="cpu", level=0))
    engine.save(folder / "scale" / "1" / "model.engine")
    for path in (folder / "scale" / "1" / "model.engine", folder / "scale" / "1", folder / "scale", folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


def may_be_another(image: Path) -> bool:
    """Whether a process of the image's user can be started, and can run the image's interpreter."""
    if os.geteuid() != 0:
        return False
    try:
        return (
            subprocess.run([image / "opt/ingot/bin/python", "-c", ""], user=USER, group=USER, cwd="/").returncode == 0
        )
    except PermissionError:
        return False


@pytest.fixture(scope="module")
def running(image: Path, models: Path) -> Iterator[dict[str, int]]:
    """Ports of the image's server, run by its user where this machine can."""
    who: dict[str, Any] = {"user": USER, "group": USER} if may_be_another(image) else {}
    flags = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    command = [image / "usr/local/bin/ingot", "serve", models, f"--engine-cache={image}/var/cache/ingot", *flags]
    command += ["--http-address=127.0.0.1", "--log-format=json"]
    variables = {"PATH": "/usr/bin:/bin", "HOME": f"{image}/var/cache/ingot", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables, cwd="/", **who)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "listening" in line:
            break
    assert "listening" in lines[-1], "".join(lines)
    assert all(json.loads(line)["level"] in ("INFO", "WARNING") for line in lines)
    assert any("running as root" in line for line in lines) == (os.geteuid() == 0 and not who)
    yield {name: int(number) for name, number in re.findall(r"(http|grpc|metrics) (\d+)", lines[-1])}
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_the_image_serves(running: dict[str, int]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", running["http"], timeout=20)
    connection.request("POST", "/v2/models/scale/generate", '{"x": [1, 2, 3, 4]}')
    assert json.loads(connection.getresponse().read())["y"] == [2, 4, 6, 8]
    connection.close()


def test_its_health_check(image: Path, running: dict[str, int]) -> None:
    def healthy(port: int) -> int:
        url = f"http://127.0.0.1:{port}/v2/health/ready"
        return subprocess.run(
            [image / "usr/local/bin/ingot-healthy"], env={"PATH": "/usr/bin:/bin", "INGOT_HEALTH_URL": url}, timeout=20
        ).returncode

    assert healthy(running["http"]) == 0
    assert healthy(1) == 1


def test_nothing_is_written_beside_the_models(models: Path, running: dict[str, int]) -> None:
    time.sleep(0.1)
    assert sorted(path.name for path in models.rglob("*")) == ["1", "model.engine", "scale"]


def test_the_serving_image_holds_no_compiler(image: Path) -> None:
    script = (
        "import importlib.util as u; print([n for n in ('onnx', 'llvmlite', 'onnx_ir', 'torch') if u.find_spec(n)])"
    )
    done = subprocess.run([image / "opt/ingot/bin/python", "-I", "-c", script], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "[]", done.stderr
    lines = (image / "etc" / "passwd").read_text()
    assert f"ingot:x:{USER}:{USER}:" in lines and "nologin" in lines


@pytest.mark.parametrize("words", [["--variant", "huge"], ["--colour", "blue"]])
def test_wrong_usage(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run([DEPLOY / "build-image", "--root", tmp_path, *words], capture_output=True, text=True)
    assert done.returncode == 2 and "build-image:" in done.stderr and not list(tmp_path.iterdir())


def test_the_dockerfile_only_calls_the_script() -> None:
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    steps = [line for line in text.splitlines() if line and not line.startswith("#")]
    runs = [line for line in steps if line.startswith("RUN")]
    assert len(runs) == 1 and runs[0].startswith("RUN /src/deploy/build-image --root / --variant")
    assert f"USER {USER}:{USER}" in steps and steps.index(runs[0]) < steps.index(f"USER {USER}:{USER}")
    entry = json.loads(next(line for line in steps if line.startswith("ENTRYPOINT")).partition(" ")[2])
    assert entry == ["/usr/local/bin/ingot"]


def test_flags_of_the_image_are_flags_of_the_server(models: Path) -> None:
    import argparse

    from ingot.server.options import add_arguments

    command = next(line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line.startswith("CMD"))
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for words in (json.loads(command.partition(" ")[2]), services["ingot"]["command"]):
        assert words[0] == "serve" and parser.parse_args(words[1:]).repository == [Path("/models")]


# -- compose ----------------------------------------------------------------------------------------------------------
def test_compose() -> None:
    content = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    served = content["services"]["ingot"]
    assert served["read_only"] and served["cap_drop"] == ["ALL"] and served["volumes"][0].endswith(":/models:ro")
    assert (DEPLOY / served["build"]["context"] / served["build"]["dockerfile"]).is_file()
    grace = int(served["stop_grace_period"].removesuffix("s"))
    lame = next(int(word.partition("=")[2]) for word in served["command"] if word.startswith("--lame-duck-secs"))
    assert grace > lame + 30, "the drain needs its time"
    for service in content["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith("./") or (DEPLOY / source).exists(), source
            assert source.startswith((".", "$")) or source in content["volumes"], source
        assert set(service.get("depends_on", [])) <= content["services"].keys()


def test_prometheus_scrapes_every_service_with_metrics() -> None:
    """Names and ports as compose and the programs' own defaults have them."""
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    ours, gateway = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert ours["static_configs"] == [{"targets": ["ingot:8002"]}]
    (lookup,) = gateway["dns_sd_configs"]
    started = flags_of_release(services["gateway"]["command"])
    assert lookup == {"names": ["gateway"], "type": "A", "port": started.metrics_port}
    assert f":{started.metrics_port}/" in services["gateway"]["environment"]["INGOT_HEALTH_URL"]
    console = flags_of_release(services["release"]["command"])
    assert console.store == started.store and console.address == started.address == "0.0.0.0"
    assert services["release"]["ports"] == [f"127.0.0.1:{console.port}:{console.port}"]
    assert services["gateway"]["ports"] == [f"{started.port}:{started.port}"]


def flags_of_release(words: list[str]) -> Any:
    import argparse

    from ingot.release.commands import VERBS

    assert words[0] == "release"
    parser = argparse.ArgumentParser(allow_abbrev=False)
    VERBS[words[1]].arguments(parser)
    return parser.parse_args(words[2:])


# -- queries ----------------------------------------------------------------------------------------------------------
def dashboard() -> Any:
    return json.loads((DEPLOY / "grafana" / "dashboards" / "ingot.json").read_text())


def queries() -> list[tuple[str, str]]:
    """(panel or alert, PromQL) of everything in deploy/."""
    found = [(panel["title"], target["expr"]) for panel in dashboard()["panels"] for target in panel["targets"]]
    found += [(item["name"], item["definition"]) for item in dashboard()["templating"]["list"]]
    groups = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    return found + [(rule["alert"], rule["expr"]) for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def exported(server: Server) -> dict[str, set[str]]:  # noqa: F811
    """Labels of every metric that a server exports which has answered something; a histogram's as its series."""
    connection = http.client.HTTPConnection("127.0.0.1", server.ports["http"], timeout=20)
    connection.request("POST", "/v2/models/scale/generate", '{"x": [1, 2, 3, 4]}')
    assert connection.getresponse().read()
    connection.close()
    kinds, values = parsed(page(server))
    scraped = {"instance", "job"}
    found = {name: set(re.findall(r'(\w+)="', " ".join(samples))) | scraped for name, samples in values.items()}
    return found | {name: {"gpu_uuid"} | scraped for name in kinds if name not in found and kinds[name] != "histogram"}


def test_a_query_for_every_panel() -> None:
    panels = dashboard()["panels"]
    assert len(panels) >= 15 and all(panel["targets"] for panel in panels)
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24


@pytest.mark.parametrize(("where", "query"), queries())
def test_queries_ask_for_what_is_exported(where: str, query: str, exported: dict[str, set[str]]) -> None:
    """Every name is a metric or a function, every label one that the metric carries."""
    assert query.count("(") == query.count(")") and query.count("{") == query.count("}")
    plain = re.sub(r'"[^"]*"|\[[^\]]*\]', "", query)
    names = set(re.findall(r"[a-zA-Z_]\w*", re.sub(r"\{[^}]*\}|\bby \([^)]*\)", "", plain)))
    if query.startswith("label_values("):
        names -= {query.rpartition(", ")[2].rstrip(")")}
    metrics = names - FUNCTIONS
    assert metrics and metrics <= exported.keys(), f"{where}: {metrics - exported.keys()} is not exported"
    common = set.intersection(*(exported[name] for name in metrics))
    selected = {label for part in re.findall(r"\{([^}]*)\}", plain) for label in re.findall(r"(\w+)\s*[=!]", part)}
    grouped = {label.strip() for part in re.findall(r"by \(([^)]*)\)", plain) for label in part.split(",")}
    assert selected <= set.union(*(exported[name] for name in metrics)), f"{where}: {selected}"
    assert grouped - {"reason", "rows", "le", "version"} <= common, f"{where}: {grouped - common}"
    assert grouped <= set.union(*(exported[name] for name in metrics))


def test_legends_name_labels_that_are_left() -> None:
    """A legend's label survives the aggregation of its query."""
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            groups = re.findall(r"by \(([^)]*)\)", target["expr"])
            if groups:
                kept = {label.strip() for label in groups[0].split(",")}
                assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, panel["title"]


def test_a_query_for_nothing_is_found(exported: dict[str, set[str]]) -> None:
    for wrong in ("sum(nv_inference_unheard_of)", 'sum by (colour) (nv_inference_count{model="x"})', "sum(ingot_ready"):
        with pytest.raises(AssertionError):
            test_queries_ask_for_what_is_exported("wrong", wrong, exported)
