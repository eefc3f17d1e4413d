"""Every query of the dashboard against the metrics that a gateway really exports."""

import http.client
import json
import re
from pathlib import Path
from typing import Any

import pytest

from ingot.release.servers import Samples, samples_of
from tests.release.fakes import HALF, world

DASHBOARD = json.loads(
    (Path(__file__).parent.parent.parent / "deploy" / "grafana" / "dashboards" / "release.json").read_text()
)
SELECTOR = re.compile(r"\b(ingot_\w+)(?:\{([^}]*)\})?")
GROUPED = re.compile(r"by \(([^)]*)\)")


def queries() -> list[tuple[str, str]]:
    return [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """What a gateway says after requests, mirrored ones too, and feedback."""
    with world(tmp_path_factory.mktemp("grafana")) as made:
        made.apply(HALF.replace("[", "[{setMirrorRoute: {percentage: 100}}, ", 1))
        for n in range(20):
            made.ask(f"user{n}")
        made.ask(path="/feedback", body=b'{"model": "digits", "event": "click", "good": true, "version": "v2"}')
        made.told()
        made.until(lambda: made.observation().counters["v2"].mirrored > 0)
        connection = http.client.HTTPConnection("127.0.0.1", made.gateway.metrics_port, timeout=60)
        connection.request("GET", "/metrics")
        page = connection.getresponse().read().decode()
        connection.close()
    return samples_of(page)


def selected(expression: str, exported: Samples) -> list[tuple[str, dict[str, str]]]:
    """(what is missing, its labels) of every selector: a name with these labels must have been exported."""
    missing = []
    for name, labels in SELECTOR.findall(expression):
        wanted = dict(re.findall(r'(\w+)="([^"]*)"', labels.replace("$model", "digits")))
        if not any(found == name and wanted.items() <= has.items() for found, has, _ in exported):
            missing.append((name, wanted))
    return missing


@pytest.mark.parametrize(("title", "expression"), queries(), ids=lambda text: text[:40])
def test_every_query_finds_something(title: str, expression: str, exported: Samples) -> None:
    assert selected(expression, exported) == []
    names = {name for name, _ in SELECTOR.findall(expression)}
    for group in GROUPED.findall(expression):
        labels = {label.strip() for label in group.split(",")}
        assert any(found in names and labels <= set(has) for found, has, _ in exported), (title, labels)


def test_a_wrong_query_is_found(exported: Samples) -> None:
    assert selected('rate(ingot_release_request_total{model="$model"}[1m])', exported)
    assert selected('ingot_release_requests_total{modell="$model"}', exported)


def test_every_version_has_its_panels() -> None:
    titles = {panel["title"] for panel in DASHBOARD["panels"]}
    assert {"Weights", "Requests a second", "Errors", "P50", "P99", "Agreement of mirrored answers"} <= titles
    legends: list[Any] = [target["legendFormat"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    assert sum("{{version}}" in legend for legend in legends) >= 10
