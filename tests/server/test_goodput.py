"""The batcher under overload, on a virtual clock: what meets its deadline, beside what a first-come queue manages."""

import random
from collections.abc import Hashable, Iterator

import pytest

from ingot.server.batcher import Batcher, QueuePolicy, Rules

MS = 1_000_000
DEADLINE = 50 * MS
ROWS = 16


class Model:
    """A model for which batching pays: 4 ms and 1 ms a row."""

    def __call__(self, shape: Hashable, rows: int) -> int:
        return 4 * MS + rows * MS

    def bound(self, shape: Hashable, rows: int) -> int:
        return self(shape, rows)

    def warm(self, shape: Hashable, rows: int) -> bool:
        return True


latency = Model()
CAPACITY = ROWS / latency("s", ROWS)  # requests a nanosecond at best


def arrivals(load: float, seconds: float, seed: int) -> Iterator[int]:
    """Poisson arrivals at `load` times the capacity."""
    source, now = random.Random(seed), 0.0
    while now < seconds * 1e9:
        now += source.expovariate(load * CAPACITY)
        yield int(now)


def goodput(batcher: Batcher, load: float, noise: float, timeout_us: int, seed: int = 0, seconds: float = 20) -> float:
    """Requests answered within the deadline, as a share of the capacity."""
    source = random.Random(seed + 1)
    waiting, free, good, last = list(arrivals(load, seconds, seed)), 0, 0, 0
    position = 0
    while position < len(waiting) or len(batcher):
        now = max(free, waiting[position]) if not len(batcher) and position < len(waiting) else free
        while position < len(waiting) and waiting[position] <= now:
            batcher.push(1, "s", None, waiting[position], timeout_us=timeout_us)
            position += 1
        take = batcher.take(now)
        if take.batch:
            free = now + int(latency("s", len(take.batch)) * source.uniform(1 - noise, 1 + noise))
            good += sum(free - entry.arrived <= DEADLINE for entry in take.batch)
        else:
            free = now if take.rejected else max(take.wake or now, now + MS // 10)
        last = max(free, last)
    return good / (CAPACITY * last)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_at_one_and_a_half_times_the_capacity(noise: float, seed: int) -> None:
    rules = Rules(max_rows=ROWS, policy=QueuePolicy(allow_override=True), slack=MS)
    aware = goodput(Batcher(rules, latency), 1.5, noise, DEADLINE // 1000, seed)
    first_come = goodput(Batcher(Rules(max_rows=ROWS)), 1.5, noise, 0, seed)
    assert aware >= 0.9 and first_come < 0.1, (aware, first_come)


def test_below_the_capacity_nothing_is_given_up() -> None:
    rules = Rules(max_rows=ROWS, policy=QueuePolicy(allow_override=True), slack=MS)
    assert goodput(Batcher(rules, latency), 0.7, 0.05, DEADLINE // 1000) >= 0.69
