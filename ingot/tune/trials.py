"""Trials: candidates compiled on all cores, and timed in one child: with the machine to itself, where that counts.

A candidate that crashes, hangs or is killed is lost alone; the others of its node are timed without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from ingot.kernels import Candidate
from ingot.kernels.cpu.workers import WorkerDied, WorkerPool
from ingot.kernels.cuda.architecture import Architecture, described
from ingot.kernels.node import Node
from ingot.kernels.target import Target
from ingot.runtime.cpu import usable_threads
from ingot.tune.measure import describe

Outcome = float | str  # microseconds, or why there are none
Progress = Callable[[float], None]
_COMPILE_LIMIT = 120.0  # seconds
_PATIENCE = 30.0  # seconds a child may take for a set of candidates, beyond its runs: libraries build plans there
_RUNS = 400  # a candidate is run fewer times than this, whatever the level
_COMPILING, _SETTING_UP = 0.1, 0.1  # seconds, to weigh progress: for one candidate, for one trial beyond its budget


@dataclass(frozen=True, eq=False)
class Trial:
    """Candidates of one node to be timed. `node` has static extents; `estimates` are microseconds per candidate;
    `share`: how many times its weights the model has."""

    key: str
    node: Node
    candidates: tuple[Candidate, ...]
    estimates: tuple[float, ...]
    share: float = 0.0


Code = Any  # what compile_candidate of the target's module gives, and its time_candidates takes
Codes = Sequence[Code]
Ready = Sequence[tuple[Candidate, Code]]
# Where a target's candidates are compiled and timed.
_MODULES = {"cpu": "ingot.tune.measure", "cuda": "ingot.tune.cuda_measure"}


def run(trials: Sequence[Trial], isa: Target, budget: float,
        progress: Progress) -> Iterator[tuple[Trial, list[Outcome]]]:  # fmt: skip
    """Each trial with an outcome per candidate; `budget`: seconds of running per trial."""
    count = sum(len(t.candidates) for t in trials)
    compiling, timing = _COMPILING * count / usable_threads(), _SETTING_UP + budget
    whole = compiling + timing * len(trials)
    with ExitStack() as held:
        codes = held.enter_context(_compiled(trials, isa, lambda done: progress(compiling / whole * done / count)))
        alone = held.enter_context(WorkerPool(1))
        for done, trial in enumerate(trials):
            yield trial, _outcomes(alone, trial, codes(trial), isa, budget)
            progress((compiling + timing * (done + 1)) / whole)


@contextmanager
def _compiled(trials: Sequence[Trial], isa: Target, told: Callable[[int], None]) -> Iterator[Callable[[Trial], Codes]]:
    """The codes of each trial. On a CPU all are there before the first is timed, as compilers would be in its times; a
    GPU times what is ready while the rest is compiled."""
    with WorkerPool(usable_threads()) as pool:
        waiting = {t: [_compile(pool, t.node, c, isa) for c in t.candidates] for t in trials}
        if isa.target != "cpu":
            yield lambda trial: [_code(future) for future in waiting[trial]]
            return
        codes = _all_of(waiting, told)
    yield codes.__getitem__


def _all_of(waiting: Mapping[Trial, Sequence[Future[Code]]], told: Callable[[int], None]) -> dict[Trial, Codes]:
    codes: dict[Trial, Codes] = {}
    for trial, futures in waiting.items():
        codes[trial] = [_code(future) for future in futures]
        told(sum(map(len, codes.values())))
    return codes


def _compile(pool: WorkerPool, node: Node, candidate: Candidate, isa: Target) -> Future[Code]:
    arguments = (node, describe(candidate), named(isa))
    return pool.submit(f"{_MODULES[isa.target]}:compile_candidate", *arguments, limit=_COMPILE_LIMIT)


def _code(future: Future[Code]) -> Code:
    try:
        return future.result()
    except Exception as error:  # noqa: BLE001  one candidate is lost and named, the build goes on
        return f"while it was compiled: {_words(error)}"


def _outcomes(pool: WorkerPool, trial: Trial, codes: Codes, isa: Target, budget: float) -> list[Outcome]:
    ready = [(c, code) for c, code in zip(trial.candidates, codes, strict=True) if not isinstance(code, str)]
    limit = _PATIENCE + 10 * budget + _RUNS * sum(trial.estimates) / 1e6
    times = iter(_timed(pool, trial, ready, (isa, budget, trial.share), limit))
    return [code if isinstance(code, str) else next(times) for code in codes]


How = tuple[Target, float, float]


def _timed(pool: WorkerPool, trial: Trial, ready: Ready, how: How, limit: float) -> list[Outcome]:
    """Outcomes in the order of `ready`; if timing all together fails, one by one."""
    if not ready:
        return []
    sent = [(describe(candidate), code) for candidate, code in ready]
    function = f"{_MODULES[how[0].target]}:time_candidates"
    job = pool.submit(function, trial.node, sent, named(how[0]), *how[1:], limit=limit)
    try:
        return list(job.result())
    except Exception as error:  # noqa: BLE001  one candidate is lost and named, the build goes on
        if len(ready) == 1:
            return [f"while it was timed: {_words(error)}"]
    return [outcome for one in ready for outcome in _timed(pool, trial, [one], how, limit)]


def named(target: Target) -> str:
    """The target as a child finds it: by its name, a GPU's with what the build allows."""
    return described(target) if isinstance(target, Architecture) else target.name


def _words(error: Exception) -> str:
    return error.cause if isinstance(error, WorkerDied) else " ".join(f"{type(error).__name__}: {error}".split())
