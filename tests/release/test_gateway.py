"""The gateway through real sockets, before servers that behave, hang, lie or reset."""

import concurrent.futures
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ingot.release import events
from ingot.server.wire import Exchange
from tests.release import fakes
from tests.release.fakes import HALF, Upstream, World, world


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("gateway"), versions=("v1", "v2", "v3")) as made:
        made.apply()
        yield made


@pytest.fixture
def half(shared: World) -> Iterator[World]:
    """Both versions at 50 %, behaving, breakers closed, nothing seen yet."""
    for upstream in shared.upstreams.values():
        upstream.behave, upstream.held = None, []
        upstream.seen.clear()
    fresh(shared, HALF)
    yield shared


def fresh(made: World, extra: str) -> None:
    """Another rollout of the same model."""
    made.submit(events.Abort())
    made.apply(extra)
    for _ in range(2):  # a breaker that a test before opened is tried again
        made.ask(x_ingot_version="v2")


def test_requests_are_split_by_weight_and_say_where_they_were(half: World) -> None:
    """kserve #4074, #5335: plain processes and sockets, no mesh required."""
    answers = [half.ask(f"user{n}") for n in range(200)]
    assert {answer.status for answer in answers} == {200}
    assert all(json.loads(answer.body)["version"] == answer.version for answer in answers)
    assert 60 < sum(answer.version == "v2" for answer in answers) < 140
    assert {answer.route for answer in answers} == {"weight"}


def test_a_user_stays_as_the_weight_grows(half: World) -> None:
    """flagger #1232, istio #19630, without a cookie."""
    users = [f"user{n}" for n in range(60)]
    before = {user for user in users if half.ask(user).version == "v2"}
    half.submit(events.SetWeight({"v2": 80}))
    half.settled()
    after = {user for user in users if half.ask(user).version == "v2"}
    assert before < after
    assert "set-cookie" not in half.ask("user1").headers


def test_a_header_forces_a_version(half: World) -> None:
    answers = [half.ask("user1", x_ingot_version=version) for version in ("v1", "v2")]
    assert [(answer.version, answer.route) for answer in answers] == [("v1", "forced"), ("v2", "forced")]
    refused = half.ask("user1", x_ingot_version="v9")
    assert refused.status == 400 and b"these are: v1, v2" in refused.body


def test_rules_come_in_order_before_the_weights(half: World) -> None:
    fresh(half, """
steps: [{setWeight: 0}, {setHeaderRoute: {name: testers, header: x-test, version: v2}}, {pause: {}}]
routing:
  segments: {beta: [{label: tier, equals: beta}, {header: x-beta}]}
  rules:
  - {name: stays, version: v1, match: {allowList: [ann]}}
  - {name: bob, version: v2, match: {allowList: [bob]}}
  - {name: beta, version: v2, match: {segment: beta}}
  - {name: phones, version: v2, match: {header: user-agent, regex: '.*Phone.*'}}
  - {name: body, version: v2, match: {model: tiny}}
""")  # fmt: skip
    asked = {
        "rule:stays": half.ask("ann", x_beta="1"), "rule:bob": half.ask("bob"),
        "rule:beta": half.ask("x", x_ingot_labels="region=eu, tier=beta"),
        "rule:phones": half.ask("x", user_agent="my Phone"), "header:testers": half.ask("x", x_test="1"),
        "rule:body": half.ask("x", body=b'{"model": "tiny"}'), "weight": half.ask("x"),
    }  # fmt: skip
    assert {route: answer.route for route, answer in asked.items()} == {route: route for route in asked}
    versions = [answer.version for answer in asked.values()]
    assert versions == ["v1", "v2", "v2", "v2", "v2", "v2", "v1"]


def test_after_an_abort_no_rule_leads_to_the_canary(half: World) -> None:
    fresh(half, HALF + "\nrouting: {rules: [{name: bob, version: v2, match: {allowList: [bob]}}]}")
    assert half.ask("bob").version == "v2"
    half.submit(events.Abort())
    half.settled()
    assert half.ask("bob").version == "v1"


def test_bodies_and_paths_pass_unchanged_or_renamed(half: World) -> None:
    body = os.urandom(300_000)
    half.ask("user1", body=body, content_type="application/octet-stream")
    assert next(u for u in half.upstreams.values() if u.seen and u.seen[-1][2] == body)
    text = fakes.SPEC.replace("timeout: 500ms", "model: digits_new, modelVersion: '7'")
    half.submit(events.Abort())
    half.apply(HALF, text)
    answer = half.ask(half.user_of("v2"), path="/v2/models/digits/infer?x=1")
    assert json.loads(answer.body)["target"] == "/v2/models/digits_new/versions/7/infer?x=1"
    assert json.loads(half.ask(half.user_of("v1")).body)["target"] == "/v2/models/digits/infer"


def test_streams_pass_through_unbuffered(half: World) -> None:
    def stream(upstream: Upstream, exchange: Exchange) -> None:
        exchange.begin(200, {b"content-type": b"text/event-stream"})
        exchange.piece(b"data: one\n\n")
        upstream.held.append(exchange)

    for upstream in half.upstreams.values():
        upstream.behave = stream
    with socket.create_connection(("127.0.0.1", half.gateway.port), timeout=60) as client:
        client.sendall(b"POST /v2/models/digits/generate_stream HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
        received = b""
        while b"data: one" not in received:
            received += client.recv(4096)
        assert b"transfer-encoding: chunked" in received and b"x-ingot-version" in received
        held = next(u for u in half.upstreams.values() if u.held).held[0]
        half.loop.loop.call_soon_threadsafe(lambda: (held.piece(b"data: two\n\n"), held.piece(b"")))
        while not received.endswith(b"0\r\n\r\n"):
            received += client.recv(4096)
    assert b"data: two" in received


def test_a_stream_that_breaks_is_not_taken_for_whole(half: World) -> None:
    def broken(upstream: Upstream, exchange: Exchange) -> None:
        exchange.begin(200, {})
        exchange.piece(b"half of it")
        exchange.abandon()

    for upstream in half.upstreams.values():
        upstream.behave = broken
    with socket.create_connection(("127.0.0.1", half.gateway.port), timeout=60) as client:
        client.sendall(b"GET /v2/models/digits HTTP/1.1\r\nhost: x\r\n\r\n")
        received = b""
        try:
            while chunk := client.recv(4096):
                received += chunk
        except ConnectionResetError:
            received += b""
    assert not received.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("trouble", ["hang", "reset", "lie", "cut"])
def test_endpoints_that_hang_lie_or_reset_cost_one_attempt(half: World, trouble: str) -> None:
    user = half.user_of("v2")
    before = half.counters("v2").errors
    half.upstreams["v2"].behave = getattr(fakes, trouble)
    begun = time.monotonic()
    answer = half.ask(user)
    assert (answer.status, answer.version, answer.route) == (200, "v1", "retry")
    assert time.monotonic() - begun < 20.0
    assert len(half.upstreams["v2"].seen) - 2 <= 2, "one attempt, or two where a kept connection was found closed"
    assert half.counters("v2").errors == before + 1


def test_a_refused_answer_is_repeated_on_stable_a_wrong_one_is_not(half: World) -> None:
    user = half.user_of("v2")
    half.upstreams["v2"].behave = fakes.status(503)
    assert (half.ask(user).version, half.ask(user).status) == ("v1", 200)
    half.upstreams["v2"].behave = fakes.status(500)
    answer = half.ask(user)
    assert (answer.version, answer.status) == ("v2", 500)


def test_retries_only_where_that_is_safe(half: World) -> None:
    user = half.user_of("v2")
    half.upstreams["v2"].behave = fakes.reset
    answer = half.ask(user, path="/v2/models/digits/infer", method="GET")
    assert answer.version == "v1"
    fresh(half, HALF + "\nrouting: {retry: {inference: false}, breaker: {failures: 100}}")
    answer = half.ask(user)
    assert answer.status == 502 and b"version v2 of digits" in answer.body, "it may have begun to work"
    answer = half.ask(user, method="PUT")
    assert answer.version == "v1"


def test_a_dead_canary_costs_each_user_at_most_one_failed_attempt(half: World) -> None:
    """Nobody sees an error, and after a few the breaker keeps everybody away."""
    dead = half.upstreams["v2"]
    port = dead.port
    half.loop.run(dead.stop())
    begun = half.counters("v2").errors
    try:
        answers = [half.ask(f"user{n}") for n in range(60)]
        assert {answer.status for answer in answers} == {200} and {answer.version for answer in answers} == {"v1"}
        routes = [answer.route for answer in answers]
        assert 1 <= routes.count("retry") <= 6 and routes.count("breaker") > 10
        assert half.counters("v2").errors - begun <= 6
        assert half.observation().open_breakers == ("v2",)
    finally:
        half.loop.run(dead.start(port))
    half.until(lambda: half.ask(half.user_of("v2")).version == "v2")


def test_a_new_stable_that_dies_is_stood_in_for_by_the_one_before(half: World) -> None:
    half.submit(events.Promote(full=True))
    half.settled()
    assert half.ask("user1").version == "v2"
    half.upstreams["v2"].behave = fakes.reset
    assert (half.ask("user1").version, half.ask("user1").route) == ("v1", "retry")
    half.upstreams["v2"].behave = None
    half.submit(events.Undo())
    half.submit(events.Ready("v1"))
    half.settled()


def test_the_canary_is_not_credited_with_stables_answers(half: World) -> None:
    """argo #1700, at the source: what stable answered in the canary's stead counts for stable."""
    user = half.user_of("v2")
    before = {version: half.counters(version) for version in ("v1", "v2")}
    half.upstreams["v2"].behave = fakes.status(503)
    for _ in range(3):
        half.ask(user)
    after = {version: half.counters(version) for version in ("v1", "v2")}
    assert after["v2"].requests - before["v2"].requests == after["v2"].errors - before["v2"].errors == 3
    assert after["v1"].requests - before["v1"].requests == 3 and after["v1"].errors == before["v1"].errors


def test_mirrored_traffic_is_compared_never_returned_never_slowing(half: World) -> None:
    fresh(half, "steps: [{setWeight: 0}, {setMirrorRoute: {percentage: 100}}, {pause: {}}]")
    half.upstreams["v2"].behave = fakes.slow(1.5)
    begun = time.monotonic()
    answers = [half.ask(f"user{n}") for n in range(20)]
    assert time.monotonic() - begun < 20.0, "twenty mirrored requests of 1.5 s each were not waited for"
    assert {answer.version for answer in answers} == {"v1"}
    half.until(lambda: half.observation().counters["v2"].mirrored >= 16)
    assert half.observation().counters["v2"].agreed == 0, "the fakes answer with their names"
    half.upstreams["v2"].behave = lambda u, e: fakes.answer(half.upstreams["v1"], e)
    half.ask("user1")
    half.until(lambda: half.observation().counters["v2"].agreed == 1)


def test_a_hanging_mirror_slows_nobody(half: World) -> None:
    fresh(half, "steps: [{setWeight: 0}, {setMirrorRoute: {percentage: 100}}, {pause: {}}]")
    half.upstreams["v2"].behave = fakes.hang
    begun = time.monotonic()
    for n in range(60):
        assert half.ask(f"user{n}").status == 200
    assert time.monotonic() - begun < 30.0
    assert len(half.upstreams["v2"].seen) <= 60


def test_feedback_finds_its_version(half: World) -> None:
    user = half.user_of("v2")
    for body in ({"user": user, "good": True}, {"version": "v2", "good": False}):
        text = json.dumps({"model": "digits", "event": "click", **body}).encode()
        assert half.ask(path="/feedback", body=text).status == 204
    assert half.counters("v2").feedback["click"] == (1, 2)
    assert half.ask(path="/feedback", body=b'{"model": "digits", "evnt": 1}').status == 400
    unknown = b'{"model": "digits", "event": "e", "good": true, "version": "v9"}'
    assert half.ask(path="/feedback", body=unknown).status == 404


def test_unknown_models_are_refused(half: World) -> None:
    answer = half.ask(path="/v2/models/nobody/infer")
    assert answer.status == 404 and b"no rollout" in answer.body
    assert half.ask(path="/v2/health/ready", method="GET").status == 200


def test_changes_apply_without_a_dropped_request(half: World) -> None:
    """Weights up and down under load: every request is answered."""
    for upstream in half.upstreams.values():
        upstream.behave = fakes.slow(0.02)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        pending = [pool.submit(half.ask, f"user{n}") for n in range(400)]
        for weight in (0, 30, 0, 100, 5, 70):
            half.submit(events.SetWeight({"v2": weight}))
            half.settled()
        answers = [future.result() for future in pending]
    assert {answer.status for answer in answers} == {200}


def test_users_are_counted_once(half: World) -> None:
    fresh(half, HALF)
    for n in range(150):
        half.ask(f"person{n % 50}")
    half.told()
    users = half.observation().users
    assert sum(users.values()) == 50


def test_metrics_are_exported(half: World) -> None:
    import http.client

    from ingot.release.gateway_metrics import NAMES

    half.ask("user1")
    half.told()
    connection = http.client.HTTPConnection("127.0.0.1", half.gateway.metrics_port, timeout=60)
    connection.request("GET", "/metrics")
    page = connection.getresponse().read().decode()
    connection.close()
    assert all(f"# TYPE {name} " in page for name in NAMES)
    assert 'ingot_release_weight_percent{model="digits",version="v2"} 50' in page
    assert 'ingot_release_phase{model="digits",phase="Paused"} 1' in page


def test_a_killed_worker_is_replaced_and_its_counts_are_kept(tmp_path: Path) -> None:
    with world(tmp_path, workers=2) as made:
        made.apply()
        for n in range(40):
            made.ask(f"user{n}")
        made.until(lambda: sum(c.requests for c in made.observation().counters.values()) == 40)
        victim = made.gateway.workers[0].process
        os.kill(victim.pid, signal.SIGKILL)
        answers = [made.ask(f"user{n}") for n in range(20)]
        assert {answer.status for answer in answers} == {200}, "the other one serves"
        made.until(lambda: len(made.gateway.workers) == 2 and all(w.report for w in made.gateway.workers))
        made.until(lambda: sum(c.requests for c in made.observation().counters.values()) == 60)
        made.settled()


def test_without_a_database_the_routes_stay(tmp_path: Path) -> None:
    with world(tmp_path) as made:
        made.apply()
        database = tmp_path / "release.db"
        database.rename(tmp_path / "away.db")
        database.mkdir()
        made.gateway.store.engine.dispose()
        made.until(lambda: not made.gateway.store_answers)
        assert {made.ask(f"user{n}").status for n in range(20)} == {200}
        database.rmdir()
        (tmp_path / "away.db").rename(database)
        made.until(lambda: made.gateway.store_answers)
        made.submit(events.SetWeight({"v2": 0}))
        made.settled()
        assert {made.ask(f"user{n}").version for n in range(20)} == {"v1"}


def test_a_gateway_started_without_a_database_has_its_last_routes(tmp_path: Path) -> None:
    from ingot.release.gateway import Gateway, Options

    with world(tmp_path) as made:
        made.apply()
        options = Options("sqlite:////nowhere/at/all.db", port=0, metrics_port=0, remember=tmp_path / "routes.json")
        second = Gateway(options)
        made.loop.run(second.start())
        try:
            made.gateway, first = second, made.gateway
            assert {made.ask(f"user{n}").status for n in range(10)} == {200}
        finally:
            made.gateway = first
            made.loop.run(second.stop())
