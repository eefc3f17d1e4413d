"""Budgets kept: one network, several accuracies that may be lost, an engine for each.

    python -m benchmarks.precision_budget ../shared/assets [--json benchmarks/results/precision_budget.json]

ResNet-56 on CIFAR-10 with 0.1, 0.5 and 2 points to lose. Every other batch of images is used to calibrate and to
search, the rest to prove. PASS needs each engine within its budget on the held-out half and faster than the one before.
Exits 1 if not.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import ingot
from benchmarks import asset_data, timing
from benchmarks.runtimes import Arrays
from ingot.precision import budget as budgets
from ingot.precision import metric, mixed
from ingot.precision.request import Request
from ingot.precision.trials import FLOAT32

MODEL = "vision/cifar10/resnet56_cifar10.onnx"
PROFILE = {"input": ((1, 3, 32, 32), (32, 3, 32, 32), (32, 3, 32, 32))}
BUDGETS = ("0.1%", "0.5%", "2%")
BATCH = 20
THREADS = 2
ROUNDS = 25
FASTER = 1.01  # than the engine of the smaller budget before it, than float32 the first


@dataclass(frozen=True)
class Row:
    """A budget, its engine, what it loses on the images that proved it, and its time in turns with the others."""

    budget: str
    narrow: int
    layers: int
    points_lost_searching: float
    points_lost: float
    images: int
    milliseconds: float
    speedup: float
    faster: float
    passed: bool
    notes: tuple[str, ...]


def samples(assets: Path) -> Iterator[Arrays]:
    """Batches with their labels, in a fixed order that mixes the classes."""
    images, labels = asset_data.cifar(assets)
    order = np.random.default_rng(0).permutation(len(images))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        yield {"input": images[chosen], "label": labels[chosen]}


def accuracy(outputs: Sequence[Mapping[str, Any]], data: Sequence[Mapping[str, Any]]) -> float:
    """Share of images whose largest score is at their label."""
    right = [next(iter(y.values())).argmax(1) == x["label"] for y, x in zip(outputs, data, strict=True)]
    return float(np.concatenate(right).mean())


def prepared(assets: Path, level: int, calibrator: str) -> mixed.Bench:
    """Calibrated once for all budgets."""
    config = ingot.BuildConfig(profiles=[ingot.Profile(**PROFILE)], level=level, threads=THREADS)
    request = Request(("int8",), partial(samples, assets), accuracy, calibrator=calibrator)
    return mixed.prepare(assets / MODEL, config, request)


def measured(bench: mixed.Bench, outcomes: Mapping[str, mixed.Outcome], assets: Path) -> dict[str, timing.Timing]:
    """Float32 and the engine of each budget, in turns."""
    batch = {"input": asset_data.cifar(assets)[0][:32]}
    engines = {"fp32": bench.trials.engine(FLOAT32), **{budget: o.engine for budget, o in outcomes.items()}}
    with ExitStack() as stack:
        runs = {n: stack.enter_context(ingot.Session(engine, threads=THREADS)).run for n, engine in engines.items()}
        return timing.paired({name: partial(run, batch) for name, run in runs.items()}, ROUNDS)


def row(budget: str, outcome: mixed.Outcome, mine: timing.Timing, wide: timing.Timing, before: timing.Timing) -> Row:
    """Judged by the held-out half, and by the engine of the budget before."""
    report = outcome.report
    held, reference = report.heldout["score"], report.heldout_reference["score"]
    allowed = budgets.parse(budget, metric.load(accuracy)).allows(held, reference)
    against = mine.ratio(before)
    return Row(
        budget, len(report.chosen), len(report.candidates), round((report.reference - report.score) * 100, 3),
        round((reference - held) * 100, 3), int(report.heldout["samples"]) * BATCH, round(mine.median, 4),
        round(mine.ratio(wide), 2), round(against, 3), allowed and against > FASTER, report.notes,
    )  # fmt: skip


def describe(row: Row) -> str:
    return (
        f"ResNet-56 budget {row.budget:>5}: {row.narrow} of {row.layers} layers in int8, {row.points_lost:+.2f} points "
        f"lost on {row.images:,} held-out images ({row.points_lost_searching:+.2f} where it was searched), "
        f"{row.milliseconds:.2f} ms, {row.speedup:.2f}x float32, {row.faster:.2f}x the one before  "
        f"{'PASS' if row.passed else 'FAIL'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path, help="the folder of shared models")
    parser.add_argument(
        "--budget", action="append", help="in rising order; may be repeated (default 0.1%%, 0.5%%, 2%%)"
    )
    parser.add_argument("--calibrator", default="auto")
    parser.add_argument("--level", type=int, default=3, help="how long to tune, 0 to 5")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    bench = prepared(options.assets, options.level, options.calibrator)
    outcomes = {text: bench.best(budgets.parse(text, bench.trials.metric)) for text in options.budget or BUDGETS}
    times = measured(bench, outcomes, options.assets)
    rows = [row(name, outcomes[name], times[name], times["fp32"], times[before]) for before, name in pairwise(times)]
    print("\n".join(map(describe, rows)))
    if options.json:
        fronts = {text: [asdict(trial) for trial in o.report.trials] for text, o in outcomes.items()}
        timing.write_json(options.json, "budgets kept", [asdict(row) for row in rows], model=MODEL, trials=fronts)
    print(f"precision_budget: {sum(row.passed for row in rows)} of {len(rows)} passed")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
