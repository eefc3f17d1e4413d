"""gRPC fronts side by side: an echo, and the same raw application (parse, run the engine, answer), on each.

    python -m benchmarks.server_grpc_fronts [--rounds 3] [--json benchmarks/results/server_grpc_fronts.json]

Fronts: grpcio's threaded server and its asyncio server (on asyncio's loop and on uvloop), both with handlers of bytes;
python-hyper's h2 on uvloop; ours, zttp on uvloop, which also looks a moment longer before it sleeps. Clients, one call
after the other: a blocking grpcio stub of bytes (also eight of them, and one that sends an image of 600 kB), and
NVIDIA's tritonclient in its own environment. CPU is a client's own time for a call, which no server can take away.
MNIST on one thread.
"""

import argparse
import asyncio
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np

import ingot
from benchmarks.models import example_inputs
from benchmarks.server_grpc import bare_engine, infer_request
from benchmarks.server_hosts import ROOT, client_python, ingot_server
from benchmarks.server_load import free_port, summary
from benchmarks.server_repository import made_models
from benchmarks.timing import write_json
from ingot.server.grpc_calls import Calls, unary
from ingot.server.http2 import Connection
from ingot.server.lookout import Lookout
from ingot.server.options import Options
from ingot.server.schema import message
from ingot.server.wire import Front

METHOD = "/inference.GRPCInferenceService/ModelInfer"
Answer = Callable[[bytes], bytes]


# -- the raw application ----------------------------------------------------------------------------------------------
def echo(raw: bytes) -> bytes:
    """What came, which a client of tensors takes for an answer without any."""
    return raw


def application(path: Path) -> Answer:
    """ModelInfer of one raw input and output, without checks: the least a server can do."""
    session = ingot.Session(ingot.Engine.load(path), threads=1)
    port, name = session.engine.inputs[0], session.engine.outputs[0].name
    question, answer = message("inference.ModelInferRequest"), message("inference.ModelInferResponse")

    def infer(raw: bytes) -> bytes:
        asked = question.FromString(raw)
        data = np.frombuffer(asked.raw_input_contents[0], port.dtype).reshape(asked.inputs[0].shape)
        result = session.run({port.name: data})[name]
        made = answer(model_name="model", model_version="1")
        made.outputs.add(name=name, datatype="FP32", shape=result.shape)
        made.raw_output_contents.append(result.tobytes())
        return bytes(made.SerializeToString())

    return infer


# -- fronts -----------------------------------------------------------------------------------------------------------
def handlers(behaviour: Callable[..., Any]) -> Any:
    made = {"ModelInfer": grpc.unary_unary_rpc_method_handler(behaviour)}
    return (grpc.method_handlers_generic_handler("inference.GRPCInferenceService", made),)


def serve_threads(answer: Answer, port: int) -> None:
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers(handlers(lambda raw, context: answer(raw)))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


async def _serve_aio(answer: Answer, port: int) -> None:
    async def infer(raw: bytes, context: Any) -> bytes:
        return answer(raw)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers(handlers(infer))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def serve_aio(answer: Answer, port: int) -> None:
    asyncio.run(_serve_aio(answer, port))


def serve_aio_uvloop(answer: Answer, port: int) -> None:
    import uvloop

    uvloop.run(_serve_aio(answer, port))


def serve_h2(answer: Answer, port: int) -> None:
    import uvloop
    from h2.config import H2Configuration
    from h2.connection import H2Connection
    from h2.events import DataReceived, StreamEnded

    head = [(b":status", b"200"), (b"content-type", b"application/grpc")]
    configuration = H2Configuration(client_side=False, header_encoding=None, validate_inbound_headers=False)

    class Connection(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport, self.bodies = transport, dict[int, bytearray]()
            self.h2 = H2Connection(configuration)
            self.h2.initiate_connection()
            transport.write(self.h2.data_to_send())

        def data_received(self, data: bytes) -> None:
            for event in self.h2.receive_data(data):
                if isinstance(event, DataReceived):
                    self.bodies.setdefault(event.stream_id, bytearray()).extend(event.data)
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, StreamEnded):
                    self.answer(event.stream_id, answer(bytes(self.bodies.pop(event.stream_id)[5:])))
            self.transport.write(self.h2.data_to_send())

        def answer(self, stream: int, result: bytes) -> None:
            self.h2.send_headers(stream, head)
            self.h2.send_data(stream, b"\x00" + len(result).to_bytes(4, "big") + result)
            self.h2.send_headers(stream, [(b"grpc-status", b"0")], end_stream=True)

    async def forever() -> None:
        await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", port)
        await asyncio.Event().wait()

    uvloop.run(forever())


def serve_ours(answer: Answer, port: int, microseconds: int = Options.busy_poll) -> None:
    import uvloop

    async def forever(pool: ThreadPoolExecutor) -> None:
        calls = Calls({METHOD.encode(): unary(lambda call, raw: call.respond(answer(bytes(raw))))}, 1 << 30, pool)
        await Front(calls, None, None, Connection, Lookout(microseconds)).start("127.0.0.1", port)
        await asyncio.Event().wait()

    with ThreadPoolExecutor(1) as pool:
        uvloop.run(forever(pool))


OURS = "ours: zttp on uvloop"
FRONTS: dict[str, Callable[[Answer, int], None]] = {
    "grpcio, threads": serve_threads, "grpcio, asyncio": serve_aio, "grpcio, asyncio on uvloop": serve_aio_uvloop,
    "h2 on uvloop": serve_h2, "ours, sleeping at once": partial(serve_ours, microseconds=0), OURS: serve_ours,
}  # fmt: skip


# -- clients ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Called:
    """Calls: a second, their latencies and the client's processor time for each in microseconds."""

    rate: float
    p50: float
    p99: float
    cpu: float


def called(call: Callable[[], Any], seconds: float, callers: int = 1) -> Called:
    """Each caller calls as soon as it is answered."""
    for _ in range(100):
        call()
    latencies: list[float] = []
    used, begun = time.process_time(), time.perf_counter()

    def go_on(_: int) -> None:
        while (now := time.perf_counter()) < begun + seconds:
            call()
            latencies.append(time.perf_counter() - now)

    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(go_on, range(callers)))
    used = (time.process_time() - used) / len(latencies) * 1e6
    load = summary(latencies, time.perf_counter() - begun)
    return Called(load.rate, load.p50, load.p99, used)


def by_stub(port: int, seconds: float, callers: int = 1, request: bytes | None = None) -> Called:
    request = request or infer_request(example_inputs("mnist"))
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        grpc.channel_ready_future(channel).result(30)
        stub = channel.unary_unary(METHOD)
        return called(lambda: stub(request), seconds, callers)


def by_stub_an_image(port: int, seconds: float) -> Called:
    return by_stub(port, seconds, request=infer_request({"x": np.zeros((1, 3, 224, 224), np.float32)}))


def by_tritonclient(port: int, seconds: float) -> Called:
    words = [str(client_python()), str(Path(__file__).parent / "server_grpc_client.py"), str(port), str(seconds)]
    return Called(**json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))


CLIENTS: dict[str, Callable[[int, float], Called]] = {
    "bytes": by_stub, "8 of bytes": partial(by_stub, callers=8), "tritonclient": by_tritonclient,
}  # fmt: skip
ECHO_CLIENTS = {**CLIENTS, "600 kB": by_stub_an_image}


# -- measuring --------------------------------------------------------------------------------------------------------
def wait_until_listening(port: int, alive: Callable[[], bool], seconds: float = 60.0) -> None:
    """TimeoutError if nothing listens after so long, or no longer can."""
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except OSError:
            if time.monotonic() > end or not alive():
                raise TimeoutError(f"nothing listens on port {port}") from None
            time.sleep(0.1)
        else:
            return


@contextlib.contextmanager
def front(name: str, engine: Path | None) -> Iterator[int]:
    """A front in a process of its own: an echo, or the application with an engine; its port."""
    port = free_port()
    words = [sys.executable, "-m", "benchmarks.server_grpc_fronts", "--serve", name, "--port", str(port)]
    process = subprocess.Popen([*words, *(["--engine", str(engine)] if engine else [])], cwd=ROOT)
    try:
        wait_until_listening(port, lambda: process.poll() is None)
        yield port
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def whole_server(repository: Path) -> Iterator[int]:
    """`ingot serve`, its models in its own process."""
    with ingot_server("ingot serve", repository) as host, host.awake():
        yield host.ports["grpc"]


Results = dict[tuple[str, str, str], list[Called]]


def measure(seconds: float, rounds: int) -> tuple[Results, list[float]]:
    """(front, what it does, client) -> a run each round; the engine alone, in microseconds, each round."""
    results: Results = {}
    alone = []
    with tempfile.TemporaryDirectory() as folder:
        models = made_models(Path(folder))
        engine, repository = models.engine("mnist"), models.repository("mnist")
        for _ in range(rounds):
            alone.append(bare_engine(engine, example_inputs("mnist"), seconds / 4).p50)
            places = {(name, "echo"): front(name, None) for name in FRONTS}
            places |= {(name, "engine"): front(name, engine) for name in FRONTS}
            places["ingot serve", "engine"] = whole_server(repository)
            for (name, does), place in places.items():
                with place as port:
                    for client, calls in (ECHO_CLIENTS if does == "echo" else CLIENTS).items():
                        results.setdefault((name, does, client), []).append(calls(port, seconds))
    return results, alone


def report(results: Results, alone: float) -> str:
    """Print the table; returns the claim."""
    print(f"{'front':28} {'does':8} {'client':14} {'calls/s':>8} {'p50 µs':>8} {'p99 µs':>8} {'CPU µs':>8}")
    for (name, does, client), runs in results.items():
        figures = [statistics.median(getattr(run, figure) for run in runs) for figure in ("rate", "p50", "p99", "cpu")]
        print(f"{name:28} {does:8} {client:14}" + "".join(f" {figure:8.0f}" for figure in figures))
    chosen = [key for key in results if key[1:] == ("echo", "bytes")]
    echoes = {key[0]: statistics.median(run.p50 for run in results[key]) for key in chosen}
    fastest = min(echoes, key=lambda name: echoes[name])
    return f"the engine alone {alone:.0f} µs; the fastest echo, {fastest}, {echoes[fastest]:.0f} µs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", choices=FRONTS, help=argparse.SUPPRESS)
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        FRONTS[arguments.serve](application(arguments.engine) if arguments.engine else echo, arguments.port)
        return 0
    results, alone = measure(arguments.seconds, arguments.rounds)
    claim = report(results, statistics.median(alone))
    print(claim)
    if arguments.json:
        rows = [
            {"front": name, "does": does, "client": client, **asdict(run)}
            for (name, does, client), runs in results.items() for run in runs
        ]  # fmt: skip
        write_json(arguments.json, claim, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
