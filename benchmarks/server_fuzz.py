"""Mutated inference requests: decoders in this process for the bulk, a whole server over sockets for the rest.

Each is refused in words or accepted; and accepted only where a strict decoder, written independently here, accepts it.
"""

import copy
import json
import math
import os
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from benchmarks.server_load import content_length
from ingot.server import grpc_codec
from ingot.server.http_codec import Decoder
from ingot.server.ports import Port, Ports
from ingot.server.request import ServerError
from ingot.server.schema import message
from ingot.server.shm import Regions

MODEL, WIDTH, MOST_ROWS = "steady", 4, 16
PATIENCE = 20.0
SHARES = {"HTTP decoder": 0.55, "gRPC decoder": 0.20, "HTTP": 0.19, "HTTP bytes": 0.01, "gRPC": 0.05}
FAULTS = ("crashes", "hangs", "500s", "wrongly accepted")
GROWTH, WARM = 0.05, 0.25  # how much memory may grow, after this share of the requests
PORTS = Ports(MODEL, (Port("x", "FP32", (WIDTH,)),), (Port("y", "FP32", (WIDTH,)),), MOST_ROWS)
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
JUNK: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 17, 2**31, 2**63, 2**64, -(2**63), 1.5, 1e308, "", "x", "y", "FP32", "FP64",
    "BYTES", "\0", "é", [], {}, [[]], [1], [1, 4], [4, 1], [-1, 4], [0, 4], [2**62, 4], {"a": 1}, [[1, 2], [3, 4]],
    [1, [2, 3], 4], [True, 1, 2, 3], ["1", "2", "3", "4"], {"binary_data_size": 16}, {"shared_memory_region": "r"},
    float("nan"), math.inf,
)  # fmt: skip


@dataclass(frozen=True)
class Body:
    """What an HTTP request carries: a JSON text and binary data; `length`: the header that tells them apart."""

    data: bytes
    length: int | None


# -- what is sent -----------------------------------------------------------------------------------------------------
def document(source: random.Random) -> tuple[dict[str, Any], bytes]:
    """A right request: its JSON and its binary part."""
    rows = source.randint(1, 3)
    numbers = [round(source.uniform(-9, 9), 3) for _ in range(rows * WIDTH)]
    described: dict[str, Any] = {"name": "x", "shape": [rows, WIDTH], "datatype": "FP32"}
    whole: dict[str, Any] = {"inputs": [described]}
    if source.random() < 0.3:
        whole |= {"id": "a", "parameters": {"priority": 1, "timeout": 10**9, "binary_data_output": True}}
    if source.random() < 0.3:
        whole["outputs"] = [{"name": "y", "parameters": {"binary_data": False, "classification": 0}}]
    if source.random() < 0.5:
        described["data"] = numbers
        return whole, b""
    described["parameters"] = {"binary_data_size": 4 * len(numbers)}
    return whole, struct.pack(f"<{len(numbers)}f", *numbers)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from places(inner)


def change_tree(source: random.Random, tree: dict[str, Any]) -> None:
    """Replace, remove, rename or repeat something in it."""
    container, key = source.choice(list(places(tree)))
    act = source.randrange(4)
    if act == 0 or (isinstance(container, list) and act == 2):
        container[key] = copy.deepcopy(source.choice(JUNK))
    elif act == 1:
        del container[key]
    elif act == 2:
        container[source.choice(("data", "shape", "parameters", "name", "id", "z"))] = container[key]
    elif isinstance(container, list):
        container.append(container[key])
    else:
        container[key] = [container[key]]


def change_bytes(source: random.Random, data: bytes, most: int) -> bytes:
    changed = bytearray(data)
    for _ in range(source.randint(1, most)):
        at = source.randrange(len(changed) + 1)
        changed[at : at + source.randint(0, 3)] = source.randbytes(source.randint(0, 3))
    return bytes(changed)


def body(source: random.Random) -> Body:
    """An HTTP body, right in one of five."""
    tree, binary = document(source)
    kind = source.randrange(5)
    for _ in range(source.randint(1, 2) if kind in (1, 2) else 0):
        if tree:
            change_tree(source, tree)
    text = json.dumps(tree).encode()
    length = len(text) if binary or source.random() < 0.3 else None
    if kind == 3:
        text = change_bytes(source, text, 3)
    if kind == 4:
        binary = change_bytes(source, binary, 2)
        length = source.choice((length, len(text) + source.randint(-3, 3), 0, None))
    return Body(text + binary, length)


def grpc_message(source: random.Random) -> bytes:
    """A serialised ModelInferRequest, right in one of four."""
    rows = source.randint(1, 3)
    asked = message("inference.ModelInferRequest")(model_name=MODEL)
    described = asked.inputs.add(name="x", datatype="FP32", shape=[rows, WIDTH])
    if source.random() < 0.5:
        described.contents.fp32_contents.extend([1.5] * rows * WIDTH)
    else:
        asked.raw_input_contents.append(bytes(4 * rows * WIDTH))
    kind = source.randrange(4)
    for _ in range(source.randint(1, 2) if kind in (1, 2) else 0):
        source.choice(GRPC_CHANGES)(source, asked)
    data = bytes(asked.SerializeToString())
    return change_bytes(source, data, 3) if kind == 3 else data


def _change_shape(source: random.Random, asked: Any) -> None:
    if asked.inputs:
        asked.inputs[0].shape[:] = source.choice(([], [-1, 4], [1, 4], [2**62, 4], [0, 4], [17, 4], [1, 1, 4]))


def _set(name: str) -> Callable[[random.Random, Any], None]:
    def change(source: random.Random, asked: Any) -> None:
        setattr(asked, name, source.choice(("", "1", "0", "-1", "x", MODEL, "9" * 30)))

    return change


GRPC_CHANGES: tuple[Callable[[random.Random, Any], None], ...] = (
    _change_shape,
    _set("model_name"),
    _set("model_version"),
    lambda source, asked: asked.raw_input_contents.append(source.randbytes(source.randint(0, 20))),
    lambda source, asked: asked.inputs.add(name=source.choice("xyz"), datatype=source.choice(("FP32", "BYTES", "q"))),
    lambda source, asked: asked.outputs.add(name=source.choice("xy")),
    lambda source, asked: asked.parameters[source.choice(("priority", "timeout", "sequence_id", "z"))].SetInParent(),
    lambda source, asked: asked.inputs[0].contents.int_contents.append(1) if asked.inputs else None,
)


# -- strict decoders: what may be accepted at all ---------------------------------------------------------------------
class Refused(Exception):
    """Not a request."""


def need(condition: bool) -> None:
    if not condition:
        raise Refused


def _constant(text: str) -> Any:
    raise Refused


def _finite(text: str) -> float:
    need(math.isfinite(float(text)))
    return float(text)


def _kind(value: Any, kind: type) -> Any:
    need(type(value) is kind)
    return value


def strict_http(sent: Body) -> bool:
    """Whether a body is a right request for the model."""
    try:
        need(sent.length is None or 0 <= sent.length <= len(sent.data))
        split = len(sent.data) if sent.length is None else sent.length
        tree = json.loads(sent.data[:split].decode(), parse_constant=_constant, parse_float=_finite)
        _strict_document(_kind(tree, dict), len(sent.data) - split)
    except (Refused, ValueError, RecursionError):
        return False
    return True


def _strict_document(tree: dict[str, Any], binary: int) -> None:
    (described,) = _kind(tree.get("inputs"), list) or [None]
    rows, width = _strict_tensor(_kind(described, dict))
    need(1 <= rows <= MOST_ROWS and width == WIDTH)
    parameters = _kind(described.get("parameters", {}), dict)
    if "binary_data_size" in parameters:
        need(_kind(parameters["binary_data_size"], int) == 4 * rows * width == binary)
    else:
        need("shared_memory_region" not in parameters and binary == 0)
        need(len(list(_numbers(_kind(described.get("data"), list)))) == rows * width)
    _strict_rest(tree)


def _strict_tensor(described: dict[str, Any]) -> tuple[int, int]:
    need(described.get("name") == "x" and described.get("datatype") == "FP32")
    rows, width = _kind(described.get("shape"), list)
    return _kind(rows, int), _kind(width, int)


def _numbers(value: list[Any]) -> Iterator[float]:
    for item in value:
        if type(item) is list:
            yield from _numbers(item)
        else:
            need(type(item) in (int, float))
            yield item


def _strict_rest(tree: dict[str, Any]) -> None:
    _kind(tree.get("id", ""), str)
    parameters = _kind(tree.get("parameters", {}), dict)
    for name in ("priority", "timeout"):
        need(_kind(parameters.get(name, 0), int) >= 0)
    for name in ("sequence_start", "sequence_end"):
        need(not parameters.get("sequence_id") or type(parameters.get(name, False)) is bool)
    _kind(parameters.get("binary_data_output", False), bool)
    for output in _kind(tree.get("outputs", []), list):
        need(_kind(output, dict).get("name") == "y")
        chosen = _kind(output.get("parameters", {}), dict)
        need(_kind(chosen.get("classification", 0), int) >= 0 and "shared_memory_region" not in chosen)
        _kind(chosen.get("binary_data", False), bool)


def strict_grpc(data: bytes) -> bool:
    """Whether bytes are a right ModelInferRequest for the model."""
    try:
        asked = message("inference.ModelInferRequest").FromString(data)
        need(asked.model_name == MODEL and asked.model_version in ("", "1"))
        (described,) = asked.inputs
        rows, width = described.shape
        need((described.name, described.datatype, width) == ("x", "FP32", WIDTH) and 1 <= rows <= MOST_ROWS)
        raw, typed = list(asked.raw_input_contents), described.contents.fp32_contents
        need([len(item) for item in raw] == [4 * rows * width] or (not raw and len(typed) == rows * width))
        need(not raw or not described.HasField("contents"))
        need(all(value.WhichOneof("parameter_choice") for value in asked.parameters.values()))
        need(all(output.name == "y" for output in asked.outputs))
    except (Refused, ValueError, DecodeError):
        return False
    return True


# -- outcomes ---------------------------------------------------------------------------------------------------------
@dataclass
class Outcomes:
    """What was seen. Thread-safe."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, status: int, allowed: bool, sent: object) -> None:
        """An answer: 2xx only where it is allowed, never 500."""
        kind = "accepted" if 200 <= status < 300 else "500s" if status == 500 else "refused"
        if kind == "accepted" and not allowed:
            kind = "wrongly accepted"
        self.add(kind, sent)

    def add(self, kind: str, sent: object) -> None:
        with self._lock:
            self.counts[kind] += 1
            if kind not in ("accepted", "refused") and len(self.faults) < 10:
                self.faults.append(f"{kind}: {sent!r}"[:600])


def decode_http(count: int, source: random.Random, outcomes: Outcomes) -> None:
    """The HTTP decoder and the checks of the model's ports, here."""
    decoder = Decoder(Regions())
    for _ in range(count):
        sent = body(source)
        try:
            PORTS.check(decoder(sent.data, sent.length, MODEL, 0, 0))
            status = 200
        except ServerError as error:
            status = error.code.status
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            status, sent = 500, Body(f"{error!r} ".encode() + sent.data, sent.length)
        outcomes.note(status, strict_http(sent), sent)


def decode_grpc(count: int, source: random.Random, outcomes: Outcomes) -> None:
    """The gRPC decoder, here."""
    decoder = grpc_codec.Decoder(Regions())  # with what it remembers of the messages before
    for _ in range(count):
        data = grpc_message(source)
        try:
            request = decoder(data, 0)
            PORTS.check(request)
            status = 200 if request.model == MODEL and request.version in (0, 1) else 404
        except ServerError:
            status = 400
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            status, data = 500, f"{error!r} ".encode() + data
        outcomes.note(status, strict_grpc(data), data)


def head(sent: Body) -> bytes:
    lines = [f"POST /v2/models/{MODEL}/infer HTTP/1.1", "Host: x", f"Content-Length: {len(sent.data)}"]
    if sent.length is not None:
        lines.append(f"Inference-Header-Content-Length: {sent.length}")
    return "\r\n".join([*lines, "", ""]).encode()


def ask_http(port: int, count: int, source: random.Random, outcomes: Outcomes) -> None:
    """Bodies under right heads, over one kept connection."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    for _ in range(count):
        sent = body(source)
        try:
            connection.sendall(head(sent) + sent.data)
            outcomes.note(read_status(connection), strict_http(sent), sent)
        except TimeoutError:
            outcomes.add("hangs", sent)
        except ConnectionError:
            outcomes.add("crashes", sent)
            connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    connection.close()


def read_status(connection: socket.socket) -> int:
    received = b""
    while (end := received.find(b"\r\n\r\n")) < 0 or len(received) < end + 4 + content_length(received[:end]):
        chunk = connection.recv(1 << 16)
        if not chunk:
            raise ConnectionResetError
        received += chunk
    return int(received[9:12])


def ask_bytes(port: int, count: int, source: random.Random, outcomes: Outcomes) -> None:
    """Whole requests with changed bytes, each on a connection of its own: any status but 500, or it is closed."""
    for _ in range(count):
        sent = body(source)
        data = change_bytes(source, head(sent) + sent.data, 4)
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
            connection.sendall(data)
            connection.settimeout(0.05)
            statuses = [int(status) for status in STATUS.findall(everything(connection))]
        outcomes.add("500s" if 500 in statuses else "refused", data)


def everything(connection: socket.socket) -> bytes:
    """What comes until the server closes, or waits for more of a request that was cut."""
    received = b""
    try:
        while chunk := connection.recv(1 << 16):
            received += chunk
    except (TimeoutError, ConnectionResetError):
        pass
    return received


def ask_grpc(port: int, count: int, source: random.Random, outcomes: Outcomes) -> None:
    """Messages over a channel; INTERNAL and UNKNOWN are gRPC's 500."""
    statuses = {grpc.StatusCode.INTERNAL: 500, grpc.StatusCode.UNKNOWN: 500}
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for _ in range(count):
            data, status = grpc_message(source), 200
            try:
                call(data, timeout=PATIENCE)
            except grpc.RpcError as error:
                status = statuses.get(error.code(), 400)
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    outcomes.add("hangs", data)
            outcomes.note(status, strict_grpc(data), data)


# -- all --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Server:
    """What is sent to: ports by protocol, and the processes there are now."""

    ports: Mapping[str, int]
    processes: Callable[[], list[int]]


def resident(pids: list[int]) -> int:
    """Bytes that processes hold in memory."""
    pages = sum(int((Path("/proc") / str(pid) / "statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE")


def fuzz(server: Server, count: int, seed: int) -> tuple[Outcomes, float]:
    """(what was seen, by what share the memory of the server or of this process grew after the first quarter)."""
    outcomes, source, ports = Outcomes(), random.Random(seed), server.ports
    parts: dict[str, Callable[[int], None]] = {
        "HTTP decoder": lambda n: decode_http(n, source, outcomes),
        "gRPC decoder": lambda n: decode_grpc(n, source, outcomes),
        "HTTP": lambda n: ask_http(ports["http"], n, source, outcomes),
        "HTTP bytes": lambda n: ask_bytes(ports["http"], n, source, outcomes),
        "gRPC": lambda n: ask_grpc(ports["grpc"], n, source, outcomes),
    }
    held: list[dict[str, int]] = []
    for share in (WARM, 1 - WARM):
        for name, part in parts.items():
            part(round(count * SHARES[name] * share))
        held.append({"server": resident(server.processes()), "here": resident([os.getpid()])})
    return outcomes, max(held[1][name] / held[0][name] - 1 for name in held[0])


def run(server: Server, count: int, seed: int) -> tuple[str, bool, dict[str, Any]]:
    """(line, passed, figures) of `count` requests."""
    before, begun = server.processes(), time.monotonic()
    outcomes, growth = fuzz(server, count, seed)
    if server.processes() != before:
        outcomes.add("crashes", "a process of the server ended")
    counts, took = outcomes.counts, time.monotonic() - begun
    for fault in outcomes.faults:
        print(f"  {fault}")
    total = sum(counts.values())
    print(f"{total} mutated requests in {took:.0f} s: {counts['accepted']} accepted, {counts['refused']} refused")
    faults = ", ".join(f"{name} {counts[name]}" for name in FAULTS)
    good = not any(counts[name] for name in FAULTS) and growth < GROWTH and counts["accepted"] > count // 10
    return f"{faults}, rss growth {growth:.1%}", good, {**counts, "growth": growth}
