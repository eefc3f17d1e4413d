"""Who runs batches: a thread for each instance; the event loop itself, for models that take less than a hand-over; or
lines to a worker process, served from the event loop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ingot.server.batcher import Entry
from ingot.server.instances import Instance
from ingot.server.lookout import Pace
from ingot.server.mailbox import Mailbox
from ingot.server.ports import Feeds
from ingot.server.request import ServerError
from ingot.server.scheduler import Scheduler, clock
from ingot.server.worker import Died, Line, ProcessInstance, Results

_PUMPED = 1_000_000  # nanoseconds for which quick models may keep the event loop from its input, or one line busy
_LONGEST_GROUP = 16


class Threads:
    """Each instance has a thread that pulls: the least loaded one is the one that asks."""

    def __init__(self, scheduler: Scheduler, instances: Sequence[Instance]) -> None:
        self._scheduler, self._instances = scheduler, instances
        self._threads = [
            threading.Thread(
                target=self._serve, args=(instance,), name=f"{scheduler.ports.model}-{number}", daemon=True
            )
            for number, instance in enumerate(instances)
        ]
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """Wake one of them."""
        self._scheduler.ready.notify()

    def at_once(self, entry: Entry) -> bool:
        """Never on the thread of whoever submits."""
        return False

    def close(self) -> None:
        """Wait for the threads."""
        for thread in self._threads:
            thread.join()
        for instance in self._instances:
            instance.close()

    def _serve(self, instance: Instance) -> None:
        while (batch := self._next()) is not None:
            if batch:
                self._scheduler.run(instance, batch)

    def _next(self) -> tuple[Entry, ...] | None:
        """The next batch; empty after refusals, None when closed and nothing waits."""
        scheduler = self._scheduler
        with scheduler.ready:
            take = scheduler.take()
            while not take.batch and not take.rejected:
                if scheduler.drained():
                    return None
                scheduler.ready.wait(None if take.wake is None else max(take.wake - clock(), 0) / 1e9)
                take = scheduler.take()
            if scheduler.pending:
                scheduler.ready.notify()
        scheduler.reject(take)
        return take.batch


class OnLoop:
    """One instance, run on the event loop after each look at the input: what arrived together runs together."""

    def __init__(self, scheduler: Scheduler, instance: Instance, loop: Mailbox) -> None:
        self._scheduler, self._instance, self._loop = scheduler, instance, loop
        self._pumping, self._drained = False, threading.Event()
        self._pace = Pace()

    def wake(self) -> None:
        """Come by soon."""
        if not self._pumping:
            self._pumping = True
            self._loop.post(self._pump)

    def at_once(self, entry: Entry) -> bool:
        """Right now, if this is the event loop: nothing waits, and nothing could run with it."""
        if not self._loop.here():
            return False
        self._scheduler.run(self._instance, (entry,))
        return True

    def close(self) -> None:
        """Wait until nothing is left; not on the event loop."""
        self._loop.wait(self._drained)
        self._instance.close()

    def _pump(self) -> None:
        """Run what waits, for a while, and come again if more does."""
        if self._scheduler.patient and (rest := self._pace.rest(self._scheduler.pending, clock())):
            time.sleep(rest / 1e9)  # not a timer: each request that comes would wake the loop
            self._loop.post(self._pump)
            return
        scheduler, until, more = self._scheduler, clock() + _PUMPED, True
        while more and clock() < until:
            with scheduler.lock:
                take = scheduler.take()
                more = bool(scheduler.pending) and bool(take.batch or take.rejected)
                self._pumping = more
            if take.rejected:
                scheduler.reject(take)
            if take.batch:
                scheduler.run(self._instance, take.batch)
        if more:
            self._loop.post(self._pump)
        elif take.wake is not None:
            self._loop.post_later(self._again, max(take.wake - clock(), 0) / 1e9)
        elif scheduler.drained():
            self._drained.set()

    def _again(self) -> None:
        with self._scheduler.lock:
            self.wake()


@dataclass(frozen=True)
class _Group:
    """Batches that went to a worker in one exchange."""

    batches: tuple[tuple[Entry, ...], ...]
    feeds: tuple[Feeds, ...]
    start: int
    gathered: int


class Lines:
    """Instances in a worker process; the event loop sends groups of batches and reads answers: no thread between."""

    def __init__(self, scheduler: Scheduler, instances: Sequence[ProcessInstance], loop: Mailbox) -> None:
        self._scheduler, self._instances, self._loop = scheduler, instances, loop
        self._free = list(instances)
        self._under_way: dict[ProcessInstance, _Group] = {}
        self._pumping, self._drained = False, threading.Event()
        for instance in instances:
            loop.post(partial(self._watch, instance))

    def wake(self) -> None:
        """Come by soon."""
        if not self._pumping:
            self._pumping = True
            self._loop.post(self._pump)

    def at_once(self, entry: Entry) -> bool:
        """What comes meanwhile may share the exchange."""
        return False

    def close(self) -> None:
        """Wait until nothing is left; not on the event loop."""
        self._loop.wait(self._drained)
        for instance in self._instances:
            instance.close()

    def _watch(self, instance: ProcessInstance) -> None:
        if instance.line is not None:
            self._loop.watch(instance.line.socket.fileno(), partial(self._answered, instance))

    def _pump(self) -> None:
        """Give every free line a group."""
        self._pumping = False
        wake = None
        while self._free:
            batches, wake = self._taken()
            if not batches:
                break
            self._send(self._free.pop(), batches)
        if wake is not None:
            self._loop.post_later(self._again, max(wake - clock(), 0) / 1e9)
        elif not self._under_way and self._scheduler.drained():
            for instance in self._instances:
                if instance.line is not None:
                    self._loop.unwatch(instance.line.socket.fileno())
            self._drained.set()

    def _again(self) -> None:
        with self._scheduler.lock:
            self.wake()

    def _taken(self) -> tuple[list[tuple[Entry, ...]], int | None]:
        """Batches for one exchange: this line's share of what waits, and not more than it does in a moment."""
        scheduler, batches, budget = self._scheduler, list[tuple[Entry, ...]](), _PUMPED
        with scheduler.lock:
            share = min(-(-scheduler.pending // len(self._free)), _LONGEST_GROUP)
            taken = []
            while True:
                taken.append(scheduler.take())
                if not taken[-1].batch:
                    break
                batches.append(taken[-1].batch)
                budget -= scheduler.expected(taken[-1].batch)
                if budget <= 0 or sum(map(len, batches)) >= share:
                    break
        for take in taken:
            scheduler.reject(take)
        return batches, taken[-1].wake if not batches else None

    def _send(self, instance: ProcessInstance, batches: Sequence[tuple[Entry, ...]]) -> None:
        start = clock()
        good, feeds = [], []
        for batch in batches:
            try:
                feeds.append(self._scheduler.gather(batch))
                good.append(batch)
            except Exception as error:  # noqa: BLE001 - what cannot be gathered fails its requests
                self._scheduler.fail(batch, error)
        group = _Group(tuple(good), tuple(feeds), start, clock())
        self._under_way[instance] = group
        try:
            self._line_of(instance).send(feeds)
        except Died:
            self._died(instance, group)

    @staticmethod
    def _line_of(instance: ProcessInstance) -> Line:
        """The line if there is one: opening it may start a process, which the event loop must not wait for."""
        if instance.line is None:
            raise Died
        return instance.line

    def _answered(self, instance: ProcessInstance) -> None:
        group = self._under_way.get(instance)
        try:
            results = self._line_of(instance).receive()
        except Died:
            self._died(instance, group)
            return
        if group is not None:
            self._complete(instance, group, results)

    def _complete(self, instance: ProcessInstance, group: _Group, results: Sequence[tuple[Results, int]]) -> None:
        del self._under_way[instance]
        self._free.append(instance)
        now = clock()
        for batch, (result, took) in zip(group.batches, results, strict=True):
            if isinstance(result, ServerError):
                self._scheduler.fail(batch, result)
            else:
                began = max(now - took, group.gathered)
                self._scheduler.complete(batch, result, began - (group.gathered - group.start), began, now)
        self._pump()

    def _died(self, instance: ProcessInstance, group: _Group | None) -> None:
        """Try once more in a new process, outside the event loop: starting one takes a while."""
        if instance.line is not None:
            self._loop.unwatch(instance.line.socket.fileno())
        if instance in self._free:
            self._free.remove(instance)
        again = group or _Group((), (), clock(), clock())
        self._under_way[instance] = again
        threading.Thread(target=self._recover, args=(instance, again), daemon=True).start()

    def _recover(self, instance: ProcessInstance, group: _Group) -> None:
        results: list[tuple[Results, int]]
        try:
            results = instance.run_again(group.feeds)
            instance.opened()
        except ServerError as error:  # the process cannot be started
            results = [(error, 0) for _ in group.batches]
        self._loop.post(partial(self._recovered, instance, group, results))

    def _recovered(self, instance: ProcessInstance, group: _Group, results: Sequence[tuple[Results, int]]) -> None:
        self._watch(instance)
        self._complete(instance, group, results)
