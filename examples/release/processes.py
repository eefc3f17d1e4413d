"""The processes of a release on one machine: a model server, the release server, a gateway."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.server_load import free_port

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Ports:
    """Where everything listens."""

    server: int
    metrics: int
    console: int
    gateway: int
    gateway_metrics: int

    @classmethod
    def free(cls) -> "Ports":
        return cls(*(free_port() for _ in range(5)))


@contextlib.contextmanager
def process(words: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`ingot WORDS` until the block ends; its output goes to a file."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as output:
        command = [sys.executable, "-m", "ingot", *words]
        running = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            yield running
        finally:
            running.send_signal(signal.SIGTERM)
            try:
                running.wait(40)
            except subprocess.TimeoutExpired:
                running.kill()


def wait_until_answers(url: str, log: Path, seconds: float = 60.0) -> None:
    """Until a GET is answered with 200; TimeoutError says what the process wrote last."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if _answers(url):
            return
        time.sleep(0.1)
    raise TimeoutError(f"{url} does not answer; {log} ends with: {log.read_text()[-500:]}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@contextlib.contextmanager
def model_server(models: Path, folder: Path, ports: Ports, first: str) -> Iterator[None]:
    """One server, one model loaded; the rest is the rollouts' business."""
    words = ["serve", str(models), "--model-control-mode=explicit", f"--load-model={first}", "--allow-grpc=false",
             f"--http-port={ports.server}", f"--metrics-port={ports.metrics}", "--http-address=127.0.0.1",
             "--process-per-model=false", "--threads=1", f"--engine-cache={folder / 'engines'}"]  # fmt: skip
    with process(words, folder / "server.log"):
        wait_until_answers(f"http://127.0.0.1:{ports.server}/v2/health/ready", folder / "server.log", 90)
        yield


@contextlib.contextmanager
def release_server(store: str, folder: Path, ports: Ports) -> Iterator[None]:
    """API, console and controller."""
    with process(["release", "serve", "--store", store, f"--port={ports.console}"], folder / "release.log"):
        wait_until_answers(f"http://127.0.0.1:{ports.console}/api/rollouts", folder / "release.log")
        yield


@contextlib.contextmanager
def gateway(store: str, folder: Path, ports: Ports, workers: int = 1) -> Iterator[subprocess.Popen[bytes]]:
    """What users talk to."""
    words = ["release", "gateway", "--store", store, f"--port={ports.gateway}", f"--workers={workers}",
             f"--metrics-port={ports.gateway_metrics}", f"--remember={folder / 'routes.json'}"]  # fmt: skip
    with process(words, folder / "gateway.log") as running:
        wait_until_answers(f"http://127.0.0.1:{ports.gateway}/v2/health/ready", folder / "gateway.log")
        yield running
