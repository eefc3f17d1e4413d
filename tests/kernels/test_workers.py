"""Child processes of a build: results, errors, crashes, limits, orphans; a pool survives its children."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ingot.errors import BuildError, IngotError
from ingot.kernels.cpu import workers
from ingot.kernels.cpu.workers import Worker, WorkerDied, WorkerPool

NULL = 0


def refuse(text: str) -> None:
    """Called in the child."""
    raise BuildError(text)


class Stubborn(Exception):
    """Cannot be brought back from a pickle: it wants two arguments and passes one on."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)


def be_stubborn() -> None:
    """Called in the child."""
    raise Stubborn("no way", 1)


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    made = WorkerPool(2)
    yield made
    made.close()


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process has ended, or does within the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def test_a_result_comes_back(worker: Worker) -> None:
    assert worker.call("math:sqrt", 16.0) == 4.0
    assert worker.call("os:getpid") != os.getpid()


def test_what_is_printed_does_not_spoil_the_answers(worker: Worker) -> None:
    assert worker.call("os:system", "echo spoilt") == 0
    assert worker.call("builtins:print", "spoilt") is None
    assert worker.call("math:sqrt", 4.0) == 2.0


def test_an_error_is_raised_here(worker: Worker) -> None:
    with pytest.raises(BuildError, match="too narrow"):
        worker.call("tests.kernels.test_workers:refuse", "too narrow")
    with pytest.raises(IngotError, match="Stubborn: no way"):
        worker.call("tests.kernels.test_workers:be_stubborn")
    assert worker.call("math:sqrt", 9.0) == 3.0


@pytest.mark.parametrize(
    ("job", "cause"),
    [(("ctypes:string_at", NULL), "SIGSEGV"), (("os:_exit", 3), "exit code 3"), (("os:abort",), "SIGABRT")],
)
def test_a_crash_is_named(worker: Worker, job: tuple[object, ...], cause: str) -> None:
    with pytest.raises(WorkerDied, match=cause) as death:
        worker.call(*job)  # type: ignore[arg-type]
    assert cause in death.value.cause and str(job[0]) in str(death.value)
    assert not worker.alive


def test_a_child_that_takes_too_long_is_ended(worker: Worker) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerDied, match=r"no answer within 0\.3 s"):
        worker.call("time:sleep", 60, limit=0.3)
    assert time.monotonic() - start < 10 and not worker.alive


def test_a_limit_that_is_kept_ends_nobody(worker: Worker) -> None:
    for _ in range(20):
        worker.call("time:sleep", 0.001, limit=5)
    assert worker.alive


def test_a_pool_goes_on_after_deaths(pool: WorkerPool) -> None:
    bad = [pool.submit("os:_exit", 1) for _ in range(3)] + [pool.submit("time:sleep", 60, limit=0.2)]
    good = [pool.submit("math:sqrt", float(i * i)) for i in range(8)]
    assert [f.result() for f in good] == [float(i) for i in range(8)]
    assert all(isinstance(f.exception(), WorkerDied) for f in bad)


def test_a_child_killed_by_the_system_loses_its_job_only(pool: WorkerPool) -> None:
    pids = {pool.submit("os:getpid").result() for _ in range(20)}
    sleeping = [pool.submit("time:sleep", 60) for _ in range(2)]
    time.sleep(0.2)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    others = {worker._process.pid for worker in pool._workers} - pids
    for pid in others:  # the queue may have given all twenty questions to one child
        os.kill(pid, signal.SIGKILL)
    assert all("SIGKILL" in str(f.exception()) for f in sleeping)
    assert pool.submit("math:sqrt", 4.0).result() == 2.0


def test_a_closed_pool_leaves_nobody_behind() -> None:
    pool = WorkerPool(2)
    pids = [worker._process.pid for worker in pool._workers]
    job = pool.submit("time:sleep", 60)
    pool.close()
    assert all(gone(pid) for pid in pids) and job.exception() is not None


def test_good_work_keeps_children_for_the_next_pool_up_to_the_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    workers.dismiss()
    monkeypatch.setattr(workers, "usable_threads", lambda: 1)
    with WorkerPool(2) as first:
        pids = [worker._process.pid for worker in first._workers]
        first.submit("math:sqrt", 4.0).result()
    assert [gone(pid, 0.5) for pid in pids].count(True) == 1
    with WorkerPool(1) as second:
        assert second.submit("os:getpid").result() in pids
    workers.dismiss()
    assert all(gone(pid) for pid in pids)


def test_an_error_in_the_block_ends_the_children() -> None:
    with pytest.raises(KeyboardInterrupt), WorkerPool(1) as pool:
        pid = pool._workers[0]._process.pid
        raise KeyboardInterrupt
    assert gone(pid)


ORPHAN = """
import os, threading, time
from ingot.kernels.cpu.workers import Worker
worker = Worker()
print(worker._process.pid, flush=True)
threading.Thread(target=lambda: worker.call("time:sleep", 600), daemon=True).start()
time.sleep(0.5)
os._exit(0)
"""


def test_a_busy_child_does_not_outlive_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True, timeout=60, check=True)
    assert gone(int(done.stdout))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_starts_its_own(pool: WorkerPool) -> None:
    workers.prepare(1)
    spare = {worker._process.pid for worker in workers._SPARE}
    child = os.fork()
    if child == 0:
        with WorkerPool(1) as own:
            good = own.submit("os:getpid").result() not in spare
        workers.dismiss()
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
