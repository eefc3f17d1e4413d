"""Child processes that compile and time kernels: `python -m ingot.kernels.cpu.workers`, pickles over pipes.

Plain children rather than multiprocessing, so that a user's script needs no `if __name__ == "__main__"`; a child may
die without taking the build with it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle  # noqa: TID251  between a parent and the children it started, never from a file
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import IO, Any, Self

from ingot.errors import IngotError
from ingot.runtime.cpu import usable_threads

_LENGTH = struct.Struct("<Q")
_ORPHAN_CHECK = 1.0  # seconds between looks whether the parent is still there


class WorkerDied(IngotError):
    """The child ended in the middle of a job (a crash of generated code, or the system killed it), or was ended because
    it took too long. `cause` says which in a few words."""

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


class Worker:
    """One child; `call("module:function", *arguments)` runs there and returns or raises here."""

    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join([root, *(entry or os.getcwd() for entry in sys.path)])  # kernels may be a user's
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ingot.kernels.cpu.workers"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
            process_group=0,  # a terminal's Ctrl-C is the parent's to handle, also while the child still imports
        )  # fmt: skip

    def call(self, function: str, *arguments: Any, limit: float | None = None) -> Any:
        """Result of the function in the child. WorkerDied when the child ends first, or is ended after `limit`
        seconds."""
        watch = _Watch(self._process, limit)
        try:
            good, result = self._exchange((function, arguments))
        except (OSError, EOFError, struct.error):
            code = self._process.wait()
            cause = f"no answer within {limit:.3g} s" if watch.ended else _cause(code)
            raise WorkerDied(f"a worker process ended while running {function} ({cause})", cause) from None
        finally:
            watch.stop()
            if watch.ended:
                self._process.wait()
        if not good:
            raise result
        return result

    def _exchange(self, message: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        _write(self._process.stdin, message)
        return _read(self._process.stdout)

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
                with contextlib.suppress(BrokenPipeError):  # a message that Ctrl-C cut off is for nobody
                    pipe.close()


class _Watch:
    """Ends a child that does not answer in time; `ended` tells whether it did."""

    def __init__(self, process: subprocess.Popen[bytes], limit: float | None) -> None:
        self.ended, self._process = False, process
        self._timer = threading.Timer(limit, self._end) if limit is not None else None
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()

    def _end(self) -> None:
        self.ended = True
        self._process.kill()

    def stop(self) -> None:
        """The answer is there."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()  # a child must not be ended in the middle of its next job


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


def _keep(workers: Sequence[Worker]) -> None:
    """For the next build, as many as there are cores."""
    with _SPARE_LOCK:
        room = max(usable_threads() - len(_SPARE), 0)
        _SPARE.extend(workers[:room])
    for worker in workers[room:]:
        worker.close()


@atexit.register
def dismiss() -> None:
    """End the children that wait for work."""
    with _SPARE_LOCK:
        while _SPARE:
            _SPARE.pop().close()


def _forget() -> None:
    """A forked child must not talk to its parent's workers."""
    global _SPARE_LOCK
    _SPARE_LOCK = threading.Lock()  # another thread of the parent may have held it
    _SPARE.clear()


os.register_at_fork(after_in_child=_forget)


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

    def submit(self, function: str, *arguments: Any, limit: float | None = None) -> Future[Any]:
        """The function's result, later; it raises what the child raised, or WorkerDied. `limit`: seconds it may run."""
        return self._threads.submit(self._run, function, arguments, limit)

    def _run(self, function: str, arguments: tuple[Any, ...], limit: float | None) -> Any:
        worker = self._idle.get()
        try:
            return worker.call(function, *arguments, limit=limit)
        finally:
            self._idle.put(self._sound(worker))

    def _sound(self, worker: Worker) -> Worker:
        """The worker, or a new one in the place of one that has ended."""
        with self._lock:
            if worker.alive or self._closed:
                return worker
            worker.close()
            self._workers.remove(worker)
            self._workers.append(Worker())
            return self._workers[-1]

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
        _keep(self._workers)


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
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    for name, arguments in _messages(requests):
        try:
            answer: tuple[bool, Any] = (True, _resolve(name)(*arguments))
        except Exception as error:  # noqa: BLE001  raised again in the parent
            answer = (False, _portable(error))
        _write(answers, answer)


def _end_with_parent(parent: int) -> None:
    """A child busy in native code would not notice that nobody waits for it any more."""
    while os.getppid() == parent:
        time.sleep(_ORPHAN_CHECK)
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """The error itself where it survives the way to the parent, else its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  whatever its own reduction does
        return IngotError(f"{type(error).__name__}: {error}")
    return error


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
