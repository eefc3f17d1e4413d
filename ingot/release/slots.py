"""Which version owns which of the 10,000 slots a user's hash falls into; weights change with the fewest
users moving."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec

from ingot.release.spec import WHOLE


class Run(msgspec.Struct, frozen=True):
    """Slots start..stop-1 belong to a version."""

    version: str
    start: int
    stop: int


Assignment = tuple[Run, ...]


def everything(version: str) -> Assignment:
    """One version for all."""
    return (Run(version, 0, WHOLE),)


def weights(assignment: Assignment) -> dict[str, int]:
    """version => slots; their sum is always 10,000"""
    total: dict[str, int] = {}
    for run in assignment:
        total[run.version] = total.get(run.version, 0) + run.stop - run.start
    return total


def reassigned(assignment: Assignment, wanted: Mapping[str, int]) -> Assignment:
    """The assignment with these weights (they sum to 10,000); who loses gives up its highest slots, and only
    those move."""
    assert sum(wanted.values()) == WHOLE and min(wanted.values()) >= 0
    kept, free = _given_up(assignment, wanted)
    needs = {version: count - weights(kept).get(version, 0) for version, count in wanted.items()}
    return _joined([*kept, *_taken(sorted(free), needs)])


def _given_up(assignment: Assignment, wanted: Mapping[str, int]) -> tuple[Assignment, list[tuple[int, int]]]:
    surplus = {version: count - wanted.get(version, 0) for version, count in weights(assignment).items()}
    kept: list[Run] = []
    free: list[tuple[int, int]] = []
    for run in reversed(assignment):
        give = max(0, min(surplus[run.version], run.stop - run.start))
        surplus[run.version] -= give
        if give:
            free.append((run.stop - give, run.stop))
        if run.stop - give > run.start:
            kept.append(Run(run.version, run.start, run.stop - give))
    return tuple(reversed(kept)), free


def _taken(free: list[tuple[int, int]], needs: Mapping[str, int]) -> list[Run]:
    """Free slots, lowest first, to those who need them."""
    runs, position = [], 0
    hungry = [(version, need) for version, need in needs.items() if need > 0]
    for start, stop in free:
        while start < stop:
            version, need = hungry[position]
            end = min(stop, start + need)
            runs.append(Run(version, start, end))
            hungry[position] = (version, need - (end - start))
            position += end - start == need
            start = end
    return runs


def _joined(runs: list[Run]) -> Assignment:
    joined: list[Run] = []
    for run in sorted(runs, key=lambda run: run.start):
        if joined and joined[-1].version == run.version:
            joined[-1] = Run(run.version, joined[-1].start, run.stop)
        else:
            joined.append(run)
    return tuple(joined)


def slot(salt: str, key: str) -> int:
    """hash(salt, key) % 10000, the same on every machine and in every version of Python"""
    digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8, salt=salted(salt)).digest()
    return int.from_bytes(digest, "big") % WHOLE


def salted(salt: str) -> bytes:
    """Any text as blake2b's 16 bytes of salt."""
    return hashlib.blake2b(salt.encode(), digest_size=16).digest()
