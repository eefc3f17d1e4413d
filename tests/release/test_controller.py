"""The controller round by round, its clock passed; servers that are real or down, sources that are down."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ingot.release import events, notify, servers, view
from ingot.release.controller import Controller, capacity_lack
from ingot.release.rollout import State, phase
from ingot.release.slots import weights
from ingot.release.spec import Endpoint, WarmUp, parse
from ingot.release.windows import Observation
from tests.release.bench import Bench, Server

ANALYSED = """
metrics: {errors: {kind: errorRate}}
steps:
- {setWeight: 10}
- {analysis: {metrics: [errors], duration: 10s}}
"""


def test_a_good_version_is_promoted_by_itself(bench: Callable[..., Bench]) -> None:
    one = bench(ANALYSED)
    one.rounds(lambda state: state.step == 1)
    for _ in range(25):
        one.traffic("v1", 90, 1)
        one.traffic("v2", 10)
        one.round(0.5)
    assert one.state.stable == "v2" and phase(one.state) == "Healthy"
    judged = [e for e in one.store.history("digits") if isinstance(e.event, events.Judged)]
    assert judged[0].event.outcome == "Successful" and judged[0].event.evidence["canary_samples"] >= 50


def test_the_same_metric_is_judged_at_every_step(bench: Callable[..., Bench]) -> None:
    one = bench(ANALYSED + "- {setWeight: 50}\n- {analysis: {metrics: [errors], duration: 10s}}\n")
    one.rounds(lambda state: state.step == 1)
    for _ in range(50):
        one.traffic("v1", 90, 1)
        one.traffic("v2", 30)
        one.round(0.5)
    assert one.state.stable == "v2"
    judged = [e for e in one.store.history("digits") if isinstance(e.event, events.Judged)]
    assert [entry.event.run for entry in judged] == [0, 1]


def test_a_bad_version_is_rolled_back_by_itself(bench: Callable[..., Bench]) -> None:
    one = bench(ANALYSED)
    one.rounds(lambda state: state.step == 1)
    for _ in range(10):
        one.traffic("v1", 90, 1)
        one.traffic("v2", 10, 4)
        one.round(0.5)
    assert phase(one.state) == "Degraded" and weights(one.state.assignment) == {"v1": 10_000}
    assert "errors of v2" in one.state.message


def test_guards_hold_while_paused(bench: Callable[..., Bench]) -> None:
    """flagger #1801"""
    one = bench("guards: {p99: 100ms}\nsteps: [{setWeight: 10}, {pause: {}}]")
    one.rounds(lambda state: phase(state) == "Paused")
    one.traffic("v2", 1)
    one.round()
    one.traffic("v2", 80, latency=0.4)
    assert phase(one.rounds(lambda state: state.stage == "aborted")) == "Degraded"


def test_a_killed_controller_is_replaced_where_it_was(bench: Callable[..., Bench]) -> None:
    """Another one, with nothing but the store, finishes the analysis on the same samples."""
    one = bench(ANALYSED)
    one.rounds(lambda state: state.step == 1)
    for _ in range(8):
        one.traffic("v1", 90)
        one.traffic("v2", 10)
        one.round(0.5)
    one.controller.threads.shutdown()
    one.controller = Controller(one.store, one.time.clock(), "second")
    for _ in range(3):
        assert one.controller.step() is False, "the first may still be alive"
    one.time.monotonic += 3.1
    one.time.wall += 3.1
    one.traffic("v1", 90)
    one.traffic("v2", 10)
    one.rounds(lambda state: state.stage == "idle", most=30)
    judged = [e for e in one.store.history("digits") if isinstance(e.event, events.Judged)]
    assert judged[-1].actor == "second" and judged[-1].event.evidence["canary_samples"] >= 80


class Killed(BaseException):
    """kill -9, right after a write."""


@pytest.mark.parametrize("versions", ["", ", managed: true"])
def test_a_controller_killed_between_event_and_action(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, versions: str
) -> None:
    """Every write of every controller is its last; the next one does what the state owes, and nothing twice."""
    one = bench(ANALYSED, versions)
    submit, kills = one.store.submit, 0

    def dying(*arguments: Any, **named: Any) -> State:
        submit(*arguments, **named)
        raise Killed

    monkeypatch.setattr(one.store, "submit", dying)
    for _ in range(60):
        one.traffic("v1", 90)
        one.traffic("v2", 10)
        try:
            one.round(0.5)
        except Killed:
            kills += 1
            one.controller.threads.shutdown()
            one.controller = Controller(one.store, one.time.clock(), "first")
    assert one.state.stable == "v2" and phase(one.state) == "Healthy" and kills >= 2
    kinds = [type(entry.event).__name__ for entry in one.store.history("digits")]
    assert kinds[:3] == ["Applied", "Ready", "Judged"] and len(kinds) == kills + 1
    assert one.store.verify("digits") is None


def test_a_clock_that_jumps_ends_no_pause(bench: Callable[..., Bench]) -> None:
    one = bench("steps: [{pause: {duration: 60s}}]")
    one.rounds(lambda state: phase(state) == "Paused")
    one.time.wall += 86_400
    assert phase(one.round(1.0)) == "Paused"
    one.time.wall -= 2 * 86_400
    assert phase(one.round(1.0)) == "Paused"
    assert phase(one.rounds(lambda state: state.stage == "idle", seconds=10.0)) == "Healthy"


def test_a_restart_with_the_clock_set_back_keeps_no_pause_for_ever(bench: Callable[..., Bench]) -> None:
    one = bench("steps: [{pause: {duration: 60s}}]")
    one.rounds(lambda state: phase(state) == "Paused")
    one.time.wall -= 86_400
    one.controller = Controller(one.store, one.time.clock(), "first")
    one.rounds(lambda state: state.stage == "idle", most=10, seconds=10.0)


def test_low_traffic_waits(bench: Callable[..., Bench]) -> None:
    """argo #1905, flagger #1501"""
    one = bench(ANALYSED.replace("duration: 10s", "duration: 10s, giveUp: 20s"))
    one.rounds(lambda state: state.step == 1)
    one.traffic("v2", 3, 3)
    for _ in range(30):
        one.round(0.5)
    assert one.state.step == 1 and phase(one.state) == "Progressing"
    state = one.rounds(lambda state: phase(state) == "Paused", seconds=2.0)
    assert state.hold is not None and "too little traffic" in state.hold.reason
    count = one.store.models()["digits"]
    for _ in range(10):
        one.round(2.0)
    assert one.store.models()["digits"] == count, "said once"


# -- servers ----------------------------------------------------------------------------------------------------------
METADATA = {"inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 2, 2]}]}


def test_versions_are_loaded_and_warmed_before_traffic(bench: Callable[..., Bench], server: Server) -> None:
    server.answers["/v2/models/digits_b"] = (200, json.dumps(METADATA).encode())
    one = bench("steps: [{pause: {}}]", ", managed: true, model: digits_b, warmUp: {minimum: 20, tolerance: 1}")
    state = one.rounds(lambda state: state.stage == "steps")
    paths = [path for _, path, _ in server.asked]
    assert paths[0] == "/v2/repository/models/digits_b/load"
    assert paths.count("/v2/models/digits_b/infer") >= 20
    body = json.loads(next(body for _, path, body in server.asked if path.endswith("/infer")))
    assert body["inputs"][0]["shape"] == [1, 1, 2, 2] and len(body["inputs"][0]["data"]) == 4
    ready = [e.event for e in one.store.history("digits") if isinstance(e.event, events.Ready)]
    assert ready[0].evidence[server.url]["requests"] >= 20
    assert state.ready == ("v1", "v2")
    one.store.submit("digits", events.Abort(), "test", one.time.wall)
    one.rounds(lambda state: "v2" not in state.ready)
    assert server.asked[-1][1] == "/v2/repository/models/digits_b/unload"


def test_a_version_that_cannot_be_loaded_gets_no_traffic(bench: Callable[..., Bench], server: Server) -> None:
    server.answers["/v2/repository/models/digits/load"] = (400, b'{"error": "damaged"}')
    state = bench(ANALYSED, ", managed: true").rounds(lambda state: phase(state) == "Paused")
    assert "damaged" in state.hold.reason and weights(state.assignment) == {"v1": 10_000}


def test_a_device_has_its_own_engine() -> None:
    spec = parse(
        "model: m\nstable: a\ncandidates: [b]\nversions:\n  a: {endpoints: [{url: 'http://h'}]}\n"
        "  b: {endpoints: [{url: 'http://h'}, {url: 'http://g', device: h200}], engines: {h200: m_h200}}"
    )
    version = spec.versions["b"]
    assert [servers.name_of("m", version, endpoint) for endpoint in version.endpoints] == ["m", "m_h200"]


@pytest.mark.parametrize(
    ("latencies", "settled"),
    [([1.0] * 20, True), ([9.0] * 10 + [1.0] * 10, False), ([1.0] * 19, False), ([9.0] * 10 + [1.0] * 20, True)],
)
def test_warm_up_lasts_until_latency_settles(latencies: list[float], settled: bool) -> None:
    assert servers.settled(latencies, 0.25) is settled


def test_a_warm_up_that_fails_or_never_settles_is_no_readiness(server: Server) -> None:
    server.answers["/bad"] = (500, b"boom")
    with pytest.raises(servers.NotServing, match="500: boom"):
        servers.warm(Endpoint(url=server.url), "m", None, WarmUp(path="/bad", body="{}"))
    with pytest.raises(servers.NotServing, match=r"cannot|refused"):
        servers.warm(Endpoint(url="http://127.0.0.1:9"), "m", None, WarmUp(path="/", body="{}"))


CAPACITY = "capacity: {headroom: 0.8}\nsteps: [{setWeight: 10}, {setWeight: 100}]"


def test_capacity_is_asked_before_more_traffic(bench: Callable[..., Bench]) -> None:
    """flagger #381, #1600"""
    one = bench(CAPACITY, ", requestsPerSecond: 50")
    one.traffic("v1", 0)
    for _ in range(8):
        one.traffic("v1", 100)
        one.time.monotonic += 1.0
        one.time.wall += 1.0
    one.store.submit("digits", events.Ready("v2"), "test", one.time.wall)
    state = one.rounds(lambda state: phase(state) == "Paused", seconds=0.1)
    assert state.hold.kind == "capacity" and "over 80% of the 50" in state.hold.reason
    assert weights(state.assignment)["v1"] >= 9000


def test_capacity_says_what_lacks() -> None:
    spec = parse(
        "model: m\nstable: a\ncandidates: [b]\ncapacity: {}\nversions:\n  a: {endpoints: [{url: 'http://h'}]}\n"
        "  b: {endpoints: [{url: 'http://h'}], requestsPerSecond: 100}"
    )
    state = State(spec, "steps", "a", (), 0.0)
    assert capacity_lack(state, {"b": 10_000, "a": 0}, 70) is None
    assert "b would get 90 requests/s" in (capacity_lack(state, {"b": 10_000, "a": 0}, 90) or "")


def test_memory_and_queue_time_come_from_the_servers(server: Server) -> None:
    page = 'nv_inference_queue_duration_us{{model="m"}} {0}\nnv_inference_request_success{{model="m"}} {1}\n'
    endpoint, found = Endpoint(url=server.url, metrics=f"{server.url}/metrics"), []
    for queue, requests in ((1000, 10), (5000, 30)):
        text = page.format(queue, requests) + 'nv_gpu_memory_used_bytes{gpu="0"} 7e9\nnv_cpu_memory_used_bytes 5\n'
        server.answers["/metrics"] = (200, text.encode())
        found.append(servers.scrape(endpoint, "m"))
    gauges = servers.gauges_between(found[0], found[1])
    assert gauges == {"gpuMemory": 7e9, "cpuMemory": 5.0, "queueTime": pytest.approx(200e-6)}


# -- what is told -----------------------------------------------------------------------------------------------------
def test_webhooks_are_told_in_order_at_least_once(bench: Callable[..., Bench], tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("shared\n")
    hook = f"notifications: [{{url: 'http://hook/', 'on': [Applied, Abort], secretFile: '{secret}'}}]"
    hook += "\nsteps: [{pause: {}}]"
    one = bench(hook)
    told: list[tuple[str, dict[str, str]]] = []
    up = [False]

    def send(url: str, body: bytes, headers: dict[str, str]) -> int:
        if up[0]:
            told.append((json.loads(body)["event"]["kind"], headers))
        return 200 if up[0] else 500

    notify.deliver(one.store, "digits", one.state, send)
    assert told == []
    one.store.submit("digits", events.Ready("v2"), "test", one.time.wall)
    one.store.submit("digits", events.Abort(), "ann", one.time.wall)
    up[0] = True
    for _ in range(2):
        notify.deliver(one.store, "digits", one.state, send)
    assert [kind for kind, _ in told] == ["Applied", "Abort"]
    assert told[0][1]["x-ingot-signature"].startswith("sha256=")


def test_the_status_says_what_really_serves(bench: Callable[..., Bench]) -> None:
    """flagger #189: after a rollback the old version serves, whatever the last rollout was called."""
    one = bench(ANALYSED)
    one.rounds(lambda state: state.step == 1)
    one.traffic("v1", 90)
    one.traffic("v2", 10)
    one.store.submit("digits", events.Abort(), "ann", one.time.wall)
    one.time.wall += 20
    one.traffic("v1", 50)
    state, sequence = one.store.load("digits")
    rows, _ = one.store.observations("digits")
    found = view.full(state, sequence, rows, one.time.wall)
    assert found["phase"] == "Degraded" and found["serving"] == {"v1": 1.0} and found["stable"] == "v1"
    now = one.time.wall
    dead, server = Observation("dead", now - 60, {}, applied=1), Observation("server http://h", now, {})
    newest, behind = (Observation("g", now, {}, applied=number) for number in (sequence, sequence - 1))
    assert view.in_effect(sequence, [dead, server, newest], now)
    assert not view.in_effect(sequence, [dead, server, behind], now)


def test_a_call_has_a_deadline_that_a_trickle_does_not_outlive() -> None:
    import socket

    from ingot.release.client import CallFailed, call

    listening = socket.create_server(("127.0.0.1", 0))

    def trickle() -> None:
        client, _ = listening.accept()
        client.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        try:
            while True:
                client.sendall(b"x")
                time.sleep(0.05)
        except OSError:
            client.close()

    threading.Thread(target=trickle, daemon=True).start()
    begun = time.monotonic()
    with pytest.raises(CallFailed, match=r"not answered within 0.3 s"):
        call("GET", f"http://127.0.0.1:{listening.getsockname()[1]}/", timeout=0.3)
    assert time.monotonic() - begun < 20.0
    listening.close()
