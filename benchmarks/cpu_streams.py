"""Throughput mode: S runs side by side over the cores, beside one run at a time on all of them, and beside the peers.

    python -m benchmarks.cpu_streams [--streams 2] [--only "resnet50 int8"] [--json results.json]

Every way of running is driven by one Python thread a stream, for a second a turn, the ways taking turns; rates are
medians over the turns. `one by one` is one stream with all threads; peers are configured for throughput with as many
streams as ours (OpenVINO by NUM_STREAMS; onnxruntime by one thread a run). The last line is the claim:
`streams give R times one run at a time, G times the best peer`, geometric means over the rows.
"""

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ingot
from benchmarks.cpu_peers import build, geometric_mean
from benchmarks.peer_cases import Case, cases
from benchmarks.runtimes import Run, open_onnxruntime, openvino_streams
from benchmarks.timing import PAUSE, available_threads, write_json

CHOSEN = ("resnet50 fp32", "resnet50 int8", "mobilenet_v2 int8", "bert_base int8")
CLAIM = "inferences per second of streams side by side, beside one run at a time and other runtimes' streams"
ROUNDS, SECONDS = 7, 1.0


def rate(runs: Sequence[Run], inputs: Any, seconds: float) -> float:
    """Inferences per second, each of `runs` on a thread of its own."""
    counts = [0] * len(runs)
    start = time.perf_counter()

    def drive(number: int) -> None:
        while time.perf_counter() - start < seconds:
            runs[number](inputs)
            counts[number] += 1

    threads = [threading.Thread(target=drive, args=(number,)) for number in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - start)


Way = tuple[Sequence[Run], Callable[[], None]]


def ways(case: Case, engine: ingot.Engine, threads: int, streams: int) -> dict[str, Way]:
    """Each way's runs, one a stream, and what ends it."""
    alone = ingot.Session(engine, threads=threads)
    together = ingot.Session(engine, threads=threads, streams=streams)
    found: dict[str, Way] = {
        "one by one": ([alone.run], alone.close),
        "streams": ([together.run] * streams, together.close),
    }
    if find_spec("onnxruntime"):
        found["onnxruntime"] = ([open_onnxruntime(case.path(), max(threads // streams, 1))] * streams, _nothing)
    if find_spec("openvino"):
        found["openvino"] = (openvino_streams(case.path(), threads, streams, case.precision), _nothing)
    return found


def _nothing() -> None:
    """A peer ends when it is forgotten."""


def measure(case: Case, threads: int, streams: int, rounds: int) -> dict[str, Any]:
    """Median rates of all ways, taking turns."""
    inputs, found = case.inputs(), ways(case, build(case, 3), threads, streams)
    turns: dict[str, list[float]] = {name: [] for name in found}
    for runs, _ in found.values():
        rate(runs, inputs, SECONDS / 4)
    for index in range(rounds):
        names = list(found)[index % len(found) :] + list(found)[: index % len(found)]
        for name in names:
            time.sleep(PAUSE)
            turns[name].append(rate(found[name][0], inputs, SECONDS))
    for _, end in found.values():
        end()
    rates = {name: round(statistics.median(values), 2) for name, values in turns.items()}
    return {"model": case.name, "precision": case.precision, "streams": streams, "threads": threads, "rates": rates}


def describe(row: dict[str, Any]) -> str:
    return f"{row['model']:<14}{row['precision']:<6}" + "".join(f"{n:>14}{r:>10.1f}" for n, r in row["rates"].items())


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The claim."""
    rates = [row["rates"] for row in rows]
    gain = geometric_mean([r["streams"] / r["one by one"] for r in rates])
    peers = [[v for n, v in r.items() if n not in ("streams", "one by one")] for r in rates]
    beside = geometric_mean([r["streams"] / max(p) for r, p in zip(rates, peers, strict=True) if p])
    return f"streams give {gain:.2f} times one run at a time, {beside:.2f} times the best peer"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=available_threads())
    parser.add_argument("--only", default=",".join(CHOSEN), help="labels, separated by commas")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    wanted = {label.strip() for label in arguments.only.split(",")}
    rows = []
    for case in (case for case in cases() if case.label in wanted):
        rows.append(measure(case, available_threads(), arguments.streams, arguments.rounds))
        print(describe(rows[-1]), flush=True)
    if not rows:
        print(f"no case is called any of {', '.join(sorted(wanted))}", file=sys.stderr)
        return 2
    print(summary(rows))
    if arguments.json:
        write_json(arguments.json, CLAIM, rows, summary=summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
