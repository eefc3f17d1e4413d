"""Ranks that compute one model together: sums and parts of all, through shared memory and a socket for each pair.

A rank writes its part into its own half of a slot, tells the others how many bytes it wrote, and reads theirs once they
told it. Halves alternate: who has told of one exchange has read the one before. A socket that ends is a rank that has
ended; nobody waits longer than `patience` seconds.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import numpy as np

from ingot.errors import IngotError
from ingot.runtime.buffers import Array

_SLOT = 1 << 20  # bytes that a rank tells the others at a time
_HALVES = 2
_NOTE = struct.Struct("<QQ")  # the exchange's number, its bytes
_LENGTH = struct.Struct("<Q")
PATIENCE = 60.0


class GroupLost(IngotError):
    """A rank has ended, or does not answer: nothing can be computed together any more."""


class Group(Protocol):
    """This process (or thread) among `ranks` that do the same at the same time."""

    @property
    def rank(self) -> int: ...
    @property
    def ranks(self) -> int: ...

    def all_reduce(self, x: Array) -> Array:
        """The sum of everybody's x, in the order of ranks: the same bits everywhere. GroupLost."""
        ...

    def all_gather(self, x: Array) -> Array:
        """Everybody's x, [ranks, *x.shape]. GroupLost."""
        ...

    def ended(self, patience: float) -> str:
        """Why nothing can be told any more, within so many seconds; "" while all are there."""
        ...

    def close(self) -> None:
        """Leave; the others learn of it. Idempotent."""
        ...


_MEMBER: ContextVar[Group | None] = ContextVar("ingot.group", default=None)


def current() -> Group | None:
    """Whose sums the numpy meanings of AllReduce and AllGather are."""
    return _MEMBER.get()


@contextmanager
def member(group: Group) -> Iterator[None]:
    """Within, `current()` is this group."""
    token = _MEMBER.set(group)
    try:
        yield
    finally:
        _MEMBER.reset(token)


class SharedGroup:
    """A rank of a group on one host. `memory` is a file of `memory_bytes(ranks)` that all have mapped, `sockets` leads
    to each other rank; both are closed with the group."""

    def __init__(self, rank: int, ranks: int, memory: int, sockets: Mapping[int, socket.socket],
                 patience: float = PATIENCE) -> None:  # fmt: skip
        self.rank, self.ranks, self.patience = rank, ranks, patience
        self.memory, self.sockets, self.lost = memory, dict(sockets), ""
        mapped = mmap.mmap(memory, memory_bytes(ranks))
        self._slots = np.frombuffer(mapped, np.uint8).reshape(_HALVES, ranks, _SLOT)
        self._count = 0
        for each in self.sockets.values():
            each.settimeout(patience)

    def all_reduce(self, x: Array) -> Array:
        """The sum of everybody's x, in the order of ranks; narrow floats are added up in float32."""
        wide = x.dtype if x.dtype.kind in "iu" or x.dtype.itemsize >= 4 else np.dtype(np.float32)
        total, place = np.empty(x.size, x.dtype), 0
        for parts in self._exchanged(x):
            first, *others = (part.view(x.dtype).astype(wide, copy=False) for part in parts)
            stop = place + first.size
            total[place:stop] = sum(others, first)
            place = stop
        return total.reshape(x.shape)

    def all_gather(self, x: Array) -> Array:
        """Everybody's x, [ranks, *x.shape]."""
        found, place = np.empty((self.ranks, x.nbytes), np.uint8), 0
        for parts in self._exchanged(x):
            stop = place + parts[0].size
            for rank, part in enumerate(parts):
                found[rank, place:stop] = part
            place = stop
        return found.view(x.dtype).reshape(self.ranks, *x.shape)

    def tell(self, data: bytes) -> None:
        """Bytes for all other ranks, which `hear` them."""
        for rank in self._others():
            self._send(rank, _LENGTH.pack(len(data)) + data)

    def hear(self) -> bytes:
        """What rank 0 tells next, however long that takes."""
        self._others()
        self.sockets[0].settimeout(None)
        length = _LENGTH.unpack(self._receive(0, _LENGTH.size))[0]
        self.sockets[0].settimeout(self.patience)
        return self._receive(0, length)

    def ended(self, patience: float) -> str:
        """Why nothing can be told any more, as soon as that is so, within so many seconds; "" while all are there."""
        ranks = {each.fileno(): rank for rank, each in list(self.sockets.items()) if each.fileno() >= 0}
        watched = select.poll()
        for number in ranks:
            watched.register(number, select.POLLRDHUP)
        found = [] if self.lost else watched.poll(patience * 1e3)
        gone = [ranks[number] for number, _ in found if number in ranks]
        return self.lost or (f"rank {gone[0]} of {self.ranks} has ended" if gone else "")

    def end(self) -> None:
        """Leave, from another thread than the one that hears: it learns of it too."""
        for each in list(self.sockets.values()):
            each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Leave; the others learn of it."""
        self.lost = self.lost or "this rank has left its group"
        for each in self.sockets.values():
            each.close()
        self.sockets.clear()
        if self.memory >= 0:
            os.close(self.memory)
        self.memory = -1

    # -- exchanges ----------------------------------------------------------------------------------------------------
    def _exchanged(self, x: Array) -> Iterator[list[Array]]:
        """A piece of x after the other, everybody's. Views, which hold until the next piece but one."""
        data = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        for start in range(0, data.size, _SLOT):
            yield self._exchange(data[start : start + _SLOT])

    def _exchange(self, data: Array) -> list[Array]:
        half = self._slots[self._count % _HALVES]
        half[self.rank, : data.size] = data
        note = _NOTE.pack(self._count, data.size)
        for rank in self._others():
            self._send(rank, note)
        for rank in self._others():
            if (theirs := self._receive(rank, len(note))) != note:
                raise self._fault(f"rank {rank} is at exchange {_NOTE.unpack(theirs)}, rank {self.rank} at "
                                  f"{_NOTE.unpack(note)}: they do not compute the same")  # fmt: skip
        self._count += 1
        return [half[rank, : data.size] for rank in range(self.ranks)]

    def _others(self) -> Sequence[int]:
        if self.lost:
            raise GroupLost(self.lost)
        return [rank for rank in range(self.ranks) if rank != self.rank]

    def _send(self, rank: int, data: bytes) -> None:
        if self.lost:
            raise GroupLost(self.lost)
        try:
            self.sockets[rank].sendall(data)
        except OSError as error:
            raise self._fault(_why(rank, error, self.patience)) from None

    def _receive(self, rank: int, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                some = self.sockets[rank].recv(count - len(data))
            except OSError as error:
                raise self._fault(_why(rank, error, self.patience)) from None
            if not some:
                raise self._fault(f"rank {rank} of {self.ranks} has ended")
            data += some
        return bytes(data)

    def _fault(self, reason: str) -> GroupLost:
        """Everybody who waits for this rank learns of it too."""
        self.lost = reason
        self.close()
        return GroupLost(reason)


def _why(rank: int, error: OSError, patience: float) -> str:
    if isinstance(error, TimeoutError):
        return f"rank {rank} has not answered for {patience:g} s"
    return f"rank {rank} has ended ({error.strerror or error})"


def memory_bytes(ranks: int) -> int:
    """Size of the file that the ranks share."""
    return _HALVES * ranks * _SLOT


def shared_groups(ranks: int, patience: float = PATIENCE) -> list[SharedGroup]:
    """All ranks of a new group, for threads or to be handed to other processes (`memory`, `sockets`)."""
    memory = os.memfd_create("ingot-group")
    os.ftruncate(memory, memory_bytes(ranks))
    ends: list[dict[int, socket.socket]] = [{} for _ in range(ranks)]
    for first in range(ranks):
        for second in range(first + 1, ranks):
            ends[first][second], ends[second][first] = socket.socketpair()
    found = [SharedGroup(rank, ranks, os.dup(memory), ends[rank], patience) for rank in range(ranks)]
    os.close(memory)
    return found
