"""What ranks tell each other between the memories of their GPUs, through NCCL: launches on a stream, in graphs too.
Short sums take a way of their own (peers)."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ingot.errors import DeviceError
from ingot.runtime import cuda, peers
from ingot.runtime.buffers import Array
from ingot.runtime.group import Group, GroupLost

log = logging.getLogger("ingot.runtime")
_TYPES: Mapping[str, int] = {  # ncclDataType_t
    "int8": 0, "uint8": 1, "int32": 2, "uint32": 3, "int64": 4, "uint64": 5, "float16": 6, "float32": 7, "float64": 8,
    "bfloat16": 9,
}  # fmt: skip
_SUM = 0  # ncclRedOp_t
_KEY = 128  # bytes by which ranks find each other
_LOOK = 0.5  # seconds between looks at whether this rank has left


def _library() -> Any:
    """The bindings; tests put their own in its place."""
    from nccl.bindings import nccl

    return nccl


def _opened() -> Any | None:
    """The bindings, where they and the library are here."""
    try:
        nccl = _library()
        nccl.get_version()
    except (ImportError, RuntimeError, OSError) as error:  # the latter: bindings without the library itself
        log.warning("ranks add up through the host's memory, NCCL is not here (%s): pip install 'ingot[cuda-ranks]'",
                    " ".join(str(error).split()))  # fmt: skip
        return None
    return nccl


def connect(context: cuda.Context, group: Group) -> Communicator | None:
    """Between the GPUs of all ranks. None, everywhere, where some rank has no NCCL or two have the same GPU."""
    nccl = _opened()
    mine = np.zeros(1 + hashlib.sha256().digest_size + _KEY, np.uint8)
    mine[0] = nccl is not None
    mine[1:-_KEY] = np.frombuffer(hashlib.sha256(context.device.uuid.encode()).digest(), np.uint8)
    if nccl is not None and group.rank == 0:
        mine[-_KEY:] = np.frombuffer(bytes(nccl.get_unique_id()), np.uint8)
    known = group.all_gather(mine)
    devices = {row[1:-_KEY].tobytes() for row in known}
    if not known[:, 0].all() or len(devices) < group.ranks:
        return None
    return Communicator(context, group, nccl, known[0, -_KEY:])


class Communicator:
    """This rank among GPUs. Where another rank ends, what waits for it on the GPU is ended too, and `check` says so."""

    def __init__(self, context: cuda.Context, group: Group, nccl: Any, key: Array) -> None:
        self._context, self._nccl, self._ranks = context, nccl, group.ranks
        context.activate()
        try:
            self._handle = nccl.comm_init_rank_scalable(group.ranks, group.rank, 1, bytearray(key.tobytes()), 0)
        except nccl.NCCLError as error:
            raise DeviceError(f"rank {group.rank} cannot reach the others' GPUs through NCCL ({error}); "
                              "NCCL_DEBUG=INFO says more") from None  # fmt: skip
        self._peers = peers.connect(context, group)
        self.lost, self._left, self._turn = "", threading.Event(), threading.Lock()
        self._watcher = threading.Thread(target=self._watch, args=(group.ended,), name="ingot-ranks", daemon=True)
        self._watcher.start()

    def put(self, operation: str, addresses: tuple[int, int], count: int, dtype: str, stream: Any) -> None:
        """The collective of `count` elements on the stream: from the first address to the second."""
        (source, target), kind = addresses, _TYPES[dtype]
        if self._peers is not None and self._peers.takes(operation, count, dtype):
            self.check()
            self._peers.put(source, target, count, stream)
            return
        rest = (self._handle, int(stream))
        if operation == "all_reduce":
            self._call(self._nccl.all_reduce, source, target, count, kind, _SUM, *rest)
        else:
            self._call(self._nccl.all_gather, source, target, count, kind, *rest)

    def check(self) -> None:
        """GroupLost where another rank has ended."""
        if self.lost:
            raise GroupLost(self.lost)

    def close(self) -> None:
        """Leave, when nothing of it is in a graph any more; idempotent."""
        self._left.set()
        if self._peers is not None:
            self._peers.close()
        self._end(self._nccl.comm_destroy)

    def _call(self, function: Callable[..., None], *arguments: int) -> None:
        self.check()
        try:
            function(*arguments)
        except self._nccl.NCCLError as error:
            raise DeviceError(f"NCCL failed among {self._ranks} ranks ({error}); NCCL_DEBUG=INFO says more") from None

    def _watch(self, ended: Callable[[float], str]) -> None:
        """Until a rank ends: kernels that wait for it would do so for ever."""
        while not self._left.is_set() and not self.lost:
            self.lost = ended(_LOOK)
        if not self._left.is_set():
            self._context.activate()
            if self._peers is not None:
                self._peers.stop()
            self._end(self._nccl.comm_abort)

    def _end(self, how: Callable[[int], None]) -> None:
        with self._turn:
            handle, self._handle = self._handle, 0
        if handle:
            try:
                how(handle)
            except self._nccl.NCCLError as error:
                log.warning("leaving NCCL failed: %s", error)
