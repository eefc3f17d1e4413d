"""A server over small models for a whole test run, and a process with NVIDIA's client in an environment of its own."""

import fcntl
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ingot.server.app import BackgroundServer, Options, Server
from tests.server.models import write_repository

HERE = Path(__file__).parent
ENVIRONMENT = HERE.parent.parent / "build" / "triton-client"


@pytest.fixture(scope="session")
def engine_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


def options(root: Path, cache: Path, **changes: Any) -> Options:
    """A server on ports the system chooses, for one machine's eyes only."""
    plain: dict[str, Any] = {
        "mode": "explicit", "load_models": ("*",), "address": "127.0.0.1", "http_port": 0, "grpc_port": 0,
        "metrics_port": 0, "engine_cache": cache, "threads": 1, "build_arguments": ("--level", "0", "--no-verify"),
    }  # fmt: skip
    return Options((root,), **{**plain, **changes})


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, engine_cache: Path) -> Iterator[Server]:
    root = write_repository(tmp_path_factory.mktemp("models"))
    with BackgroundServer(options(root, engine_cache)) as running:
        yield running


def client_python() -> Path:
    """An interpreter that has tritonclient: INGOT_CLIENT_PYTHON, or build/triton-client, made on first use."""
    if "INGOT_CLIENT_PYTHON" in os.environ:
        return Path(os.environ["INGOT_CLIENT_PYTHON"])
    python, complete = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "complete"
    ENVIRONMENT.parent.mkdir(parents=True, exist_ok=True)
    with ENVIRONMENT.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes want it at once
        if not complete.exists():
            venv.create(ENVIRONMENT, with_pip=True, clear=True)
            requirements = HERE / "client-requirements.txt"
            subprocess.run([python, "-m", "pip", "install", "-q", "-r", requirements], check=True)
            complete.touch()
    return python


class Client:
    """NVIDIA's client in its own process; runs one function of client_checks.py at a time."""

    def __init__(self, server: Server) -> None:
        addresses = [f"127.0.0.1:{server.ports[name]}" for name in ("http", "grpc", "metrics") if name in server.ports]
        self._process = subprocess.Popen(
            [client_python(), HERE / "client_checks.py", *addresses],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ""},
        )  # fmt: skip

    def check(self, name: str, protocol: str) -> None:
        """Run a check; its traceback is this failure's message."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, protocol]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the client died with {self._process.wait()}"
        failure = json.loads(line)
        assert failure is None, f"{name}({protocol}) with tritonclient on {sys.platform}:\n{failure}"

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[Client]:
    running = Client(server)
    yield running
    running.close()
