"""Which blocks of keys and values a sequence has: a table for each kind of layers, whose blocks come from the kind's
pool and go back to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ingot.llm.batch import Copy, Integers, Kind
from ingot.llm.cache import BlockPool, gone_before


@dataclass(eq=False, slots=True)
class Table:
    """A sequence's blocks of a kind, in order. The first `gone` of them are not its own, and their numbers mean
    nothing: they have left the window, nothing reads them."""

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


Tables = Sequence[Table]


class Cache:
    """A pool of blocks of `size` tokens for each kind of layers, and what sequences do with them: for all kinds, or not
    at all. asked, found: tokens of prompts that were looked for, and those whose keys and values were there."""

    def __init__(self, kinds: Sequence[Kind], size: int) -> None:
        self.pools, self.windows = [BlockPool(kind.blocks, size) for kind in kinds], [kind.window for kind in kinds]
        self._sliding = [(number, kind.window) for number, kind in enumerate(kinds) if kind.window]
        self.size = size
        self.asked = self.found = 0

    def enter(self, keys: Sequence[bytes], length: int, chunk: int, company: bool) -> tuple[list[Table], int] | None:
        """Tables for so many tokens, and how many of them are computed: those of the first blocks that `keys` find.
        Kinds with a window get the blocks of the next `chunk` tokens, the others all. None, and nothing was changed,
        where those are lacking, or what a window and a chunk take later; in company some blocks are to spare."""
        count, entries = self.known(keys), list[tuple[int, list[int], int]]()
        known = count * self.size
        for pool, window in zip(self.pools, self.windows, strict=True):
            gone = gone_before(known, window, self.size)
            found, end = pool.match(keys[gone:count]), min(length, known + chunk) if window else length
            later = min(max(end, gone * self.size + window + chunk), length)
            spare = pool.blocks // 64 if company else 0
            if pool.free < -(-later // self.size) - count + pool.idle(found) + spare:
                return None
            entries.append((gone, found, -(-end // self.size) - count))
        self.asked += length
        self.found += known
        return [_entered(pool, *entry) for pool, entry in zip(self.pools, entries, strict=True)], known

    def known(self, keys: Sequence[bytes]) -> int:
        """How many blocks of a prefix need not be computed: every kind has those that the tokens behind them see."""
        count, kind, agreed = len(keys), 0, 0
        while agreed < len(self.pools):  # in turn, until each has as much as the others
            found = self.pools[kind].reach(keys[:count], self.windows[kind])
            agreed = agreed + 1 if found == count else 1
            count, kind = found, (kind + 1) % len(self.pools)
        return count

    def provide(self, tables: Tables, computed: int, length: int) -> list[Copy] | None:
        """Blocks of its own for everything from what is computed to `length`, and the copies that this takes; None, and
        nothing was changed, where they are lacking."""
        first, blocks, lacking = computed // self.size, -(-length // self.size), list[tuple[int, bool, int]]()
        for kind, pool in enumerate(self.pools):
            held = tables[kind].blocks
            count = len(held)
            fresh, copied = blocks - count, first < count and pool.shared(held[first])
            if fresh > 0 or copied:
                if pool.free < max(fresh, 0) + copied:
                    return None
                lacking.append((kind, copied, fresh))
        copies = [self._copied(kind, tables[kind], first) for kind, copied, _ in lacking if copied] if lacking else []
        for kind, _, fresh in lacking:
            tables[kind].blocks += [self.pools[kind].allocate() for _ in range(fresh)]
        return copies

    def _copied(self, kind: int, table: Table, place: int) -> Copy:
        """A block of its own in the place of one that is another's too."""
        old, own = table.blocks[place], self.pools[kind].allocate()
        table.replace(place, own)
        self.pools[kind].release([old])
        return kind, old, own

    def reserve(self, tables: Tables, computed: int, known: int, drafts: int) -> int:
        """Blocks for so many drafts behind what is known, as far as free ones suffice; how many have a place."""
        first, both = computed // self.size, list(zip(self.pools, tables, strict=True))
        if any(first < len(table.blocks) and pool.shared(table.blocks[first]) for pool, table in both):
            return 0  # it is copied by the next step, not before
        most = min(-(-(known + drafts) // self.size), *(len(table.blocks) + pool.free for pool, table in both))
        for pool, table in both:
            table.blocks += [pool.allocate() for _ in range(most - len(table.blocks))]
        return max(min(drafts, len(tables[0].blocks) * self.size - known), 0)

    def fork(self, tables: Tables) -> list[Table]:
        """The same blocks for one more owner."""
        for pool, table in zip(self.pools, tables, strict=True):
            pool.acquire(table.held)
        return [Table(list(table.blocks), table.gone) for table in tables]

    def release(self, tables: Tables) -> None:
        """Give all of its blocks back."""
        for pool, table in zip(self.pools, tables, strict=True):
            pool.release(table.held)

    def publish(self, tables: Tables, keys: Sequence[bytes], start: int, end: int) -> None:
        """Make the blocks that became full between these tokens findable; `keys` are those of all blocks."""
        for pool, table in zip(self.pools, tables, strict=True):
            for place in range(start // self.size, end // self.size):
                pool.publish(table.blocks[place], keys[place])

    def slide(self, tables: Tables, end: int) -> None:
        """Give back the blocks that no token from `end` on sees; who has published one may find it again."""
        for kind, window in self._sliding:
            table, gone = tables[kind], gone_before(end, window, self.size)
            if gone > table.gone:
                self.pools[kind].release(table.blocks[table.gone : gone])
                table.gone = gone

    @property
    def usage(self) -> float:
        """Share of the blocks that have an owner, of the kind where it is largest: at 1 somebody waits or gives way."""
        return max(1 - pool.free / pool.blocks for pool in self.pools)

    def check_integrity(self, sequences: Sequence[Tables]) -> None:
        """CacheCorrupt unless every block is owned by exactly the sequences whose tables name it."""
        for kind, pool in enumerate(self.pools):
            pool.check_integrity(tables[kind].held for tables in sequences)


def _entered(pool: BlockPool, gone: int, found: Sequence[int], fresh: int) -> Table:
    pool.acquire(found)
    return Table([0] * gone + [*found] + [pool.allocate() for _ in range(fresh)], gone)


def tables_of(held: Sequence[Tables], kinds: int) -> Integers:
    """The tables [kinds, S, any] of sequences, those of the first kinds alone."""
    width = max([len(tables[0].blocks) for tables in held])  # the others are no longer
    found = np.zeros((kinds, len(held), width), np.int32)
    for kind, rows in enumerate(found):
        for row, tables in zip(rows, held, strict=True):
            table = tables[kind]
            blocks, gone = table.numbers(), table.gone
            row[: len(blocks)] = blocks
            if gone:
                row[:gone] = blocks[min(gone, len(blocks) - 1)]  # who reads more than it sees reads its own
    return found
