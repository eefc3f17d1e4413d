"""The HTTP API through a socket: who may do what, and what it says; the command line on both of its ways."""

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ingot.cli import main
from ingot.release import events
from ingot.release.api import ROUTES, Api
from ingot.release.store import Store
from ingot.release.windows import Counters, Observation
from ingot.server.wire import Front
from tests.release.fakes import Loop

SPEC = """
model: digits
stable: v1
candidates: [v2]
versions: {v1: {endpoints: [{url: 'http://h:1'}]}, v2: {endpoints: [{url: 'http://h:2'}]}}
steps: [{setWeight: 5}, {pause: {}}]
"""


class Served:
    """An API on a port."""

    def __init__(self, folder: Path) -> None:
        self.url = f"sqlite:///{folder}/release.db"
        self.store, self.loop = Store(self.url), Loop()
        self.store.migrate()
        self.api = Api(self.store)
        self.front = Front(self.api)
        self.port = self.loop.run(self.front.start("127.0.0.1", 0))

    def ask(self, method: str, path: str, body: str = "", **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        named = {"content-type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
        connection.request(method, path, body.encode(), named)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        kind = answer.getheader("content-type") or ""
        return answer.status, json.loads(text) if "json" in kind else text

    def close(self) -> None:
        self.loop.run(self.front.stop())
        self.loop.end()
        self.store.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    yield made
    made.close()


def begun(served: Served) -> None:
    assert served.ask("POST", "/api/rollouts", SPEC)[0] == 200
    served.store.submit("digits", events.Ready("v2"), "controller")


def test_a_rollout_from_application_to_promotion(served: Served) -> None:
    begun(served)
    served.store.observe({"digits": Observation("g", 9e9, {"v1": Counters(requests=3, histogram={200: 3})})})
    status, found = served.ask("GET", "/api/rollouts/digits?series=1")
    assert status == 200 and found["phase"] == "Paused" and found["weights"] == {"v2": 5.0, "v1": 95.0}
    assert [step["status"] for step in found["steps"]] == ["done", "current"]
    assert {"promote", "abort", "set-weight"} <= set(found["commands"]) and "retry" not in found["commands"]
    assert len(found["series"]["v1"]) == len(found["series"]["time"]) == 60
    assert served.ask("POST", "/api/rollouts/digits/set-weight", '{"weights": {"v2": 30}}')[1]["weights"]["v2"] == 30
    assert served.ask("POST", "/api/rollouts/digits/promote", '{"full": true}')[1]["stable"] == "v2"
    history = served.ask("GET", "/api/rollouts/digits/history")[1]["history"]
    assert [one["what"] for one in history] == ["Applied", "Ready", "SetWeight", "Promote"]
    assert history[2]["figures"] == {"weights": {"v2": 30.0}} and history[2]["actor"] == "local"
    assert served.ask("GET", "/api/rollouts")[1]["rollouts"][0]["phase"] == "Healthy"
    assert served.ask("GET", "/api/rollouts/digits/verify")[1] == {"fault": None}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("GET", "/api/rollouts/nobody", "", 404, "no rollout of 'nobody'"),
        ("POST", "/api/rollouts", SPEC.replace("setWeight", "setWeigth"), 400, "setWeigth"),
        ("POST", "/api/rollouts", SPEC + "watch: 5s", 409, "two at once"),
        ("POST", "/api/rollouts/digits/retry", "", 409, "only an aborted"),
        ("POST", "/api/rollouts/digits/explode", "", 400, "no command"),
        ("POST", "/api/rollouts/digits/promote", '{"ful": true}', 400, "unknown setting 'ful'"),
        ("POST", "/api/rollouts/digits/set-weight", '{"weights": {"v2": "much"}}', 400, "weights"),
        ("POST", "/api/rollouts/digits/set-weight", '{"weights": {"v9": 5}}', 409, "no candidate"),
        ("POST", "/api/rollouts/digits/set-weight", '{"weights": {"v2": 200}}', 409, "100"),
        ("DELETE", "/api/rollouts/digits", "", 404, "no DELETE"),
        ("PUT", "/api/rollouts/digits/history", "[]", 404, "no PUT"),
    ],
)
def test_refusals_say_why(served: Served, method: str, path: str, body: str, status: int, message: str) -> None:
    begun(served)
    found = served.ask(method, path, body)
    assert found[0] == status and message in found[1]["error"], found


def test_the_audit_cannot_be_rewritten_through_the_api(served: Served) -> None:
    """No route changes or removes an entry; the store would refuse as well (test_store)."""
    assert {route.method for route in ROUTES} == {b"GET", b"POST"}
    assert not [route for route in ROUTES if route.method == b"POST" and "history" in route.pattern.pattern]


def test_viewers_read_and_operators_command(served: Served) -> None:
    begun(served)
    served.store.add_key("see", "vic", "viewer")
    served.store.add_key("do", "olga", "operator")
    for key, read, write in (("", 401, 401), ("wrong", 401, 401), ("see", 200, 403), ("do", 200, 200)):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        assert served.ask("GET", "/api/rollouts", **headers)[0] == read
        assert served.ask("POST", "/api/rollouts/digits/pause", "{}", **headers)[0] == write
    served.ask("POST", "/api/rollouts/digits/abort", "{}", authorization="Bearer do")
    assert served.store.history("digits")[-1].actor == "olga"


def test_without_keys_only_this_machines_programs_are_served(served: Served) -> None:
    begun(served)
    assert served.ask("GET", "/api/rollouts", host="evil.example")[0] == 401
    assert served.ask("POST", "/api/rollouts/digits/abort", "{}", content_type="text/plain")[0] == 415


def test_the_console_is_served(served: Served) -> None:
    status, page = served.ask("GET", "/")
    assert status == 200 and b"console.js" in page
    assert served.ask("GET", "/console.js")[0] == served.ask("GET", "/console.css")[0] == 200
    assert served.ask("GET", "/../api.py")[0] == 404


# -- the command line -------------------------------------------------------------------------------------------------
def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(["release", *words])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize("way", ["store", "server"])
def test_every_verb(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str], way: str) -> None:
    file = tmp_path / "rollout.yaml"
    file.write_text(SPEC)
    there = ["--store", served.url] if way == "store" else ["--server", f"http://127.0.0.1:{served.port}"]

    def verb(*words: str) -> str:
        code, text = run(capsys, *words, *there)
        assert code == 0, text
        return text

    assert "Progressing" in verb("apply", str(file))
    served.store.submit("digits", events.Ready("v2"), "controller")
    assert "v2=5%" in verb("list")
    assert "setWeight 5" in verb("get", "digits") and "resume" in verb("get", "digits")
    assert "paused by hand" in verb("pause", "digits")
    assert "v2=25%" in verb("set-weight", "digits", "25")
    assert "v2=30%" in verb("set-weight", "digits", "v2=30")
    verb("resume", "digits")
    assert "Degraded" in verb("abort", "digits")
    assert run(capsys, "status", "digits", *there)[0] == 1
    assert "Progressing" in verb("retry", "digits")
    assert run(capsys, "status", "digits", *there)[0] == 3
    served.store.submit("digits", events.Ready("v2"), "controller")
    assert "v2 is stable" in verb("promote", "digits", "--full")
    assert verb("status", "digits").startswith("Healthy: v2 is stable")
    assert verb("get", "digits", "-w").startswith("digits: Healthy")
    assert "going back to v1" in verb("undo", "digits")
    text = verb("history", "digits", "--figures", "--verify")
    assert "Promote" in text and '{"weights": {"v2": 30.0}}' in text and "every entry follows" in text


def test_errors_of_users_are_sentences(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rollout.yaml"
    file.write_text(SPEC.replace("pause", "pase"))
    for words, message in (
        (["lint", str(file)], "unknown field `pase`"),
        (["lint", str(tmp_path / "none.yaml")], "No such file"),
        (["get", "nobody", "--store", served.url], "there is no rollout of 'nobody'"),
        (["list", "--server", "http://127.0.0.1:9"], "does not answer"),
        (["list", "--store", "nonsense"], "no database's URL"),
        (["pause", "digits", "--store", "sqlite:////nowhere/at/all.db"], "does not answer"),
    ):
        code, text = run(capsys, *words)
        assert code == 1 and message in text and text.startswith("ingot: error:"), text


def test_lint_schema_and_keys(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rollout.yaml"
    file.write_text(SPEC)
    assert "a rollout of digits: v1 -> v2, 2 steps" in run(capsys, "lint", str(file))[1]
    assert json.loads(run(capsys, "schema")[1])["$ref"] == "#/$defs/Rollout"
    key = run(capsys, "keys", "add", "ann", "--role", "operator", "--store", served.url)[1].strip()
    assert served.store.key(key) == ("ann", "operator")
    assert run(capsys, "keys", "remove", "ann", "--store", served.url)[0] == 0
    assert run(capsys, "keys", "remove", "ann", "--store", served.url)[0] == 1
