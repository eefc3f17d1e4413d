"""`ingot advise model.engine`: measures batch sizes, threads and instances here, and recommends a configuration."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ingot.engine import Engine
from ingot.errors import ConfigError
from ingot.plan.extent import evaluate, symbols_of
from ingot.plan.plan import TensorSpec
from ingot.runtime.session import Session
from ingot.server import load
from ingot.server.config import UNBOUNDED_BATCH
from ingot.server.infer import drawn
from ingot.tools.shapes import parse_shapes

_ENOUGH = 0.95  # a smaller batch, fewer instances: if they bring this share of the best, they are the better choice


@dataclass(frozen=True)
class Point:
    """What was measured: so many instances of so many threads, each with batches of so many rows."""

    instances: int
    threads: int
    rows: int
    rows_per_second: float
    median_ms: float
    p99_ms: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add = parser.add_argument
    add("engine", help="an engine file")
    add(
        "--shapes", default="", help="extents other than the batch: x:1x3x224x224 (default: the profile's typical ones)"
    )
    add("--latency-ms", type=float, help="only what stays below this at the 99th percentile")
    add("--cores", type=int, default=os.cpu_count() or 1, help="cores the server may use (default: all)")
    add("--seconds", type=float, default=0.5, help="of each measurement")
    add("--json", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Measure and recommend; ConfigError where nothing stays below the latency asked for."""
    engine = Engine.load(arguments.engine)
    points = measure(engine, parse_shapes(arguments.shapes), arguments.cores, arguments.seconds)
    best = chosen(points, arguments.latency_ms)
    if arguments.json:
        content = {"points": [asdict(point) for point in points], "best": asdict(best)}
        print(json.dumps({**content, "config.pbtxt": snippet(best, points), "flags": flags(best)}, indent=1))
    else:
        print(as_text(points, best))
    return 0


# -- measuring --------------------------------------------------------------------------------------------------------
def measure(engine: Engine, shapes: dict[str, tuple[int, ...]], cores: int, seconds: float) -> list[Point]:
    """A point for each way to divide the cores and each batch size."""
    points = []
    for instances, threads in divisions(cores):
        with ExitStack() as stack:
            sessions = [stack.enter_context(Session(engine, threads=threads)) for _ in range(instances)]
            points += [
                _measured(sessions, threads, rows, feeds_of(engine.inputs, shapes, rows), seconds)
                for rows in batch_sizes(engine.inputs, engine.outputs)
            ]
    return points


def divisions(cores: int) -> Iterator[tuple[int, int]]:
    """(instances, threads each): one instance of every size, and as many as fill the cores."""
    sizes = sorted({2**power for power in range(cores.bit_length()) if 2**power <= cores} | {cores})
    pairs = {(1, threads) for threads in sizes} | {(cores // threads, threads) for threads in sizes}
    yield from sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[0]))


def batch_sizes(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[int]:
    """1, 2, 4, … up to the profile's largest; [0] for a model that does not batch."""
    first = {spec.shape[0] if spec.shape else None for spec in (*inputs, *outputs)}
    if len(first) != 1 or not isinstance(next(iter(first)), str):
        return [0]
    most = min((spec.max[0] for spec in inputs if spec.max), default=UNBOUNDED_BATCH)
    least = max((spec.min[0] for spec in inputs if spec.min), default=1)
    sizes = [2**power for power in range(most.bit_length()) if least <= 2**power <= most]
    return sizes if sizes and sizes[-1] == most else [*sizes, most]


def feeds_of(inputs: Sequence[TensorSpec], shapes: dict[str, tuple[int, ...]], rows: int) -> dict[str, Any]:
    """Drawn inputs with so many rows; 0: with the shapes as they are."""
    names = {spec.name for spec in inputs}
    if stray := shapes.keys() - names:
        raise ConfigError(f"there is no input {min(stray)!r}; the engine has {', '.join(sorted(names))}")
    generator = np.random.default_rng(0)
    feeds = {}
    for spec in inputs:
        typical = spec.opt or tuple(int(evaluate(d, dict.fromkeys(symbols_of(d), 1))) for d in spec.shape)
        shape = shapes.get(spec.name, typical)
        feeds[spec.name] = drawn(generator, spec.dtype, (rows, *shape[1:]) if rows else shape)
    return feeds


def _measured(sessions: Sequence[Session], threads: int, rows: int, feeds: dict[str, Any], seconds: float) -> Point:
    def asking(session: Session) -> Callable[[], Any]:
        return lambda: session.run(feeds)

    result = load.closed([asking(session) for session in sessions], seconds, warm_up=seconds / 4)
    latencies = result.latencies or (_once(sessions[0], feeds),)
    rate = len(latencies) * max(rows, 1) / result.seconds
    late = float(np.percentile(latencies, 99, method="inverted_cdf"))
    return Point(len(sessions), threads, rows, rate, statistics.median(latencies), late)


def _once(session: Session, feeds: dict[str, Any]) -> float:
    """Milliseconds of a run that takes longer than a whole measurement."""
    start = time.perf_counter()
    session.run(feeds)
    return (time.perf_counter() - start) * 1e3


# -- recommending -----------------------------------------------------------------------------------------------------
def chosen(points: Sequence[Point], latency_ms: float | None) -> Point:
    """Of those within the latency the one with the most rows a second, or nearly as many at a lower latency."""
    allowed = [point for point in points if latency_ms is None or point.p99_ms <= latency_ms]
    if not allowed:
        fastest = min(points, key=lambda point: point.p99_ms)
        raise ConfigError(
            f"nothing stays below {latency_ms} ms here; the fastest, {fastest.rows or 1} rows on {fastest.threads} "
            f"threads, takes {fastest.p99_ms:.2f} ms at the 99th percentile"
        )
    best = max(point.rows_per_second for point in allowed)
    enough = [point for point in allowed if point.rows_per_second >= _ENOUGH * best]
    return min(enough, key=lambda point: (point.median_ms, point.instances))


def snippet(best: Point, points: Sequence[Point]) -> str:
    """What config.pbtxt should say."""
    lines = [f"max_batch_size: {best.rows}"]
    alike = [p for p in points if (p.instances, p.threads) == (best.instances, best.threads) and p.rows <= best.rows]
    alone = min(alike, key=lambda point: point.rows)
    if best.rows > 1:
        gain = best.rows_per_second / alone.rows_per_second
        lines.append(
            f"# {best.rows} rows bring {gain:.2f} times the rows a second of {alone.rows}; the server waits by its"
        )
        lines.append("# measured latencies and the requests' deadlines: dynamic_batching needs no preferred sizes")
        lines.append("dynamic_batching { default_queue_policy { allow_timeout_override: true } }")
    lines.append(f"instance_group [ {{ kind: KIND_CPU count: {best.instances} }} ]")
    return "\n".join(lines)


def flags(best: Point) -> str:
    """What `ingot serve` should be told."""
    return f"--threads={best.threads}"


def as_text(points: Sequence[Point], best: Point) -> str:
    """The measurements, and what follows."""
    lines = [f"{'instances':>9} {'threads':>8} {'rows':>6} {'rows/s':>12} {'median ms':>11} {'p99 ms':>9}"]
    for point in points:
        mark = "  <" if point == best else ""
        lines.append(
            f"{point.instances:9} {point.threads:8} {point.rows or '-':>6} {point.rows_per_second:12.1f} "
            f"{point.median_ms:11.3f} {point.p99_ms:9.3f}{mark}"
        )
    return "\n".join([*lines, "", "config.pbtxt:", snippet(best, points), "", f"ingot serve models/ {flags(best)}"])
