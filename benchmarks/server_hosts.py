"""Servers under measurement: ours, a raw ASGI application, MLServer and LitServe; all started, one awake at a time."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from benchmarks.server_load import free_port, wait_for

ROOT = Path(__file__).parent.parent
ENVIRONMENT = ROOT / "build" / "server-peers"
INFER = "/v2/models/model/infer"
Arrays = Mapping[str, "np.ndarray[Any, Any]"]
_NAMES = {"float32": "FP32", "int64": "INT64"}


# -- requests ---------------------------------------------------------------------------------------------------------
def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", *headers, f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def binary_request(inputs: Arrays, path: str = INFER, timeout_us: int = 0) -> bytes:
    """KServe v2 with binary tensors both ways."""
    described = [
        {**_described(name, data), "parameters": {"binary_data_size": data.nbytes}} for name, data in inputs.items()
    ]
    parameters = {"binary_data_output": True, **({"timeout": timeout_us} if timeout_us else {})}
    text = json.dumps({"inputs": described, "parameters": parameters}).encode()
    body = text + b"".join(data.tobytes() for data in inputs.values())
    kind = "Content-Type: application/octet-stream"
    return post(path, body, kind, f"Inference-Header-Content-Length: {len(text)}")


def json_request(inputs: Arrays, path: str = INFER) -> bytes:
    """KServe v2 with JSON tensors both ways."""
    described = [{**_described(name, data), "data": data.ravel().tolist()} for name, data in inputs.items()]
    return post(path, json.dumps({"inputs": described}).encode(), "Content-Type: application/json")


def litserve_request(inputs: Arrays) -> bytes:
    """The same numbers as LitServe takes them."""
    (data,) = inputs.values()
    body = json.dumps({"input": data.ravel().tolist(), "shape": list(data.shape)}).encode()
    return post("/predict", body, "Content-Type: application/json")


def _described(name: str, data: "np.ndarray[Any, Any]") -> dict[str, Any]:
    return {"name": name, "shape": list(data.shape), "datatype": _NAMES[data.dtype.name]}


# -- processes --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Host:
    """A running server: stopped (SIGSTOP) but for its turns, so that what one does while idle costs no other."""

    name: str
    process: "subprocess.Popen[bytes]"
    ports: Mapping[str, int]
    written: IO[bytes]

    @property
    def port(self) -> int:
        return self.ports["http"]

    def log(self) -> str:
        """The end of what it has written."""
        self.written.seek(0)
        return self.written.read()[-3000:].decode(errors="replace")

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGSTOP)


@contextlib.contextmanager
def running(name: str, words: list[str], ports: Mapping[str, int], ready: str, **settings: Any) -> Iterator[Host]:
    """Start a server in a process group of its own; end the group. What it wrote is shown if it does not start."""
    with tempfile.TemporaryFile() as written:
        process = subprocess.Popen(words, start_new_session=True, stdout=written, stderr=written, **settings)
        host = Host(name, process, ports, written)
        try:
            wait_for(ports["http"], ready, lambda: process.poll() is None)
            os.killpg(process.pid, signal.SIGSTOP)
            yield host
        except TimeoutError as error:
            raise TimeoutError(f"{name}: {error}: {host.log()}") from error
        finally:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """In good order, else by force."""
    for number in (signal.SIGCONT, signal.SIGTERM):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _python() -> list[str]:
    return [sys.executable, "-m"]


@contextlib.contextmanager
def raw_application(engine: Path) -> Iterator[Host]:
    """The raw ASGI application on uvicorn: parse, run the same engine, answer; no checks."""
    port = free_port()
    words = [*_python(), "benchmarks.server_fronts", "--serve", "uvicorn", "--port", str(port), str(engine)]
    with running("raw ASGI, uvicorn", words, {"http": port}, "/", cwd=ROOT) as host:
        yield host


@contextlib.contextmanager
def ingot_server(name: str, repository: Path, *flags: str, threads: int = 1, processes: bool = False) -> Iterator[Host]:
    """`ingot serve`."""
    ports = {kind: free_port() for kind in ("http", "grpc", "metrics")}
    stated = [f"--{kind}-port={port}" for kind, port in ports.items()]
    mode = [f"--threads={threads}", f"--process-per-model={str(processes).lower()}", "--http-address=127.0.0.1"]
    words = [*_python(), "ingot", "serve", str(repository), *stated, *mode, *flags]
    with running(name, words, ports, "/v2/health/ready", cwd=ROOT) as host:
        yield host


# -- peers ------------------------------------------------------------------------------------------------------------
def peers_python() -> Path | None:
    """An interpreter that has the peers; None, with a line why, if it cannot be had."""
    try:
        return environment(ENVIRONMENT, Path(__file__).parent / "server-peers.txt")
    except OSError as error:
        print(f"the peers cannot be installed, their claims are not measured: {error}")
        return None


def client_python() -> Path:
    """An interpreter that has tritonclient, the one of the tests."""
    return environment(ROOT / "build" / "triton-client", ROOT / "tests" / "server" / "client-requirements.txt")


def environment(folder: Path, requirements: Path) -> Path:
    """The interpreter of a virtual environment, made on first use; begun again if that was broken off."""
    python, complete = folder / "bin" / "python", folder / "complete"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be making it
        if not complete.exists():
            venv.create(folder, with_pip=True, clear=True)
            words = [str(python), "-m", "pip", "install", "-q", "-r", str(requirements)]
            made = subprocess.run(words, capture_output=True, text=True)
            if made.returncode:
                raise OSError(f"pip install -r {requirements.name}: {made.stderr.strip()[-300:]}")
            complete.touch()
    return python


@contextlib.contextmanager
def mlserver(python: Path, model: Path, folder: Path, workers: int) -> Iterator[Host]:
    """MLServer with its JSON codec; `workers` 0 runs the model in the server's process."""
    folder.mkdir()
    ports = {kind: free_port() for kind in ("http", "grpc", "metrics")}
    settings: dict[str, Any] = {f"{kind}_port": port for kind, port in ports.items()}
    settings |= {"host": "127.0.0.1", "parallel_workers": workers, "debug": False}
    (folder / "settings.json").write_text(json.dumps(settings))
    described = {"name": "model", "implementation": "server_peer_mlserver.OnnxModel", "parameters": {"uri": str(model)}}
    (folder / "model-settings.json").write_text(json.dumps(described))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    words = [str(python.parent / "mlserver"), "start", str(folder)]
    name = "MLServer, in process" if workers == 0 else "MLServer, default"
    with running(name, words, ports, "/v2/models/model/ready", env=environment, cwd=folder) as host:
        yield host


@contextlib.contextmanager
def litserve(python: Path, model: Path) -> Iterator[Host]:
    """LitServe with one worker."""
    port = free_port()
    words = [str(python), str(Path(__file__).parent / "server_peer_litserve.py"), str(model), str(port)]
    environment = {**os.environ, "PYTHONPATH": ""}
    with running("LitServe", words, {"http": port}, "/health", env=environment, cwd=ENVIRONMENT) as host:
        yield host
