"""Resting until a few requests are there: where they come densely, and not where callers wait for their answers; and
looking instead of sleeping.
"""

import random
from collections import deque

from ingot.server.lookout import Habit, Pace

MICROSECOND = 1000
LOOK, EACH = 30 * MICROSECOND, 45 * MICROSECOND  # what a batch costs, and every request of it


def open_loop(gap: float, batches: int, seed: int = 0) -> tuple[list[int], int]:
    """(sizes of the batches, rests among them) of requests that come at Poisson times, so many nanoseconds apart."""
    source, pace, now, arrival, sizes, rests = random.Random(seed), Pace(), 0.0, 0.0, [], 0
    due = deque[float]()
    while len(sizes) < batches:
        while arrival <= now or not due:
            arrival += source.expovariate(1 / gap)
            due.append(arrival)
        now = max(now, due[0])
        waiting = sum(time <= now for time in due)
        rest = pace.rest(waiting, int(now))
        rests += rest > 0
        if rest:
            now += rest
            continue
        for _ in range(waiting):
            due.popleft()
        sizes.append(waiting)
        now += LOOK + waiting * EACH
    return sizes, rests


def closed_loop(clients: int, batches: int) -> int:
    """Rests of a server whose clients each wait for their answer, and ask again 20 microseconds later."""
    pace, now, rests, due = Pace(), 0, 0, [0] * clients
    for _ in range(batches):
        now = max(now, min(due))
        rest = pace.rest(sum(time <= now for time in due), now)
        if rest:
            rests += 1
            now += rest
            pace.rest(sum(time <= now for time in due), now)
        waiting = [number for number, time in enumerate(due) if time <= now]
        now += LOOK + len(waiting) * EACH
        for number in waiting:
            due[number] = now + 20 * MICROSECOND
    return rests


def test_dense_requests_are_gathered() -> None:
    sizes, rests = open_loop(100 * MICROSECOND, 3000)
    assert sum(sizes) / len(sizes) > 4.5
    assert rests > 1000


def test_what_comes_rarely_is_not_kept_waiting() -> None:
    sizes, rests = open_loop(1000 * MICROSECOND, 3000)
    assert rests == 0 and sum(sizes) / len(sizes) < 1.3


def test_where_enough_wait_there_is_no_rest() -> None:
    sizes, rests = open_loop(46 * MICROSECOND, 3000)
    assert sum(sizes) / len(sizes) > 6 and rests < 300


def test_callers_that_wait_for_their_answers_do_not_come_sooner() -> None:
    for clients in (1, 2, 3, 4, 16):
        assert closed_loop(clients, 20_000) < 100, clients


def test_after_an_idle_time_nothing_rests() -> None:
    pace = Pace()
    for number in range(100):
        pace.rest(6, number * 600_000)
    assert pace.rest(1, 60_100_000) > 0
    pace.rest(6, 60_600_000)
    for number in range(1, 20):
        pace.rest(1, number * 10**9)
    assert pace.rest(1, 20 * 10**9) == 0


def test_looking_is_a_habit_while_it_finds_something() -> None:
    habit = Habit()
    for _ in range(100):
        assert habit.wanted()
        habit.looked(True)
    looks = 0
    for _ in range(640):
        if habit.wanted():
            looks += 1
            habit.looked(False)
    assert 16 <= looks <= 16 + 640 // 64
    while not habit.wanted():
        pass
    habit.looked(True)
    assert habit.wanted()
