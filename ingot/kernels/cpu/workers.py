"""Child processes that compile and time kernels: `python -m ingot.kernels.cpu.workers`, pickles over pipes.

Plain children rather than multiprocessing, so that a user's script needs no `if __name__ == "__main__"`; a child may
die without taking the build with it.
"""

from __future__ import annotations

import atexit
import os
import pickle  # noqa: TID251  between a parent and the children it started, never from a file
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import IO, Any, Self

from ingot.errors import IngotError

_LENGTH = struct.Struct("<Q")


class WorkerDied(IngotError):
    """The child ended in the middle of a job (a crash of generated code, or the system killed it)."""


class Worker:
    """One child; `call("module:function", *arguments)` runs there and returns or raises here."""

    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ingot.kernels.cpu.workers"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
        )  # fmt: skip

    def call(self, function: str, *arguments: Any) -> Any:
        """Result of the function in the child. WorkerDied when the child ends first."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            _write(self._process.stdin, (function, arguments))
            good, result = _read(self._process.stdout)
        except (OSError, EOFError, struct.error):
            code = self._process.wait()
            raise WorkerDied(f"a worker process ended while running {function} ({_cause(code)})") from None
        if not good:
            raise result
        return result

    @property
    def alive(self) -> bool:
        """Whether the child still runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the child; idempotent."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


_SPARE: list[Worker] = []
_SPARE_LOCK = threading.Lock()


def prepare(size: int) -> None:
    """Start children ahead of their first job: they import while the caller does something else."""
    with _SPARE_LOCK:
        _SPARE.extend(Worker() for _ in range(size - len(_SPARE)))


def _take() -> Worker:
    with _SPARE_LOCK:
        while _SPARE:
            worker = _SPARE.pop()
            if worker.alive:
                return worker
            worker.close()
    return Worker()


@atexit.register
def dismiss() -> None:
    """End the children that wait for work."""
    with _SPARE_LOCK:
        while _SPARE:
            _SPARE.pop().close()


os.register_at_fork(after_in_child=_SPARE.clear)  # a forked child must not talk to its parent's workers


class WorkerPool:
    """Several children fed from one queue. A context manager: after good work they are kept for the next build,
    after an error or Ctrl-C they are ended."""

    def __init__(self, size: int) -> None:
        self._workers = [_take() for _ in range(size)]
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        self._lock, self._closed = threading.Lock(), False
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="ingot-worker")

    def submit(self, function: str, *arguments: Any) -> Future[Any]:
        """The function's result, later; it raises what the child raised, or WorkerDied."""
        return self._threads.submit(self._run, function, arguments)

    def map(self, function: str, jobs: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """Results in order as they become available; WorkerDied is returned in a result's place, not raised."""
        futures = [self.submit(function, *job) for job in jobs]
        for future in futures:
            try:
                yield future.result()
            except WorkerDied as death:
                yield death

    def _run(self, function: str, arguments: tuple[Any, ...]) -> Any:
        worker = self._idle.get()
        try:
            return worker.call(function, *arguments)
        except WorkerDied:
            worker.close()
            with self._lock:
                if not self._closed:
                    self._workers.remove(worker)
                    worker = Worker()
                    self._workers.append(worker)
            raise
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End all children."""
        with self._lock:
            self._closed = True
        self._threads.shutdown(cancel_futures=True, wait=False)
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.close()
            return
        self._threads.shutdown()
        with _SPARE_LOCK:
            _SPARE.extend(self._workers)


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _write(pipe: IO[bytes], message: Any) -> None:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.write(_LENGTH.pack(len(data)) + data)
    pipe.flush()


def _read(pipe: IO[bytes]) -> Any:
    (length,) = _LENGTH.unpack(_exactly(pipe, _LENGTH.size))
    return pickle.loads(_exactly(pipe, length))


def _exactly(pipe: IO[bytes], count: int) -> bytes:
    data = pipe.read(count)
    if len(data) != count:
        raise EOFError
    return data


def _resolve(name: str) -> Callable[..., Any]:
    import importlib

    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """A child's life: answer calls until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    for name, arguments in _messages(requests):
        try:
            answer: tuple[bool, Any] = (True, _resolve(name)(*arguments))
        except Exception as error:  # noqa: BLE001  raised again in the parent
            answer = (False, error)
        _write(answers, answer)


def _messages(pipe: IO[bytes]) -> Iterable[tuple[str, tuple[Any, ...]]]:
    while True:
        try:
            yield _read(pipe)
        except EOFError:
            return


if __name__ == "__main__":
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # anything a library prints must not end up in the answers
    serve(sys.stdin.buffer, output)
