"""Budgets kept: one network, several accuracies that may be lost, an engine for each.

    python -m benchmarks.precision_budget ../shared/assets [--json benchmarks/results/precision_budget.json]
    python -m benchmarks.precision_budget ../shared/assets --keep build/budget --budget 0.1%    # a part at a time

ResNet-56 on CIFAR-10 with 0.1, 0.5 and 2 points to lose. Every other batch of images is used to calibrate and to
search, the rest to prove. PASS needs each engine within its budget on the held-out half and faster than the one before.
Exits 1 if not.
"""

import argparse
import json
import sys
import tempfile
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
from ingot.precision import mixed
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


@dataclass(frozen=True)
class Found:
    """What a search found for a budget, beside the engine."""

    narrow: int
    layers: int
    points_lost_searching: float
    points_lost: float
    images: int
    within: bool
    notes: list[str]
    trials: list[dict[str, Any]]


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


def prepared(assets: Path, options: argparse.Namespace) -> mixed.Bench:
    """Calibrated once for all budgets."""
    config = ingot.BuildConfig(profiles=[ingot.Profile(**PROFILE)], level=options.level, threads=THREADS,
                               timing_cache=options.keep / "times")  # fmt: skip
    ranges = options.keep / f"{options.calibrator}.ranges"
    request = Request(("int8",), partial(samples, assets), accuracy, calibrator=options.calibrator, cache=ranges)
    return mixed.prepare(assets / MODEL, config, request)


def search(bench: mixed.Bench, text: str, keep: Path) -> None:
    """The budget's engine and what was found on the way, kept in files."""
    budget = budgets.parse(text, bench.trials.metric)
    outcome = bench.best(budget)
    report = outcome.report
    held, reference = report.heldout["score"], report.heldout_reference["score"]
    found = Found(
        len(report.chosen), len(report.candidates), round((report.reference - report.score) * 100, 3),
        round((reference - held) * 100, 3), int(report.heldout["samples"]) * BATCH, budget.allows(held, reference),
        list(report.notes), [asdict(trial) for trial in report.trials],
    )  # fmt: skip
    bench.trials.engine(FLOAT32).save(keep / "fp32.engine")
    outcome.engine.save(keep / f"{text}.engine")
    (keep / f"{text}.json").write_text(json.dumps(asdict(found)))


def measured(names: Sequence[str], keep: Path, assets: Path) -> dict[str, timing.Timing]:
    """The engines kept under these names, in turns."""
    batch = {"input": asset_data.cifar(assets)[0][:32]}
    engines = {name: ingot.Engine.load(keep / f"{name}.engine") for name in names}
    with ExitStack() as stack:
        runs = {n: stack.enter_context(ingot.Session(engine, threads=THREADS)).run for n, engine in engines.items()}
        return timing.paired({name: partial(run, batch) for name, run in runs.items()}, ROUNDS)


def row(budget: str, found: Found, mine: timing.Timing, wide: timing.Timing, before: timing.Timing) -> Row:
    """Judged by the held-out half, and by the engine of the budget before."""
    against = mine.ratio(before)
    return Row(
        budget, found.narrow, found.layers, found.points_lost_searching, found.points_lost, found.images,
        round(mine.median, 4), round(mine.ratio(wide), 2), round(against, 3), found.within and against > FASTER,
        tuple(found.notes),
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
    parser.add_argument("--keep", type=Path, help="what is found is kept here, and not searched for again")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.keep = options.keep or Path(folder)
        options.keep.mkdir(parents=True, exist_ok=True)
        return run(options)


def run(options: argparse.Namespace) -> int:
    texts, keep = options.budget or BUDGETS, options.keep
    missing = [text for text in texts if not (keep / f"{text}.json").exists()]
    bench = prepared(options.assets, options) if missing else None
    for text in missing:
        assert bench is not None
        search(bench, text, keep)
    found = {text: Found(**json.loads((keep / f"{text}.json").read_text())) for text in texts}
    times = measured(("fp32", *texts), keep, options.assets)
    rows = [row(name, found[name], times[name], times["fp32"], times[before]) for before, name in pairwise(times)]
    print("\n".join(map(describe, rows)))
    if options.json:
        fronts = {text: known.trials for text, known in found.items()}
        timing.write_json(options.json, "budgets kept", [asdict(row) for row in rows], model=MODEL, trials=fronts)
    print(f"precision_budget: {sum(row.passed for row in rows)} of {len(rows)} passed")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
