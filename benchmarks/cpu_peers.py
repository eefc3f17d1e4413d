"""Latency beside onnxruntime and OpenVINO on this CPU, paired, fp32, batch 1.

    python -m benchmarks.cpu_peers [--quick] [--threads 1,2] [--only resnet50] [--level 3] [--json results.json]

The last line is the claim: `worst ratio vs onnxruntime: R`, R = onnxruntime's time / Ingot's, over all rows.
A row whose outputs differ from onnxruntime's by more than a thousandth of the largest output fails the run.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

import ingot
from benchmarks.models import MODELS, example_inputs, model_path
from benchmarks.runtimes import PEERS, Run, installed_peers
from benchmarks.timing import available_threads, paired, pinned, write_json

TOLERANCE = 1e-3
ROUNDS, QUICK_ROUNDS = 25, 9


@dataclass(frozen=True)
class Row:
    """One model at one thread count: medians in milliseconds, speed ratios (above 1: Ingot is faster), difference."""

    model: str
    threads: int
    milliseconds: dict[str, float]
    ratios: dict[str, float]
    difference: float | None

    @property
    def passed(self) -> bool:
        return self.difference is None or self.difference <= TOLERANCE


def build(name: str, level: int) -> ingot.Engine:
    """The model's engine; tuning results are kept between runs."""
    config = ingot.BuildConfig(target="cpu", level=level, timing_cache=Path("build/timing.cache"))
    return ingot.build(model_path(name), config)


def open_ingot(engine: ingot.Engine, threads: int) -> Run:
    return ingot.Session(engine, device="cpu", threads=threads).run


def difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest difference over all outputs, as a share of the largest magnitude of that output."""
    return max(float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()) for name in theirs)


def measure(name: str, engine: ingot.Engine, threads: int, rounds: int) -> Row:
    with pinned(threads):
        inputs, path = example_inputs(name), model_path(name)
        runs = {"ingot": open_ingot(engine, threads)}
        runs |= {peer: opener(path, threads) for peer, opener in installed_peers().items()}
        outputs = {runtime: run(inputs) for runtime, run in runs.items()}
        apart = difference(outputs["ingot"], outputs["onnxruntime"]) if "onnxruntime" in outputs else None
        timings = paired({runtime: partial(run, inputs) for runtime, run in runs.items()}, rounds)
    ours = timings["ingot"]
    ratios = {peer: round(ours.ratio(timing), 3) for peer, timing in timings.items() if peer != "ingot"}
    return Row(name, threads, {key: round(timing.median, 4) for key, timing in timings.items()}, ratios, apart)


def measure_all(names: list[str], threads: list[int], level: int, rounds: int) -> Iterator[Row]:
    for name in names:
        engine = build(name, level)
        for count in threads:
            yield measure(name, engine, count, rounds)


def cell(row: Row, runtime: str) -> str:
    return f"{row.milliseconds[runtime]:.3f}" if runtime in row.milliseconds else "absent"


def describe(row: Row) -> str:
    times = "".join(f"{cell(row, runtime):>13}" for runtime in ("ingot", *PEERS))
    ratios = "".join(f"{row.ratios[peer]:>8.2f}x" if peer in row.ratios else f"{'–':>9}" for peer in PEERS)
    apart = "not compared" if row.difference is None else f"{row.difference:.1e}"
    return f"{row.model:<14}{row.threads:>7} {times}   {ratios}   {apart}{'' if row.passed else '  FAIL'}"


def report(rows: Iterator[Row]) -> list[Row]:
    """Print each row as it is measured."""
    header = "".join(f"{name:>13}" for name in ("ingot ms", *PEERS))
    print(f"{'model':<14}{'threads':>7} {header}   {'vs ort':>9}{'vs ov':>9}   difference", flush=True)
    done = []
    for row in rows:
        print(describe(row), flush=True)
        done.append(row)
    return done


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    counts = [count for count in (1, 2) if count <= available_threads()]
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}")
    parser.add_argument("--threads", type=lambda text: [int(count) for count in text.split(",")], default=counts)
    parser.add_argument("--only", choices=MODELS, action="append", help="this model; may be repeated")
    parser.add_argument("--level", type=int, default=3, help="how long to tune, 0 to 5")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def main() -> int:
    chosen = options()
    for peer in PEERS.keys() - installed_peers().keys():
        print(f"{peer} is not installed: its column is absent (pip install 'ingot[peers]')")
    rounds = QUICK_ROUNDS if chosen.quick else ROUNDS
    # Most threads first: OpenVINO's pool keeps the cores that its process may use when the first model is compiled.
    threads = sorted(set(chosen.threads), reverse=True)
    rows = report(measure_all(chosen.only or list(MODELS), threads, chosen.level, rounds))
    worst = min((row.ratios["onnxruntime"] for row in rows if "onnxruntime" in row.ratios), default=None)
    if chosen.json:
        write_json(
            chosen.json, "fp32 latency at batch 1 beside other runtimes", [asdict(row) for row in rows], worst=worst
        )
    print(f"worst ratio vs onnxruntime: {'not measured' if worst is None else f'{worst:.2f}'}")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
