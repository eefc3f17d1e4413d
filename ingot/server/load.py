"""Load: closed (so many at a time, each waits for its answer) or open (so many a second, whoever still waits)."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.errors import IngotError

Ask = Callable[[], Any]
PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)


@dataclass(frozen=True)
class Load:
    """What came of it. Latencies in milliseconds; in an open loop from when a request was due, not when it went."""

    seconds: float
    latencies: tuple[float, ...]
    errors: Counter[str]
    offered: float | None = None

    def as_plain(self) -> dict[str, Any]:
        """As JSON data."""
        answered = len(self.latencies)
        content: dict[str, Any] = {
            "seconds": round(self.seconds, 3), "answered": answered, "refused": self.errors.total(),
            "errors": dict(self.errors), "per_second": round(answered / self.seconds, 1) if self.seconds else 0.0,
        }  # fmt: skip
        if self.offered is not None:
            content["offered_per_second"] = self.offered
        if answered:
            values = np.array(self.latencies)
            content["latency_ms"] = {
                "mean": round(float(values.mean()), 3), "max": round(float(values.max()), 3),
                **{f"p{p:g}": round(float(np.percentile(values, p, method="inverted_cdf")), 3) for p in PERCENTILES},
            }  # fmt: skip
        return content


def closed(asks: Sequence[Ask], seconds: float, warm_up: float = 0.5) -> Load:
    """Each of `asks` in a thread of its own, one request after the other."""
    begin = time.perf_counter() + warm_up
    until = begin + seconds

    def client(ask: Ask, kept: _Kept) -> None:
        while (start := time.perf_counter()) < until:
            error = _attempt(ask)
            if start >= begin:
                kept.add(start, error)

    return _together([(client, ask) for ask in asks], begin)


def opened(asks: Sequence[Ask], seconds: float, rate: float, poisson: bool = True, seed: int = 0) -> Load:
    """`rate` requests a second, spread at random or evenly; at most len(asks) at once, later ones wait and count it."""
    count = max(int(rate * seconds), 1)
    generator = np.random.default_rng(seed)
    gaps = generator.exponential(1 / rate, count) if poisson else np.full(count, 1 / rate)
    begin = time.perf_counter() + 0.1
    due = iter((begin + np.cumsum(gaps)).tolist())
    lock = threading.Lock()

    def client(ask: Ask, kept: _Kept) -> None:
        while True:
            with lock:
                moment = next(due, None)
            if moment is None:
                return
            time.sleep(max(moment - time.perf_counter(), 0))
            kept.add(moment, _attempt(ask))

    return _together([(client, ask) for ask in asks], begin, rate)


class _Kept:
    """What one client has seen."""

    def __init__(self) -> None:
        self.latencies: list[float] = []
        self.errors: Counter[str] = Counter()

    def add(self, start: float, error: str) -> None:
        """A request that began at `start` has ended now."""
        if error:
            self.errors[error] += 1
        else:
            self.latencies.append((time.perf_counter() - start) * 1e3)


def _attempt(ask: Ask) -> str:
    """An empty text, or why it was refused."""
    try:
        ask()
    except IngotError as error:
        return str(error)[:200]
    return ""


def _together(
    clients: Sequence[tuple[Callable[[Ask, _Kept], None], Ask]], begin: float, offered: float | None = None
) -> Load:
    kept = [_Kept() for _ in clients]
    failures: list[BaseException] = []

    def guarded(run: Callable[[Ask, _Kept], None], ask: Ask, mine: _Kept) -> None:
        try:
            run(ask, mine)
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread below
            failures.append(error)

    threads = [
        threading.Thread(target=guarded, args=(run, ask, mine), daemon=True)
        for (run, ask), mine in zip(clients, kept, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    seconds = time.perf_counter() - begin
    return Load(
        seconds,
        tuple(x for mine in kept for x in mine.latencies),
        sum((mine.errors for mine in kept), Counter()),
        offered,
    )
