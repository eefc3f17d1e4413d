"""Bad input against a whole server, over HTTP and gRPC: always a clear 4xx, never a hang, a leak or a lost request."""

import contextlib
import gzip
import http.client
import json
import os
import resource
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from ingot.server.app import BackgroundServer, Server
from ingot.server.schema import message
from ingot.server.wire import Limits
from tests.server.conftest import options
from tests.server.models import add_version, scale

GOOD = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
LIMIT = 4 << 20


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory, engine_cache: Path) -> Iterator[Server]:
    """Good models beside broken ones, behind small limits and short patience."""
    root = tmp_path_factory.mktemp("models")
    add_version(root, "scale", 1, scale(2.0))
    for name, config in (("malformed", "max_batch_size: many"), ("impossible", "max_batch_size: -3"), ("empty", "")):
        add_version(root, name, 1, scale(2.0), config)
    (root / "empty" / "1" / "model.onnx").write_bytes(b"")
    (root / "truncated" / "1").mkdir(parents=True)
    (root / "truncated" / "1" / "model.onnx").write_bytes(scale(2.0).SerializeToString()[:-7])
    (root / "escaping").mkdir()
    (root / "escaping" / "config.pbtxt").write_text('default_model_filename: "../../scale/1/model.onnx"')
    (root / "escaping" / "1").mkdir()
    limits = Limits(body=LIMIT, stalled=1.0, idle=3.0, connections=200)
    with BackgroundServer(options(root, engine_cache, exit_on_error=False, limits=limits)) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(strict: Server) -> Iterator[None]:
    """After every test a good request is answered rightly and nothing is in flight."""
    yield
    status, answer = posted(strict, json.dumps({"inputs": [GOOD]}).encode())
    assert status == 200 and answer["outputs"][0]["data"] == [2, 4, 6, 8]
    assert strict.service.inflight == 0


def posted(server: Server, body: bytes, path: str = "/v2/models/scale/infer", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.ports["http"], timeout=60)
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    raw = response.read()
    connection.close()
    return response.status, json.loads(raw) if raw else None


def refused(server: Server, body: bytes, words: str, status: int = 400, **more: str) -> None:
    found, answer = posted(server, body, **more)
    assert found == status and words in answer["error"], answer


# -- JSON -------------------------------------------------------------------------------------------------------------
def changed(**changes: Any) -> bytes:
    return json.dumps({"inputs": [{**GOOD, **changes}]}).encode()


TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "NaN": ({"data": [float("nan"), 1, 2, 3]}, "failed to parse"),
    "infinity": ({"data": [float("inf"), 1, 2, 3]}, "failed to parse"),
    "too large": ({"data": [1e39, 1, 2, 3]}, "does not fit into FP32"),
    "negative": ({"shape": [-1, -4]}, "negative dimension"),
    "shape overflow": ({"shape": [1 << 62, 4]}, "too large"),
    "shape beyond 64 bits": ({"shape": [1 << 70, 4]}, "must be integers"),
    "product overflow": ({"shape": [1 << 33, 1 << 33, 1 << 33]}, "too large"),
    "many dimensions": ({"shape": [1] * 1000}, "too large"),
    "zero rows": ({"shape": [0, 4], "data": []}, "batch-size"),
    "fractional shape": ({"shape": [1.0, 4]}, "must be integers"),
    "boolean shape": ({"shape": [True, 4]}, "must be integers"),
    "too few": ({"data": [1, 2, 3]}, "has 3 elements"),
    "too many": ({"data": [1, 2, 3, 4, 5]}, "has 5 elements"),
    "ragged": ({"data": [[1, 2], [3]]}, "ragged"),
    "text": ({"data": ["1", "2", "3", "4"]}, "must be FP32"),
    "unknown type": ({"datatype": "FP13"}, "unknown datatype"),
    "other type": ({"datatype": "INT32"}, "data-type is 'INT32'"),
    "unknown name": ({"name": "z"}, "unexpected inference input 'z'"),
    "bytes claimed": ({"parameters": {"binary_data_size": 16}}, "0 are left"),
    "negative bytes": ({"parameters": {"binary_data_size": -16}}, "unsigned integer"),
    "shared memory of nobody": (
        {"parameters": {"shared_memory_region": "none", "shared_memory_byte_size": 16}}, "Unable to find",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors(strict: Server, kind: str) -> None:
    changes, words = TENSORS[kind]
    refused(strict, changed(**changes), words, 404 if "nobody" in kind else 400)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"inputs": 5}', b'{"inputs": [5]}', b"\xff\xfe", b'{"inputs": [], "inputs": 1}'],
)  # fmt: skip
def test_no_request_at_all(strict: Server, body: bytes) -> None:
    refused(strict, body, "")


def test_depth(strict: Server) -> None:
    for depth in (60, 100, 900, 5_000, 1_000_000):
        nested = b"[" * depth + b"1,2,3,4" + b"]" * depth
        body = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,4],"data":%b}]}' % nested
        status, answer = posted(strict, body)
        assert status == (200 if depth == 60 else 400), answer
        assert posted(strict, b'{"a":' * depth + b"1" + b"}" * depth)[0] == (413 if depth == 1_000_000 else 400)


# -- bytes ------------------------------------------------------------------------------------------------------------
def binary(size: int, sent: int, head: int | None = None) -> tuple[bytes, dict[str, str]]:
    entry = {"name": "x", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": size}}
    text = json.dumps({"inputs": [entry]}).encode()
    length = len(text) if head is None else head
    return text + bytes(sent), {"Inference-Header-Content-Length": str(length)}


@pytest.mark.parametrize(
    ("size", "sent", "words"),
    [
        (16, 15, "15 are left"),
        (16, 17, "1 bytes are left over"),
        (12, 12, "unexpected byte size"),
        (1 << 62, 16, "left"),
    ],
)
def test_wrong_byte_counts(strict: Server, size: int, sent: int, words: str) -> None:
    body, headers = binary(size, sent)
    refused(strict, body, words, **headers)


@pytest.mark.parametrize("head", ["-1", "x", "99999999999999999999", "1000000", "3"])
def test_wrong_header_lengths(strict: Server, head: str) -> None:
    refused(strict, binary(16, 16)[0], "", **{"Inference-Header-Content-Length": head})


def test_bytes_elements_that_end_beyond(strict: Server) -> None:
    entry = {"name": "x", "datatype": "BYTES", "shape": [1 << 39], "parameters": {"binary_data_size": 8}}
    text = json.dumps({"inputs": [entry]}).encode()
    raw = (0xFFFFFFFF).to_bytes(4, "little") + b"abcd"
    refused(strict, text + raw, "ends beyond", **{"Inference-Header-Content-Length": str(len(text))})


# -- compression ------------------------------------------------------------------------------------------------------
def test_decompression_bombs(strict: Server) -> None:
    """A gigabyte in a megabyte: refused, and no more than the limit was ever unpacked."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(1024)), packer.flush()])
    assert len(bomb) < LIMIT
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(5):
        refused(strict, bomb, "exceeds", 413, **{"content-encoding": "gzip"})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10, "kilobytes"


def test_bodies_that_are_not_what_they_say(strict: Server) -> None:
    good = gzip.compress(changed())
    refused(strict, good[:-5], "cut short", **{"content-encoding": "gzip"})
    refused(strict, good[:10] + b"\0\1\2" + good[13:], "not valid gzip", **{"content-encoding": "gzip"})
    refused(strict, good, "not valid deflate", **{"content-encoding": "deflate"})
    refused(strict, good, "not supported", **{"content-encoding": "br"})


# -- paths ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["..%2f..%2fetc", "%2fetc%2fpasswd", "..", ".", "a%00b", "%5c..", "scale%2f1", ".hidden"]
)
def test_names_that_lead_elsewhere(strict: Server, name: str) -> None:
    for path in (f"/v2/repository/models/{name}/load", f"/v2/models/{name}/infer"):
        status, answer = posted(strict, b"{}", path)
        assert status in (400, 404) and "root:" not in answer["error"]


@pytest.mark.parametrize("key", ["../../etc/passwd", "/../etc/passwd", "..", "/", "", "a/b", "x" * 300, "a\0b"])
def test_shared_memory_names_that_lead_elsewhere(strict: Server, key: str) -> None:
    body = json.dumps({"key": key, "offset": 0, "byte_size": 16}).encode()
    refused(strict, body, "", path="/v2/systemsharedmemory/region/r/register")


def test_shared_memory_that_is_no_memory(strict: Server, tmp_path: Path) -> None:
    link = Path("/dev/shm") / f"ingot-test-{os.getpid()}"
    link.symlink_to("/etc/passwd")
    try:
        body = json.dumps({"key": link.name, "offset": 0, "byte_size": 16}).encode()
        refused(strict, body, link.name, path="/v2/systemsharedmemory/region/r/register")
    finally:
        link.unlink()


def test_broken_models_among_good_ones(strict: Server) -> None:
    """Each says why; the good one serves, as every test here shows."""
    index = {item["name"]: item for item in posted(strict, b"", "/v2/repository/index")[1]}
    assert index["scale"]["state"] == "READY"
    for name, words in {
        "malformed": "max_batch_size", "impossible": "must not be negative", "empty": "is empty", "truncated": "ONNX",
        "escaping": "leads out",
    }.items():  # fmt: skip
        assert index[name]["state"] == "UNAVAILABLE" and words in index[name]["reason"], index[name]
        status, answer = posted(strict, json.dumps({"inputs": [GOOD]}).encode(), f"/v2/models/{name}/infer")
        assert status == 404 and "no available versions" in answer["error"]


# -- connections ------------------------------------------------------------------------------------------------------
def connected(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.ports["http"]), timeout=60)


HEAD = b"POST /v2/models/scale/infer HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize("begun", [b"POST /v2/mo", HEAD, HEAD + b"Content-Length: 100\r\n\r\n{", b""])
def test_slow_clients_are_closed(strict: Server, begun: bytes) -> None:
    """Who stops within a request, or never asks, is closed; meanwhile others are served."""
    start = time.monotonic()
    with connected(strict) as client:
        client.sendall(begun)
        assert posted(strict, changed())[0] == 200
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(100) == b""
    assert time.monotonic() - start > 0.5


def test_a_client_that_drips(strict: Server) -> None:
    """A byte now and then does not hold a place for ever: progress counts, but so does the header's limit."""
    with connected(strict) as client:
        for byte in HEAD + b"Content-Length: %d\r\n\r\n" % len(changed()):
            client.sendall(bytes([byte]))
        client.sendall(changed())
        assert b" 200 OK" in client.recv(10_000)


def test_half_open_connections(strict: Server) -> None:
    """A client that ends its side before it was answered is taken as gone; its place is free again."""
    for data in (b"", HEAD, HEAD + b"Content-Length: %d\r\n\r\n" % len(changed()) + changed()):
        with connected(strict) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while client.recv(10_000):
                    pass
    deadline = time.monotonic() + 60
    while strict.front.connections and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not strict.front.connections


def test_many_that_reset(strict: Server) -> None:
    def reset() -> None:
        for _ in range(20):
            client = connected(strict)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(changed()) + changed())
            client.close()

    threads = [threading.Thread(target=reset) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    deadline = time.monotonic() + 60
    while strict.service.inflight and time.monotonic() < deadline:
        time.sleep(0.05)


# -- gRPC -------------------------------------------------------------------------------------------------------------
def call(server: Server, raw: bytes, method: str = "ModelInfer") -> grpc.StatusCode:
    with grpc.insecure_channel(f"127.0.0.1:{server.ports['grpc']}") as channel:
        try:
            channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(raw, timeout=60)
        except grpc.RpcError as error:
            assert error.details()
            return error.code()
    return grpc.StatusCode.OK


def asked(change: Callable[[Any], None]) -> bytes:
    request = message("inference.ModelInferRequest")(model_name="scale")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(np.ones(4, np.float32).tobytes())
    change(request)
    return request.SerializeToString()


def contents(request: Any, values: list[float]) -> None:
    del request.raw_input_contents[:]
    request.inputs[0].contents.fp32_contents.extend(values)


MESSAGES: dict[str, Callable[[Any], None]] = {
    "negative": lambda r: r.inputs[0].shape.__setitem__(slice(None), [-1, -4]),
    "overflow": lambda r: r.inputs[0].shape.__setitem__(slice(None), [1 << 62, 4]),
    "too few bytes": lambda r: r.raw_input_contents.__setitem__(0, b"123"),
    "too many bytes": lambda r: r.raw_input_contents.__setitem__(0, bytes(17)),
    "none": lambda r: r.raw_input_contents.pop(),
    "too many tensors": lambda r: r.raw_input_contents.append(b""),
    "both": lambda r: r.inputs[0].contents.fp32_contents.append(1.0),
    "too few elements": lambda r: contents(r, [1.0]),
    "no type": lambda r: setattr(r.inputs[0], "datatype", ""),
    "twice": lambda r: (r.inputs.append(r.inputs[0]), r.raw_input_contents.append(r.raw_input_contents[0])),
    "empty parameter": lambda r: r.parameters["priority"].SetInParent(),
    "negative timeout": lambda r: setattr(r.parameters["timeout"], "int64_param", -1),
    "text timeout": lambda r: setattr(r.parameters["timeout"], "string_param", "soon"),
    "version": lambda r: setattr(r, "model_version", "-1"),
    "unknown output": lambda r: r.outputs.add(name="none"),
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_messages(strict: Server, kind: str) -> None:
    assert call(strict, asked(MESSAGES[kind])) is grpc.StatusCode.INVALID_ARGUMENT


def test_malformed_protobuf(strict: Server, caplog: pytest.LogCaptureFixture) -> None:
    """What is no message at all is the client's mistake, and no traceback in our log."""
    good = asked(lambda request: None)
    assert call(strict, good) is grpc.StatusCode.OK
    for raw in (b"\xff" * 20, good[:-3], b"\x0a\xff\xff\xff\xff\x0f", b"\x0b" * 10_000):
        assert call(strict, raw) is call(strict, raw, "ModelMetadata") is grpc.StatusCode.INVALID_ARGUMENT, raw[:20]
    with grpc.insecure_channel(f"127.0.0.1:{strict.ports['grpc']}") as channel:
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        answer = message("inference.ModelStreamInferResponse").FromString(next(stream(iter([b"\xff"]), timeout=60)))
        assert "is no inference.ModelInferRequest" in answer.error_message
    assert not caplog.records
    assert call(strict, b"", "ServerUnheardOf") is grpc.StatusCode.UNIMPLEMENTED


def test_messages_beyond_the_limit(strict: Server) -> None:
    raw = asked(lambda request: request.raw_input_contents.append(bytes(LIMIT)))
    assert call(strict, raw) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_mutated_messages(strict: Server) -> None:
    generator, good = np.random.default_rng(0), bytearray(asked(lambda request: None))
    seen = set()
    with grpc.insecure_channel(f"127.0.0.1:{strict.ports['grpc']}") as channel:
        ask = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for _ in range(300):
            raw = bytearray(good)
            for at in generator.integers(0, len(raw), generator.integers(1, 4)):
                raw[at] = generator.integers(0, 256)
            try:
                ask(bytes(raw), timeout=60)
                seen.add(grpc.StatusCode.OK)
            except grpc.RpcError as error:
                seen.add(error.code())
    assert {code.name for code in seen} == {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}
