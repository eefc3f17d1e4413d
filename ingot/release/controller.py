"""Does what states owe: prepares versions, asks the judge, watches the guards, lets time pass. One acts, others wait.

Nothing is remembered that the store does not have, but for measurements of foreign metrics in progress, which
begin again.
A finding is written with the lease in the same transaction: a controller that lost it writes nothing.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ingot.release import events, guards, judge, notify, servers, sources, windows
from ingot.release.client import CallFailed
from ingot.release.lease import Keeper
from ingot.release.rollout import Analysis, Duty, State, advance, duties, under_way
from ingot.release.spec import WHOLE, ReleaseError, seconds
from ingot.release.store import Fenced, Store, Unavailable
from ingot.release.view import SERVER
from ingot.release.windows import Observation

log = logging.getLogger("ingot.release")
ROUND_SECONDS, SCRAPE_SECONDS = 0.1, 2.0
KEPT = 1200  # observations in memory; older ones are thinned, which only makes the judge's looks coarser


@dataclass
class Clock:
    """Wall time at the start, monotonic from then on, never before what the log says: no jump ends a pause."""

    wall: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._offset = self.wall() - self.monotonic()

    def now(self, at_least: float = 0.0) -> float:
        """Seconds; moves ahead to `at_least` once and for all."""
        self._offset = max(self._offset, at_least - self.monotonic())
        return self.monotonic() + self._offset


@dataclass
class View:
    """What the controller holds of one model: derived, and read again after a restart."""

    state: State
    sequence: int
    observations: list[Observation] = field(default_factory=list)
    reached: int = 0
    looked: dict[tuple[int, str, str], float] = field(default_factory=dict)
    tallies: dict[tuple[int, str, str], sources.Tally] = field(default_factory=dict)
    scrapes: dict[str, servers.Scrape] = field(default_factory=dict)
    scraped: float = float("-inf")
    breached: float = float("-inf")


class Controller:
    """`step` is one round; `run` repeats it until told to stop."""

    def __init__(self, store: Store, clock: Clock | None = None, holder: str = "", ttl: float = 3.0) -> None:
        self.store, self.clock = store, clock or Clock()
        self.holder = holder or f"controller-{uuid.uuid4().hex[:8]}"
        self.lease = Keeper(store, self.holder, ttl)
        self.views: dict[str, View] = {}
        self.jobs: dict[tuple[str, ...], Future[None]] = {}
        self.threads = ThreadPoolExecutor(16, thread_name_prefix="ingot-release")

    def run(self, ended: threading.Event) -> None:
        """Until `ended`; a store that does not answer is waited for."""
        while not ended.wait(ROUND_SECONDS):
            try:
                self.step()
            except Fenced as error:
                log.warning("%s", error)
                self.lease.lost()
            except Unavailable as error:
                log.warning("%s; nothing is decided meanwhile", error)
                self.lease.lost()
                ended.wait(0.5)
        self.threads.shutdown(wait=False, cancel_futures=True)

    def step(self) -> bool:
        """One round; False if somebody else is the controller."""
        if not self.lease.hold(self.clock.monotonic()):
            self.views.clear()
            return False
        self._read()
        for model, view in self.views.items():
            now = self.clock.now(view.state.time)
            self._tick(model, view, now)
            for duty in duties(view.state):
                _DUTIES[duty.kind](self, model, view, duty, now)
            if view.state.spec.notifications:
                self._job(("notify", model), self._notify, model, view.state)
            self._scrape(model, view, now)
        return True

    # -- reading and writing ------------------------------------------------------------------------------------------
    def _read(self) -> None:
        known = {model: view.sequence for model, view in self.views.items()}
        for model in self.store.states(known):
            state, sequence = self.store.load(model)
            assert state is not None
            if model in self.views:
                self.views[model].state, self.views[model].sequence = state, sequence
            else:
                self.views[model] = View(state, sequence)
        for model, view in self.views.items():
            self._observe(model, view)

    def _observe(self, model: str, view: View) -> None:
        """New rows get this clock's time: gateways' clocks may jump. Those from before the start keep theirs."""
        first = view.reached == 0
        rows, view.reached = self.store.observations(model, view.reached)
        now = self.clock.now(view.state.time)
        for row in rows:
            latest = view.observations[-1].time if view.observations else 0.0
            moment = max(latest, min(row.time, now)) if first else now
            view.observations.append(Observation(row.boot, moment, row.counters, row.applied, row.users,
                                                 row.open_breakers, row.gauges))  # fmt: skip
        if len(view.observations) > KEPT:
            half = len(view.observations) // 2
            view.observations = view.observations[:half:2] + view.observations[half:]

    def _submit(self, model: str, event: events.Event) -> None:
        """Write a finding; the view is as new as the store then."""
        view = self.views.get(model)
        now = self.clock.now(view.state.time if view is not None else 0.0)
        try:
            state = self.store.submit(model, event, self.holder, now, lease=self.holder)
        except (Fenced, Unavailable):
            raise
        except ReleaseError as error:  # the state has moved on since
            log.info("%s of %s: %s", type(event).__name__, model, error)
            return
        if view is not None:
            view.sequence = -1  # read again: another thread may have written meanwhile
        log.info("%s: %s: %s", model, type(event).__name__, state.message)

    def _tick(self, model: str, view: View, now: float) -> None:
        if advance(view.state, events.Tick(), now)[0] != view.state:
            self._submit(model, events.Tick())

    def _job(self, key: tuple[str, ...], action: Callable[..., None], *arguments: Any) -> None:
        """Run beside the rounds, once at a time."""
        running = self.jobs.get(key)
        if running is None or running.done():
            if running is not None and running.exception() is not None:
                log.warning("%s: %s", " ".join(key), running.exception())
            self.jobs[key] = self.threads.submit(action, *arguments)

    # -- duties -------------------------------------------------------------------------------------------------------
    def _prepare(self, model: str, view: View, duty: Duty, now: float) -> None:
        self._job(("prepare", model, duty.subject), self._prepared, model, view.state, duty.subject)

    def _prepared(self, model: str, state: State, version: str) -> None:
        try:
            evidence = servers.prepare(state.spec, version)
        except servers.NotServing as error:
            self._submit(model, events.NotReady(version, str(error)))
        else:
            self._submit(model, events.Ready(version, evidence))

    def _unload(self, model: str, view: View, duty: Duty, now: float) -> None:
        if now - view.state.since >= 2.0:  # what is under way has been answered
            self._job(("unload", model, duty.subject), self._unloaded, model, view.state, duty.subject)

    def _unloaded(self, model: str, state: State, version: str) -> None:
        try:
            servers.unload(state.spec, version)
        except servers.NotServing as error:
            self._submit(model, events.Unloaded(version, str(error)))
        else:
            self._submit(model, events.Unloaded(version))

    def _capacity(self, model: str, view: View, duty: Duty, now: float) -> None:
        wanted = dict(view.state.wanted or {})
        rate = request_rate(view.state, view.observations, now)
        self._job(("capacity", model), self._capacity_checked, model, view.state, wanted, rate)

    def _capacity_checked(self, model: str, state: State, wanted: dict[str, int], rate: float) -> None:
        reason = capacity_lack(state, wanted, rate)
        for version in (v for v, count in wanted.items() if count and reason is None):
            try:
                for endpoint in state.spec.versions[version].endpoints:
                    servers.require_ready(endpoint)
            except servers.NotServing as error:
                reason = f"{version}: {error}"
        said = reason or f"{rate:.4g} requests/s fit"
        self._submit(model, events.CapacityChecked(reason is None, said, wanted))

    def _guard(self, model: str, view: View, duty: Duty, now: float) -> None:
        if now - view.breached < 0.4:
            return
        view.breached = now
        for breach in guards.breaches(view.state, view.observations, now):
            self._submit(model, breach)
            return

    def _notify(self, model: str, state: State) -> None:
        notify.deliver(self.store, model, state)

    def _scrape(self, model: str, view: View, now: float) -> None:
        """What the servers say of themselves, where the rollout says where."""
        wanted = any(e.metrics is not None for v in view.state.spec.versions.values() for e in v.endpoints)
        if wanted and under_way(view.state) and now - view.scraped >= SCRAPE_SECONDS:
            view.scraped = now
            self._job(("scrape", model), self._scraped, model, view, now)

    def _scraped(self, model: str, view: View, now: float) -> None:
        for name, version in view.state.spec.versions.items():
            for endpoint in version.endpoints:
                if endpoint.metrics is None:
                    continue
                try:
                    found = servers.scrape(endpoint, servers.name_of(model, version, endpoint))
                except CallFailed as error:
                    log.info("metrics of %s: %s", name, error)
                    continue
                gauges = servers.gauges_between(view.scrapes.get(endpoint.url), found)
                view.scrapes[endpoint.url] = found
                row = Observation(f"{SERVER}{endpoint.url}", now, {}, gauges={name: gauges})
                self.store.observe({model: row})

    # -- analyses -----------------------------------------------------------------------------------------------------
    def _analyse(self, model: str, view: View, duty: Duty, now: float) -> None:
        analysis = next((a for a in view.state.analyses if str(a.run) == duty.subject), None)
        if analysis is None:
            return
        for metric in analysis.metrics:
            for version in view.state.spec.candidates:
                if (metric, version) not in analysis.passed:
                    self._look(model, view, analysis, metric, version, now)

    def _look(self, model: str, view: View, analysis: Analysis, metric: str, version: str, now: float) -> None:
        config, key = view.state.spec.metrics[metric], (analysis.run, metric, version)
        due = view.looked.get(key, analysis.since + seconds(config.initial_delay)) + seconds(config.interval)
        ended = analysis.until is not None and now >= analysis.until
        if now < due and not ended:
            return
        view.looked[key] = now
        question = judge.Question(view.state, analysis, metric, version, view.observations, now)
        if judge.own(config):
            self._conclude(model, question, judge.judge(question))
        else:
            self._job(("measure", model, *map(str, key)), self._measured, model, view, question)

    def _measured(self, model: str, view: View, question: judge.Question) -> None:
        state, key = question.state, (question.analysis.run, question.metric, question.version)
        context = sources.Context(model, question.version, state.stable, question.begin, question.now)
        value: float | sources.SourceDown
        try:
            value = sources.measure(question.config, context)
        except sources.SourceDown as error:
            value = error
        tally = view.tallies[key] = sources.counted(view.tallies.get(key, sources.Tally()), question.config, value)
        self._conclude(model, question, sources.verdict(tally, question.config, question.ended))

    def _conclude(self, model: str, question: judge.Question, verdict: judge.Verdict) -> None:
        if verdict.outcome is None:
            return
        said = {(n.metric, n.version, n.outcome) for n in question.state.notes if n.time > question.analysis.since}
        repeated = (question.metric, question.version, verdict.outcome) in said
        if repeated and verdict.outcome in ("Inconclusive", "Error"):
            return  # it stands until somebody resumes
        found = events.Judged(question.analysis.run, question.metric, question.version, verdict.outcome,
                              verdict.reason, dict(verdict.evidence))  # fmt: skip
        self._submit(model, found)


_DUTIES: dict[str, Callable[[Controller, str, View, Duty, float], None]] = {
    "prepare": Controller._prepare, "unload": Controller._unload, "capacity": Controller._capacity,
    "analyse": Controller._analyse, "guard": Controller._guard,
}  # fmt: skip


def request_rate(state: State, observations: list[Observation], now: float, window: float = 10.0) -> float:
    """Requests a second of all versions together, lately."""
    versions = state.spec.versions
    return sum(windows.between(observations, version, now - window, now).requests for version in versions) / window


def capacity_lack(state: State, wanted: dict[str, int], rate: float) -> str | None:
    """Why the wanted weights are too much for a version that states what it can do; None if they are not."""
    assert state.spec.capacity is not None
    for version, count in wanted.items():
        can, gets = state.spec.versions[version].requests_per_second, rate * count / WHOLE
        if can is not None and gets > can * state.spec.capacity.headroom:
            return (
                f"{version} would get {gets:.4g} requests/s, over {state.spec.capacity.headroom:.0%} of the "
                f"{can:g} it is said to serve"
            )
    return None
