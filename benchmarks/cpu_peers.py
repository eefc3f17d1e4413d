"""Latency beside onnxruntime and OpenVINO on this CPU, paired: a row per model, precision and thread count.

    python -m benchmarks.cpu_peers [--quick] [--threads 1,2] [--only "resnet50 int8"] [--level 3] [--json results.json]

fp32 rows: OpenVINO is told to compute in float32; unasked it takes bfloat16 on CPUs that have it, which a column shows
and no ratio counts, since its results differ by what the bf16 rows allow. bf16 rows: OpenVINO by its precision hint,
Ingot by `--bf16`; onnxruntime has none on x86 and runs float32. int8: QDQ models made by onnxruntime's own quantiser.
torch.compile runs networks of the same layers and shapes from torch definitions (benchmarks/torch_models.py), with
weights of their own.

A row whose outputs differ from onnxruntime's by more than its tolerance fails the run. With --json, rows measured
earlier on the same machine with the same versions stay in the file; --show prints them without measuring. The last line
is the claim: `best peer beaten on K of N, geometric mean G`, of the fastest peer's time / Ingot's over all rows.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import ingot
from benchmarks.peer_cases import TOLERANCES, Case, absent, cases, difference
from benchmarks.runtimes import COMPILED, PEERS, UNASKED, Run, installed_peers, openvino_unasked, torch_compiled
from benchmarks.timing import available_threads, machine, paired, pinned, write_json

ROUNDS, QUICK_ROUNDS = 15, 7
CLAIM = "latency beside other runtimes, by model, precision and threads"
UNCOUNTED = (UNASKED,)


@dataclass(frozen=True)
class Row:
    """One case at one thread count: medians in milliseconds, speed ratios (above 1: Ingot is faster), difference."""

    model: str
    precision: str
    family: str
    threads: int
    milliseconds: dict[str, float]
    ratios: dict[str, float]
    difference: float | None
    load: float
    unable: dict[str, str] = field(default_factory=dict)  # peers that refuse the model, and what they say

    @property
    def passed(self) -> bool:
        return self.difference is None or self.difference <= TOLERANCES[self.precision]

    @property
    def best(self) -> float | None:
        """Against the fastest peer."""
        return min((ratio for peer, ratio in self.ratios.items() if peer not in UNCOUNTED), default=None)

    @property
    def key(self) -> tuple[str, str, int]:
        return self.model, self.precision, self.threads


def build(case: Case, level: int) -> ingot.Engine:
    """The case's engine; tuning results are kept between runs, and its outputs are compared below."""
    config = ingot.BuildConfig(
        level=level,
        precision=case.build_precision,
        profiles=case.profiles,
        verify=False,
        timing_cache=Path("build/timing.cache"),
    )
    return ingot.build(case.path(), config)


def measure(case: Case, engine: ingot.Engine, threads: int, rounds: int) -> Row:
    inputs, path = case.inputs(), case.path()
    openers = installed_peers(case.precision) | (openvino_unasked() if case.precision == "fp32" else {})
    openers |= torch_compiled(case.network, case.batch, case.precision)
    with pinned(threads), ingot.Session(engine, threads=threads) as session:
        runs: dict[str, Run] = {"ingot": session.run}
        unable: dict[str, str] = {}
        for peer, opener in openers.items():
            try:
                runs[peer] = opener(path, threads)
            except RuntimeError as error:
                unable[peer] = str(error).strip().splitlines()[-1][:200]
        outputs = {runtime: run(inputs) for runtime, run in runs.items()}
        apart = difference(outputs["ingot"], outputs["onnxruntime"]) if "onnxruntime" in outputs else None
        load = round(os.getloadavg()[0], 1)
        timings = paired({runtime: partial(run, inputs) for runtime, run in runs.items()}, rounds)
    ours = timings["ingot"]
    ratios = {peer: round(ours.ratio(timing), 3) for peer, timing in timings.items() if peer != "ingot"}
    times = {runtime: round(timing.median, 4) for runtime, timing in timings.items()}
    return Row(case.name, case.precision, case.family, threads, times, ratios, apart, load, unable)


def measure_all(chosen: Sequence[Case], threads: Sequence[int], level: int, rounds: int) -> Iterator[Row]:
    """Most threads first: OpenVINO's pool keeps the cores that its process may use when it compiles its first model."""
    engines: dict[str, ingot.Engine] = {}
    for count in sorted(set(threads), reverse=True):
        for case in chosen:
            if case.label not in engines:
                engines[case.label] = build(case, level)
            yield measure(case, engines[case.label], count, rounds)


COLUMNS = ("ingot", *PEERS, COMPILED, UNASKED)


def describe(row: Row) -> str:
    times = "".join(f"{row.milliseconds.get(runtime, math.nan):>18.3f}".replace("nan", "  –") for runtime in COLUMNS)
    best = "–" if row.best is None else f"{row.best:.2f}x"
    apart = "not compared" if row.difference is None else f"{row.difference:.1e}"
    name = f"{row.model:<14}{row.precision:<6}{row.threads:>7}"
    refusals = "".join(f"  ({peer} refuses: {reason})" for peer, reason in row.unable.items() if peer in PEERS)
    return f"{name}{times}{best:>9}   {apart}{'' if row.passed else '  FAIL'}{refusals}"


def report(rows: Iterator[Row]) -> list[Row]:
    """Print each row as it is measured."""
    titles = "".join(f"{name:>18}" for name in ("ingot ms", *COLUMNS[1:]))
    print(f"{'model':<20}{'threads':>7}{titles}{'vs best':>9}   difference", flush=True)
    done = []
    for row in rows:
        print(describe(row), flush=True)
        done.append(row)
    return done


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """The int8 means, the worst row, and the claim."""
    ratios = {row.key: row.best for row in rows if row.best is not None}
    for family in ("convolution", "transformer"):
        found = [row.best for row in rows if (row.precision, row.family) == ("int8", family) and row.best is not None]
        yield f"int8 {family} nets, geometric mean {geometric_mean(found):.2f} over {len(found)}"
    if ratios:
        worst = min(ratios, key=lambda key: ratios[key])
        yield f"worst row: {' '.join(map(str, worst))} threads, {ratios[worst]:.2f}x"
    beaten = sum(ratio >= 1 for ratio in ratios.values())
    yield f"best peer beaten on {beaten} of {len(ratios)}, geometric mean {geometric_mean(list(ratios.values())):.2f}"


def stored_rows(path: Path) -> list[Row]:
    """Rows of a result file that were measured on this machine with these versions."""
    if not path.exists():
        return []
    found: dict[str, Any] = json.loads(path.read_text())
    here = machine()
    same = all(found["machine"][key] == here[key] for key in ("processor", "threads", "versions"))
    names = {member.name for member in fields(Row)}
    rows = found["rows"] if same else []
    return [Row(**{k: v for k, v in row.items() if k in names}) for row in rows if "precision" in row]


def save(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows over those of the file with the same case, in the order of the cases."""
    order = {(case.name, case.precision): number for number, case in enumerate(cases())}
    merged = {row.key: row for row in (*stored_rows(path), *rows)}
    kept = sorted(merged.values(), key=lambda row: (order.get(row.key[:2], len(order)), -row.threads))
    lines = list(summary(kept))
    write_json(path, CLAIM, [asdict(row) | {"best": row.best} for row in kept], summary=lines)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    counts = [count for count in (1, 2) if count <= available_threads()]
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}")
    parser.add_argument("--threads", type=lambda text: [int(count) for count in text.split(",")], default=counts)
    parser.add_argument("--only", action="append", help='a model ("resnet50") or a case ("resnet50 int8"); may repeat')
    parser.add_argument("--level", type=int, default=3, help="how long to tune, 0 to 5")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--show", action="store_true", help="print what the file of --json holds; measure nothing")
    return parser.parse_args()


def chosen_cases(only: Sequence[str] | None) -> list[Case]:
    found = cases()
    known = {name for case in found for name in (case.name, case.precision, case.label)}
    if unknown := [name for name in only or () if name not in known]:
        raise SystemExit(f"no case {', '.join(unknown)}; there are {', '.join(case.label for case in found)}")
    return [case for case in found if only is None or {case.name, case.precision, case.label} & set(only)]


def main() -> int:
    chosen = options()
    for note in (absent(), *(f"{peer} is not installed: pip install 'ingot[peers]'" for peer in missing_peers())):
        if note:
            print(note)
    if chosen.show:
        rows = report(iter(stored_rows(chosen.json)))
    else:
        rounds = QUICK_ROUNDS if chosen.quick else ROUNDS
        rows = report(measure_all(chosen_cases(chosen.only), chosen.threads, chosen.level, rounds))
    if chosen.json and not chosen.show:
        save(chosen.json, rows)
    print("\n".join(summary(rows)))
    return 0 if all(row.passed for row in rows) else 1


def missing_peers() -> set[str]:
    return PEERS.keys() - installed_peers().keys()


if __name__ == "__main__":
    sys.exit(main())
