"""What a gateway counts for each version, cumulative, and what lies between two moments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

PER_OCTAVE = 16  # latency buckets: 4.4 % wide
USER_BITS = 1 << 17


class Counters(msgspec.Struct, omit_defaults=True):
    """One version's counts since its gateway began; latencies of good answers by bucket."""

    requests: int = 0
    errors: int = 0
    retried: int = 0
    diverted: int = 0
    mirrored: int = 0
    agreed: int = 0
    latency_sum: float = 0.0
    histogram: dict[int, int] = {}
    feedback: dict[str, tuple[int, int]] = {}

    def answered(self, latency: float) -> None:
        """A good answer after so many seconds."""
        self.requests += 1
        self.latency_sum += latency
        bucket = bucket_of(latency)
        self.histogram[bucket] = self.histogram.get(bucket, 0) + 1

    def failed(self) -> None:
        """A request it could not answer well."""
        self.requests += 1
        self.errors += 1

    def told(self, event: str, good: bool) -> None:
        """Feedback on an answer of this version."""
        count, total = self.feedback.get(event, (0, 0))
        self.feedback[event] = (count + good, total + 1)


def bucket_of(latency: float) -> int:
    """The bucket of so many seconds: microseconds, sixteen buckets an octave."""
    return int(math.log2(max(latency * 1e6, 1.0)) * PER_OCTAVE)


def upper_bound(bucket: int) -> float:
    """Seconds up to which a bucket reaches."""
    return 2.0 ** ((bucket + 1) / PER_OCTAVE) / 1e6


_NUMBERS = ("requests", "errors", "retried", "diverted", "mirrored", "agreed", "latency_sum")


def combined(first: Counters, second: Counters, sign: int = 1) -> Counters:
    """first + sign * second, field by field"""
    histogram = dict(first.histogram)
    for bucket, count in second.histogram.items():
        histogram[bucket] = histogram.get(bucket, 0) + sign * count
    feedback = dict(first.feedback)
    for name, (good, total) in second.feedback.items():
        before = feedback.get(name, (0, 0))
        feedback[name] = (before[0] + sign * good, before[1] + sign * total)
    numbers = {name: getattr(first, name) + sign * getattr(second, name) for name in _NUMBERS}
    kept = {bucket: count for bucket, count in histogram.items() if count}
    return Counters(**numbers, histogram=kept, feedback=feedback)


def total(counters: Iterable[Counters]) -> Counters:
    """Their sum."""
    result = Counters()
    for one in counters:
        result = combined(result, one)
    return result


def quantile(histogram: Mapping[int, int], share: float) -> float | None:
    """Seconds below which this share of the answers lies; None without answers."""
    count = sum(histogram.values())
    if not count:
        return None
    rank, seen = share * count, 0
    for bucket in sorted(histogram):
        seen += histogram[bucket]
        if seen >= rank:
            return upper_bound(bucket)
    return upper_bound(max(histogram))


def slower_than(histogram: Mapping[int, int], seconds: float) -> int:
    """Answers in buckets beyond the one that holds so many seconds."""
    edge = bucket_of(seconds)
    return sum(count for bucket, count in histogram.items() if bucket > edge)


class Observation(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one run of one gateway (its `boot`) had counted at a moment; `users` since the weights last changed."""

    boot: str
    time: float
    counters: dict[str, Counters]
    applied: int = 0
    users: dict[str, int] = {}
    open_breakers: tuple[str, ...] = ()
    gauges: dict[str, dict[str, float]] = {}


def at(observations: Sequence[Observation], version: str, moment: float) -> Counters:
    """All that was counted for a version by a moment, over every gateway and run; observations in order of time."""
    latest: dict[str, Counters] = {}
    for observation in observations:
        if observation.time > moment:
            break
        if version in observation.counters:
            latest[observation.boot] = observation.counters[version]
    return total(latest.values())


def between(observations: Sequence[Observation], version: str, start: float, end: float) -> Counters:
    """What was counted after `start` and up to `end`."""
    return combined(at(observations, version, end), at(observations, version, start), -1)


_DECODER = msgspec.json.Decoder(Observation)


def encode(observation: Observation) -> str:
    """As a row of the store."""
    return msgspec.json.encode(observation).decode()


def decode(text: str) -> Observation:
    """An observation from its row."""
    return _DECODER.decode(text)
