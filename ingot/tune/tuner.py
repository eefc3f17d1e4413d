"""Where prices come from: estimates at level 0; above it the most promising candidates are timed, once per distinct
node. Where all of them are refused, more are: nothing that was not timed takes the place of what was."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ingot.config import BuildConfig
from ingot.errors import BuildError
from ingot.kernels import Candidate, Ports
from ingot.kernels.target import Target
from ingot.plan.lower import Module, Work
from ingot.report import BuildLog
from ingot.runtime.session import features
from ingot.tune import cold, trials
from ingot.tune.cache import TimingCache, candidate_key, signature
from ingot.tune.choose import Price
from ingot.tune.measure import without_weights
from ingot.tune.price import Estimates
from ingot.tune.trials import Outcome, Trial


@dataclass(frozen=True)
class Level:
    """How much is timed: at most `candidates` per kernel and layout of a node, `budget` seconds of running per node.
    Candidates estimated at more than `hopeless` times the best are left out, and nodes cheaper than `worth`
    microseconds. With `varied`, half of the seats are for different values of a kernel's first setting."""

    candidates: int
    budget: float
    hopeless: float = 3.0
    worth: float = 3.0
    varied: bool = False


LEVELS = {
    1: Level(1, 0.02),
    2: Level(2, 0.04),
    3: Level(4, 0.08),
    4: Level(8, 0.15, hopeless=10.0),
    5: Level(10_000, 0.4, hopeless=math.inf, worth=0.0),
}


_WIDER = 4  # times as many candidates are timed where those before all failed
_ON_GPU = 4  # times as many candidates as on a CPU: they are compiled on all cores, and run for milliseconds


def prices(module: Module, target: Target, symbols: Mapping[str, int], config: BuildConfig, log: BuildLog) -> Price:
    """The price function of a build."""
    estimates = Estimates(target, symbols)
    if config.level == 0:
        return estimates
    nodes = Nodes(estimates, weight_bytes(module) if target.target == "cpu" else 0)
    if not target.machine <= features(target.target):
        log.note("not timed", target.name, "this machine cannot run it; its kernels are chosen by estimate")
        return estimates
    cache = TimingCache(Path(config.timing_cache) if config.timing_cache else None, target)
    if cache.mismatch:
        log.note("timing cache", str(cache.path), cache.mismatch, "they are kept; this build measures its own")
    level = LEVELS[config.level]
    if target.target != "cpu":  # a GPU's steps all cost microseconds, and its microseconds more
        level = replace(level, worth=0.0, candidates=_ON_GPU * level.candidates, varied=True)
    lists = {work: nodes.able(work, chosen) for work, chosen in shortlists(module, estimates, level).items()}
    lists = {work: able for work, able in lists.items() if len(able) > 1}
    try:
        _measure(lists, nodes, cache, level, config, log)
    finally:
        cache.save()  # Ctrl-C does not lose what has been measured
    return Measured(nodes, cache, lists, log)


def weight_bytes(module: Module) -> int:
    """Bytes of the weights that every run reads; tables from which rows are gathered do not count."""
    works = (work for work in module.all_works() if work.op != "Gather")
    arrays = {id(t.constant): t.constant for work in works for t in work.inputs if t is not None}
    return sum(array.nbytes for array in arrays.values() if array is not None)


@dataclass(frozen=True, eq=False)
class Nodes:
    """The nodes of works, as they are estimated and timed. `weights`: bytes of the model's, or 0 on a GPU,
    where it does not matter."""

    estimates: Estimates
    weights: int

    def key(self, work: Work) -> str:
        """What the timing cache knows a work by."""
        return signature(self.estimates.bound(work), cold.distance(self.weights) if self.share(work) else 0)

    def share(self, work: Work) -> float:
        """How many times this work's weights the model has: as many times as much does a candidate's form of them take
        where it is that of all."""
        node = self.estimates.bound(work)
        own = sum(port.constant.nbytes for port in node.inputs if port is not None and port.constant is not None)
        return self.weights / own if own else 0.0

    def able(self, work: Work, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those that can be timed: a kernel for any number of rows may not apply to the typical number."""
        node, target = self.estimates.bound(work), self.estimates.isa
        kernels = {c.kernel.name: c.kernel for c in candidates}
        applied = {name for name, kernel in kernels.items() if kernel.when(node, target)}
        return [c for c in candidates if c.kernel.name in applied]


def shortlists(module: Module, estimates: Estimates, level: Level) -> dict[Work, list[Candidate]]:
    """For each work with a real choice: the best few candidates of each kernel and layout by estimate. Estimates rank
    one kernel's tactics better than they rank kernels: without seats of its own a good kernel was shut out."""
    lists: dict[Work, list[Candidate]] = {}
    for work in module.all_works():
        if work.kind == "native" and len(work.choices) > 1:
            lists[work] = _shortlist(work, work.choices, estimates, level)
    return {work: chosen for work, chosen in lists.items() if len(chosen) > 1}


def _shortlist(work: Work, choices: Sequence[Candidate], estimates: Estimates, level: Level) -> list[Candidate]:
    ranked = sorted((estimates(work, c), i) for i, c in enumerate(choices))
    generated = [cost for cost, index in ranked if choices[index].kernel.library is None]
    best = generated[0] if generated else ranked[0][0]  # what libraries reach is guessed too well to measure others by
    if best == 0 or best < level.worth:
        return []
    taken: dict[tuple[str, Ports], list[Candidate]] = {}
    for cost, index in ranked:
        candidate = choices[index]
        if cost <= level.hopeless * best:
            taken.setdefault((candidate.kernel.name, candidate.ports), []).append(candidate)
    return [c for group in taken.values() for c in _seated(group, level)]


def _seated(group: Sequence[Candidate], level: Level) -> list[Candidate]:
    """Of one kernel's candidates, the best first: those that are timed. Estimates rank ways to use a tile better than
    they rank tiles: the twelve best of a convolution all had two, which were not the fastest."""
    first = {next(iter(c.tactic.values()), None): c for c in reversed(group)} if level.varied else {}
    varied = [c for c in group if c in first.values()][: (level.candidates + 1) // 2]
    rest = [c for c in group if c not in varied]
    return [*varied, *rest[: level.candidates - len(varied)]]


class Measured:
    """Measured microseconds where there are some. Candidates nobody timed do not compete with timed ones; those that
    failed compete with nobody, and are named in the log."""

    def __init__(
        self, nodes: Nodes, cache: TimingCache, lists: Mapping[Work, Sequence[Candidate]], log: BuildLog
    ) -> None:
        self._nodes, self._estimates, self._cache = nodes, nodes.estimates, cache
        self._prices = {work: self._prices_of(work) for work in lists}
        told: set[str] = set()
        for work in lists:
            key = nodes.key(work)
            if key not in told:
                told.add(key)
                _tell_failures(work, key, cache, log)
                _tell_second_choice(work, key, lists[work], cache, log)

    def __call__(self, work: Work, candidate: Candidate) -> float:
        if work not in self._prices:
            return self._estimates(work, candidate)
        return self._prices[work].get(candidate_key(candidate), math.inf)

    def _prices_of(self, work: Work) -> dict[str, float]:
        timed = self._cache.passed(self._nodes.key(work), map(candidate_key, work.choices))
        if not timed:
            raise BuildError(
                f"every kernel for {work.op} {_nodes(work)} failed when it was timed; this is a bug in Ingot. "
                "Build with level 0, or with another timing cache if the machine was to blame"
            )
        return timed


def _tell_failures(work: Work, key: str, cache: TimingCache, log: BuildLog) -> None:
    remedy = "ended by the system? then reset the timing cache" if cache.path else "the others were timed without it"
    for candidate in work.choices:
        reason = cache.failure(key, candidate_key(candidate))
        if reason is not None:
            log.note("dropped tactic", _nodes(work), f"{candidate.label}: {reason}", remedy)


def _tell_second_choice(work: Work, key: str, first: Sequence[Candidate], cache: TimingCache, log: BuildLog) -> None:
    if not cache.passed(key, map(candidate_key, first)):
        log.note("second choice", _nodes(work), f"all {len(first)} candidates that were timed first failed",
                 "others were timed in their place, and passed")  # fmt: skip


def _nodes(work: Work) -> str:
    return ", ".join(work.origins) or work.name


Lists = Mapping[Work, Sequence[Candidate]]


def _measure(lists: Lists, nodes: Nodes, cache: TimingCache, level: Level, config: BuildConfig, log: BuildLog) -> None:
    """Fill the cache with what the shortlists need, and with more where all of a list failed."""
    log.figures["candidates timed"] = 0
    stage = f"tune {nodes.estimates.isa.name}"
    while lists:
        _time(_missing(lists, nodes, cache), nodes, cache, config, log, stage)
        level = replace(level, candidates=_WIDER * level.candidates, hopeless=math.inf, worth=0.0)
        left = {work: untried for work in lists if (untried := _untried(work, nodes, cache))}
        lists = {work: _shortlist(work, untried, nodes.estimates, level) for work, untried in left.items()}
        stage = f"tune {nodes.estimates.isa.name}, second choices"


def _untried(work: Work, nodes: Nodes, cache: TimingCache) -> list[Candidate]:
    """What is left of a work of which nothing passed."""
    known = cache.times.get(nodes.key(work), {})
    names = [candidate_key(c) for c in work.choices]
    if cache.passed(nodes.key(work), names):
        return []
    return nodes.able(work, [c for name, c in zip(names, work.choices, strict=True) if name not in known])


Missing = Mapping[str, tuple[Work, list[Candidate]]]


def _missing(lists: Lists, nodes: Nodes, cache: TimingCache) -> Missing:
    """What nobody has timed yet, by signature: what one work lacks another may have, as weights differ."""
    missing: dict[str, tuple[Work, list[Candidate]]] = {}
    for work, candidates in lists.items():
        key = nodes.key(work)
        known = {*cache.times.get(key, {}), *(candidate_key(c) for c in missing.get(key, (work, []))[1])}
        if unknown := [c for c in candidates if candidate_key(c) not in known]:
            missing.setdefault(key, (work, []))[1].extend(unknown)
    return missing


def _time(missing: Missing, nodes: Nodes, cache: TimingCache, config: BuildConfig, log: BuildLog, stage: str) -> None:
    log.figures["candidates timed"] += sum(len(c) for _, c in missing.values())
    if not missing:
        return
    if config.timing_cache_only:
        names = ", ".join(work.name for work, _ in list(missing.values())[:3])
        raise BuildError(
            f"the timing cache lacks {len(missing)} nodes ({names} …); build once without this restriction"
        )
    anchors = {key: _anchor(key, work, cache) for key, (work, _) in missing.items()}
    todo = [_trial(key, work, unknown, anchors[key], nodes) for key, (work, unknown) in missing.items()]
    budget = LEVELS[config.level].budget
    for trial, outcomes in trials.run(todo, nodes.estimates.isa, budget, lambda share: log.advance(stage, share)):
        _remember(trial, outcomes, anchors[trial.key], cache)


def _anchor(key: str, work: Work, cache: TimingCache) -> Candidate | None:
    """The fastest candidate timed earlier: timed again beside new ones, it says how fast the machine is today."""
    timed = [(t, i) for i, c in enumerate(work.choices) if (t := cache.get(key, candidate_key(c))) is not None]
    return work.choices[min(timed)[1]] if timed else None


def _trial(key: str, work: Work, unknown: Sequence[Candidate], anchor: Candidate | None, nodes: Nodes) -> Trial:
    candidates = (*unknown, anchor) if anchor else tuple(unknown)
    node = without_weights(nodes.estimates.bound(work))
    estimates = tuple(nodes.estimates(work, c) for c in candidates)
    return Trial(key, node, candidates, estimates, nodes.share(work))


def _remember(trial: Trial, outcomes: Sequence[Outcome], anchor: Candidate | None, cache: TimingCache) -> None:
    scale = 1.0
    if anchor is not None:
        *outcomes, again = outcomes
        before = cache.get(trial.key, candidate_key(anchor))
        scale = before / again if before and not isinstance(again, str) else 1.0
    for candidate, outcome in zip(trial.candidates, outcomes, strict=False):
        cache.put(trial.key, candidate_key(candidate), outcome if isinstance(outcome, str) else outcome * scale)
