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
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson

from ingot.engine import Engine
from ingot.errors import IngotError
from ingot.server.arena import Arena
from ingot.server.instances import Instance, SessionInstance
from ingot.server.placement import Place
from ingot.server.request import Array, Code, ServerError

log = logging.getLogger("ingot.server")
ANYWHERE = Place("cpu")
LONGEST_MESSAGE = 1 << 17  # bytes of a message: names and shapes, never tensors


class Died(Exception):
    """The process at the other end is gone."""


# -- the front's side -------------------------------------------------------------------------------------------------
class Worker:
    """A model's process, shared by its instances; started on first use and again after it died.

    `arguments`: module and words it is started with; the file descriptor of its control line follows them.
    """

    def __init__(
        self, name: str, arguments: Sequence[str], starting_seconds: float = 120.0, place: Place = ANYWHERE
    ) -> None:
        self.name, self.generation, self.restarts, self._place = name, 0, 0, place
        self._arguments, self._starting_seconds = arguments, starting_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The process's number while it lives."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def line(self, dead: int = 0) -> Line:
        """A new line; `dead`: a generation of the process that is known to have died."""
        with self._lock:
            if self._process is None or self.generation == dead or self._process.poll() is not None:
                self._start()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            inputs, outputs = Arena(), Arena()
            assert self._control is not None
            with theirs:
                socket.send_fds(self._control, [b"line"], [theirs.fileno(), inputs.handle, outputs.handle])
            return Line(self.generation, ours, inputs, outputs)

    def _start(self) -> None:
        self._end()
        self._process, self._control = spawned(self._arguments, self._place)
        self.restarts += self.generation > 0
        self.generation += 1
        self._control.settimeout(self._starting_seconds)
        try:
            greeting = self._control.recv(LONGEST_MESSAGE)
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


def spawned(arguments: Sequence[str], place: Place = ANYWHERE) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A Python process of a module and words, and the line that controls it; it sees one GPU, has its cores."""
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": place.visible} if place.visible else None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-m", *arguments, str(theirs.fileno())]
        process = subprocess.Popen(  # a session of its own: Ctrl-C is for the front, which drains first
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True, env=variables
        )
    if place.cores:  # long before it has other threads
        os.sched_setaffinity(process.pid, place.cores)
    return process, ours


def engine_worker(name: str, engine: Path, place: Place, threads: int | None) -> Worker:
    """The process of an engine."""
    return Worker(name, ["ingot.server.worker", str(engine), place.device, str(threads or 0)], place=place)


Results = Mapping[str, Array] | ServerError
Facts = Mapping[str, Any]


class Hear(Protocol):
    """Answers what a model says while it runs. `heard`: something has gone out because of it."""

    heard: bool

    def __call__(self, facts: Facts, tensors: Mapping[str, Array]) -> tuple[Facts, Mapping[str, Array]]: ...


@dataclass(frozen=True)
class Line:
    """A connection to a worker's process, with the memory both sides see."""

    generation: int
    socket: socket.socket
    inputs: Arena
    outputs: Arena

    def send(self, runs: Sequence[Mapping[str, Array]]) -> None:
        """Ask for some runs; Died if nobody is there."""
        try:
            self.socket.sendall(orjson.dumps(self.inputs.write(runs)))
        except ConnectionError as error:
            raise Died from error

    def receive(self, hear: Hear | None = None) -> list[tuple[Results, int]]:
        """(outputs or error, nanoseconds) of each run that was asked for; Died if the process ended first.

        `hear` answers what the model says meanwhile.
        """
        answers = self._message()
        while isinstance(answers, dict):
            assert hear is not None
            (said,) = self.outputs.read([answers["tensors"]], copy=True)
            facts, tensors = hear(answers["facts"], said)
            (entries,) = self.inputs.write([tensors])
            try:
                self.socket.sendall(orjson.dumps({"facts": facts, "tensors": entries}))
            except ConnectionError as error:
                raise Died from error
            answers = self._message()
        outputs = iter(self.outputs.read([item["outputs"] for item in answers if "outputs" in item], copy=True))
        return [(next(outputs) if "outputs" in item else _error_of(item), item["ns"]) for item in answers]

    def _message(self) -> Any:
        try:
            raw = self.socket.recv(LONGEST_MESSAGE)
        except ConnectionError as error:
            raise Died from error
        if not raw:
            raise Died
        return orjson.loads(raw)

    def close(self) -> None:
        """Give everything back."""
        self.socket.close()
        self.inputs.close()
        self.outputs.close()


def _error_of(item: Mapping[str, Any]) -> ServerError:
    return ServerError(Code[item["code"]], item["error"], "BACKEND")


class ProcessInstance:
    """A line to a worker that is opened again when the process has died."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.line: Line | None = worker.line()
        self._last = self.line.generation

    def run(self, feeds: Mapping[str, Array], hear: Hear | None = None) -> Mapping[str, Array]:
        """One run in the worker; tried once more if the worker dies during it, unless some of it is answered."""
        try:
            ((results, _),) = self._exchange([feeds], hear)
        except Died:
            log.error("model %s: its process died while it ran; starting it again", self._worker.name)
            if hear is not None and hear.heard:
                self.close()
                reason = f"the process of model '{self._worker.name}' died between the responses of this request"
                raise ServerError(Code.UNAVAILABLE, reason, "BACKEND") from None
            ((results, _),) = self.run_again([feeds], hear)
        if isinstance(results, ServerError):
            raise results
        return results

    def run_again(self, runs: Sequence[Mapping[str, Array]], hear: Hear | None = None) -> list[tuple[Results, int]]:
        """The second and last try, in a new process."""
        self.close()
        try:
            return self._exchange(runs, hear)
        except Died:
            self.close()
            reason = f"the process of model '{self._worker.name}' died twice while running this request"
            return [(ServerError(Code.UNAVAILABLE, reason, "BACKEND"), 0) for _ in runs]

    def opened(self) -> Line:
        """The line, to a living process as far as is known."""
        if self.line is None:
            self.line = self._worker.line(dead=self._last)
            self._last = self.line.generation
        return self.line

    def _exchange(self, runs: Sequence[Mapping[str, Array]], hear: Hear | None) -> list[tuple[Results, int]]:
        line = self.opened()
        line.send(runs)
        return line.receive(hear)

    def close(self) -> None:
        """Give up the line; idempotent."""
        if self.line is not None:
            self.line.close()
            self.line = None


# -- the worker's side ------------------------------------------------------------------------------------------------
def serve(engine_path: str, device: str, threads: int | None, control: socket.socket) -> None:
    """Open a session for every line the front sends; return when the front is gone."""
    try:
        engine = Engine.load(engine_path)
        SessionInstance(engine, device, threads).close()
    except IngotError as error:
        control.send(str(error).encode()[:LONGEST_MESSAGE])
        return
    control.send(b"ready")
    serve_lines(control, lambda back: SessionInstance(engine, device, threads))


def serve_lines(control: socket.socket, make: Callable[[Back], Instance]) -> None:
    """An instance and a thread for each line that the front sends; returns when the front is gone."""
    while True:
        data, handles, _, _ = socket.recv_fds(control, 16, 3)
        if not data:
            return
        line, inputs, outputs = handles
        back = Back(socket.socket(fileno=line), Arena(inputs), Arena(outputs))
        threading.Thread(target=back.serve, args=(make(back),), daemon=True).start()


class Back:
    """The worker's end of a line."""

    def __init__(self, line: socket.socket, inputs: Arena, outputs: Arena) -> None:
        self._line, self._inputs, self._outputs = line, inputs, outputs
        self._speaking, self._running = threading.Lock(), False

    def serve(self, instance: Instance) -> None:
        """Run what the front sends until it gives the line up."""
        while raw := self._line.recv(LONGEST_MESSAGE):
            self._running = True
            answers = [_run(instance, feeds) for feeds in self._inputs.read(orjson.loads(raw), copy=False)]
            good = [answer for answer in answers if "outputs" in answer]
            with self._speaking:
                self._running = False
                entries = self._outputs.write([answer["outputs"] for answer in good])
                for answer, written in zip(good, entries, strict=True):
                    answer["outputs"] = written
                try:
                    self._line.sendall(orjson.dumps(answers))
                except ConnectionError:  # the front gave the line up while this ran
                    break
        instance.close()

    def ask(self, facts: Facts, tensors: Mapping[str, Array]) -> tuple[Facts, Mapping[str, Array]]:
        """Say something while a run is under way, and what the front answers; from any thread, one at a time.

        What was read from the line before must have been copied. Died if no run is under way or the front is gone.
        """
        with self._speaking:
            if not self._running:
                raise Died
            (entries,) = self._outputs.write([tensors])
            try:
                self._line.sendall(orjson.dumps({"facts": facts, "tensors": entries}))
                raw = self._line.recv(LONGEST_MESSAGE)
            except ConnectionError as error:
                raise Died from error
            if not raw:
                raise Died
            answer = orjson.loads(raw)
            return answer["facts"], self._inputs.read([answer["tensors"]], copy=True)[0]


def _run(instance: Instance, feeds: Mapping[str, Array]) -> dict[str, Any]:
    start = time.monotonic_ns()
    try:
        answer: dict[str, Any] = {"outputs": instance.run(feeds)}
    except IngotError as error:
        answer = {"error": str(error), "code": "INVALID_ARG"}
    except Exception as error:  # noqa: BLE001 - whatever a model raises is its request's answer
        answer = {"error": f"{type(error).__name__}: {error}", "code": "INTERNAL"}
    return {**answer, "ns": time.monotonic_ns() - start}


def main(arguments: list[str]) -> None:
    """engine, device, threads (0: all), file descriptor of the control line."""
    engine, device, threads, handle = arguments
    os.set_inheritable(int(handle), False)
    serve(engine, device, int(threads) or None, socket.socket(fileno=int(handle)))


if __name__ == "__main__":
    main(sys.argv[1:])
