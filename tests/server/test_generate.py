"""generate and generate_stream, the OpenAPI document, and models that a load request carries."""

import base64
import gzip
import hashlib
import http.client
import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest

from ingot.server import openapi
from ingot.server.app import BackgroundServer, Server
from ingot.server.http import _GENERATE, _INFER, ROUTES
from tests.server.conftest import options
from tests.server.models import scale


def ask(server: Server, path: str, body: Any = None, **headers: str) -> tuple[int, Any, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.ports["http"], timeout=60)
    sent = body if isinstance(body, str | bytes) else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, None if body is None else sent, headers)
    response = connection.getresponse()
    raw = response.read()
    connection.close()
    plain = response.headers["content-type"] == "application/json" and raw
    return response.status, json.loads(raw) if plain else raw.decode(), response.headers


def test_numbers(server: Server) -> None:
    path = "/v2/models/scale/versions/1/generate"
    status, body, _ = ask(server, path, {"x": [1, 2, 3, 4], "id": "a", "mood": "good"})
    assert (status, body) == (200, {"model_name": "scale", "model_version": "1", "id": "a", "y": [2, 4, 6, 8]})
    assert ask(server, path, {"x": [[1, 2, 3, 4], [5, 6, 7, 8]]})[1]["y"] == [2, 4, 6, 8, 10, 12, 14, 16]


def test_texts(server: Server) -> None:
    assert ask(server, "/v2/models/texts/generate", {"INPUT": "häuser"})[1]["OUTPUT"] == "häuser"
    assert ask(server, "/v2/models/texts/generate", {"INPUT": ["a", "b"]})[1]["OUTPUT"] == ["a", "b"]


def test_a_stream_is_one_event(server: Server) -> None:
    status, body, headers = ask(server, "/v2/models/texts/generate_stream", {"INPUT": "hello"})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert re.fullmatch(r"data: \{.*\}\n\n", body) and json.loads(body[6:])["OUTPUT"] == "hello"


def test_a_sequence(server: Server) -> None:
    path = "/v2/models/accumulator/generate"
    first = ask(server, path, {"x": 1, "sequence_id": 77, "sequence_start": True})[1]["y"]
    second = ask(server, path, {"x": 2, "sequence_id": 77, "parameters": {"sequence_end": True}})[1]["y"]
    assert (first, second) == (1001, 3)


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("scale", {"x": "text"}, 400, "must be FP32"), ("scale", {"x": [[1], [2, 3]]}, 400, "must be FP32"),
        ("scale", {"x": [1, 2]}, 400, "unexpected shape"), ("scale", {}, 400, "expected 1 inputs"),
        ("scale", {"x": 1, "y": [2]}, 400, "'y' is no input"), ("scale", {"x": None}, 400, "must be FP32"),
        ("scale", {"x": 1, "id": 5}, 400, "'id'"), ("scale", {"x": 1, "timeout": -1}, 400, "'timeout'"),
        ("scale", {"x": 1, "sequence_id": [1]}, 400, "'sequence_id'"), ("simple", {"INPUT0": 1.5}, 400, "INT32"),
        ("simple", {"INPUT0": 1 << 40, "INPUT1": 1}, 400, "does not fit"),
        ("texts", {"INPUT": 5}, 400, "not all strings"),
        ("scale", "[1]", 400, "must be an object"), ("scale", "{", 400, "failed to parse"),
        ("none", {}, 404, "unknown"),
        ("scale", {"x": 1, "parameters": 5}, 400, "'parameters'"), ("scale/versions/0", {}, 400, "version"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["generate", "generate_stream"])
def test_refusals(server: Server, path: str, body: Any, status: int, words: str, verb: str) -> None:
    found, answer, _ = ask(server, f"/v2/models/{path}/{verb}", body)
    assert found == status and words in answer["error"]


def test_compressed_and_get(server: Server) -> None:
    packed = gzip.compress(json.dumps({"x": [1, 2, 3, 4]}).encode())
    answer = ask(server, "/v2/models/scale/generate", packed, **{"content-encoding": "gzip"})
    assert answer[0] == 200
    assert ask(server, "/v2/models/scale/generate")[0] == 501


# -- OpenAPI ----------------------------------------------------------------------------------------------------------
def test_the_document_is_what_the_server_answers(server: Server) -> None:
    """Every operation meets a route, every route an operation, every reference a schema."""
    status, document, _ = ask(server, "/openapi.json")
    assert status == 200 and document["openapi"] == "3.1.0"
    patterns = {(method.decode().lower(), route.pattern.pattern) for route in ROUTES for method in route.methods}
    patterns |= {("post", _INFER.pattern), ("post", _GENERATE.pattern)}
    met = set()
    for path, methods in document["paths"].items():
        for method in methods:
            concrete = re.sub(r"\{\w+\}", "1", path)
            meeting = {(m, pattern) for m, pattern in patterns if m == method and re.fullmatch(pattern, concrete)}
            assert meeting, f"{method} {path} has no route"
            met |= meeting
    assert {pattern for _, pattern in patterns} == {pattern for _, pattern in met}
    names = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert names == set(openapi.SCHEMAS)


def test_the_page(server: Server) -> None:
    status, page, headers = ask(server, "/docs")
    assert status == 200 and headers["content-type"].startswith("text/html") and "/v2/models/{model}/infer" in page
    assert not re.search(r'(src|href)="(https?:)?//', page), "nothing is fetched from elsewhere"


# -- models that a request carries ------------------------------------------------------------------------------------
def encoded(proto: onnx.ModelProto) -> str:
    return base64.b64encode(proto.SerializeToString()).decode()


def load(server: Server, name: str, **parameters: Any) -> tuple[int, Any]:
    return ask(server, f"/v2/repository/models/{name}/load", {"parameters": parameters})[:2]


def tenfold(server: Server, model: str) -> Any:
    return ask(server, f"/v2/models/{model}/generate", {"x": [1, 2, 3, 4]})[1].get("y")


def test_a_model_in_a_request(tmp_path: Path, engine_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    with BackgroundServer(options(tmp_path / "models", engine_cache)) as server:
        given = {"config": "{}", "file:1/model.onnx": encoded(scale(10.0))}
        assert load(server, "fresh", **given)[0] == 200 and tenfold(server, "fresh") == [10, 20, 30, 40]
        assert load(server, "fresh", **{**given, "file:1/model.onnx": encoded(scale(100.0))})[0] == 200
        assert tenfold(server, "fresh") == [100, 200, 300, 400]
        assert len(list((tmp_path / "temporary").iterdir())) == 1
        status, answer = load(server, "fresh", **{**given, "file:1/model.onnx": base64.b64encode(b"junk").decode()})
        assert (
            status == 400 and "cannot be built" in answer["error"] and tenfold(server, "fresh") == [100, 200, 300, 400]
        )
        config = json.dumps({"max_batch_size": 2})
        assert load(server, "fresh", **{**given, "config": config})[0] == 200
        assert server.service.config("fresh").max_batch_size == 2
        assert ask(server, "/v2/repository/models/fresh/unload", {})[0] == 200
    assert not list((tmp_path / "temporary").iterdir())


def test_the_index_has_digests(server: Server) -> None:
    index = {item["name"]: item for item in ask(server, "/v2/repository/index", {})[1]}
    for name in ("simple", "cached"):
        found = server.repository.find(name)
        assert index[name]["file_sha256"] == found.digests["file_sha256"] and len(index[name]["engine_sha256"]) == 64
    assert index["simple"]["file_sha256"] != index["cached"]["file_sha256"]
    (root,) = server.repository.roots
    content = (root / "simple" / "1" / "model.onnx").read_bytes()
    assert index["simple"]["file_sha256"] == hashlib.sha256(content).hexdigest()
    assert "file_sha256" not in index["chain"]


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("m", "file:../x/model.onnx", "", "leads out"), ("m", "file:/etc/passwd", "", "leads out"),
        ("m", "file:", "", "leads out"), ("m", "file:1/model.onnx", "*not base64*", "not base64"),
        ("m", "file:1/model.onnx", 5, "not base64"), ("m", "colour", "blue", "'colour' is not supported"),
        ("..", "file:1/model.onnx", "", "no model name"), ("a%2fb", "file:1/model.onnx", "", "no model name"),
        ("m", f"file:1/{'x' * 300}", "", "leads out"),
    ],
)  # fmt: skip
def test_files_that_are_refused(server: Server, name: str, key: str, value: Any, words: str) -> None:
    status, answer = load(server, name, config="{}", **{key: value})
    assert status == 400 and words in answer["error"]


def test_files_need_a_configuration(server: Server) -> None:
    status, answer = load(server, "m", **{"file:1/model.onnx": ""})
    assert status == 400 and "without the parameter 'config'" in answer["error"]
    status, answer = load(server, "m", config="{}", **{"file:1": "", "file:1/model.onnx": ""})
    assert status == 400 and "cannot be written" in answer["error"]


def test_numbers_that_do_not_fit_are_no_infinities(server: Server) -> None:
    entry = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1e39, 0, 0, 0]}
    status, answer, _ = ask(server, "/v2/models/scale/infer", {"inputs": [entry]})
    assert status == 400 and "does not fit into FP32" in answer["error"]
