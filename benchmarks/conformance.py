"""The ONNX backend test suite as our gate: python -m benchmarks.conformance [--limit K] [--filter regex] [--json out]

Each model is built at level 0 and run through a session; with --oracle-only the numpy oracle alone answers. Tests run
in child processes, so that a crash or a hang is one failure. The last line: `conformance: passed P of 2024, native N`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")
RESULTS = Path(__file__).parent / "results" / "conformance.json"
TIME_LIMIT = 60.0
Feeds = dict[str, Any]
Run = tuple[list[Any], list[str]]


@dataclass(frozen=True)
class Case:
    """A test of the suite: a model with its data sets, in memory or in a folder."""

    name: str
    kind: str
    model: onnx.ModelProto
    data: Sequence[tuple[Sequence[Any], Sequence[Any]]] | Path
    rtol: float
    atol: float

    def data_sets(self) -> Iterator[tuple[list[Any], list[Any]]]:
        """(inputs, expected outputs) pairs as arrays and lists."""
        if isinstance(self.data, Path):
            for folder in sorted(self.data.glob("test_data_set*")):
                yield _read(folder, "input", self.model.graph.input), _read(folder, "output", self.model.graph.output)
            return
        for inputs, outputs in self.data:
            yield [_as_array(x) for x in inputs], [_as_array(x) for x in outputs]


@dataclass
class Outcome:
    """What became of one test."""

    name: str
    passed: bool = False
    native: bool = False
    host_operators: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0


def _as_array(item: Any) -> Any:
    return numpy_helper.to_array(item) if isinstance(item, onnx.TensorProto) else item


def _read(folder: Path, prefix: str, types: Sequence[onnx.ValueInfoProto]) -> list[Any]:
    count = len(list(folder.glob(f"{prefix}_*.pb")))
    return [_read_value((folder / f"{prefix}_{i}.pb").read_bytes(), types[i].type) for i in range(count)]


def _read_value(content: bytes, declared: onnx.TypeProto) -> Any:
    if declared.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(content))
    if declared.HasField("optional_type"):
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(content))
    return numpy_helper.to_array(onnx.TensorProto.FromString(content))


def load_cases(pattern: str = "", limit: int | None = None) -> list[Case]:
    """The suite without its downloaded "real" models, in a stable order."""
    from onnx.backend.test.loader import load_model_tests

    cases = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in KINDS:
            tests = sorted(load_model_tests(kind=kind), key=lambda test: test.name)
            cases += [_case(test, kind) for test in tests if re.search(pattern, test.name)]
    return cases[:limit]


def _case(test: Any, kind: str) -> Case:
    if test.model_dir is None:
        return Case(test.name, kind, test.model, test.data_sets, test.rtol, test.atol)
    folder = Path(test.model_dir)
    return Case(test.name, kind, onnx.load(folder / "model.onnx"), folder, test.rtol, test.atol)


def differences(actual: Any, expected: Any, rtol: float, atol: float) -> None:
    """Raise AssertionError unless they agree as the suite's own runner demands."""
    if isinstance(expected, list | tuple):
        assert isinstance(actual, list | tuple), f"{type(actual).__name__} instead of a sequence"
        assert len(actual) == len(expected), f"{len(actual)} elements instead of {len(expected)}"
        for one, other in zip(actual, expected, strict=True):
            differences(one, other, rtol, atol)
        return
    if expected is None or actual is None:
        assert actual is expected, "a value instead of an absent optional, or the reverse"
        return
    assert actual.shape == expected.shape, f"shape {actual.shape} instead of {expected.shape}"
    if expected.dtype == object:
        np.testing.assert_array_equal(actual, expected)
        return
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype} instead of {expected.dtype}"
    if actual.dtype.name == "bfloat16":
        actual, expected, rtol = actual.astype(np.float32), expected.astype(np.float32), max(rtol, 2**-6)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def _oracle_engine(model: onnx.ModelProto) -> tuple[Callable[[Feeds], list[Any]], list[str]]:
    from ingot.ir.oracle import compile_model

    run = compile_model(model)
    return lambda feeds: list(run(feeds).values()), ["(oracle)"]


def _built_engine(model: onnx.ModelProto, target: str) -> tuple[Callable[[Feeds], list[Any]], list[str]]:
    import ingot
    from ingot.build import build

    engine = build(model, ingot.BuildConfig(target=target, level=0, verify=False))
    session = ingot.Session(engine)
    names = [output.name for output in engine.outputs]

    def run(feeds: Feeds) -> list[Any]:
        outputs = session.run(feeds)
        return [outputs[name] for name in names]

    return run, host_operators(engine)


def host_operators(engine: Any) -> list[str]:
    """Operators of the plan's host steps; "(constant)" when the outputs were folded and nothing is left to run."""
    plan = engine.variants[0].plan
    return sorted({segment.step.op for segment in plan.host_steps}) if plan.segments else ["(constant)"]


def check(case: Case, target: str) -> Outcome:
    """Build (for "cpu" or "host"; "oracle": do not build) and run one case; every exception is its failure."""
    started = time.perf_counter()
    outcome = Outcome(case.name)
    try:
        oracle = target == "oracle"
        run, outcome.host_operators = _oracle_engine(case.model) if oracle else _built_engine(case.model, target)
        names = [value.name for value in case.model.graph.input]
        for inputs, expected in case.data_sets():
            differences(run(dict(zip(names, inputs, strict=False))), expected, case.rtol, case.atol)
        outcome.passed = True
    except Exception as error:  # noqa: BLE001 - the gate counts whatever goes wrong
        outcome.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    outcome.native = outcome.passed and not outcome.host_operators
    outcome.seconds = round(time.perf_counter() - started, 4)
    return outcome


def _serve(connection: Connection, cases: Sequence[Case], target: str) -> None:
    warnings.simplefilter("ignore")
    while (index := connection.recv()) is not None:
        connection.send(check(cases[index], target))


@dataclass
class Worker:
    """A forked child, the case it works on and since when."""

    process: Any
    connection: Connection
    index: int | None = None
    since: float = 0.0


def _fork(cases: Sequence[Case], target: str) -> Worker:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, cases, target), daemon=True)
    process.start()
    theirs.close()
    return Worker(process, ours)


def run_all(cases: Sequence[Case], target: str = "cpu", workers: int = 2) -> list[Outcome]:
    """Outcomes in the order of the cases; crashed and overdue children are replaced."""
    outcomes: dict[int, Outcome] = {}
    waiting = iter(range(len(cases)))
    team = [_fork(cases, target) for _ in range(min(workers, len(cases)))]
    for worker in team:
        _assign(worker, waiting)
    while any(worker.index is not None for worker in team):
        ready = wait([worker.connection for worker in team if worker.index is not None], timeout=1.0)
        for position, worker in enumerate(team):
            if worker.index is None or (result := _collect(worker, cases, worker.connection in ready)) is None:
                continue
            outcomes[worker.index] = result
            if not worker.process.is_alive():
                team[position] = worker = _fork(cases, target)
            _assign(worker, waiting)
        _progress(outcomes, len(cases))
    for worker in team:
        worker.process.join(5)
    return [outcomes[index] for index in range(len(cases))]


def _assign(worker: Worker, waiting: Iterator[int]) -> None:
    worker.index, worker.since = next(waiting, None), time.monotonic()
    worker.connection.send(worker.index)


def _collect(worker: Worker, cases: Sequence[Case], readable: bool) -> Outcome | None:
    """The worker's answer; a failure when it died or took too long; None while it is still at work."""
    assert worker.index is not None
    name = cases[worker.index].name
    if readable:
        try:
            answer: Outcome = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join(5)
            return Outcome(name, error=f"crashed: exit code {worker.process.exitcode}")
        return answer
    if time.monotonic() - worker.since < TIME_LIMIT:
        return None
    worker.process.kill()
    worker.process.join(5)
    return Outcome(name, error=f"hung: no answer within {TIME_LIMIT:.0f} s", seconds=TIME_LIMIT)


def _progress(outcomes: dict[int, Outcome], total: int) -> None:
    if sys.stderr.isatty() or len(outcomes) == total or len(outcomes) % 200 == 0:
        passed = sum(outcome.passed for outcome in outcomes.values())
        print(f"\r{len(outcomes)}/{total} run, {passed} passed ", end="", file=sys.stderr, flush=True)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts, the operators that keep tests from being native, and every failure with its reason."""
    blockers = Counter(op for outcome in outcomes if outcome.passed for op in set(outcome.host_operators))
    return {
        "total": len(outcomes),
        "passed": sum(outcome.passed for outcome in outcomes),
        "native": sum(outcome.native for outcome in outcomes),
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
        "host_operators": dict(blockers.most_common()),
        "failures": {outcome.name: outcome.error for outcome in outcomes if not outcome.passed},
        "slowest": {o.name: o.seconds for o in sorted(outcomes, key=lambda o: -o.seconds)[:10]},
    }


def main() -> None:
    """Run the suite, write the JSON, print the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--filter", default="")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--oracle-only", action="store_true", help="do not build: the oracle alone answers")
    parser.add_argument("--target", choices=("cpu", "host"), default="cpu")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    cases = load_cases(options.filter, options.limit)
    target = "oracle" if options.oracle_only else options.target
    outcomes = run_all(cases, target, options.workers)
    report = summary(outcomes)
    whole = not (options.filter or options.limit) and target == "cpu"
    file = options.json or (RESULTS if whole else None)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**report, "tests": [asdict(outcome) for outcome in outcomes]}, indent=1) + "\n")
    print()
    for name, reason in report["failures"].items():
        print(f"failed {name}: {reason}")
    print(f"conformance: passed {report['passed']} of {report['total']}, native {report['native']}")


if __name__ == "__main__":
    main()
