"""Grey release, measured: the gateway's overhead, how soon worse versions are found, false alarms, rollback.

    python -m benchmarks.release [--quick] [--parts overhead,detection,alarms,rollback] [--json FILE]

overhead    1,000 requests/s (Poisson) to a server that answers after 1 ms ± 0.3 ms, directly and through the gateway
            in turns; the gateway's processes on one core. Ten rounds each: medians are paired; the P99 is each side's
            quietest round, because whatever else runs on the machine is in the tail of both
detection   drawn traffic (benchmarks/release_simulation.py: 200 requests/s Poisson, lognormal latency with median 10 ms
            and sigma 0.4; slower: every quantile times 2.37) through the real judge and state machine, a look a
            second, the analysis in the background from 5 % on; α = 1 % for the rollout, split over its tests
alarms      1,000 drawn rollouts of equal versions through three steps and nine tests
rollback    real processes: 200 requests/s, 5 % on a version of whose answers 30 % are errors
"""

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import release_simulation as simulation
from benchmarks.release_load import Load, inference, percentile
from benchmarks.release_upstream import Upstream, upstream
from benchmarks.timing import machine, write_json
from examples.release.processes import Ports, gateway, release_server
from ingot.release.access import Remote

EVERY = 20  # seconds between questions; the judge keeps the largest evidence of every second, so none is passed over
BODY = b'{"inputs": [{"name": "image", "shape": [1, 64], "datatype": "FP32", "data": [%b]}]}' % b",".join([b"0.5"] * 64)
PATH = "/v2/models/m/infer"
DETECTION = """
model: simulated
stable: v1
candidates: [v2]
versions: {v1: {endpoints: [{url: 'http://localhost:1'}]}, v2: {endpoints: [{url: 'http://localhost:2'}]}}
metrics: {errors: {kind: errorRate}, slow: {kind: latency}}
analysis: {metrics: [errors, slow]}
steps: [{setWeight: 5}, {pause: {duration: 600s}}, {setWeight: 50}, {pause: {duration: 60s}}]
"""


@dataclass(frozen=True)
class Line:
    """A claim: what was measured, the bound, whether it holds."""

    text: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        return f"{'passed' if self.passed else 'FAILED'}  {self.text}: {self.value:.4g} (limit {self.limit:g})"


# -- overhead ---------------------------------------------------------------------------------------------------------
ONE = """
model: m
stable: v1
candidates: [v2]
versions:
  v1: {{endpoints: [{{url: 'http://127.0.0.1:{0}'}}]}}
  v2: {{endpoints: [{{url: 'http://127.0.0.1:{1}'}}]}}
{2}
"""


def overhead(quick: bool) -> tuple[list[Line], dict[str, Any]]:
    """Paired rounds; the gateway's processes stay on one core, server and load on the rest."""
    rounds, seconds = (2, 4.0) if quick else (10, 5.0)
    direct: list[tuple[float, float]] = []
    through: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder, upstream(Upstream(0.001, 0.0003)) as server:
        ports, store = Ports.free(), f"sqlite:///{folder}/release.db"
        with release_server(store, Path(folder), ports), gateway(store, Path(folder), ports) as running:
            pin(running.pid)
            Remote(f"http://127.0.0.1:{ports.console}").apply(
                ONE.format(server, server, "steps: [{setWeight: 5}, {pause: {}}]"), ""
            )
            time.sleep(1.5)
            for index in range(rounds):
                pairs = [(server, direct), (ports.gateway, through)]
                for port, kept in pairs if index % 2 else pairs[::-1]:
                    kept.append(latencies(port, 1000.0, seconds, index))
                    through_or_direct = "gateway" if port == ports.gateway else "direct"
                    print(
                        f"  {through_or_direct:8} P50 {1e3 * kept[-1][0]:.3f} ms, P99 {1e3 * kept[-1][1]:.3f} ms",
                        flush=True,
                    )
    medians = [1e3 * (b[0] - a[0]) for a, b in zip(direct, through, strict=True)]
    tails = [[1e3 * tail for _, tail in rounds] for rounds in (direct, through)]
    middle = [statistics.median(tail) for tail in tails]
    print(f"  P99, median of the rounds: direct {middle[0]:.3g} ms, gateway {middle[1]:.3g} ms")
    lines = [
        Line("gateway overhead at 1,000 requests/s on one core, median, ms", statistics.median(medians), 1.0),
        Line("the same, P99, quietest round of each, ms", min(tails[1]) - min(tails[0]), 5.0),
    ]
    return lines, {"median_ms": medians, "direct_p99_ms": tails[0], "gateway_p99_ms": tails[1], "nice": os.nice(0)}


def pin(pid: int) -> None:
    """The gateway and its workers on one core, everybody else here on the others."""
    cores = sorted(os.sched_getaffinity(0))
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    for one in (pid, *children):
        os.sched_setaffinity(one, {cores[0]})


def latencies(port: int, rate: float, seconds: float, seed: int) -> tuple[float, float]:
    """(P50, P99) of a load from a process of its own, the first second left out."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_latencies, port, rate, seconds, seed).result()


def _latencies(port: int, rate: float, seconds: float, seed: int) -> tuple[float, float]:
    import uvloop

    load = Load(port, inference(PATH, [BODY]), rate, seed=seed)
    uvloop.run(load.run(seconds))
    assert not load.lost, load.lost[:3]
    kept = [sample.seconds for sample in load.samples if sample.due > 1.0]
    return percentile(kept, 0.5), percentile(kept, 0.99)


# -- detection and false alarms ---------------------------------------------------------------------------------------
def in_parts(count: int, canary: simulation.Behaviour, seed: int, every: int, text: str) -> list[simulation.Course]:
    """Drawn rollouts on all cores."""
    workers = len(os.sched_getaffinity(0))
    share = math.ceil(count / workers)
    with ProcessPoolExecutor(workers) as pool:
        parts = [pool.submit(simulation.rollouts, share, canary, seed + n, every, text) for n in range(workers)]
        return [course for part in parts for course in part.result()][:count]


def detection(quick: bool) -> tuple[list[Line], dict[str, Any]]:
    count = 20 if quick else 200
    slow = in_parts(count, simulation.SLOWER, 100, 1, DETECTION)
    errors = in_parts(count, simulation.WORSE, 200, 1, DETECTION)
    at = {"slow": sorted(c.seconds for c in slow), "errors": sorted(c.seconds for c in errors)}
    exposed = {"slow": statistics.median(c.canary_requests for c in slow),
               "errors": statistics.median(c.canary_requests for c in errors)}  # fmt: skip
    missed = sum(not c.failed for c in slow + errors)
    lines = [
        Line("+137 % P95 at 200 requests/s and 5 %: found after, 90 % of runs, s", percentile(at["slow"], 0.9), 30),
        Line(
            "errors 1 % -> 3 % at 200 requests/s and 5 %: found after, median, s", statistics.median(at["errors"]), 60
        ),
        Line(
            "errors 1 % -> 3 % at 200 requests/s and 5 %: found after, 90 % of runs, s",
            percentile(at["errors"], 0.9),
            150,
        ),
        Line(f"regressions not found, of {2 * count}", missed, 0),
    ]
    print(f"  requests exposed, median: slower {exposed['slow']:.0f}, errors {exposed['errors']:.0f}")
    return lines, {"seconds": at, "exposed_requests": exposed}


def alarms(quick: bool) -> tuple[list[Line], dict[str, Any]]:
    count = 60 if quick else 1000
    courses = in_parts(count, simulation.SAME, 300, EVERY, simulation.SPEC)
    share = 100 * sum(course.failed for course in courses) / count
    reasons = [course.reason for course in courses if course.failed]
    return [Line(f"A/A false alarms in {count} whole rollouts, %", share, 1.0)], {"reasons": reasons, "rollouts": count}


# -- rollback ---------------------------------------------------------------------------------------------------------
BAD = """
metrics: {errors: {kind: errorRate, interval: 500ms}}
analysis: {metrics: [errors]}
steps: [{setWeight: 5}, {pause: {}}]
"""


def rollback(quick: bool) -> tuple[list[Line], dict[str, Any]]:
    """Errors that reach users are the canary's own, none is the rollback's; soon after the verdict there are none."""
    with (
        tempfile.TemporaryDirectory() as folder,
        upstream(Upstream(0.001)) as good,
        upstream(Upstream(0.001, errors=0.3)) as bad,
    ):
        ports, store = Ports.free(), f"sqlite:///{folder}/release.db"
        with release_server(store, Path(folder), ports), gateway(store, Path(folder), ports):
            remote = Remote(f"http://127.0.0.1:{ports.console}")
            remote.apply(ONE.format(good, bad, BAD), "")
            time.sleep(1.5)
            load = Load(ports.gateway, inference(PATH, [BODY]), 200.0)
            thread, begun = threading.Thread(target=lambda: asyncio.run(load.run())), time.time()
            thread.start()
            found = wait_for_end(remote, 60)
            time.sleep(3)
            load.stopped = True
            thread.join()
            verdict = next(e["time"] for e in reversed(remote.history("m")) if e["what"] == "Judged")
    return _rollback_lines(load, verdict - begun, found["phase"])


def _rollback_lines(load: Load, verdict: float, phase: str) -> tuple[list[Line], dict[str, Any]]:
    canary = [sample for sample in load.samples if sample.version == "v2"]
    failed = [sample for sample in load.samples if sample.status != 200]
    others = [sample for sample in failed if sample.version != "v2"]
    last = max((sample.due for sample in canary), default=0.0)
    users = len({sample.user for sample in canary})
    print(f"  {phase} {verdict:.1f} s after the load began; {users} users exposed, {len(failed)} errors of the canary")
    lines = [
        Line("rollback: failed requests beyond the canary's own", len(others) + len(load.lost), 0),
        Line("rollback: canary's last request after the verdict, s", max(0.0, last - verdict), 1.0),
        Line("rollback: a version with 30 % errors was not rolled back", phase != "Degraded", 0),
    ]
    return lines, {"users": users, "failed": len(failed), "seconds": verdict}


def wait_for_end(remote: Remote, seconds: float) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while (found := remote.get("m"))["phase"] not in ("Healthy", "Degraded") and time.monotonic() < end:
        time.sleep(0.1)
    return found


PARTS: dict[str, Callable[[bool], tuple[list[Line], dict[str, Any]]]] = {
    "overhead": overhead, "detection": detection, "alarms": alarms, "rollback": rollback,
}  # fmt: skip


def keep(path: Path, part: str, lines: list[Line], details: dict[str, Any]) -> None:
    """Write a part's rows with the machine they were measured on; those of other parts stay."""
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in before if row["part"] != part]
    rows += [
        {"part": part, "text": line.text, "value": line.value, "limit": line.limit, "passed": line.passed,
         "machine": machine()} for line in lines
    ]  # fmt: skip
    rows.append({"part": part, "text": "details", "passed": True, "details": details})
    failed = [row["text"] for row in rows if not row["passed"]]
    claims = sum("limit" in row for row in rows)
    write_json(
        path, f"{claims - len(failed)} of {claims} passed" + "".join(f"; FAILED {text}" for text in failed), rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs: a check, no figures")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    lines: list[Line] = []
    for name in arguments.parts.split(","):
        print(f"{name} …", flush=True)
        found, details = PARTS[name](arguments.quick)
        lines += found
        print(*found, sep="\n", flush=True)
        if arguments.json:
            keep(arguments.json, name, found, details)
    print(f"release: {sum(line.passed for line in lines)} of {len(lines)} passed")
    return 0 if all(line.passed for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
