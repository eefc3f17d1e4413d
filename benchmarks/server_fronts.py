"""HTTP fronts side by side: the same raw application (parse, run the engine, answer) on each, and the whole server.

    python -m benchmarks.server_fronts model.onnx [--seconds 5] [--rounds 3] [--clients 1,16] [--json results.json]

Rows: uvicorn and granian with a raw ASGI application, `ingot.server.wire` with the same one, and `ingot serve`.
The last line is the claim: the whole server's requests a second as a share of the best raw ASGI row's, at most clients.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

import ingot
from benchmarks.server_load import Load, closed_loop, free_port, wait_for
from benchmarks.timing import write_json

PREFIX = "/v2/models/model/infer"


# -- the raw application ----------------------------------------------------------------------------------------------
class Application:
    """KServe v2 with one binary input and one binary output, without checks: the least a server can do."""

    def __init__(self, path: str) -> None:
        self.session = ingot.Session(ingot.Engine.load(path), threads=1)
        self.input, self.output = self.session.engine.inputs[0], self.session.engine.outputs[0].name

    def infer(self, body: bytes, json_length: int) -> tuple[bytes, bytes]:
        described = orjson.loads(memoryview(body)[:json_length])["inputs"][0]
        array = np.frombuffer(body, self.input.dtype, offset=json_length).reshape(described["shape"])
        result = self.session.run({self.input.name: array})[self.output]
        entry = {"name": self.output, "datatype": "FP32", "shape": result.shape}
        entry["parameters"] = {"binary_data_size": result.nbytes}
        head = orjson.dumps({"model_name": "model", "model_version": "1", "outputs": [entry]})
        return head, result.tobytes()

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return
        parts, more = [], True
        while more:
            event = await receive()
            parts.append(event.get("body", b""))
            more = event.get("more_body", False)
        body = b"".join(parts)
        length = next((int(v) for k, v in scope["headers"] if k == b"inference-header-content-length"), 0)
        head, data = self.infer(body, length) if body else (b"", b"")
        headers = [
            (b"content-length", b"%d" % (len(head) + len(data))), (b"content-type", b"application/octet-stream"),
            (b"inference-header-content-length", b"%d" % len(head)),
        ]  # fmt: skip
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": head + data})

    def exchange(self, exchange: Any) -> None:
        """The same on ingot.server.wire."""
        if not exchange.body:
            exchange.respond(200)
            return
        length = int(exchange.headers[b"inference-header-content-length"])
        head, data = self.infer(exchange.body, length)
        headers = {
            b"content-type": b"application/octet-stream", b"inference-header-content-length": b"%d" % len(head),
        }  # fmt: skip
        exchange.respond(200, [head, data], headers)


def serve_uvicorn(engine: str, port: int) -> None:
    import uvicorn

    uvicorn.run(
        Application(engine), host="127.0.0.1", port=port, loop="uvloop", http="httptools", access_log=False,
        log_level="error",
    )  # fmt: skip


def serve_granian(engine: str, port: int) -> None:
    import uvloop
    from granian.constants import Interfaces
    from granian.server.embed import Server

    server = Server(Application(engine), address="127.0.0.1", port=port, interface=Interfaces.ASGI, log_enabled=False)
    uvloop.run(server.serve())


def serve_wire(engine: str, port: int) -> None:
    import uvloop

    from ingot.server.wire import Front

    async def forever() -> None:
        await Front(Application(engine).exchange).start("127.0.0.1", port)
        await asyncio.Event().wait()

    uvloop.run(forever())


RAW = {"uvicorn": serve_uvicorn, "granian": serve_granian, "wire": serve_wire}


# -- measuring --------------------------------------------------------------------------------------------------------
def request_for(engine: ingot.Engine) -> bytes:
    """The bytes of one inference."""
    spec = engine.inputs[0]
    shape = [extent if isinstance(extent, int) else 1 for extent in spec.shape]
    data = np.random.default_rng(0).random(shape, np.float32).astype(spec.dtype).tobytes()
    described = {
        "inputs": [
            {"name": spec.name, "shape": shape, "datatype": "FP32", "parameters": {"binary_data_size": len(data)}}
        ],
        "parameters": {"binary_data_output": True},
    }
    text = json.dumps(described).encode()
    head = (
        f"POST {PREFIX} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
        f"Inference-Header-Content-Length: {len(text)}\r\nContent-Length: {len(text) + len(data)}\r\n\r\n"
    )
    return head.encode() + text + data


@dataclass(frozen=True)
class Measured:
    """A run of the load, and the CPU time of the server's processes for each request, in microseconds."""

    load: Load
    cpu: float


def processor_seconds(pid: int) -> float:
    """CPU time so far of a process and its children, which are looked for once a call."""
    total = 0.0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # ended meanwhile
                continue
            if pid in (int(entry.name), int(fields[1])):
                total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def measured(pid: int, port: int, request: bytes, clients: int, seconds: float) -> Measured:
    closed_loop(port, request, clients, 0.3)
    before = processor_seconds(pid)
    load = closed_loop(port, request, clients, seconds)
    return Measured(load, (processor_seconds(pid) - before) / load.requests * 1e6)


@contextlib.contextmanager
def running(command: list[str], port: int, path: str) -> Iterator[int]:
    process = subprocess.Popen(command, env={**os.environ, "PYTHONUNBUFFERED": "1"}, stderr=subprocess.DEVNULL)
    try:
        wait_for(port, path)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def commands(engine: Path, repository: Path) -> dict[str, Callable[[int], tuple[list[str], str]]]:
    """Name -> (port -> how to start it, the path that answers when it is ready)."""

    def raw(name: str) -> Callable[[int], tuple[list[str], str]]:
        module = [sys.executable, "-m", "benchmarks.server_fronts"]
        return lambda port: ([*module, "--serve", name, "--port", str(port), str(engine)], "/")

    def whole(processes: str) -> Callable[[int], tuple[list[str], str]]:
        flags = ["--allow-grpc=false", "--allow-metrics=false", "--threads=1", f"--process-per-model={processes}"]
        serve = [sys.executable, "-m", "ingot", "serve", str(repository), *flags]
        return lambda port: ([*serve, "--http-port", str(port)], "/v2/health/ready")

    return {**{name: raw(name) for name in RAW}, "ingot serve": whole("false"), "ingot, processes": whole("true")}


Results = dict[str, dict[int, list[Measured]]]


def measure(model: Path, clients: list[int], seconds: float, rounds: int) -> Results:
    """Every front in turn, `rounds` times."""
    results: Results = {}
    with tempfile.TemporaryDirectory() as folder:
        version = Path(folder) / "models" / "model" / "1"
        version.mkdir(parents=True)
        engine = ingot.build(model, ingot.BuildConfig(level=1))
        engine.save(version / "model.engine")
        request = request_for(engine)
        for _ in range(rounds):
            for name, command in commands(version / "model.engine", version.parent.parent).items():
                port = free_port()
                words, path = command(port)
                with running(words, port, path) as pid:
                    for count in clients:
                        found = measured(pid, port, request, count, seconds)
                        results.setdefault(name, {}).setdefault(count, []).append(found)
    return results


def middle(runs: list[Measured]) -> Measured:
    return sorted(runs, key=lambda run: run.load.rate)[len(runs) // 2]


def report(results: Results, clients: list[int]) -> str:
    """Print the table; returns the claim."""
    print(f"{'front':17}" + "".join(f"{count:>4} clients: req/s   p50 µs   p99 µs   CPU µs" for count in clients))
    for name, rows in results.items():
        cells = [middle(rows[count]) for count in clients]
        print(
            f"{name:17}"
            + "".join(f"{c.load.rate:19.0f} {c.load.p50:8.0f} {c.load.p99:8.0f} {c.cpu:8.0f}" for c in cells)
        )
    most = max(clients)
    alone, processes = (share_of(results, name, most) for name in ("ingot serve", "ingot, processes"))
    return f"at {most} clients: {alone:.2f} of the best raw ASGI application, {processes:.2f} with processes"


def share_of(results: Results, name: str, clients: int) -> float:
    rounds = zip(*(results[front][clients] for front in (name, "uvicorn", "granian")), strict=True)
    return statistics.median(own.load.rate / max(one.load.rate, other.load.rate) for own, one, other in rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", default="1,16")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", choices=RAW, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        RAW[arguments.serve](str(arguments.model), arguments.port)
        return 0
    clients = [int(count) for count in arguments.clients.split(",")]
    results = measure(arguments.model, clients, arguments.seconds, arguments.rounds)
    claim = report(results, clients)
    print(claim)
    if arguments.json:
        rows = [
            {"front": name, "clients": count, **asdict(run.load), "cpu": run.cpu}
            for name, by_count in results.items() for count, runs in by_count.items() for run in runs
        ]  # fmt: skip
        write_json(arguments.json, claim, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
