"""What tuning costs and what it gains.

    python -m benchmarks.tuning [--only resnet50] [--json results.json]

For each model: seconds of a build at level 0, at level 3 without and with the times at hand, and of one at level 5; the
latency of the engines of levels 0, 3 and 5 (paired, all cores); and how often a shortlist of the cost model lost the
best candidate of a node, judged by the times of all candidates (two within 3 % of each other count as equal). The last
line is the claim about the first model.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import ingot
from benchmarks.models import MODELS, example_inputs, model_path
from benchmarks.timing import available_threads, paired, write_json
from ingot import compiler
from ingot.config import BuildConfig
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.standalone import native_isa
from ingot.plan.lower import Module, Work, lower
from ingot.report import BuildLog, last_log
from ingot.tune.cache import TimingCache, candidate_key
from ingot.tune.price import Estimates
from ingot.tune.tuner import LEVELS, Nodes, shortlists, weight_bytes

ROUNDS = 15
EQUAL = 1.03
LIMITS = {"cold": 30.0, "cached": 3.0}


@dataclass(frozen=True)
class Pruning:
    """How a level's shortlists did over the distinct nodes of a model: how many lost the best candidate, and how much
    longer the best ones that were left take, over all steps."""

    level: int
    nodes: int
    timed: int
    candidates: int
    lost: int
    excess: float


@dataclass(frozen=True)
class Row:
    """One model: seconds of builds, milliseconds of their engines, and the shortlists."""

    model: str
    seconds: dict[str, float]
    milliseconds: dict[str, float]
    identical: bool
    pruning: tuple[Pruning, ...]

    @property
    def gain(self) -> float:
        return self.milliseconds["level 0"] / self.milliseconds["level 3"]


def timed_build(name: str, level: int, cache: Path | None) -> tuple[ingot.Engine, float]:
    """The engine and the seconds its build took."""
    start = time.perf_counter()
    engine = ingot.build(model_path(name), BuildConfig(level=level, timing_cache=cache))
    return engine, time.perf_counter() - start


def engine_bytes(engine: ingot.Engine, folder: Path) -> bytes:
    engine.save(folder / "saved.engine")
    return (folder / "saved.engine").read_bytes()


def latencies(name: str, engines: Mapping[str, ingot.Engine]) -> dict[str, float]:
    """Median milliseconds of a run, the engines taking turns."""
    sessions = {level: ingot.Session(engine, threads=available_threads()) for level, engine in engines.items()}
    inputs = example_inputs(name)
    timings = paired({level: partial(session.run, inputs) for level, session in sessions.items()}, ROUNDS)
    for session in sessions.values():
        session.close()
    return {level: round(timing.median, 4) for level, timing in timings.items()}


def lowered(name: str, isa: Isa) -> Module:
    config, log = BuildConfig(), BuildLog()
    source = compiler.import_model(model_path(name), config, log)
    model = compiler.optimise(source, config, log)
    assert model is not None
    return lower(model, isa)


def judged(module: Module, isa: Isa, cache: TimingCache) -> Iterator[Pruning]:
    """Each level's shortlists against the times of all candidates."""
    nodes = Nodes(Estimates(isa, {}), weight_bytes(module))
    steps: dict[str, list[Work]] = {}
    for work in module.all_works():
        if work.kind == "native" and len(work.choices) > 1:
            steps.setdefault(nodes.key(work), []).append(work)
    for number in range(1, 5):
        lists = shortlists(module, nodes.estimates, LEVELS[number])
        yield judge(number, steps, {work: [candidate_key(c) for c in kept] for work, kept in lists.items()}, cache)


def judge(level: int, steps: Mapping[str, list[Work]], lists: Mapping[Work, list[str]], cache: TimingCache) -> Pruning:
    lost = kept_time = best_time = 0.0
    nodes = [(key, works) for key, works in steps.items() if works[0] in lists]
    for key, works in nodes:
        times = {c: t for c in map(candidate_key, works[0].choices) if (t := cache.get(key, c)) is not None}
        best, kept = min(times.values()), min(times[c] for c in lists[works[0]] if c in times)
        lost += kept > EQUAL * best
        kept_time, best_time = kept_time + len(works) * kept, best_time + len(works) * best
    timed = sum(len(lists[works[0]]) for _, works in nodes)
    count = sum(len(works[0].choices) for _, works in nodes)
    return Pruning(level, len(nodes), timed, count, int(lost), round(kept_time / best_time - 1, 4) if nodes else 0.0)


def measure(name: str, folder: Path, isa: Isa) -> Row:
    cache, everything = folder / f"{name}.times", folder / f"{name}.all.times"
    quick, at_once = timed_build(name, 0, None)
    tuned, cold = timed_build(name, 3, cache)
    counted = last_log().figures["candidates timed"]
    again, cached = timed_build(name, 3, cache)
    third, best_cached = timed_build(name, 3, cache)
    full, longest = timed_build(name, 5, everything)
    seconds = {"level 0": at_once, "cold": cold, "cached": min(cached, best_cached), "level 5": longest}
    engines = {"level 0": quick, "level 3": tuned, "level 5": full}
    same = engine_bytes(tuned, folder) == engine_bytes(again, folder) == engine_bytes(third, folder)
    pruning = tuple(judged(lowered(name, isa), isa, TimingCache(everything, isa)))
    print(f"{name}: {counted} candidates timed at level 3", flush=True)
    return Row(name, {k: round(v, 2) for k, v in seconds.items()}, latencies(name, engines), same, pruning)


def describe(row: Row) -> Iterator[str]:
    seconds = ", ".join(f"{what} {value:.1f} s" for what, value in row.seconds.items())
    times = ", ".join(f"{level} {value:.3f} ms" for level, value in row.milliseconds.items())
    yield f"  builds: {seconds}; {'the same' if row.identical else 'OTHER'} bytes from the cache"
    yield f"  latency: {times}; level 3 is {row.gain:.2f} times as fast as level 0"
    for p in row.pruning:
        yield (
            f"  level {p.level} times {p.timed} of {p.candidates} candidates of {p.nodes} nodes: lost the best of "
            f"{p.lost}, {p.excess:.1%} slower than the best"
        )


def claim(row: Row) -> str:
    third = next(p for p in row.pruning if p.level == 3)
    return (
        f"{row.model} level 3: {row.seconds['cold']:.1f} s, {row.seconds['cached']:.1f} s from the cache, "
        f"{row.gain:.2f}x level 0; the cost model lost the best candidate of {third.lost} of {third.nodes} nodes"
    )


def passed(row: Row) -> bool:
    """Same bytes; and the limits on build time, which are ResNet-50's."""
    quick_enough = all(row.seconds[what] <= limit for what, limit in LIMITS.items())
    return row.identical and (quick_enough or row.model != "resnet50")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS, action="append", help="this model; may be repeated")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def main() -> int:
    chosen, isa = options(), native_isa()
    if isa is None:
        print("this machine has no instruction set Ingot generates code for")
        return 1
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen.only or ["resnet50", "mobilenet_v2", "minilm"]:
            rows.append(measure(name, Path(folder), isa))
            print("\n".join(describe(rows[-1])), flush=True)
    if chosen.json:
        write_json(chosen.json, "what tuning costs and what it gains", [asdict(row) for row in rows])
    print(claim(rows[0]))
    return 0 if all(map(passed, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
