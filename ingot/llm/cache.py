"""Blocks of keys and values: who holds which, which prefixes are known, which may be taken again."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence

import numpy as np

from ingot.errors import IngotError


class CacheCorrupt(IngotError):
    """A block has the wrong number of owners: a fault of ours, never of a request."""


def block_keys(tokens: Sequence[int], size: int, salt: bytes = b"", known: Sequence[bytes] = ()) -> list[bytes]:
    """SHA-256 of every full block of `tokens` and all before it; `known` are the first ones, computed earlier."""
    keys = list(known)
    for start in range(len(keys) * size, len(tokens) - size + 1, size):
        digest = hashlib.sha256(keys[-1] if keys else b"ingot" + salt)
        digest.update(np.asarray(tokens[start : start + size], "<i4").tobytes())
        keys.append(digest.digest())
    return keys


def gone_before(end: int, window: int, size: int) -> int:
    """The first blocks of which no token from `end` on sees any, where a token sees `window` positions; 0: all."""
    return max(end + 1 - window, 0) // size if window else 0


class BlockPool:
    """`blocks` blocks of `size` tokens. A published one outlives its owners until its place is wanted, oldest first."""

    def __init__(self, blocks: int, size: int) -> None:
        self.blocks, self.size = blocks, size
        self.taken = [0] * blocks  # how often each was given away for something new
        self._owners = [0] * blocks
        self._key: list[bytes | None] = [None] * blocks
        self._by_key: dict[bytes, int] = {}
        self._empty = deque(range(blocks))
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Blocks without an owner."""
        return len(self._empty) + len(self._kept)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The published blocks of the longest known prefix; nobody owns them the more for it."""
        found: list[int] = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def reach(self, keys: Sequence[bytes], window: int) -> int:
        """The longest beginning of a prefix, in blocks, of which all is there that a token behind it sees."""
        if not window:
            return len(self.match(keys))
        longest = start = 0  # of what is there without a gap
        for count, key in enumerate(keys, 1):
            if key not in self._by_key:
                start = count
            if start <= gone_before(count * self.size, window, self.size):
                longest = count
        return longest

    def idle(self, blocks: Iterable[int]) -> int:
        """How many of these have no owner: acquiring them takes so many from `free`."""
        return sum(self._owners[block] == 0 for block in blocks)

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more owner for each."""
        for block in blocks:
            if self._owners[block] == 0:
                del self._kept[block]
            self._owners[block] += 1

    def allocate(self) -> int:
        """A block for one owner whose content means nothing; there must be a free one."""
        if self._empty:
            block = self._empty.popleft()
        else:
            block, _ = self._kept.popitem(last=False)
            self._forget(block)
        self._owners[block] = 1
        self.taken[block] += 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """One owner fewer for each; of a chain the last blocks are taken again first."""
        for block in reversed(blocks):
            if self._owners[block] < 1:
                raise CacheCorrupt(f"block {block} is given back by nobody's owner")
            self._owners[block] -= 1
            if self._owners[block] == 0:
                if self._key[block] is None:
                    self._empty.append(block)
                else:
                    self._kept[block] = None

    def shared(self, block: int) -> bool:
        """Whether writing to it would be seen by another owner."""
        return self._owners[block] > 1

    def publish(self, block: int, key: bytes) -> None:
        """From now on the block is found by its key; the first block of a key stays."""
        if key not in self._by_key and self._key[block] is None:
            self._by_key[key], self._key[block] = block, key

    def forget(self) -> None:
        """Publish nothing any more, for instance because the weights changed."""
        self._by_key.clear()
        self._key = [None] * self.blocks
        self._empty.extend(self._kept)
        self._kept.clear()

    def _forget(self, block: int) -> None:
        key, self._key[block] = self._key[block], None
        if key is not None:
            del self._by_key[key]

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """CacheCorrupt unless every block has exactly the owners that these tables name, and the rest are free."""
        named = Counter(block for table in tables for block in table)
        wrong = [block for block in range(self.blocks) if self._owners[block] != named[block]]
        if wrong:
            block = wrong[0]
            raise CacheCorrupt(
                f"block {block} has {self._owners[block]} owners, {named[block]} tables name it; {len(wrong)} are wrong"
            )
        idle = sorted([*self._empty, *self._kept])
        if idle != [block for block in range(self.blocks) if not self._owners[block]]:
            raise CacheCorrupt("the free blocks are not those without an owner")
        if any(self._key[block] != key for key, block in self._by_key.items()):
            raise CacheCorrupt("a prefix is found in a block that does not hold it")
        if any(self._key[block] is None for block in self._kept) or any(self._key[block] for block in self._empty):
            raise CacheCorrupt("a block without a prefix is kept, or one with a prefix counts as empty")
