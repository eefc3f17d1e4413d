"""`calibrate(model, samples)`: ranges of the tensors that products read, from a float32 engine that shows them.

One pass over the samples, a batch in memory at a time, histograms of constant size. "auto" then tries, tensor by
tensor, what each calibrator says, and keeps what disturbs the model's outputs least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from ingot.build import build
from ingot.compiler import input_specs
from ingot.config import BuildConfig
from ingot.errors import ConfigError
from ingot.ir import shapes
from ingot.ir.graph import add_constant
from ingot.passes.branches import inline_branches
from ingot.plan.plan import TensorSpec
from ingot.precision import calibrators, data, nodes, representative
from ingot.precision.histogram import Histogram
from ingot.precision.ranges import Ranges, TensorRange
from ingot.precision.representative import Series
from ingot.precision.trial_ranges import least_disturbing
from ingot.runtime.session import Session

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Any]
Progress = Callable[[str, float], None]
Run = Callable[[Feeds], Mapping[str, Any]]
__all__ = ["Ranges", "TensorRange", "calibrate"]
_BATCH, _KEPT = 16, 32
_MANY_CHANNELS, _FAR_LARGER = 16, 4.0


@dataclass(eq=False)
class Observation:
    """What is kept of one tensor, whatever the number of samples."""

    channel_axis: int
    histogram: Histogram = field(default_factory=Histogram)
    series: Series = field(default_factory=Series)
    lows: Array | None = None
    highs: Array | None = None
    _squares: Array | None = None
    _rows: int = 0

    def add(self, values: Array) -> None:
        """Count one batch of it."""
        self.histogram.add(values)
        self.series.add(values)
        if values.size and values.ndim:
            rows = np.moveaxis(values, self.channel_axis, -1).reshape(-1, values.shape[self.channel_axis])
            self._channels(rows)

    def _channels(self, rows: Array) -> None:
        lows, highs, squares = rows.min(0), rows.max(0), np.square(rows).sum(0, dtype=np.float64)
        if self.lows is None or self.highs is None or self._squares is None or len(self.lows) != len(lows):
            self.lows, self.highs, self._squares, self._rows = lows, highs, squares, 0
        else:
            self.lows, self.highs = np.minimum(self.lows, lows), np.maximum(self.highs, highs)
            self._squares = self._squares + squares
        self._rows += len(rows)

    @property
    def energy(self) -> Array | None:
        """Mean square of each channel."""
        return None if self._squares is None else (self._squares / self._rows).astype(np.float32)


def calibrate(
    model: ir.Model, samples: Iterable[Feeds], calibrator: str = "auto", progress: Progress | None = None
) -> Ranges:
    """Ranges of every tensor that a quantizable node of the imported `model` reads.

    `samples`: feeds, with what else they hold. ConfigError where there are none, or values that are not finite come up.
    """
    if calibrator != calibrators.AUTO:
        calibrators.named(calibrator)
    tell = progress or _silent
    specs = input_specs(model, BuildConfig())
    first, every = _first(samples, specs)
    observed = observable(model, first, specs)
    seen, kept, count = _observe(observed, data.batches(every, specs, _BATCH), specs, tell)
    chosen = _choose(observed, seen, kept, calibrator, tell)
    doubts = representative.warnings(seen, chosen, count)
    return Ranges(chosen, count, tuple(doubts))


def _silent(stage: str, share: float) -> None:
    """Nobody listens."""


def _first(samples: Iterable[Feeds], specs: Sequence[TensorSpec]) -> tuple[Feeds, Iterator[Feeds]]:
    """The first sample, and an iterator over all: the samples are gone through once."""
    stream = enumerate(samples)
    checked = (data.checked(sample, specs, f"sample {index}") for index, sample in stream)
    first = next(checked, None)
    if first is None:
        raise ConfigError("there are no samples to calibrate on: give at least one, a few hundred are better")

    def every() -> Iterator[Feeds]:
        yield first
        yield from checked

    return first, every()


def observable(model: ir.Model, sample: Feeds, specs: Sequence[TensorSpec]) -> ir.Model:
    """The prepared model without branches that the sample decides, so that all it computes lies in the main graph."""
    copy = nodes.prepared(model)
    if not any(node.op_type == "If" for node in ir.traversal.RecursiveGraphIterator(copy.graph)):
        return copy
    for value, spec in zip(copy.graph.inputs, specs, strict=True):
        if not spec.shape and spec.dtype in ("bool", "int32", "int64"):
            value.replace_all_uses_with(add_constant(copy.graph, np.asarray(sample[spec.name]), spec.name))
    while True:
        copy = nodes.prepared(copy)
        shapes.infer(copy)
        if not inline_branches(copy):
            return copy


def _observe(
    model: ir.Model, batches: Iterator[Feeds], specs: Sequence[TensorSpec], tell: Progress
) -> tuple[dict[str, Observation], list[Feeds], int]:
    """Every tensor's observation, the first few batches, the number of samples."""
    found = {str(t.x.name): Observation(t.channel_axis) for t in nodes.targets(model) if t.x.graph is model.graph
             or (t.x.producer() is not None and t.x.producer().graph is model.graph)}  # type: ignore[union-attr] # fmt: skip
    kept: list[Feeds] = []
    count = 0
    if not found:
        return found, kept, sum(1 for _ in batches)
    with _tapped(model, list(found)) as session:
        for feeds in batches:
            _watch(found, {**feeds, **session.run(feeds)}, count)
            count += _size(feeds, specs)
            if len(kept) * _size(feeds, specs) < _KEPT:
                kept.append(feeds)
            tell("calibrate", count / (count + 4 * _BATCH))  # how many there are is not known before the end
    return found, kept, count


def _size(feeds: Feeds, specs: Sequence[TensorSpec]) -> int:
    first = specs[0]
    return len(feeds[first.name]) if first.shape and isinstance(first.shape[0], str) else 1


def _watch(found: Mapping[str, Observation], values: Mapping[str, Any], count: int) -> None:
    for name, observation in found.items():
        if not np.isfinite(values[name]).all():
            raise ConfigError(f"tensor {name!r} is not finite for sample {count} or one soon after: the model "
                              "overflows in float32 already on this input")  # fmt: skip
        observation.add(np.asarray(values[name]))


def _tapped(model: ir.Model, names: Sequence[str]) -> Session:
    """An engine with these tensors among its outputs; nothing is timed, nothing verified."""
    copy = model.clone()
    have = {value.name for value in (*copy.graph.outputs, *copy.graph.inputs)}
    made = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs.extend(made[name] for name in names if name not in have)
    return Session(build(copy, BuildConfig(level=0, verify=False)))


def _choose(
    model: ir.Model, seen: Mapping[str, Observation], kept: Sequence[Feeds], calibrator: str, tell: Progress
) -> dict[str, TensorRange]:
    names = list(calibrators.CALIBRATORS) if calibrator == calibrators.AUTO else [calibrator]
    offers = {tensor: {name: calibrators.named(name)(o.histogram) for name in names} for tensor, o in seen.items()}
    if calibrator == calibrators.AUTO:
        for tensor, o in seen.items():
            offers[tensor] |= _of_channels(o)
    best = dict.fromkeys(seen, calibrator)
    if calibrator == calibrators.AUTO and seen:
        best = least_disturbing(model, offers, kept, tell)
    return {tensor: _range(observation, best[tensor], offers[tensor]) for tensor, observation in seen.items()}


def _of_channels(observation: Observation) -> dict[str, calibrators.Bounds]:
    """What covers most channels, where there are many and a few are far larger than the others."""
    lows, highs = observation.lows, observation.highs
    if lows is None or highs is None or len(lows) < _MANY_CHANNELS:
        return {}
    low, high = calibrators.most_channels(lows, highs)
    far = max(-lows.min(), highs.max()) > _FAR_LARGER * max(-low, high)
    return {"most channels": (low, high)} if far and high > low else {}


def _range(observation: Observation, name: str, offers: Mapping[str, calibrators.Bounds]) -> TensorRange:
    low, high = offers[name]
    clipped = observation.histogram.outside(low, high)
    o = observation
    return TensorRange(min(low, 0.0), max(high, 0.0), name, clipped, o.lows, o.highs, o.energy)
