"""Entering native code: worker threads that park inside it, and one call per segment."""

from __future__ import annotations

import ctypes
import os
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from ingot.runtime.buffers import Array, address_of, aligned_bytes
from ingot.runtime.image import Image

_SYNC_COUNTERS, _STAMPS = 512, 368
_RUN = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 3)
_WORKER = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
_ONE_POINTER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class NativeCode:
    """A variant's code mapped once and shared by all sessions of the engine."""

    def __init__(self, code: Any, symbols: Mapping[str, int]) -> None:
        self._image = Image(code, symbols)
        self.run = _RUN(self._image.address("ingot_run"))
        self.worker = _WORKER(self._image.address("ingot_worker"))
        self.stop = _ONE_POINTER(self._image.address("ingot_stop"))
        self._clock = _ONE_POINTER(self._image.address("ingot_clock"))
        self._ticks_per_microsecond = 0.0

    def address(self, symbol: str) -> int:
        """Entry point of a segment."""
        return self._image.address(symbol)

    def ticks(self) -> int:
        """The processor's time-stamp counter."""
        cell = np.zeros(1, np.uint64)
        self._clock(address_of(cell))
        return int(cell[0])

    @property
    def ticks_per_microsecond(self) -> float:
        """Rate of the time-stamp counter, measured over 20 ms on first use."""
        if not self._ticks_per_microsecond:
            start, ticks = time.perf_counter(), self.ticks()
            while (elapsed := time.perf_counter() - start) < 0.02:
                pass
            self._ticks_per_microsecond = (self.ticks() - ticks) / (elapsed * 1e6)
        return self._ticks_per_microsecond


class Teams:
    """The threads of a session, divided among its streams: a run takes a team that is idle, or goes on alone."""

    def __init__(self, code: NativeCode, threads: int, streams: int, phases: int) -> None:
        self._teams = [Team(code, size, phases) for size in division(threads, streams)]
        self.size = self._teams[0].size

    def run(
        self, function: int, pointers: int, extents: int, scratch: int, stride: int, phases: int, stamps: int = 0
    ) -> None:
        """Run one segment; `phases` is its number of work counters (0: nothing to share, run alone)."""
        if phases and self.size > 1:
            for team in self._teams:
                if team.run(function, pointers, extents, scratch, stride, phases, stamps):
                    return
        self._teams[0].run_alone(function, pointers, extents, scratch, stride, stamps)

    def close(self) -> None:
        """Let all workers return; idempotent."""
        for team in self._teams:
            team.close()


class Team:
    """`size` threads for one run at a time: the caller and `size - 1` workers parked in native code."""

    def __init__(self, code: NativeCode, size: int, phases: int) -> None:
        self.size, self._code, self._phases = size, code, phases
        self._lock = threading.Lock()
        self._alone = threading.local()
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._start()
        _TEAMS.add(self)

    def _start(self) -> None:
        self._sync = aligned_bytes(_SYNC_COUNTERS + 64 * max(self._phases, 1))
        self._process = os.getpid()
        self._workers: list[threading.Thread] = []

    def _hire(self) -> None:
        for number in range(1, self.size):
            self._workers.append(threading.Thread(target=_work, args=(self._code, self._sync, number), daemon=True))
            self._workers[-1].start()
        self._finalizer = weakref.finalize(self, _dismiss, self._code, self._sync, os.getpid())

    def run(
        self, function: int, pointers: int, extents: int, scratch: int, stride: int, phases: int, stamps: int
    ) -> bool:
        """Run one segment together; False, and nothing done, where the team is busy or is the caller alone."""
        if self.size == 1 or not self._lock.acquire(blocking=False):
            return False
        try:
            if not self._workers:
                self._hire()
            sync = self._sync
            if stamps or sync[_STAMPS]:
                sync[_STAMPS : _STAMPS + 8].view(np.uint64)[0] = stamps
            self._code.run(address_of(sync), function, pointers, extents, scratch, stride, self.size, phases)
        finally:
            self._lock.release()
        return True

    def run_alone(self, function: int, pointers: int, extents: int, scratch: int, stride: int, stamps: int) -> None:
        """Run one segment on the caller's thread, whatever the team does."""
        self._code.run(self._private(stamps), function, pointers, extents, scratch, stride, 1, 0)

    def _private(self, stamps: int) -> int:
        """Address of this thread's own sync block, for running alone."""
        known = self._alone.__dict__
        if "block" not in known:
            known["block"] = aligned_bytes(_SYNC_COUNTERS)
            known["address"] = address_of(known["block"])
            known["stamps"] = 0
        if known["stamps"] != stamps:
            known["block"][_STAMPS : _STAMPS + 8].view(np.uint64)[0] = known["stamps"] = stamps
        return known["address"]

    def close(self) -> None:
        """Let the workers return; idempotent."""
        workers, self._workers = self._workers, []
        if workers and self._finalizer is not None and self._process == os.getpid():
            self._finalizer()
            for worker in workers:
                worker.join()
            self._start()

    def after_fork(self) -> None:
        """In a child process the workers do not exist: begin again."""
        self._lock = threading.Lock()
        self._retired = self._sync  # a worker of the parent may be writing to its own copy; keep ours apart
        self._start()


def _work(code: NativeCode, sync: Array, number: int) -> None:
    """A worker's life. It keeps the code it runs and the memory it waits on alive until it has returned."""
    code.worker(address_of(sync), number)


def _dismiss(code: NativeCode, sync: Array, process: int) -> None:
    """Tell the workers to return: a session that is forgotten without being closed must not leave them waiting."""
    if process == os.getpid():
        code.stop(address_of(sync))


_TEAMS: weakref.WeakSet[Team] = weakref.WeakSet()


def _restart_teams() -> None:
    for team in list(_TEAMS):
        team.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_restart_teams)


def division(threads: int, streams: int) -> list[int]:
    """Threads of each stream's team, the largest first; streams beyond the threads run on their callers' own."""
    teams = min(streams, threads)
    return [(threads + number) // teams for number in reversed(range(teams))]


def usable_threads() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def zeros(count: int, dtype: str) -> Array:
    """A zeroed, aligned table of 8-byte entries for native code."""
    return aligned_bytes(8 * max(count, 1), 64).view(dtype)
