"""Which blocks of keys and values a sequence has: a table, whose blocks come from a pool and go back to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ingot.llm.batch import Integers
from ingot.llm.cache import BlockPool

Copy = tuple[int, int]  # a block, and the one that takes its place


@dataclass(eq=False, slots=True)
class Table:
    """A sequence's blocks in order. The first `gone` of them are not its own any more: they have left the window,
    nothing reads them."""

    blocks: list[int] = field(default_factory=list)
    gone: int = 0
    _numbers: Integers = field(default_factory=lambda: np.zeros(0, np.int32))
    _written: int = 0  # of the blocks, those that the numbers have

    @property
    def held(self) -> list[int]:
        """The blocks that it owns."""
        return self.blocks[self.gone :]

    def numbers(self) -> Integers:
        """The blocks as numbers of an array."""
        count = len(self.blocks)
        if count > len(self._numbers):
            self._numbers, self._written = np.zeros(2 * count, np.int32), 0
        self._numbers[self._written : count] = self.blocks[self._written :]
        self._written = count
        return self._numbers[:count]

    def replace(self, place: int, block: int) -> None:
        """Another block in the place of one."""
        self.blocks[place], self._written = block, min(self._written, place)


class Cache:
    """The pool, and what sequences do with it. window: positions that a token sees at most, its own included; 0: all.

    asked, found: tokens of prompts that were looked for, and those whose keys and values were there.
    """

    def __init__(self, pool: BlockPool, window: int = 0) -> None:
        self.pool, self.window, self.size = pool, window, pool.size
        self.asked = self.found = 0

    def enter(self, keys: Sequence[bytes], length: int, company: bool) -> tuple[Table, int] | None:
        """A table for so many tokens, and how many of them are computed: those of the first blocks that `keys` find.
        None, and nothing was changed, where blocks are lacking; in company some are to spare."""
        found = self.pool.match(keys)
        fresh, spare = -(-length // self.size) - len(found), self.pool.blocks // 64 if company else 0
        if self.pool.free < fresh + self.pool.idle(found) + spare:
            return None
        self.pool.acquire(found)
        table, known = Table(found + [self.pool.allocate() for _ in range(fresh)]), len(found) * self.size
        self.asked += length
        self.found += known
        self.slide(table, known)
        return table, known

    def provide(self, table: Table, computed: int, length: int) -> list[Copy] | None:
        """Blocks of its own for everything from what is computed to `length`, and the copies that this takes; None, and
        nothing was changed, where they are lacking."""
        first, fresh = computed // self.size, -(-length // self.size) - len(table.blocks)
        copied = first < len(table.blocks) and self.pool.shared(table.blocks[first])
        if self.pool.free < max(fresh, 0) + copied:
            return None
        copies = list[Copy]()
        if copied:
            copies.append((table.blocks[first], self.pool.allocate()))
            table.replace(first, copies[0][1])
            self.pool.release([copies[0][0]])
        table.blocks += [self.pool.allocate() for _ in range(fresh)]
        return copies

    def reserve(self, table: Table, computed: int, known: int, drafts: int) -> int:
        """Blocks for so many drafts behind what is known, as far as free ones suffice; how many have a place."""
        first = computed // self.size
        if first < len(table.blocks) and self.pool.shared(table.blocks[first]):
            return 0  # it is copied by the next step, not before
        fresh = -(-(known + drafts) // self.size) - len(table.blocks)
        table.blocks += [self.pool.allocate() for _ in range(min(fresh, self.pool.free))]
        return max(min(drafts, len(table.blocks) * self.size - known), 0)

    def fork(self, table: Table) -> Table:
        """The same blocks for one more owner."""
        self.pool.acquire(table.held)
        return Table(list(table.blocks), table.gone)

    def release(self, table: Table) -> None:
        """Give all of its blocks back."""
        self.pool.release(table.held)

    def publish(self, table: Table, keys: Sequence[bytes], start: int, end: int) -> None:
        """Make the blocks that became full between these tokens findable; `keys` are those of all blocks."""
        for place in range(start // self.size, end // self.size):
            self.pool.publish(table.blocks[place], keys[place])

    def slide(self, table: Table, end: int) -> None:
        """Give back the blocks that no token from `end` on sees; who has published one may find it again."""
        gone = max(end + 1 - self.window, 0) // self.size if self.window else 0
        if gone > table.gone:
            self.pool.release(table.blocks[table.gone : gone])
            table.gone = gone

    @property
    def usage(self) -> float:
        """Share of the blocks that have an owner."""
        return 1 - self.pool.free / self.pool.blocks

    def check_integrity(self, tables: Iterable[Table]) -> None:
        """CacheCorrupt unless every block is owned by exactly the tables that name it."""
        self.pool.check_integrity([table.held for table in tables])
