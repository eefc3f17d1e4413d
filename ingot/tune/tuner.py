"""Where prices come from: estimates at level 0; above it the most promising candidates are timed, once per distinct
node."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ingot.config import BuildConfig
from ingot.errors import BuildError
from ingot.kernels import Candidate, Ports
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.workers import WorkerDied, WorkerPool
from ingot.plan.lower import Module, Work
from ingot.report import BuildLog
from ingot.runtime.cpu import usable_threads
from ingot.tune.cache import TimingCache, candidate_key, signature
from ingot.tune.choose import Price
from ingot.tune.measure import describe, without_weights
from ingot.tune.price import Estimates, estimate

# level → candidates timed per node and layout; seconds of running per node
_LEVELS: dict[int, tuple[int, float]] = {1: (2, 0.02), 2: (3, 0.04), 3: (5, 0.08), 4: (10, 0.15), 5: (10_000, 0.4)}
_HOPELESS = 3.0  # a layout whose estimate is this many times the best's is not timed
_WORTH_TIMING = 3.0  # microseconds: below, the estimates decide


def prices(module: Module, isa: Isa, symbols: Mapping[str, int], config: BuildConfig, log: BuildLog) -> Price:
    """The price function of a build."""
    estimates = Estimates(isa, symbols)
    if config.level == 0 or not isa.machine <= _here():
        return estimates
    cache = TimingCache(Path(config.timing_cache) if config.timing_cache else None, isa)
    _note_foreign(cache, config, log)
    shortlists = _shortlists(module, estimates, isa, config.level)
    _measure(shortlists, estimates, cache, isa, config, log)
    cache.save()
    return _Measured(estimates, cache, shortlists)


def _here() -> frozenset[str]:
    from ingot.runtime.machine import cpu_features

    return cpu_features()


def _note_foreign(cache: TimingCache, config: BuildConfig, log: BuildLog) -> None:
    if cache.foreign and not cache.times:
        log.note(
            "timing cache", str(config.timing_cache), f"holds times of {cache.foreign[0]} only",
            "times of another processor or generator are not used; these are measured anew",
        )  # fmt: skip


class _Measured:
    """Measured microseconds where there are some; candidates nobody timed do not compete with timed ones."""

    def __init__(
        self, estimates: Estimates, cache: TimingCache, shortlists: Mapping[Work, Sequence[Candidate]]
    ) -> None:
        self._estimates, self._cache = estimates, cache
        self._keys = {work: signature(estimates.bound(work)) for work in shortlists}

    def __call__(self, work: Work, candidate: Candidate) -> float:
        if work not in self._keys:
            return self._estimates(work, candidate)
        known = self._cache.get(self._keys[work], candidate_key(candidate))
        return math.inf if known is None else known


def _shortlists(module: Module, estimates: Estimates, isa: Isa, level: int) -> dict[Work, list[Candidate]]:
    """For each work with a real choice: the best few candidates of each layout by estimate."""
    count, _ = _LEVELS[level]
    lists: dict[Work, list[Candidate]] = {}
    for work in module.all_works():
        if work.kind != "native" or len(work.choices) < 2:
            continue
        node = estimates.bound(work)
        ranked = sorted(((estimate(node, c, isa), i) for i, c in enumerate(work.choices)))
        if ranked[0][0] < _WORTH_TIMING and level < 5:
            continue
        taken: dict[Ports, list[Candidate]] = {}
        for cost, index in ranked:
            candidate = work.choices[index]
            group = taken.setdefault(candidate.ports, [])
            if len(group) < count and (cost <= _HOPELESS * ranked[0][0] or level == 5):
                group.append(candidate)
        lists[work] = [c for group in taken.values() for c in group]
    return {work: chosen for work, chosen in lists.items() if len(chosen) > 1}


def _measure(
    lists: Mapping[Work, Sequence[Candidate]],
    estimates: Estimates,
    cache: TimingCache,
    isa: Isa,
    config: BuildConfig,
    log: BuildLog,
) -> None:
    _, budget = _LEVELS[config.level]
    missing: dict[str, tuple[Work, list[Candidate]]] = {}
    for work, candidates in lists.items():
        key = signature(estimates.bound(work))
        unknown = [c for c in candidates if cache.get(key, candidate_key(c)) is None]
        if unknown and key not in missing:
            missing[key] = (work, unknown)
    log.figures["candidates timed"] = sum(len(c) for _, c in missing.values())
    if not missing:
        return
    if config.timing_cache_only:
        names = ", ".join(work.name for work, _ in list(missing.values())[:3])
        raise BuildError(
            f"the timing cache lacks {len(missing)} nodes ({names} …); build once without this restriction"
        )
    jobs = [
        (without_weights(estimates.bound(work)), [describe(c) for c in unknown], isa.name, budget)
        for work, unknown in missing.values()
    ]
    with WorkerPool(min(usable_threads(), len(jobs))) as pool:
        results = pool.map("ingot.tune.measure:time_candidates", jobs)
        for done, (key, result) in enumerate(zip(missing, results, strict=True)):
            work, unknown = missing[key]
            _remember(key, work, unknown, result, cache, log)
            log.advance("tune", (done + 1) / len(jobs))


def _remember(
    key: str,
    work: Work,
    candidates: Sequence[Candidate],
    result: list[float] | WorkerDied,
    cache: TimingCache,
    log: BuildLog,
) -> None:
    if isinstance(result, WorkerDied):
        names = ", ".join(work.origins) or work.name
        log.note("dropped tactics", names, f"{len(candidates)} candidates of {work.op}: {result}", "report this")
        return
    for candidate, microseconds in zip(candidates, result, strict=True):
        cache.put(key, candidate_key(candidate), microseconds)
