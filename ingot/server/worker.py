"""A model in a process of its own: `python -m ingot.server.worker` holds its engine; the front keeps one line to it per
instance. Tensors lie in shared memory, a line carries only where. A process that dies is started again; what it was
running is tried once more and then refused.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from ingot.engine import Engine
from ingot.errors import IngotError
from ingot.server.arena import Arena
from ingot.server.instances import SessionInstance
from ingot.server.request import Array, Code, ServerError

log = logging.getLogger("ingot.server")
_LONGEST = 1 << 17  # bytes of a message: names and shapes, never tensors
_STARTING_SECONDS = 60.0


class Died(Exception):
    """The process at the other end is gone."""


# -- the front's side -------------------------------------------------------------------------------------------------
class Worker:
    """A model's process, shared by its instances; started on first use and again after it died."""

    def __init__(self, name: str, engine: Path, device: str, threads: int | None) -> None:
        self.name, self.generation, self.restarts = name, 0, 0
        self._command = [sys.executable, "-m", "ingot.server.worker", str(engine), device, str(threads or 0)]
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The process's number while it lives."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def line(self, dead: int = 0) -> tuple[int, socket.socket, Arena, Arena]:
        """(generation, line, arena for inputs, arena for outputs); `dead`: a generation known to have died."""
        with self._lock:
            if self._process is None or self.generation == dead or self._process.poll() is not None:
                self._start()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            inputs, outputs = Arena(), Arena()
            assert self._control is not None
            with theirs:
                socket.send_fds(self._control, [b"line"], [theirs.fileno(), inputs.handle, outputs.handle])
            return self.generation, ours, inputs, outputs

    def _start(self) -> None:
        self._end()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [*self._command, str(theirs.fileno())]
            self._process = subprocess.Popen(  # a session of its own: Ctrl-C is for the front, which drains first
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._control = ours
        self.restarts += self.generation > 0
        self.generation += 1
        ours.settimeout(_STARTING_SECONDS)
        try:
            greeting = ours.recv(_LONGEST)
        except (TimeoutError, ConnectionError):
            greeting = b""
        if greeting != b"ready":
            self._end()
            reason = greeting.decode() or "it ended or did not answer"
            raise ServerError(Code.UNAVAILABLE, f"the process of model '{self.name}' cannot start: {reason}", "BACKEND")
        log.info("model %s: process %d", self.name, self._process.pid)

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()  # the worker ends when this line closes
        if self._process is not None:
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._control = self._process = None

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()


class ProcessInstance:
    """One line to a worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._generation, self._line, self._inputs, self._outputs = worker.line()

    def run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """One run in the worker; tried once more if the worker dies during it."""
        try:
            return self._exchange(feeds)
        except Died:
            log.error("model %s: its process died while it ran; starting it again", self._worker.name)
        self._reconnect()
        try:
            return self._exchange(feeds)
        except Died:
            self._reconnect()
            raise ServerError(
                Code.UNAVAILABLE, f"the process of model '{self._worker.name}' died twice while running this request",
                "BACKEND",
            ) from None  # fmt: skip

    def _exchange(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        try:
            self._line.sendall(orjson.dumps(self._inputs.write(feeds)))
            raw = self._line.recv(_LONGEST)
        except ConnectionError as error:
            raise Died from error
        if not raw:
            raise Died
        answer = orjson.loads(raw)
        if "error" in answer:
            raise ServerError(Code[answer["code"]], answer["error"], "BACKEND")
        return self._outputs.read(answer["outputs"], copy=True)

    def _reconnect(self) -> None:
        self._drop()
        self._generation, self._line, self._inputs, self._outputs = self._worker.line(dead=self._generation)

    def _drop(self) -> None:
        self._line.close()
        self._inputs.close()
        self._outputs.close()

    def close(self) -> None:
        """Give up the line; the worker ends with its last one."""
        self._drop()


# -- the worker's side ------------------------------------------------------------------------------------------------
def serve(engine_path: str, device: str, threads: int | None, control: socket.socket) -> None:
    """Open a session for every line the front sends; return when the front is gone."""
    try:
        engine = Engine.load(engine_path)
        SessionInstance(engine, device, threads).close()
    except IngotError as error:
        control.send(str(error).encode()[:_LONGEST])
        return
    control.send(b"ready")
    while True:
        data, handles, _, _ = socket.recv_fds(control, 16, 3)
        if not data:
            return
        line, inputs, outputs = handles
        arguments = (
            SessionInstance(engine, device, threads),
            socket.socket(fileno=line),
            Arena(inputs),
            Arena(outputs),
        )
        threading.Thread(target=_serve_line, args=arguments, daemon=True).start()


def _serve_line(instance: SessionInstance, line: socket.socket, inputs: Arena, outputs: Arena) -> None:
    while raw := line.recv(_LONGEST):
        try:
            results = instance.run(inputs.read(orjson.loads(raw), copy=False))
            answer: dict[str, Any] = {"outputs": outputs.write(results)}
        except IngotError as error:
            answer = {"error": str(error), "code": "INVALID_ARG"}
        except Exception as error:  # noqa: BLE001 - whatever a model raises is its request's answer
            answer = {"error": f"{type(error).__name__}: {error}", "code": "INTERNAL"}
        try:
            line.sendall(orjson.dumps(answer))
        except ConnectionError:  # the front gave the line up while this ran
            break
    instance.close()


def main(arguments: list[str]) -> None:
    """engine, device, threads (0: all), file descriptor of the control line."""
    engine, device, threads, handle = arguments
    os.set_inheritable(int(handle), False)
    serve(engine, device, int(threads) or None, socket.socket(fileno=int(handle)))


if __name__ == "__main__":
    main(sys.argv[1:])
