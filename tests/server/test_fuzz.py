"""Mutated requests against a whole server: each gets a 2xx, a 4xx or a closed connection, never a 500."""

import http.client
import json
import random
import re
import socket

import numpy as np
import pytest

from ingot.server.app import Server

STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
ROUTES = (
    b"/v2", b"/v2/models/simple/infer", b"/v2/models/simple/versions/1/infer", b"/v2/models/stats",
    b"/v2/repository/index", b"/v2/models/simple/config", b"/v2/logging", b"/v2/trace/setting",
    b"/v2/systemsharedmemory/region/x/register", b"/v2/models/%2e%2e%2fsimple", b"/v2/models/simple/versions/-1/infer",
    b"/v2/models/simple/versions/99999999999999999999/infer", b"//", b"/v2/models//infer", b"*",
)  # fmt: skip
BINARY = np.arange(16, dtype=np.int32).tobytes()
DOCUMENT = {
    "inputs": [
        {"name": name, "shape": [1, 16], "datatype": "INT32", "parameters": {"binary_data_size": 64}}
        for name in ("INPUT0", "INPUT1")
    ],
    "outputs": [{"name": "OUTPUT0", "parameters": {"binary_data": True}}],
    "parameters": {"timeout": 0, "priority": 0},
}


def plain(source: random.Random) -> bytes:
    text = json.dumps(DOCUMENT).encode()
    body = text + BINARY * 2
    method, route = source.choice([b"POST", b"POST", b"POST", b"GET", b"PUT", b"HEAD"]), source.choice(ROUTES)
    lines = [
        b"%b %b HTTP/1.1" % (method, route),
        b"Host: x", b"Inference-Header-Content-Length: %d" % len(text), b"Content-Length: %d" % len(body),
    ]  # fmt: skip
    if source.random() < 0.2:
        lines.append(source.choice([b"Content-Encoding: gzip", b"Accept-Encoding: gzip", b"Content-Encoding: br"]))
    return b"\r\n".join([*lines, b"", b""]) + body


def mutated(source: random.Random) -> bytes:
    data = bytearray(plain(source))
    for _ in range(source.randint(0, 4)):
        at = source.randrange(len(data))
        data[at : at + source.randint(0, 4)] = source.randbytes(source.randint(0, 4))
    return bytes(data)


@pytest.mark.parametrize("seed", range(2))
def test_mutated_requests(server: Server, seed: int) -> None:
    source, seen = random.Random(seed), set[int]()
    for _ in range(150):
        data = mutated(source)
        with socket.create_connection(("127.0.0.1", server.ports["http"]), timeout=60) as client:
            client.sendall(data)
            client.settimeout(0.02)
            answer = receive(client)
        statuses = [int(status) for status in STATUS.findall(answer)]
        seen |= set(statuses)
        assert all(200 <= status < 500 or status == 501 for status in statuses), (data, answer)
    assert {200, 400, 404} <= seen
    connection = http.client.HTTPConnection("127.0.0.1", server.ports["http"], timeout=60)
    connection.request("GET", "/v2/health/ready")
    assert connection.getresponse().status == 200 and server.service.inflight == 0
    connection.close()


def receive(client: socket.socket) -> bytes:
    """What the server sends, until it closes or waits for more of a request that was cut."""
    received = b""
    try:
        while chunk := client.recv(1 << 16):
            received += chunk
    except (TimeoutError, ConnectionResetError):
        pass
    return received
