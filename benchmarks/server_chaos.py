"""The model server while everything goes wrong: nothing is lost, wrong or hung.

    python -m benchmarks.server_chaos [--quick] [--only chaos,fuzz,queue] [--seed 0] [--json results.json]

chaos  32 threads of 1,024 requests over HTTP and gRPC while models are loaded, unloaded, reloaded with other weights,
       and their processes killed; at nine tenths the server is told to end. Every request is answered rightly, refused
       in words, or comes after the end.
fuzz   100,000 mutated requests: benchmarks/server_fuzz.py.
queue  one request executes (its process is stopped), ten may wait, twelve arrive: two are refused, in Triton's words.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import onnx
from onnx import TensorProto, helper

from benchmarks import server_fuzz, server_hosts
from benchmarks.server_load import content_length
from benchmarks.timing import RESULTS, write_json
from ingot.server.schema import message

THREADS, REQUESTS = 32, 1024
PATIENCE = 30.0  # seconds after which a request counts as hung
FACTORS = (2.0, 3.0)
QUEUE = "max_batch_size: 1 dynamic_batching { default_queue_policy { max_queue_size: 10 } }"


# -- a server over small models ---------------------------------------------------------------------------------------
def scale(factor: float) -> onnx.ModelProto:
    """y = x * factor; float32 [N, 4]."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in "xy")
    constant = helper.make_tensor("factor", TensorProto.FLOAT, [], [factor])
    graph = helper.make_graph([helper.make_node("Mul", ["x", "factor"], ["y"])], "scale", [x], [y], [constant])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def put_model(root: Path, name: str, factor: float, config: str = "") -> None:
    """Write or replace root/name/1/model.onnx in one step."""
    folder = root / name / "1"
    folder.mkdir(parents=True, exist_ok=True)
    if config:
        (folder.parent / "config.pbtxt").write_text(config)
    partial = root.parent / f"{name}.partial"
    onnx.save(scale(factor), partial)
    partial.rename(folder / "model.onnx")


@contextlib.contextmanager
def small_models() -> Iterator[tuple[Path, server_hosts.Host]]:
    """A server of models in processes of their own: one steady, one killed, one changed, one with a short queue."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "models"
        put_model(root, "steady", FACTORS[0])
        put_model(root, "killed", FACTORS[0], "instance_group { count: 2 kind: KIND_CPU }")
        put_model(root, "changed", FACTORS[0])
        put_model(root, "queued", FACTORS[0], QUEUE)
        flags = ("--model-control-mode=explicit", "--load-model=*", f"--engine-cache={folder}/engines")
        with server_hosts.ingot_server("chaos", root, *flags, processes=True) as host:
            os.killpg(host.process.pid, signal.SIGCONT)
            yield root, host


def workers_of(host: server_hosts.Host) -> list[int]:
    """The processes of the server's models."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # ended meanwhile
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == host.process.pid and b"ingot.server.worker" in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return sorted(found)


# -- clients ----------------------------------------------------------------------------------------------------------
class Ended(Exception):
    """The server no longer listens."""


class Lost(Exception):
    """A request without an answer."""


@dataclass
class HttpClient:
    """One kept connection; a request that met it closed while idle is sent again on a new one, as HTTP clients do."""

    port: int
    ending: threading.Event
    connection: socket.socket | None = None

    def ask(self, model: str, value: float) -> tuple[int, float | str]:
        """(status, y[0] or the error)."""
        request = self._request(model, value)
        reused = self.connection is not None
        answer = self._exchange(request)
        if answer is None and reused and self.ending.is_set():
            answer = self._exchange(request)
        if answer is None:
            which = f"a {'kept' if reused else 'new'} one, {'at the end' if self.ending.is_set() else 'before the end'}"
            raise Lost(f"{model}: the connection ({which}) was closed without an answer")
        return answer

    def _request(self, model: str, value: float) -> bytes:
        described = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}
        text = json.dumps({"inputs": [described], "parameters": {"binary_data_output": True}}).encode()
        length = f"Inference-Header-Content-Length: {len(text)}"
        return server_hosts.post(f"/v2/models/{model}/infer", text + struct.pack("<4f", *[value] * 4), length)

    def _exchange(self, request: bytes) -> tuple[int, float | str] | None:
        try:
            if self.connection is None:
                self.connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
            self.connection.sendall(request)
            return self._answer()
        except ConnectionRefusedError as error:
            raise Ended from error
        except ConnectionError:
            self.close()
            return None

    def _answer(self) -> tuple[int, float | str] | None:
        assert self.connection is not None
        received = b""
        while (end := received.find(b"\r\n\r\n")) < 0 or len(received) < end + 4 + content_length(received[:end]):
            chunk = self.connection.recv(1 << 16)
            if not chunk:
                self.close()
                if received:
                    raise Lost(f"an answer was cut short: {received!r}")
                return None
            received += chunk
        if b"connection: close" in received[:end].lower():
            self.close()
        status = int(received[9:12])
        if status == 200:
            return status, float(struct.unpack("<f", received[-4:])[0])
        return status, str(json.loads(received[end + 4 :])["error"])

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


_STATUSES = {grpc.StatusCode.NOT_FOUND: 404, grpc.StatusCode.UNAVAILABLE: 503, grpc.StatusCode.INVALID_ARGUMENT: 400}
_TRANSPORT = ("failed to connect", "Connection refused", "Socket closed", "recvmsg", "GOAWAY", "Connection reset")


@dataclass
class GrpcClient:
    """One channel."""

    port: int
    ending: threading.Event

    def __post_init__(self) -> None:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        answer = message("inference.ModelInferResponse")
        self.call = self.channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer", response_deserializer=answer.FromString
        )

    def ask(self, model: str, value: float) -> tuple[int, float | str]:
        """(status as HTTP's, y[0] or the error)."""
        asked = message("inference.ModelInferRequest")(model_name=model)
        asked.inputs.add(name="x", datatype="FP32", shape=[1, 4])
        asked.raw_input_contents.append(struct.pack("<4f", *[value] * 4))
        try:
            answer = self.call(asked.SerializeToString(), timeout=PATIENCE)
        except grpc.RpcError as error:
            return self._failed(error)
        return 200, float(struct.unpack("<f", answer.raw_output_contents[0][-4:])[0])

    def close(self) -> None:
        self.channel.close()

    def _failed(self, error: Any) -> tuple[int, str]:
        details = str(error.details())
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise TimeoutError(details)
        if error.code() is grpc.StatusCode.CANCELLED and self.ending.is_set():
            raise Ended  # so gRPC's core refuses calls that reach a server which no longer takes any
        if any(words in details for words in _TRANSPORT):
            raise Ended if self.ending.is_set() else Lost(details)
        return _STATUSES.get(error.code(), 500), details


# -- chaos ------------------------------------------------------------------------------------------------------------
@dataclass
class Tally:
    """What became of the requests, and what was done to the server. Thread-safe."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, what: str, fault: str = "") -> None:
        with self._lock:
            self.counts[what] += 1
            if fault and len(self.faults) < 20:
                self.faults.append(f"{what}: {fault}")

    @property
    def requests(self) -> int:
        return sum(self.counts[what] for what in ("answered", "refused", "after the end", "lost", "wrong", "hung"))


def verdict(model: str, value: float, status: int, content: float | str) -> tuple[str, str]:
    """(what became of a request, what is wrong with it)."""
    factors = FACTORS if model == "changed" else FACTORS[:1]
    if status == 200:
        right = content in [value * factor for factor in factors]
        return ("answered", "") if right else ("wrong", f"{model}: {value} gave {content}")
    if status == 503 or (status == 404 and model == "changed"):
        return "refused", ""
    return "wrong", f"{model}: {status} {content}"


def ask_all(
    client: HttpClient | GrpcClient, numbers: range, seed: int, tally: Tally, reached: Callable[[int], None]
) -> None:
    """One client's requests."""
    source = random.Random(seed)
    for number in numbers:
        model = source.choice(("steady", "killed", "changed"))
        try:
            what, fault = verdict(model, float(number), *client.ask(model, float(number)))
        except Ended:
            what, fault = ("after the end", "") if client.ending.is_set() else ("lost", "the server does not listen")
        except TimeoutError as error:
            what, fault = "hung", f"{model}: {error}"
        except Lost as error:
            what, fault = "lost", str(error)
        tally.note(what, fault)
        reached(tally.requests)
    client.close()


def change(root: Path, host: server_hosts.Host, ending: threading.Event, tally: Tally, seed: int) -> None:
    """Load, reload with other weights, and unload one model, until the server ends."""
    source = random.Random(seed)
    while not ending.wait(source.uniform(0.0, 0.1)):
        verb = source.choice(("load", "load", "reload", "unload"))
        if verb == "reload":
            put_model(root, "changed", source.choice(FACTORS))
        path = f"repository/models/changed/{'unload' if verb == 'unload' else 'load'}"
        try:
            post(host.port, path)
            tally.note(f"{verb}s")
        except urllib.error.HTTPError as error:  # its process was killed while it was loaded
            clear = error.code in (400, 503) and "failed" in str(json.load(error).get("error"))
            tally.note("failed loads" if clear else "wrong", "" if clear else f"{verb}: {error}")
        except OSError as error:
            if not ending.is_set():
                tally.note("wrong", f"{verb}: {error}")


def post(port: int, path: str) -> None:
    address = urllib.request.Request(f"http://127.0.0.1:{port}/v2/{path}", b"{}")
    with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
        answer.read()


def kill(host: server_hosts.Host, ending: threading.Event, tally: Tally, seed: int) -> None:
    """Kill a model's process now and then; which one is chance."""
    source = random.Random(seed)
    while not ending.wait(source.uniform(0.1, 0.6)):
        if workers := workers_of(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(source.choice(workers), signal.SIGKILL)
                tally.note("kills")


def chaos(host: server_hosts.Host, root: Path, threads: int, requests: int, seed: int) -> tuple[Tally, bool]:
    """(what happened, whether the server ended by itself with 0)."""
    tally, ending = Tally(), threading.Event()
    last = threads * requests * 9 // 10

    def reached(count: int) -> None:
        if count >= last and not ending.is_set():
            ending.set()
            host.process.send_signal(signal.SIGTERM)

    clients = [
        GrpcClient(host.ports["grpc"], ending) if number % 4 == 3 else HttpClient(host.port, ending)
        for number in range(threads)
    ]
    running = [
        threading.Thread(target=ask_all, args=(client, range(first, first + requests), seed + first, tally, reached))
        for client, first in zip(clients, range(0, threads * requests, requests), strict=True)
    ]
    running += [
        threading.Thread(target=change, args=(root, host, ending, tally, seed)),
        threading.Thread(target=kill, args=(host, ending, tally, seed)),
    ]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return tally, ended_well(host)


def ended_well(host: server_hosts.Host) -> bool:
    """Whether the server ends by itself, with 0."""
    try:
        return host.process.wait(PATIENCE) == 0
    except subprocess.TimeoutExpired:
        print(host.log())
        return False


def run_chaos(quick: bool, seed: int) -> tuple[str, bool, dict[str, Any]]:
    threads, requests = (32, 256) if quick else (THREADS, REQUESTS)
    with small_models() as (root, host):
        begun = time.monotonic()
        tally, ended = chaos(host, root, threads, requests, seed)
        took = time.monotonic() - begun
        if tally.counts["lost"] + tally.counts["wrong"] + tally.counts["hung"]:
            print(host.log())
    counts = tally.counts
    for fault in tally.faults:
        print(f"  {fault}")
    done = ", ".join(f"{counts[what]} {what}" for what in ("answered", "refused", "after the end"))
    acts = ", ".join(f"{counts[what]} {what}" for what in ("loads", "reloads", "unloads", "failed loads", "kills"))
    faults = ", ".join(f"{what} {counts[what]}" for what in ("lost", "wrong", "hung"))
    drained = "ended by itself" if ended else "did NOT end by itself"
    print(f"{threads} threads x {requests} requests in {took:.0f} s: {done}; {acts}; {drained}")
    whole = tally.requests == threads * requests and counts["kills"] > 0 and counts["reloads"] > 0
    good = ended and whole and not (counts["lost"] + counts["wrong"] + counts["hung"])
    return faults, good, dict(counts)


# -- queue ------------------------------------------------------------------------------------------------------------
def run_queue(quick: bool, seed: int) -> tuple[str, bool, dict[str, Any]]:
    """One executes, ten wait, twelve arrive."""
    with small_models() as (_, host):
        outcomes = queue_outcomes(host)
    refused = [words for status, words in outcomes if status != 200]
    answered = sorted(words for status, words in outcomes if status == 200)
    good = refused == ["Exceeds maximum queue size"] * 2 and len(answered) == 11
    return f"queue: {len(answered)} answered, refused {refused}", good, {"answered": len(answered), "refused": refused}


def metric(host: server_hosts.Host, name: str) -> int:
    """A metric's value, of the model with the short queue if it is a model's."""
    with urllib.request.urlopen(f"http://127.0.0.1:{host.ports['metrics']}/metrics", timeout=PATIENCE) as answer:
        lines = answer.read().decode().splitlines()
    (value,) = [line.rpartition(" ")[2] for line in lines if re.match(rf'{name}({{model="queued",.*}})? ', line)]
    return int(value)


def in_flight(host: server_hosts.Host) -> int:
    return metric(host, "ingot_requests_in_flight")


def pending(host: server_hosts.Host) -> int:
    return metric(host, "nv_inference_pending_request_count")


def wait_until(holds: Callable[[], bool]) -> None:
    """TimeoutError if it does not come about before a request counts as hung."""
    end = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError("the requests did not all arrive")
        time.sleep(0.02)


def queue_outcomes(host: server_hosts.Host) -> list[tuple[int, float | str]]:
    """The outcomes of one request that is held while it executes and of twelve that arrive meanwhile."""
    outcomes: list[tuple[int, float | str]] = []

    def ask(value: float) -> None:
        client = HttpClient(host.port, threading.Event())
        outcomes.append(client.ask("queued", value))
        client.close()

    asking = [threading.Thread(target=ask, args=(float(number),)) for number in range(13)]
    stopped = workers_of(host)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    asking[0].start()
    wait_until(lambda: (in_flight(host), pending(host)) == (1, 0))
    for thread in asking[1:]:
        thread.start()
    wait_until(lambda: pending(host) + len(outcomes) >= 12)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    for thread in asking:
        thread.join()
    return outcomes


# -- all --------------------------------------------------------------------------------------------------------------
def run_fuzz(quick: bool, seed: int) -> tuple[str, bool, dict[str, Any]]:
    """Every kind of mutated request, against the same kind of server."""
    with small_models() as (_, host):
        server = server_fuzz.Server(host.ports, lambda: [host.process.pid, *workers_of(host)])
        return server_fuzz.run(server, 2_000 if quick else 100_000, seed)


PARTS = {"chaos": run_chaos, "fuzz": run_fuzz, "queue": run_queue}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="32 x 256 requests, 2,000 mutations")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {','.join(PARTS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help=f"write here (a whole run: {RESULTS.name}/server_chaos.json)")
    chosen = parser.parse_args()
    names = chosen.only.split(",")
    rows, good = [], True
    for name in names:
        line, held, figures = PARTS[name](chosen.quick, chosen.seed)
        print(f"{line}  {'passed' if held else 'FAILED'}", flush=True)
        rows.append({"part": name, "line": line, "passed": held, **figures})
        good = good and held
    whole = RESULTS / "server_chaos.json" if names == list(PARTS) and not chosen.quick else None
    if path := chosen.json or whole:
        write_json(path, "; ".join(str(row["line"]) for row in rows), rows, seed=chosen.seed)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
