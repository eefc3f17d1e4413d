"""Metrics from elsewhere: Prometheus, Python, and sources that are down."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from ingot.release import events, sources
from ingot.release.rollout import phase
from ingot.release.slots import weights
from ingot.release.sources import SourceDown, Tally, counted, verdict
from ingot.release.spec import Prometheus, parse
from tests.release.bench import Bench, Server

# -- sources ----------------------------------------------------------------------------------------------------------
FOREIGN = """
metrics:
  load: {{kind: prometheus, address: '{0}', query: 'load{{{{version="{{version}}"}}}}', successCondition: result < 1,
         consecutiveErrorLimit: 2, interval: 1s, count: 3, failureLimit: 1}}
steps: [{{setWeight: 10}}, {{analysis: {{metrics: [load], duration: 10s}}}}]
"""


def prometheus(value: str) -> tuple[int, bytes]:
    return 200, json.dumps({"data": {"resultType": "vector", "result": [{"value": [0, value]}]}}).encode()


def test_a_prometheus_metric_decides(bench: Callable[..., Bench], server: Server) -> None:
    server.answers["/api/v1/query"] = prometheus("0.5")
    one = bench(FOREIGN.format(server.url))
    one.rounds(lambda state: state.stable == "v2")
    queries = [path for _, path, _ in server.asked if path.startswith("/api/v1/query")]
    assert len(queries) == 3 and "version%3D%22v2%22" in queries[0]


def test_a_prometheus_metric_that_fails_rolls_back(bench: Callable[..., Bench], server: Server) -> None:
    server.answers["/api/v1/query"] = prometheus("2")
    state = bench(FOREIGN.format(server.url)).rounds(lambda state: state.stage == "aborted")
    assert "2 of 2 failed" in state.message


def test_a_source_that_is_down_is_an_error_and_pauses(bench: Callable[..., Bench], server: Server) -> None:
    server.answers["/api/v1/query"] = (503, b"starting")
    one = bench(FOREIGN.format(server.url))
    state = one.rounds(lambda state: phase(state) == "Paused")
    assert state.hold.kind == "error" and "the source is down" in state.hold.reason
    assert weights(state.assignment)["v2"] == 1000
    server.answers["/api/v1/query"] = prometheus("0.5")
    one.store.submit("digits", events.Resume(), "ann", one.time.wall)
    one.rounds(lambda state: state.stable == "v2")


def of_python(context: sources.Context) -> float:
    return 0.5 if context.version == "v2" else 5.0


def broken(context: sources.Context) -> float:
    raise RuntimeError("no figures today")


def test_a_python_function_is_a_metric(bench: Callable[..., Bench]) -> None:
    text = (
        "metrics: {own: {kind: python, function: 'tests.release.test_sources:of_python', "
        "successCondition: result < 1}}\nsteps: [{setWeight: 10}, {analysis: {metrics: [own], duration: 3s}}]"
    )
    bench(text).rounds(lambda state: state.stable == "v2")


def test_arguments_of_a_measurement_that_cannot_be_had() -> None:
    context = sources.Context("m", "v2", "v1", 0.0, 1.0)
    for place, message in (("tests.release.test_sources:broken", "no figures today"), ("no.module:f", "no")):
        metric = parse(
            "model: m\nstable: v1\ncandidates: [v2]\nversions: {v1: {endpoints: [{url: 'http://h'}]}, "
            "v2: {endpoints: [{url: 'http://h'}]}}\n"
            f"metrics: {{own: {{kind: python, function: '{place}', successCondition: result < 1}}}}"
        ).metrics["own"]
        with pytest.raises(SourceDown, match=message):
            sources.measure(metric, context)


def metric(**settings: Any) -> Prometheus:
    return Prometheus(address="http://p", query="q", **settings)


@pytest.mark.parametrize(
    ("values", "settings", "outcome"),
    [
        ([1, 1], {"success_condition": "result < 2", "count": 2}, "Successful"),
        ([1, 3], {"success_condition": "result < 2", "count": 2}, "Failed"),
        ([3, 1, 1], {"success_condition": "result < 2", "count": 3, "failure_limit": 1}, "Successful"),
        ([2], {"success_condition": "result < 2", "failure_condition": "result > 2", "count": 1}, "Inconclusive"),
        ([None] * 5, {"success_condition": "result < 2"}, "Error"),
        ([None] * 4, {"success_condition": "result < 2"}, None),
        ([None, None, 1, None, None, None, None], {"success_condition": "result < 2"}, None),
    ],
)
def test_argos_counting(values: list[float | None], settings: dict[str, Any], outcome: str | None) -> None:
    tally, config = Tally(), metric(**settings)
    for value in values:
        tally = counted(tally, config, SourceDown("down") if value is None else value)
    assert verdict(tally, config, ended=False).outcome == outcome
