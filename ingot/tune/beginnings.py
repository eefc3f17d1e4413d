"""What of a graph is settled by the time of the whole graph: steps side by side, and which kernels begin early.

Steps that do not need each other may share the GPU, where one of them leaves processors idle. They then wait for events
where a row of steps has launches that begin early, and run side by side only where they do not share memory, of which
more is less in caches: these ways are timed.

A launch that begins before the one before it has ended finds its processors taken: its blocks are put together on
those that are idle, and stay there. Which of them gain by it depends on what is before and after them, which no time of
a step alone shows. Each kernel's early beginning is taken away in turn, and given back unless the graph became faster.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from ingot.config import BuildConfig
from ingot.engine import Variant, plan_bytes
from ingot.kernels.target import Target
from ingot.plan.extent import Extent, evaluate, symbols_of
from ingot.plan.memory import in_lanes
from ingot.plan.plan import GraphSegment
from ingot.runtime import cubins, cuda, cuda_executor
from ingot.runtime.session import features
from ingot.tune.binding import DEFAULT_EXTENT
from ingot.tune.cache import TimingCache
from ingot.tune.turns import alone_on

_FASTER = 0.997  # of a graph's time: less is noise
_LONGEST = 3000.0  # microseconds of a graph in which these things matter
_ROWS, _RUNS = 7, 10
_LANES = ((2, 1 << 18), (8, 1 << 20), (8, None))  # how many, and bytes up to which storages' memory is apart
_MOST_MEMORY = 256 << 20
_AS_BUILT = "as built"

Symbols = Mapping[str, int]
Known = Callable[[str], float | None]


def settled(variant: Variant, target: Target, symbols: Symbols, config: BuildConfig) -> Variant:
    """The variant with lanes and beginnings that make its graphs fast, where the GPU is here and times are taken."""
    graphs = all(isinstance(segment, GraphSegment) for segment in variant.plan.segments)
    if not graphs or variant.plan.derived or config.level == 0 or not target.machine <= features("cuda"):
        return variant
    cache = TimingCache(Path(config.timing_cache) if config.timing_cache else None, target)
    return _begun(_laid(variant, symbols, config, cache), symbols, config, cache)


def _laid(variant: Variant, symbols: Symbols, config: BuildConfig, cache: TimingCache) -> Variant:
    """In as many lanes as make its graphs fastest."""
    plans = {f"{lanes} lanes, {apart} apart": in_lanes(variant.plan, lanes, apart) for lanes, apart in _LANES}
    wide = {name: replace(variant, plan_json=plan_bytes(plan)) for name, plan in plans.items()
            if all(m.bytes <= _MOST_MEMORY for m in plan.memory)}  # fmt: skip
    if not wide:
        return variant
    key = _key("lanes", variant)
    if cache.get(key, _AS_BUILT) is None and not config.timing_cache_only:
        with alone_on(cuda.select("cuda")):
            for name, made in {_AS_BUILT: variant, **wide}.items():
                cache.put(key, name, _time(_frame(made, symbols)))
        cache.save()
    times = cache.passed(key, wide)
    best, known = min(times, key=lambda name: times[name], default=""), cache.get(key, _AS_BUILT)
    return wide[best] if best and known is not None and times[best] < _FASTER * known else variant


def _begun(variant: Variant, symbols: Symbols, config: BuildConfig, cache: TimingCache) -> Variant:
    codes = cubins.unpack(variant.code)
    early = [name for name, code in codes.items() if code.overlaps]
    key = _key("beginnings", variant)
    if early and cache.get(key, _AS_BUILT) is None and not config.timing_cache_only:
        with alone_on(cuda.select("cuda")):
            _measure(variant, symbols, early, lambda name, time: cache.put(key, name, time))
        cache.save()
    late = set(_late(early, lambda name: cache.get(key, name)))
    changed = {name: replace(code, overlaps=code.overlaps and name not in late) for name, code in codes.items()}
    return replace(variant, code=cubins.pack(changed)) if late else variant


def _key(what: str, variant: Variant) -> str:
    return f"{what} {hashlib.sha256(bytes(variant.plan_json) + bytes(variant.code)).hexdigest()[:24]}"


def _late(early: list[str], known: Known) -> list[str]:
    """Kernels without which as early beginners the graph was faster, in the order in which they were tried."""
    best, late = known(_AS_BUILT), []
    for name in early:
        time = known(name)
        if best is not None and time is not None and time < _FASTER * best:
            best = time
            late.append(name)
    return late


def _measure(variant: Variant, symbols: Symbols, early: list[str], tell: Callable[[str, float], None]) -> None:
    """Times of the graphs: as built, and with each kernel's early beginning taken away after those before it."""
    frame = _frame(variant, symbols)
    kernels = frame.loaded.kernels
    best = _time(frame)
    tell(_AS_BUILT, best)
    for name in early if best <= _LONGEST else []:
        kernels.begin(name, False)
        frame.forget_graphs(every=True)
        time = _time(frame)
        tell(name, time)
        kernels.begin(name, time >= _FASTER * best)
        best = time if time < _FASTER * best else best


def _frame(variant: Variant, symbols: Symbols) -> cuda_executor.CudaFrame:
    """The variant ready to run at these sizes."""
    trial = replace(variant)  # what is loaded for it goes with it
    weights = np.frombuffer(trial.weights, np.uint8)
    plan, loaded = trial.plan, cuda_executor.load(trial, cuda.select("cuda"), weights)
    shapes = tuple(tuple(_size(d, symbols) for d in plan.values[i].shape) for i in plan.inputs)
    frame = cuda_executor.CudaExecutor(plan, loaded).take(shapes)
    assert isinstance(frame, cuda_executor.CudaFrame)
    return frame


def _size(extent: Extent, symbols: Symbols) -> int:
    return evaluate(extent, {**dict.fromkeys(symbols_of(extent), DEFAULT_EXTENT), **symbols})


def _time(frame: cuda_executor.CudaFrame) -> float:
    """Microseconds of all graphs, of many runs in a row."""
    context, rows = frame.context, []
    begin, end = context.event(), context.event()
    numbers = range(len(frame.plan.segments))
    for row in range(_ROWS + 1):
        context.call("cuEventRecord", begin, frame.stream)
        for _ in range(_RUNS):
            for number in numbers:
                frame.launch(number)
        context.call("cuEventRecord", end, frame.stream)
        frame.wait("timing a graph")
        if row:  # the first one captures
            rows.append(1e3 * context.call("cuEventElapsedTime", begin, end) / _RUNS)
    for event in (begin, end):
        context.call("cuEventDestroy", event)
    return statistics.median(rows)
