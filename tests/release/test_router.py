"""Routing without sockets: what a compiled router decides; the breaker; when mirrored answers agree."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingot.release import events
from ingot.release.breaker import CircuitBreaker
from ingot.release.mirror import alike
from ingot.release.rollout import State, advance
from ingot.release.router import Request, Router, Routes, UnknownVersion
from ingot.release.spec import parse

SPEC = """
model: digits
stable: v1
candidates: [v2, v3]
versions:
  v1: {endpoints: [{url: 'http://h:1/base'}]}
  v2: {endpoints: [{url: 'http://h:2', device: cpu}, {url: 'https://g', device: h200}], engines: {h200: digits_h200}}
  v3: {endpoints: [{url: 'http://h:3'}], model: other, modelVersion: '2'}
steps: [{setWeights: {v2: 20, v3: 30}}, {pause: {}}]
"""


def state(extra: str = "", ready: tuple[str, ...] = ("v2", "v3")) -> State:
    found, _ = advance(None, events.Applied(parse(SPEC + extra)), 0.0)
    for version in ready:
        found, _ = advance(found, events.Ready(version), 1.0)
    return found


def user(name: str, **headers: str) -> Request:
    return Request(
        {b"x-user-id": name.encode(), **{k.replace("_", "-").encode(): v.encode() for k, v in headers.items()}}
    )


@given(st.text(min_size=1, max_size=20))
def test_the_same_user_has_the_same_version_in_every_worker(name: str) -> None:
    first, second = Router(state(), 1), Router(state(), 2)
    assert first.decide(user(name)) == second.decide(user(name))


def test_weights_are_shares_of_users() -> None:
    router = Router(state(), 1)
    found = [router.decide(user(f"user{n}")).version for n in range(20_000)]
    assert {v: round(found.count(v) / 200) for v in ("v1", "v2", "v3")} == {"v1": 50, "v2": 20, "v3": 30}


def test_a_salt_draws_other_users() -> None:
    plain, salted = Router(state(), 1), Router(state("routing: {salt: other}"), 1)
    same = sum(plain.decide(user(str(n))).version == salted.decide(user(str(n))).version for n in range(2000))
    assert 600 < same < 900


def test_without_a_user_chance_decides_or_the_address() -> None:
    draws = iter(range(0, 10_000_000, 2500))
    router = Router(state(), 1, lambda: next(draws))
    assert {router.decide(Request({})).version for _ in range(4)} == {"v1", "v2", "v3"}
    by_address = Router(state("routing: {key: {fallback: address}}"), 1)
    assert len({by_address.decide(Request({}, lambda: "10.0.0.7")).version for _ in range(20)}) == 1


def test_percentage_rules_have_a_draw_of_their_own() -> None:
    rules = "routing: {rules: [{name: tenth, version: v2, match: {percentage: 10}}]}"
    router = Router(state(rules), 1)
    found = [router.decide(user(str(n))) for n in range(10_000)]
    assert 900 < sum(decision.reason == "rule:tenth" for decision in found) < 1100
    tenth = [d for n, d in enumerate(found) if d.reason == "weight"]
    assert 0.18 < sum(d.version == "v2" for d in tenth) / len(tenth) < 0.22


def test_only_ready_versions_can_be_forced() -> None:
    router = Router(state(ready=("v2",)), 1)
    assert router.decide(user("a", x_ingot_version="v2")).reason == "forced"
    with pytest.raises(UnknownVersion, match="'v3' of 'digits' is not ready; these are: v1, v2"):
        router.decide(user("a", x_ingot_version="v3"))


def test_each_device_gets_its_engine() -> None:
    targets = Router(state(), 1).targets
    path = b"/v2/models/digits/infer?q=1"
    assert [t.path(path) for t in targets["v2"]] == [path, b"/v2/models/digits_h200/infer?q=1"]
    assert (targets["v2"][1].port, targets["v2"][1].tls) == (443, True)
    assert targets["v3"][0].path(path) == b"/v2/models/other/versions/2/infer?q=1"
    assert targets["v1"][0].path(path) == b"/base" + path
    assert targets["v3"][0].path(b"/v2/models/digits/versions/9/infer") == b"/v2/models/other/versions/2/infer"


def test_the_body_is_read_only_if_a_rule_needs_it() -> None:
    def never() -> str:
        raise AssertionError("nobody asked for the body")

    Router(state(), 1).decide(Request({b"x-user-id": b"a"}, model=never))
    shared = {name: Router(state(f"routing: {{paths: [/v1/], salt: {name}}}"), 1) for name in ("digits",)}
    assert Routes(shared).find(b"/v1/chat/completions", never) is shared["digits"]


def test_several_models_on_one_prefix_are_told_apart_by_the_body() -> None:
    routers = {}
    for name in ("digits", "letters"):
        spec = parse(SPEC.replace("model: digits", f"model: {name}") + "routing: {paths: [/v1/]}")
        routers[name] = Router(advance(None, events.Applied(spec), 0.0)[0], 1)
    routes = Routes(routers)
    assert routes.find(b"/v1/completions", lambda: "letters") is routers["letters"]
    assert routes.find(b"/v1/completions", lambda: "nobody") is None
    assert routes.find(b"/v2/models/letters/infer", lambda: "") is routers["letters"]


# -- breaker ----------------------------------------------------------------------------------------------------------
def test_a_breaker_opens_tries_once_and_closes() -> None:
    breaker = CircuitBreaker(3, 5.0)
    for _ in range(3):
        assert breaker.allows(0.0)
        breaker.failed(0.0)
    assert not breaker.allows(4.9)
    assert breaker.allows(5.0) and not breaker.allows(5.0), "one at a time tries"
    breaker.failed(5.0)
    assert not breaker.allows(9.9) and breaker.allows(10.0)
    breaker.given_up()
    assert breaker.allows(10.0)
    breaker.succeeded()
    assert breaker.allows(10.0) and breaker.allows(10.0)


def test_a_success_between_failures_keeps_it_closed() -> None:
    breaker = CircuitBreaker(2, 5.0)
    for _ in range(5):
        breaker.failed(0.0)
        breaker.succeeded()
    assert breaker.allows(0.0)


# -- agreement --------------------------------------------------------------------------------------------------------
def scores(values: list[float], binary: bool = False, **extra: str) -> tuple[int, dict[bytes, bytes], bytes]:
    output: dict[str, object] = {"name": "scores", "datatype": "FP32", "shape": [1, len(values)]}
    data = b""
    if binary:
        data = np.array(values, "<f4").tobytes()
        output["parameters"] = {"binary_data_size": len(data)}
    else:
        output["data"] = values
    text = json.dumps({"model_name": "m", **extra, "outputs": [output]}).encode()
    return 200, {b"inference-header-content-length": str(len(text)).encode()}, text + data


@pytest.mark.parametrize("binary", [False, True])
def test_scores_agree_when_the_largest_is_the_same(binary: bool) -> None:
    first = scores([0.1, 0.9, 0.0], binary, model_version="1")
    assert alike(first, scores([0.3, 0.6, 0.1], not binary, model_version="2"))
    assert not alike(first, scores([0.9, 0.1, 0.0], binary))
    assert not alike(first, scores([0.1, 0.9], binary))


def test_other_answers_agree_when_they_are_equal() -> None:
    def answer(**content: object) -> tuple[int, dict[bytes, bytes], bytes]:
        return 200, {}, json.dumps(content).encode()

    assert alike(answer(id="a", text="yes", score=1.0), answer(id="b", text="yes", score=1.0004))
    assert not alike(answer(text="yes"), answer(text="no"))
    assert not alike(answer(text="yes"), (500, {}, b""))
    assert not alike((200, {}, b"no json"), (200, {}, b"other"))
