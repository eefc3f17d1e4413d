"""MLPerf's load generator drives MNIST against the server over HTTP: Offline, then Server.

    python -m benchmarks.server_loadgen [--quick] [--share 0.5] [--json results.json]

Offline gives all samples at once and counts them a second: the capacity of server and generator together, for both
are on this machine. Server sends them at Poisson times, at `--share` of that; it is valid if 99 of 100 are answered
within 10 ms, over 60 seconds. The generator's callbacks are this process's, the server is a process of its own, between
them are 32 kept HTTP connections with binary tensors. Whoever else works on this machine is measured too: where a core
is shared, Linux takes it away for 12 ms at a time; so the share of the time that the server waited for a core is
printed beside the result. Last line: `loadgen: Offline VALID, Server VALID`.
"""

import argparse
import gc
import re
import select
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlperf_loadgen

from benchmarks import server_hosts
from benchmarks.models import example_inputs
from benchmarks.server_load import Connection, closed_loop, connect
from benchmarks.server_repository import made_models
from benchmarks.timing import RESULTS, write_json

CLIENTS, SAMPLES = 32, 256
LATENCY_NS, PERCENTILE = 10_000_000, 0.99
SWITCH = 0.0002  # seconds after which the generator's thread and ours take turns; at Python's 5 ms we would time that


class Sender:
    """The system under test as the load generator sees it: its thread sends, ours receives, over kept connections.

    A sample that finds none free waits for the next answer. Either thread may send it: deques and lists are atomic.
    """

    def __init__(self, port: int, requests: Sequence[bytes]) -> None:
        self._requests, self._waiting = requests, deque[tuple[int, int]]()
        self._clients = {client.socket.fileno(): client for client in connect(port, CLIENTS)}
        self._free, self._asked = list(self._clients.values()), dict[int, int]()
        self._ended = False
        self._thread = threading.Thread(target=self._receive)
        self._thread.start()

    def issue(self, samples: Sequence[Any]) -> None:
        """Samples to be answered; called by the load generator."""
        self._waiting.extend((sample.id, sample.index) for sample in samples)
        self._send()

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self._ended = True
        self._thread.join()
        for client in self._clients.values():
            client.socket.close()

    def _receive(self) -> None:
        poll = select.epoll()
        for number in self._clients:
            poll.register(number, select.EPOLLIN)
        while not self._ended:
            done = []
            for number, _ in poll.poll(0.1):
                if self._clients[number].complete():
                    done.append(mlperf_loadgen.QuerySampleResponse(self._asked.pop(number), 0, 0))
                    self._free.append(self._clients[number])
            self._send()
            if done:
                mlperf_loadgen.QuerySamplesComplete(done)
        poll.close()

    def _send(self) -> None:
        while self._waiting:
            try:
                client: Connection = self._free.pop()
            except IndexError:  # the next answer frees one, and sends
                return
            try:
                identity, index = self._waiting.popleft()
            except IndexError:  # the other thread has sent it
                self._free.append(client)
                return
            self._asked[client.socket.fileno()] = identity
            client.send(self._requests[index])


@contextmanager
def constructed(sender: Sender) -> Iterator[tuple[Any, Any]]:
    """The load generator's handles of a sender and of its samples."""
    system = mlperf_loadgen.ConstructSUT(sender.issue, sender.flush)
    library = mlperf_loadgen.ConstructQSL(SAMPLES, SAMPLES, lambda samples: None, lambda samples: None)
    try:
        yield system, library
    finally:
        mlperf_loadgen.DestroyQSL(library)
        mlperf_loadgen.DestroySUT(system)


def drive(sender: Sender, settings: Any) -> Mapping[str, str]:
    """One test; the summary's lines by name."""
    with tempfile.TemporaryDirectory() as folder, constructed(sender) as (system, library):
        logs = mlperf_loadgen.LogSettings()
        logs.log_output.outdir = folder
        logs.log_output.copy_summary_to_stdout = False
        logs.enable_trace = False
        mlperf_loadgen.StartTestWithLogSettings(system, library, settings, logs)
        text = (Path(folder) / "mlperf_log_summary.txt").read_text()
    return dict(re.findall(r"^\s*(\S[^:\n]*?)\s*: +(.*?)\s*$", text, re.MULTILINE))


def settings_for(scenario: str, rate: float, seconds: float) -> Any:
    """Performance only, at least so many seconds."""
    settings = mlperf_loadgen.TestSettings()
    settings.scenario = getattr(mlperf_loadgen.TestScenario, scenario)
    settings.mode = mlperf_loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = int(seconds * 1000)
    settings.min_query_count = 1 if scenario == "Offline" else 1000
    settings.offline_expected_qps, settings.server_target_qps = 2 * rate, rate  # Offline must last long enough
    settings.server_target_latency_ns = LATENCY_NS
    settings.server_target_latency_percentile = PERCENTILE
    settings.server_coalesce_queries = False
    return settings


def figures(summary: Mapping[str, str]) -> dict[str, Any]:
    """What is reported of a test."""
    wanted = {
        "Samples per second": "samples_per_second", "Completed samples per second": "samples_per_second",
        "Scheduled samples per second": "scheduled_per_second", "99.00 percentile latency (ns)": "p99_ns",
        "50.00 percentile latency (ns)": "p50_ns",
    }  # fmt: skip
    return {name: float(summary[line]) for line, name in wanted.items() if line in summary}


@dataclass(frozen=True)
class Scheduled:
    """Seconds by the clock, and those in which a process's first thread ran, or could have but had no core."""

    clock: float
    ran: float
    waited: float


def scheduled(process: int) -> Scheduled:
    """Up to now; where Linux does not tell, it has neither run nor waited."""
    path = Path(f"/proc/{process}/schedstat")
    ran, waited = path.read_text().split()[:2] if path.exists() else (0, 0)
    return Scheduled(time.monotonic(), int(ran) / 1e9, int(waited) / 1e9)


def shares(before: Scheduled, after: Scheduled) -> dict[str, float]:
    """Of the time between."""
    seconds = after.clock - before.clock
    ran, waited = (after.ran - before.ran) / seconds, (after.waited - before.waited) / seconds
    return {"server_ran": round(ran, 3), "server_waited": round(waited, 4)}


def measure(seconds: Mapping[str, float], share: float) -> list[dict[str, Any]]:
    """Both scenarios against one server."""
    requests = [server_hosts.binary_request(example_inputs("mnist", seed=seed)) for seed in range(SAMPLES)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        repository = made_models(Path(folder)).repository("mnist_free")
        with server_hosts.ingot_server("inside", repository) as host, host.awake():
            rate = closed_loop(host.port, requests[0], 16, 3.0).rate
            sender = Sender(host.port, requests)
            for scenario in ("Offline", "Server"):
                before = scheduled(host.process.pid)
                summary = drive(sender, settings_for(scenario, rate, seconds[scenario]))
                found = figures(summary) | shares(before, scheduled(host.process.pid))
                rows.append({"scenario": scenario, "asked": rate, "valid": summary["Result is"] == "VALID", **found})
                print(describe(rows[-1]), flush=True)
                rate = share * rows[0]["samples_per_second"]
            sender.close()
    return rows


def describe(row: Mapping[str, Any]) -> str:
    if row["scenario"] == "Offline":
        return f"Offline: {row['samples_per_second']:.0f} samples/s (16 clients in a closed loop: {row['asked']:.0f}/s)"
    latency = f"p50 {row['p50_ns'] / 1e6:.2f} ms, P99 {row['p99_ns'] / 1e6:.2f} ms (<= {LATENCY_NS / 1e6:.0f})"
    cores = f"the server ran {row['server_ran']:.0%} of the time, had no core {row['server_waited']:.1%}"
    return f"Server: {row['asked']:.0f} samples/s asked, {row['samples_per_second']:.0f} completed; {latency}; {cores}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 seconds each")
    parser.add_argument("--share", type=float, default=0.5, help="of the capacity, for Server")
    parser.add_argument("--json", type=Path, help=f"write here (a whole run: {RESULTS.name}/server_loadgen.json)")
    chosen = parser.parse_args()
    sys.setswitchinterval(SWITCH)
    gc.disable()  # the generator's pauses are not the server's
    seconds = {"Offline": 5.0, "Server": 5.0} if chosen.quick else {"Offline": 10.0, "Server": 60.0}
    rows = measure(seconds, chosen.share)
    line = "loadgen: " + ", ".join(f"{row['scenario']} {'VALID' if row['valid'] else 'INVALID'}" for row in rows)
    if path := chosen.json or (None if chosen.quick else RESULTS / "server_loadgen.json"):
        write_json(path, line, rows, share=chosen.share)
    print(line)
    return 0 if all(row["valid"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
