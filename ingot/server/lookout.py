"""Whether to look for input a little longer instead of going to sleep: waking a core takes longer than many models.
And the contrary: whether to rest before looking again, where requests come so densely that each look finds only one.

Pure but for `Lookout`, which does the looking on an event loop.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from time import monotonic_ns

_TRUST, _TRIED_AGAIN = 16, 64  # looks in vain until none are made; answers after which one is
_COMPANY = 6  # requests beyond which one more costs nearly the same in a larger batch
_SHORTEST_REST, _LONGEST_REST, _LONGEST_SINCE = 50_000, 600_000, 5_000_000
_RESTED_AGAIN = 1024  # batches after which a rest is tried once more
_NEW = 0.05  # weight of the latest look


@dataclass
class Habit:
    """Looking is worth while as long as it usually finds something."""

    trust: int = _TRUST
    passed: int = 0
    again: int = _TRIED_AGAIN

    def wanted(self) -> bool:
        """After an answer: whether to look for the next request."""
        self.passed = 0 if self.trust else (self.passed + 1) % self.again
        return bool(self.trust) or not self.passed

    def looked(self, found: bool) -> None:
        """What came of it."""
        if not found:
            self.trust = max(self.trust - 1, 0)
        elif self.trust < _TRUST:
            self.trust = min(self.trust + 2, _TRUST)


@dataclass
class Pace:
    """How long to rest until a few requests are there, of which each then costs half as much as alone.

    Only where they come densely enough, and only as long as those that are waited for come: callers that wait for
    their answers themselves will not. All times are nanoseconds.
    """

    habit: Habit = field(default_factory=lambda: Habit(again=_RESTED_AGAIN))
    looked: int = 0  # when this was last asked
    since: float = _LONGEST_SINCE  # smoothed: from one time to the next, and how many requests came meanwhile
    came: float = 1.0
    kept: int = 0  # how many waited before the rest, and how many should be there after it; 0: there was none
    hoped: int = 0

    def rest(self, waiting: int, now: int) -> int:
        """So many requests wait: how long to rest before they run; 0: not at all. After a rest there is no other."""
        self.since += _NEW * (min(now - self.looked, _LONGEST_SINCE) - self.since)
        self.came += _NEW * (waiting - self.kept - self.came)
        self.looked = now
        if self.hoped:
            self.habit.looked(waiting >= self.hoped)
            self.kept = self.hoped = 0
            return 0
        wanted = _COMPANY - waiting
        rest = int(wanted * self.since / max(self.came, 0.01))
        if not _SHORTEST_REST < rest <= _LONGEST_REST or not self.habit.wanted():
            return 0
        self.kept, self.hoped = waiting, waiting + (wanted + 1) // 2
        return rest


class Lookout:
    """Keeps an event loop from sleeping for a moment after an answer; `microseconds` 0, or a single core: never."""

    def __init__(self, microseconds: int = 0) -> None:
        self._window = microseconds * 1000 if len(os.sched_getaffinity(0)) > 1 else 0
        self._habit = Habit()
        self._until, self._looking = 0, False

    def heard(self) -> None:
        """Input came."""
        if self._until:
            self._until = 0
            self._habit.looked(True)

    def answered(self) -> None:
        """Something was sent: there may soon be more to do. On the event loop's thread only."""
        if not self._window or self._until or not self._habit.wanted():
            return
        self._until = monotonic_ns() + self._window
        if not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        if monotonic_ns() < self._until:
            asyncio.get_running_loop().call_soon(self._look)
            return
        self._looking = False
        if self._until:
            self._until = 0
            self._habit.looked(False)
