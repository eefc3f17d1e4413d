"""Controller, gateway worker, canary and database are killed at every step of a rollout, under load.

    python -m benchmarks.release_chaos [--quick] [--json FILE]

For each victim and each step: kill -9 when the step begins (the database: locked for longer than anybody waits), bring
it back as a process manager would, and let the rollout end. Then:
lost    requests that a client which repeats a broken connection had no good answer to, and logs of which an entry does
        not follow from those before
stuck   rollouts that did not end as they should within a minute
wrong   requests given by weight to a version that had had none for a second
"""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen

from benchmarks.release_load import Load, inference
from benchmarks.release_upstream import Upstream, upstream
from benchmarks.server_load import free_port
from benchmarks.timing import write_json
from examples.release.processes import Ports, gateway, process, wait_until_answers
from ingot.release import events, rollout
from ingot.release.rollout import State, phase
from ingot.release.slots import weights
from ingot.release.spec import ReleaseError, parse
from ingot.release.store import Entry, Store

SPEC = """
model: m
stable: v1
candidates: [v2]
versions:
  v1: {{endpoints: [{{url: 'http://127.0.0.1:{0}'}}]}}
  v2: {{endpoints: [{{url: 'http://127.0.0.1:{1}'}}], timeout: 1s}}
routing: {{breaker: {{failures: 3, cooldown: 500ms}}}}
metrics: {{errors: {{kind: errorRate, minimumSamples: 20}}}}
watch: 1s
steps:
- {{setWeight: 20}}
- {{analysis: {{metrics: [errors], duration: 2s}}}}
- {{pause: {{duration: 1s}}}}
- {{setWeight: 60}}
- {{analysis: {{metrics: [errors], duration: 2s}}}}
"""
PLACES = ("preparing", "step 1", "step 2", "step 4", "watching", "idle")
VICTIMS = ("controller", "worker", "canary", "database")
RATE = 100.0


@dataclass
class Result:
    """What one kill led to."""

    victim: str
    place: str
    lost: int = 0
    stuck: int = 0
    wrong: int = 0
    ended: str = ""
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = f"lost {self.lost}, stuck {self.stuck}, wrong weight {self.wrong}"
        return f"{self.victim:10} killed at {self.place:9}: {self.ended:8} {counts} {'; '.join(self.notes)}"


class World:
    """Processes that can be killed one by one."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.ports, self.stack = folder, Ports.free(), stack
        self.url = f"sqlite:///{folder}/release.db"
        self.store = Store(self.url, wait=2.0)
        self.store.migrate()
        self.good = stack.enter_context(upstream(Upstream(0.002)))
        self.canary_port = free_port()
        self.canary = stack.enter_context(self.canary_process())
        self.controller = stack.enter_context(self.controller_process())
        self.gateway = stack.enter_context(gateway(self.url, folder, self.ports, workers=2))

    @contextmanager
    def canary_process(self) -> Iterator[Popen[bytes]]:
        code = (
            "from benchmarks.release_upstream import *; import multiprocessing as m; "
            "import benchmarks.release_upstream as u; a, b = m.Pipe(); "
            f"u._serve(Upstream(0.002), {self.canary_port}, b)"
        )
        running = Popen([sys.executable, "-c", code])
        try:
            wait_until_answers(f"http://127.0.0.1:{self.canary_port}/", self.folder / "gateway.log")
            yield running
        finally:
            running.kill()
            running.wait()

    @contextmanager
    def controller_process(self) -> Iterator[Popen[bytes]]:
        words = ["release", "serve", "--store", self.url, f"--port={self.ports.console}"]
        with process(words, self.folder / "release.log") as running:
            yield running

    def kill(self, victim: str) -> None:
        """Kill it, and bring it back as its manager would."""
        if victim == "database":
            self._lose_database()
        elif victim == "worker":
            os.kill(self._worker(), signal.SIGKILL)  # the gateway itself starts another
        elif victim == "controller":
            self.controller.kill()
            self.controller = self.stack.enter_context(self.controller_process())
        else:
            self.canary.kill()
            self.canary.wait()
            time.sleep(1.0)
            self.canary = self.stack.enter_context(self.canary_process())

    def _worker(self) -> int:
        pid = self.gateway.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def _lose_database(self) -> None:
        """The file cannot be opened for two seconds; a process that has it open finds it locked."""
        import sqlite3

        with sqlite3.connect(self.folder / "release.db", isolation_level=None, timeout=10) as connection:
            connection.execute("begin exclusive")
            time.sleep(2.5)  # longer than the gateway waits for it
            connection.execute("rollback")

    def state(self) -> State | None:
        try:
            return self.store.load("m")[0]
        except ReleaseError:
            return None


def at_place(state: State | None, place: str) -> bool:
    """Whether the rollout has come to a place."""
    if state is None:
        return False
    if place.startswith("step"):
        return state.stage not in ("preparing",) and state.step >= int(place.split()[1])
    order = ("preparing", "steps", "promoting", "watching", "idle")
    return state.stage in order and order.index(state.stage) >= order.index(place)


def one_kill(victim: str, place: str) -> Result:
    result = Result(victim, place)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        world = World(Path(folder), stack)
        acknowledged = world.store.submit(
            "m", events.Applied(parse(SPEC.format(world.good, world.canary_port))), "chaos"
        )
        assert acknowledged.stage == "preparing"
        wait_until_answers(f"http://127.0.0.1:{world.ports.gateway}/v2/models/m", Path(folder) / "gateway.log")
        load = Load(world.ports.gateway, inference("/v2/models/m/infer", [b"{}"]), RATE)
        thread = threading.Thread(target=lambda: asyncio.run(load.run()))
        began = time.time()
        thread.start()
        try:
            reach(world, place, 40)
            world.kill(victim)
            ended = reach(world, "idle", 60)
            time.sleep(1.5)
        finally:
            load.stopped = True
            thread.join()
        judge_result(result, world, load, ended, began)
    return result


def reach(world: World, place: str, seconds: float) -> State | None:
    """The state once it is there, has been aborted, or time is over; an operator resumes what an error held."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = world.state()
        if at_place(state, place) or (state is not None and state.stage == "aborted"):
            return state
        if state is not None and state.hold is not None and state.hold.kind in ("preparation", "error"):
            world.store.submit("m", events.Resume(), "operator")
        time.sleep(0.02)
    return world.state()


def judge_result(result: Result, world: World, load: Load, ended: State | None, began: float) -> None:
    failed = [sample for sample in load.samples if sample.status != 200]
    result.lost = len(load.lost) + len(failed)
    result.notes += load.lost[:2] + [
        f"{sample.status} of {sample.version} at {sample.due:.1f} s" for sample in failed[:2]
    ]
    fault = world.store.verify("m")
    if fault is not None:
        result.lost += 1
        result.notes.append(fault)
    result.ended = phase(ended) if ended is not None else "?"
    # a canary that was killed while it had users may be rolled back: that is its job
    allowed = ("Healthy", "Degraded") if result.victim == "canary" else ("Healthy",)
    result.stuck = int(result.ended not in allowed)
    result.wrong = wrong_weights(world.store.history("m"), load, began)


def wrong_weights(entries: list[Entry], load: Load, began: float) -> int:
    """Requests to a version that had no weight, a second and more after the log said so, before it said otherwise."""
    state, spans = None, []
    for entry in entries:
        state, _ = rollout.advance(state, entry.event, entry.time)
        spans.append((entry.time - began, weights(state.assignment)))
    found = 0
    for index, (start, shares) in enumerate(spans):
        stop = spans[index + 1][0] if index + 1 < len(spans) else float("inf")
        within = [s for s in load.samples if start + 1.0 < s.due < stop and s.route == "weight"]
        found += sum(shares.get(s.version, 0) == 0 for s in within)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one place a victim")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    places = ("step 1",) if arguments.quick else PLACES
    results = []
    for victim in VICTIMS:
        for place in places:
            results.append(one_kill(victim, place))
            print(results[-1], flush=True)
    lost, stuck, wrong = (sum(getattr(result, name) for result in results) for name in ("lost", "stuck", "wrong"))
    claim = f"lost {lost}, stuck {stuck}, wrong weight {wrong}"
    print(f"{len(results)} kills: {claim}")
    if arguments.json:
        rows = [{"victim": r.victim, "place": r.place, "lost": r.lost, "stuck": r.stuck, "wrong": r.wrong,
                 "ended": r.ended} for r in results]  # fmt: skip
        write_json(arguments.json, claim, rows)
    return 0 if lost == stuck == wrong == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
