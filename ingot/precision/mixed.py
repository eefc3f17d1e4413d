"""`build_mixed`: the fastest engine within an accuracy budget, and how it was found.

The samples are halved, every other one: on the first half ranges are taken and layers chosen, the second has the last
word. An engine that keeps the budget on the first alone is passed over for the next best, and the report says so.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

from ingot.compiler import input_specs, typical_symbols
from ingot.config import BuildConfig
from ingot.engine import Engine
from ingot.errors import BuildError, ConfigError
from ingot.evidence import index_limits, make_inputs
from ingot.importers import onnx as importer
from ingot.ir import shapes
from ingot.plan.extent import symbols_of
from ingot.plan.plan import TensorSpec
from ingot.precision import budget as budgets
from ingot.precision import cache, constraints, formats, metric, overflow, sensitivity
from ingot.precision.budget import UNLIMITED, Budget
from ingot.precision.calibrate import Ranges, calibrate
from ingot.precision.constraints import Settled
from ingot.precision.data import samples
from ingot.precision.metric import Answer
from ingot.precision.report import Proof, Report, Trial
from ingot.precision.request import Request
from ingot.precision.search import FASTER, LADDER, Point, Search, front, never_slower
from ingot.precision.sensitivity import Group, Sensitivity
from ingot.precision.spool import held
from ingot.precision.trials import FLOAT32, Choice, Trials

Progress = Callable[[str, float], None]
_DRAWN = 4
_BLOCKING = 5


@dataclass(frozen=True)
class Outcome:
    """The engine, the model it was built from (with its Q/DQ), and what was found on the way."""

    engine: Engine
    model: onnx_ir.Model
    report: Report


def build_mixed(model: Any, config: BuildConfig, request: Request, progress: Progress | None = None) -> Outcome:
    """The fastest engine that keeps the request's budget on samples that were not used to find it.

    BuildError when nodes that must be narrow break the budget; it says what could be had, and what stands in the way.
    """
    budget = budgets.parse(request.budget, metric.load(request.metric))  # what is wrong with it is said first
    return prepare(model, config, request, progress).best(budget)


def prepare(model: Any, config: BuildConfig, request: Request, progress: Progress | None = None) -> Bench:
    """Everything that does not depend on the budget."""
    tell = progress or _silent
    source = importer.load(model)
    shapes.infer(source)
    notes: list[str] = []
    found, proven = _samples(source, config, request, notes)
    config, judge = _holding(source, _remembering(config), found, notes), metric.load(request.metric)
    ranges = _ranges(source, found, request, tell)
    notes.extend(ranges.warnings if ranges is not None else ())
    available = dict.fromkeys(formats.quantizable(source), request.formats) if request.formats else {}
    settled = constraints.settle(request.constraints, source, available, config.precision, notes.append)
    trials = Trials(lambda nodes: formats.apply(source, nodes, ranges) if nodes else source, config, judge, found)
    narrow = {n: settled.narrow.get(n, kinds[0]) for n, kinds in available.items() if n not in settled.wide}
    return Bench(trials, proven, request, tuple(available), narrow, settled, tell, notes, ranges, _reads(source))


def without_overflow(model: Any, config: BuildConfig, request: Request) -> tuple[BuildConfig, list[str]]:
    """The configuration with the tensors that leave float16 on the request's samples, and a line for each."""
    source = importer.load(model)
    shapes.infer(source)
    notes: list[str] = []
    found, proven = _samples(source, config, request, notes)
    return _holding(source, config, [*found, *proven], notes), notes


def _holding(source: onnx_ir.Model, config: BuildConfig, found: Sequence[Answer], notes: list[str]) -> BuildConfig:
    if config.precision != "fp16":
        return config
    beyond = overflow.find(source, overflow.observe(source, found))
    notes.extend(map(str, beyond))
    return replace(config, overflows={**config.overflows, **overflow.kept(beyond)})


def _remembering(config: BuildConfig) -> BuildConfig:
    """Dozens of engines share most of their kernels: each is timed once. The file goes when this process does."""
    if config.timing_cache is not None:
        return config
    folder = Path(tempfile.mkdtemp(prefix="ingot-precision-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return replace(config, timing_cache=folder / "times")


def _reads(source: onnx_ir.Model) -> dict[str, str]:
    """The tensor that each node multiplies with its weights."""
    nodes = onnx_ir.traversal.RecursiveGraphIterator(source.graph)
    return {n.name or "": (n.inputs[0].name or "") for n in nodes if n.inputs and n.inputs[0] is not None}


def _silent(stage: str, share: float) -> None:
    """Nobody listens."""


def _ranges(source: onnx_ir.Model, found: Sequence[Answer], request: Request, tell: Progress) -> Ranges | None:
    """Of every tensor that may become narrow; None where nothing may."""
    if not request.formats:
        return None
    if request.data is None and request.cache is not None and not Path(request.cache).exists():
        raise ConfigError(f"there is no calibration cache {request.cache}, and no samples to make it of: give them")
    return cache.remembered(request.cache, source, lambda: calibrate(source, found, request.calibrator, tell))


@dataclass(frozen=True, eq=False)
class Bench:
    """A model with its samples, ready to be searched for one budget or several."""

    trials: Trials
    proven: Sequence[Answer]
    request: Request
    candidates: tuple[str, ...]
    narrow: Mapping[str, str]
    settled: Settled
    tell: Progress
    notes: list[str]
    ranges: Ranges | None
    reads: Mapping[str, str]
    _measured: list[Sensitivity] = field(default_factory=list)
    _ranked: list[Sensitivity] = field(default_factory=list)
    _groups: list[Group] = field(default_factory=list)
    _proofs: dict[Choice, Proof] = field(default_factory=dict)

    @property
    def rest(self) -> str:
        """What wide nodes are computed in."""
        return self.trials.config.precision

    def best(self, budget: Budget) -> Outcome:
        """The fastest engine within the budget on both halves."""
        ranked = self.ranked(budget)
        search = Search(
            lambda choice: self.judged(choice, budget), self.trials.microseconds, self.tell, self.settled.narrow,
            self.rest, (1.0, 0.5) if budget is UNLIMITED else LADDER, self._pure(),
        )  # fmt: skip
        points = search.run(ranked)
        chosen, notes = self._proven(points, budget)
        if chosen is None:
            raise BuildError(self._cannot(points, budget))
        return self._outcome(chosen, points, budget, notes)

    def _pure(self) -> list[Choice]:
        """Everything in one format, where there are several to choose from."""
        free = [n for n in self.candidates if n not in self.settled.wide]
        several = self.request.formats if len(self.request.formats) > 1 else ()
        return [Choice({**dict.fromkeys(free, kind), **self.settled.narrow}, self.rest) for kind in several]

    def judged(self, choice: Choice, budget: Budget) -> Point:
        """Whether the choice keeps the budget with the confidence that was asked for."""
        score, reference = self.trials.score(choice), self.trials.score(FLOAT32)
        margin = 0.0 if budget is UNLIMITED else self.request.quantile * self.trials.uncertainty(choice)
        return Point(choice, score, margin, budget.allows(score - margin, reference))

    def ranked(self, budget: Budget) -> list[Sensitivity]:
        """Each layer in its cheapest format, by noise per microsecond saved; without a budget their noise is nobody's
        concern."""
        free = [n for n in self.candidates if n not in self.settled.narrow and n not in self.settled.wide]
        if not free:
            return []
        if budget is UNLIMITED and not self._ranked:
            return _cheapest([s for kind in self.request.formats for s in self._gains(dict.fromkeys(free, kind))])
        if not self._ranked:
            for kind in self.request.formats:
                narrow = dict.fromkeys(free, kind)
                self._measured.extend(sensitivity.layers(self.trials, narrow, self.rest, self.tell))
            self._ranked.extend(_cheapest(self._measured))
            self._groups.extend(sensitivity.groups(self.trials, self._ranked, self.rest))
        return self._ranked

    def _gains(self, narrow: Mapping[str, str]) -> list[Sensitivity]:
        saved = sensitivity.gains(self.trials, narrow, self.rest)
        return [Sensitivity(node, narrow[node], 0.0, gain) for node, gain in saved.items()]

    def proof(self, choice: Choice) -> Proof:
        """The choice's engine on the held-out half."""
        if choice not in self._proofs:
            mine = self.trials.ask(self.trials.engine(choice), self.proven)
            wanted = self._wanted if choice != FLOAT32 else mine
            self._proofs[choice] = Proof(
                self.trials.metric(mine, self.proven, wanted), metric.decibels(mine, wanted),
                min(metric.cosines(mine, wanted), default=1.0), len(self.proven), mine,
            )  # fmt: skip
        return self._proofs[choice]

    @property
    def _wanted(self) -> Sequence[Answer]:
        return self.proof(FLOAT32).answers

    def _proven(self, points: Sequence[Point], budget: Budget) -> tuple[Choice | None, list[str]]:
        """The fastest choice that keeps the budget on the held-out half too and is faster than float32 when it is
        measured again, and how many were passed over: the more often the held-out half is asked, the less it proves."""
        reference, wide = self.proof(FLOAT32).score, FLOAT32 in [point.choice for point in points]
        worse = slower = 0
        for point in never_slower(points):
            if not budget.allows(self.proof(point.choice).score, reference):
                worse += 1
            elif wide and point.choice != FLOAT32 and self.trials.ratio(point.choice, FLOAT32) > FASTER:
                slower += 1
            else:
                return point.choice, _passed_over(worse, slower)
        return None, []

    def _outcome(self, chosen: Choice, points: Sequence[Point], budget: Budget, notes: Sequence[str]) -> Outcome:
        model = self.trials.transform(chosen.nodes)
        engine = self.trials.verified(chosen) if self.trials.config.verify else self.trials.engine(chosen)
        report = self._report(chosen, points, budget, notes)
        details = {**engine.details, "precision": report.lasting()}
        return Outcome(replace(engine, details=details), model, report)

    def _report(self, chosen: Choice, points: Sequence[Point], budget: Budget, notes: Sequence[str]) -> Report:
        best = front(points)
        return Report(
            formats=self.request.formats, rest=chosen.rest, metric=self.trials.metric.name, budget=budget.text,
            samples=len(self.trials.samples), reference=self.trials.score(FLOAT32),
            reference_microseconds=self.trials.microseconds(FLOAT32), chosen=dict(chosen.nodes),
            score=self.trials.score(chosen), microseconds=self.trials.microseconds(chosen),
            heldout=self.proof(chosen).shown, heldout_reference=self.proof(FLOAT32).shown,
            layers=tuple(self._ranked), groups=tuple(self._groups), candidates=self.candidates,
            trials=tuple(self._trial(p, p in best) for p in points),
            notes=(*self.notes, *notes, *self._unmet(chosen, points, budget)),
        )  # fmt: skip

    def _unmet(self, chosen: Choice, points: Sequence[Point], budget: Budget) -> list[str]:
        """Why nothing is narrow: the best that could be had, and the layers in the way."""
        narrow = [p for p in points if p.choice.nodes]
        if chosen.nodes or budget is UNLIMITED or not narrow:
            return []
        best = max(narrow, key=lambda p: p.score - p.margin)
        noisy = sorted(self._ranked, key=lambda s: -s.noise)[:_BLOCKING]
        slower = "" if not best.within else ", but it is no faster or fails on the held-out samples"
        return [
            f"no narrow choice keeps the budget {budget.text}: the best has {len(best.choice.nodes)} narrow layers and "
            f"scores {best.score:.6g} ± {best.margin:.2g}, float32 {self.trials.score(FLOAT32):.6g}{slower}; most "
            f"of the noise is that of {', '.join(s.node for s in noisy)}"
        ]

    def _trial(self, point: Point, best: bool) -> Trial:
        proof, nodes = self._proofs.get(point.choice), point.choice.nodes
        return Trial(
            len(nodes), tuple(sorted(set(nodes.values()))), point.choice.rest, point.score, point.margin,
            point.microseconds, point.within, None if proof is None else proof.score, best,
        )  # fmt: skip

    def _cannot(self, points: Sequence[Point], budget: Budget) -> str:
        reference = self.trials.score(FLOAT32)
        best = max(points, key=lambda p: p.score)
        blocking = ", ".join(list(self.settled.narrow)[:8]) or "the precision of the whole engine"
        return (
            f"no engine keeps the budget {budget.text} of metric {self.trials.metric.name}: float32 scores "
            f"{reference:.6g}, the best that could be had is {best.score:.6g}; in the way stand {blocking}, which "
            "--layerPrecisions with --precisionConstraints=obey holds narrow; widen the budget or release them"
        )


def _samples(
    source: onnx_ir.Model, config: BuildConfig, request: Request, notes: list[str]
) -> tuple[Sequence[Answer], Sequence[Answer]]:
    """The half to search with, and the half that proves; one sample is both."""
    specs = input_specs(source, config)
    if request.data is None:
        ranges = "those of drawn inputs" if request.cache is None else f"those of {request.cache}"
        notes.append(f"no samples were given: ranges are {ranges}, and accuracy on real inputs is unknown")
        found = samples(_drawn(source, specs, config), specs)
    else:
        found = samples(request.data, specs, request.preprocess)
    every = held(found)
    _check_indices(every, index_limits(source))
    if len(every) < 2:
        notes.append("there is one sample only: what was found on it is proved on it as well, which proves little")
        return every, every
    return every[::2], every[1::2]


def _passed_over(worse: int, slower: int) -> list[str]:
    said = {
        f"{worse} faster choices kept the budget on the samples of the search but not on the held-out ones": worse,
        f"{slower} choices were not faster than float32 when measured again": slower,
    }
    return [line for line, count in said.items() if count]


def _cheapest(measured: Sequence[Sensitivity]) -> list[Sensitivity]:
    """One a layer: the least noise per microsecond saved, then the most saved; in that order."""
    best: dict[str, Sensitivity] = {}
    for found in sorted(measured, key=lambda s: (s.price, -s.gain)):
        best.setdefault(found.node, found)
    return list(best.values())


def _check_indices(found: Sequence[Answer], limits: Mapping[str, int]) -> None:
    """Whole numbers that rows are looked up by have to be places of rows."""
    for position, sample in enumerate(found):
        for name, rows in limits.items():
            low, high = int(np.min(sample[name], initial=0)), int(np.max(sample[name], initial=0))
            if low < -rows or high >= rows:
                wrong = high if high >= rows else low
                raise ConfigError(f"sample {position}: input {name!r} holds {wrong}, the model looks up one of {rows} "
                                  "rows by it: these samples are another model's")  # fmt: skip


def _drawn(source: onnx_ir.Model, specs: Sequence[TensorSpec], config: BuildConfig) -> list[dict[str, Any]]:
    """Inputs of the first profile's typical shapes."""
    symbols = {**dict.fromkeys(_symbols(specs), 1), **typical_symbols(source, config)}
    limits = index_limits(source)
    return [make_inputs(specs, symbols, replace(config, seed=config.seed + i), limits) for i in range(_DRAWN)]


def _symbols(specs: Sequence[TensorSpec]) -> set[str]:
    return {symbol for spec in specs for extent in spec.shape for symbol in symbols_of(extent)}
