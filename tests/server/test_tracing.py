"""Traces as Triton writes them and as OpenTelemetry collectors get them; a log line for each request."""

import http.client
import http.server
import json
import logging
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ingot.server import logs
from ingot.server.app import BackgroundServer, Server
from ingot.server.request import Code, ServerError
from ingot.server.tracing import Sink, Tracer
from tests.server.conftest import options
from tests.server.models import CHAIN_CONFIG, add_version, scale
from tests.server.test_app import INFER

PARENT = f"00-{'a' * 32}-{'b' * 16}-01"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    add_version(folder, "scale", 1, scale(2.0))
    add_version(folder, "scale", 3, scale(3.0))
    (folder / "scale" / "config.pbtxt").write_text("version_policy { all {} }")
    (folder / "chain").mkdir()
    (folder / "chain" / "config.pbtxt").write_text(CHAIN_CONFIG)
    return folder


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes spans as an OpenTelemetry collector does."""

    spans: "queue.Queue[dict[str, Any]]" = queue.Queue()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        for resource in body["resourceSpans"]:
            for scope in resource["scopeSpans"]:
                for span in scope["spans"]:
                    self.spans.put(span | {"resource": resource["resource"]})
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def collector() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces"
        server.shutdown()


def infer(server: Server, model: str = "scale", **headers: str) -> Any:
    entry = {**INFER["inputs"][0], "name": "x" if model == "scale" else "in"}
    connection = http.client.HTTPConnection("127.0.0.1", server.ports["http"], timeout=60)
    connection.request("POST", f"/v2/models/{model}/infer", json.dumps({"inputs": [entry]}), headers)
    body = json.loads(connection.getresponse().read())
    connection.close()
    return body


def setting(server: Server, path: str = "/v2/trace/setting", **changes: Any) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.ports["http"], timeout=60)
    connection.request("POST", path, json.dumps(changes))
    response = connection.getresponse()
    answer = response.status, json.loads(response.read())
    connection.close()
    return answer


def test_spans_of_an_ensemble(root: Path, engine_cache: Path, collector: str) -> None:
    trace = {"trace_mode": "opentelemetry", "url": collector, "trace_rate": "1000000"}
    with BackgroundServer(options(root, engine_cache, trace=trace)) as server:
        infer(server)  # the first of a million is sampled
        infer(server)
        infer(server, "chain", traceparent=PARENT, **{"x-request-id": "order 66"})
    spans = [Collector.spans.get(timeout=60) for _ in range(3 + 5)]
    assert Collector.spans.empty()
    mine = [span for span in spans if span["traceId"] == "a" * 32]
    (top,) = [span for span in mine if span["name"] == "InferRequest"]
    assert top["parentSpanId"] == "b" * 16 and top["kind"] == 2
    facts = {entry["key"]: next(iter(entry["value"].values())) for entry in top["attributes"]}
    assert facts == {"model": "chain", "request_id": "order 66", "protocol": "http"}
    below = [span for span in mine if span is not top]
    assert sorted(span["name"] for span in below) == ["compute", "compute", "queue", "queue"]
    assert all(span["parentSpanId"] == top["spanId"] for span in below)
    times = [int(top["startTimeUnixNano"]), *(int(span["startTimeUnixNano"]) for span in below)]
    assert times == sorted(times) and int(top["endTimeUnixNano"]) >= max(int(s["endTimeUnixNano"]) for s in below)
    assert abs(times[0] / 1e9 - time.time()) < 60
    assert {"key": "service.name", "value": {"stringValue": "ingot"}} in top["resource"]["attributes"]


def traces_in(file: Path) -> int:
    """None while it is not there, or is being written."""
    try:
        return len(json.loads(file.read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return 0


def test_files_as_triton_writes_them(root: Path, engine_cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    with BackgroundServer(options(root, engine_cache)) as server:
        assert setting(server)[1]["trace_level"] == ["OFF"] and not server.service.watching
        changes = {"trace_level": ["TIMESTAMPS"], "trace_rate": "1", "trace_count": "2", "trace_file": str(file)}
        assert setting(server, "/v2/models/scale/trace/setting", **changes)[1]["trace_rate"] == "1"
        assert setting(server)[1]["trace_level"] == ["OFF"], "a model's settings are its own"
        for _ in range(4):
            infer(server)
        infer(server, "chain")
        deadline = time.monotonic() + 60
        while traces_in(file) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert traces_in(file) == 2
        assert setting(server, "/v2/models/scale/trace/setting", trace_count="1")[0] == 200
        infer(server)
    traces = json.loads(file.read_text())
    assert [trace["model_name"] for trace in traces] == ["scale"] * 3 and traces[0]["model_version"] == 3
    names = [stamp["name"] for stamp in traces[0]["timestamps"]]
    assert names == [
        "REQUEST_START", "QUEUE_START", "COMPUTE_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END",
        "REQUEST_END",
    ]  # fmt: skip
    times = [stamp["ns"] for stamp in traces[0]["timestamps"]]
    assert times == sorted(times)


def test_settings_that_are_refused(root: Path, engine_cache: Path) -> None:
    with BackgroundServer(options(root, engine_cache)) as server:
        for changes in ({"trace_level": ["ALL"]}, {"trace_rate": "often"}, {"colour": "blue"}, {"trace_mode": "smoke"}):
            status, answer = setting(server, **changes)
            assert status == 400 and "trace setting" in answer["error"]
        assert setting(server, "/v2/models/none/trace/setting")[0] == 404
        assert setting(server, trace_rate="7")[1]["trace_rate"] == "7"
        assert setting(server, trace_rate=None)[1]["trace_rate"] == "1000"


@pytest.mark.parametrize(("parent", "traced"), [(PARENT, True), (PARENT[:-1] + "0", False), ("nonsense", False)])
def test_traceparent_decides(parent: str, traced: bool) -> None:
    tracer = Tracer()
    tracer.updated({"trace_level": ["TIMESTAMPS"], "trace_rate": "2"})
    assert tracer.sampled("m", "") is not None, "the first of two"
    assert (tracer.sampled("m", parent) is not None) == traced


def test_a_collector_that_is_away_costs_traces_only(caplog: pytest.LogCaptureFixture) -> None:
    sink = Sink()

    def away(items: Any) -> None:
        raise ConnectionRefusedError("nobody listens")

    for _ in range(10):
        sink.put(away, [{}])
    sink.close()
    assert sink.dropped == 10 and len([r for r in caplog.records if "cannot be delivered" in r.message]) == 1


def test_a_line_for_each_request(root: Path, engine_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with BackgroundServer(options(root, engine_cache, log_requests=True)) as server:
        infer(server, **{"x-request-id": "seven"})
        connection = http.client.HTTPConnection("127.0.0.1", server.ports["http"], timeout=60)
        connection.request("POST", "/v2/models/scale/infer", json.dumps({"inputs": [], "id": "nine"}))
        assert connection.getresponse().read()
        connection.request("POST", "/v2/models/scale/infer", "no JSON", {"x-request-id": "ten"})
        assert connection.getresponse().status == 400
        connection.close()
    records = [record for record in caplog.records if record.name == "ingot.server.requests"]
    facts = {record.facts["request_id"]: record.facts for record in records}  # type: ignore[attr-defined]
    assert facts["seven"]["model"] == "scale" and facts["seven"]["status"] == "OK" and facts["seven"]["version"] == 3
    assert facts["seven"]["latency_us"] >= facts["seven"]["compute_us"] > 0
    assert facts["nine"]["status"] == "INVALID_ARG" and "expected 1 inputs" in facts["nine"]["error"]
    assert facts["ten"]["status"] == "INVALID_ARG" and "failed to parse" in facts["ten"]["error"]
    line = json.loads(logs.JsonFormatter().format(records[0]))
    assert line["request_id"] == "seven" and line["level"] == "INFO" and line["time"].endswith("+00:00")
    assert " request_id=seven protocol=http " in logs.TextFormatter(iso=True).format(records[0])


def test_json_of_an_exception() -> None:
    try:
        raise ServerError(Code.INTERNAL, "no")
    except ServerError:
        record = logging.getLogger("x").makeRecord("x", 40, "f", 1, "bad %s", ("thing",), sys.exc_info())
    text = logs.JsonFormatter().format(record)
    assert json.loads(text)["message"] == "bad thing" and "ServerError" in json.loads(text)["exception"]
    assert "\n" not in text
