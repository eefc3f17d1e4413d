"""Which layers break an accuracy: found by halving, each measured by itself, and what it takes to mend it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ingot.precision.budget import Budget
from ingot.precision.mixed import Bench
from ingot.precision.trials import FLOAT32, Choice

_WEIGHTS_ALONE = {"int8": "int8_weights"}


@dataclass(frozen=True)
class Culprit:
    """A layer that has to stay wide. `alone`: it breaks the budget by itself; else it does so with others. The score
    and the signal to noise of it alone narrow; `weights`: of its weights alone, where the format has both."""

    node: str
    precision: str
    alone: bool
    score: float
    decibels: float
    weights: float | None
    tensor: str
    low: float
    high: float
    clipped: float


@dataclass(frozen=True)
class Findings:
    """Scores of float32, of everything narrow, and with the culprits kept wide (None where there are none)."""

    metric: str
    budget: str
    reference: float
    narrow: float
    layers: int
    culprits: tuple[Culprit, ...]
    mended: float | None

    @property
    def breaks(self) -> bool:
        """Whether everything narrow is outside the budget."""
        return bool(self.culprits)


def failing(layers: Sequence[str], fails: Callable[[Sequence[str]], bool]) -> list[tuple[str, ...]]:
    """Layers that fail by themselves, one each, and runs of layers that fail only together; halves of the order."""
    if not layers or not fails(layers):
        return []
    if len(layers) == 1:
        return [tuple(layers)]
    middle = len(layers) // 2
    return [*failing(layers[:middle], fails), *failing(layers[middle:], fails)] or [tuple(layers)]


def find(bench: Bench, budget: Budget) -> Findings:
    """The layers to keep wide so that the rest holds the budget; none where all of it does."""
    tried: dict[frozenset[str], bool] = {}

    def fails(layers: Sequence[str]) -> bool:
        key = frozenset(layers)
        if key not in tried:
            bench.tell("bisect", min(len(tried) / 32, 0.99))
            tried[key] = not bench.judged(_choice(bench, layers), budget).within
        return tried[key]

    every = list(bench.narrow)
    alone = {runs[0] for runs in failing(every, fails) if len(runs) == 1}
    together = _together([name for name in every if name not in alone], bench, budget, fails)
    wide = [name for name in every if name in alone or name in together]
    rest = [name for name in every if name not in wide]
    return Findings(
        bench.trials.metric.name, budget.text, bench.trials.score(FLOAT32),
        bench.trials.score(_choice(bench, every)), len(every),
        tuple(_culprit(bench, name, name in alone) for name in wide),
        bench.trials.score(_choice(bench, rest)) if wide else None,
    )  # fmt: skip


def _choice(bench: Bench, layers: Sequence[str]) -> Choice:
    return Choice({name: bench.narrow[name] for name in layers}, bench.rest)


def _together(layers: Sequence[str], bench: Bench, budget: Budget, fails: Callable[[Sequence[str]], bool]) -> set[str]:
    """The fewest of the noisiest layers without which the others hold the budget."""
    if not layers or not fails(layers):
        return set()
    noisy = [s.node for s in sorted(bench.ranked(budget), key=lambda s: -s.noise) if s.node in set(layers)]
    low, high = 0, len(noisy)  # without the first `high` of them there is nothing that could fail
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fails(noisy[middle:]) else (low, middle)
    return set(noisy[:high])


def _culprit(bench: Bench, name: str, alone: bool) -> Culprit:
    precision = bench.narrow[name]
    mine = Choice({name: precision}, bench.rest)
    weights = _WEIGHTS_ALONE.get(precision)
    tensor, found = _range(bench, name)
    return Culprit(
        name, precision, alone, bench.trials.score(mine), bench.trials.decibels(mine),
        None if weights is None else bench.trials.decibels(Choice({name: weights}, bench.rest)),
        tensor, found["low"], found["high"], found["clipped"],
    )  # fmt: skip


def _range(bench: Bench, name: str) -> tuple[str, Mapping[str, float]]:
    """What the layer reads, and the range that calibration chose for it."""
    tensor = bench.reads[name]
    known = None if bench.ranges is None else bench.ranges.get(tensor)
    nothing = {"low": float("nan"), "high": float("nan"), "clipped": 0.0}
    return tensor, nothing if known is None else {"low": known.low, "high": known.high, "clipped": known.clipped}
