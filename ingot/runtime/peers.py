"""Sums of short rows between GPUs of a host, by what each writes into the others' memory: one launch, which waits for
nobody else's launch, and lets the one behind it begin and ask for its weights meanwhile.

Every two bfloat16 travel as eight bytes, with the number of the sum in the other four: who reads looks until that is
there (as NCCL's protocol LL does). Two halves of an inbox take turns: a rank writes one again when it has seen the sum
in between, for which the others must have read it. Ranks are added in their order, so that all have the same numbers.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import numpy as np

from ingot.errors import DeviceError
from ingot.runtime import cuda
from ingot.runtime.buffers import Array
from ingot.runtime.cubins import Code
from ingot.runtime.group import Group

log = logging.getLogger("ingot.runtime")
_NAME, _THREADS, _EACH = "sum_of_ranks", 128, 8  # bfloat16 of a thread
MOST = 1 << 15  # elements; longer rows are NCCL's: from where on it is as fast was not measured
_FROM = 90  # of the capability that launches begin early from
_HANDLE, _LAZY = 64, 1  # bytes of CUipcMemHandle; CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_LOOKS = 4095  # between two looks at whether to stop


def ptx(ranks: int, rank: int) -> str:
    """The kernel of a rank (PTX ISA 7.8). Arguments: the row, the sum, the own inbox [2, ranks, MOST / 2] of eight
    bytes, addresses of all inboxes, a counter for each block, where the host says stop, eighths of the row."""
    names = ("source", "target", "inbox", "boxes", "counts", "stop")
    return "\n".join([
        ".version 7.8", ".target sm_90", ".address_size 64",
        f".visible .entry {_NAME}({', '.join(f'.param .u64 {_NAME}_param_{k}' for k in range(6))}, "
        f".param .u32 {_NAME}_param_6)", f".reqntid {_THREADS}", "{",
        f".reg .b64 {', '.join(names)}, there, far, mine, e<4>, f<4>;",
        ".reg .b32 eighths, thread, block, first, number, flag, half, at, looks, v<4>, w<4>, t<4>;",
        ".reg .f32 x, y, a<4>, b<4>; .reg .pred p, q;", "griddepcontrol.launch_dependents;",
        *[f"ld.param.u64 {name}, [{_NAME}_param_{k}];" for k, name in enumerate(names)],
        f"ld.param.u32 eighths, [{_NAME}_param_6]; mov.u32 thread, %tid.x; mov.u32 block, %ctaid.x;",
        f"mad.lo.u32 first, block, {_THREADS}, thread; setp.ge.u32 q, first, eighths;",
        "mul.wide.u32 far, block, 4; add.u64 counts, counts, far; griddepcontrol.wait;",
        "ld.volatile.global.u32 number, [counts]; add.u32 flag, number, 1; and.b32 half, number, 1;",
        "@q bra DONE; mul.wide.u32 mine, first, 16; shl.b32 first, first, 2;",
        "add.u64 there, source, mine; ld.global.v4.b32 {v0, v1, v2, v3}, [there];",
        *[f"mov.b64 e{k}, {{v{k}, flag}};" for k in range(4)], *_exchange(ranks, rank),
        *[f"cvt.rn.bf16x2.f32 v{k}, b{k}, a{k};" for k in range(4)],
        "add.u64 there, target, mine; st.global.v4.b32 [there], {v0, v1, v2, v3};",
        "DONE: bar.sync 0; setp.eq.u32 p, thread, 0; @p st.volatile.global.u32 [counts], flag; ret;", "}", "",
    ])  # fmt: skip


def _exchange(ranks: int, rank: int) -> list[str]:
    """Sends v0 to v3 and adds up what all have, two numbers of each word, to a0 to a3 and b0 to b3."""
    place = f"mad.lo.u32 at, half, {ranks}, {{}}; mad.lo.u32 at, at, {MOST // 2}, first; mul.wide.u32 far, at, 8;"
    send, receive = list[str](), list[str]()
    for other in range(ranks):
        if other == rank:
            receive += [f"mov.b32 w{k}, v{k};" for k in range(4)]
        else:
            send += [place.format(rank), f"ld.global.u64 there, [boxes + {8 * other}]; add.u64 there, there, far;"]
            send += ["st.relaxed.sys.global.v2.b64 [there], {e0, e1};",
                     "st.relaxed.sys.global.v2.b64 [there + 16], {e2, e3};"]  # fmt: skip
            receive += [
                place.format(other), "add.u64 there, inbox, far; mov.u32 looks, 0;", f"AGAIN{other}:",
                "ld.relaxed.sys.global.v2.b64 {f0, f1}, [there]; ld.relaxed.sys.global.v2.b64 {f2, f3}, [there + 16];",
                *[f"mov.b64 {{w{k}, t{k}}}, f{k};" for k in range(4)],
                "setp.eq.u32 p, t0, flag; setp.eq.and.u32 p, t1, flag, p; setp.eq.and.u32 p, t2, flag, p;",
                f"setp.eq.and.u32 p, t3, flag, p; @p bra THERE{other};",
                f"add.u32 looks, looks, 1; and.b32 t0, looks, {_LOOKS}; setp.ne.u32 p, t0, 0; @p bra AGAIN{other};",
                f"ld.relaxed.sys.global.u32 t0, [stop]; setp.eq.u32 p, t0, 0; @p bra AGAIN{other};", f"THERE{other}:",
            ]  # fmt: skip
        for k in range(4):
            receive += [f"shl.b32 t0, w{k}, 16; mov.b32 x, t0; and.b32 t0, w{k}, 0xffff0000; mov.b32 y, t0;"]
            add = f"add.f32 a{k}, a{k}, x; add.f32 b{k}, b{k}, y;"
            receive.append(add if other else f"mov.f32 a{k}, x; mov.f32 b{k}, y;")
    return [*send, *receive]


class Peers:
    """This rank's inbox, and where the others' are. handle: by which others open it."""

    def __init__(self, context: cuda.Context, group: Group) -> None:
        self._context, self._opened = context, list[int]()
        sizes = 2 * group.ranks * (MOST // 2) * 8, 8 * group.ranks, 4 * MOST // (_THREADS * _EACH)
        self._memory = [context.allocate(size, "sums of ranks") for size in sizes]
        held = context.call("cuIpcGetMemHandle", self._memory[0].address)
        self.handle = np.frombuffer(ctypes.string_at(int(held.getPtr()), _HANDLE), np.uint8)
        stream = context.stream()
        for memory in self._memory:
            context.clear(memory, stream)
        context.wait(stream, "clearing inboxes")
        text = ptx(group.ranks, group.rank).encode() + b"\0"
        self._kernels = cuda.Kernels(context, {_NAME: Code(text, _NAME, _THREADS, 0, True)})
        self._kernels.function(_NAME)
        self._stop = context.pinned(64)
        self._stop[:] = 0
        self._stream = stream

    def open(self, handles: Array, rank: int) -> None:
        """The others' inboxes, by their handles."""
        places = np.zeros(len(handles), np.uint64)
        for other, data in enumerate(handles):
            if other != rank:
                handle = self._context.driver.structure("CUipcMemHandle")
                ctypes.memmove(int(handle.getPtr()), data.tobytes(), _HANDLE)
                self._opened.append(int(self._context.call("cuIpcOpenMemHandle", handle, _LAZY)))
                places[other] = self._opened[-1]
        self._context.upload(self._memory[1].address, places, self._stream)
        self._context.wait(self._stream, "inboxes of ranks")

    def takes(self, operation: str, count: int, dtype: str) -> bool:
        """Whether such a collective is one of these."""
        return operation == "all_reduce" and dtype == "bfloat16" and count <= MOST and count % _EACH == 0

    def put(self, source: int, target: int, count: int, stream: Any) -> None:
        """The sum of `count` elements on the stream."""
        inbox, boxes, counts = (memory.address for memory in self._memory)
        values = (source, target, inbox, boxes, counts, self._stop.ctypes.data, count // _EACH)
        blocks = -(-count // (_THREADS * _EACH))
        self._kernels.launch(_NAME, (blocks, 1, 1), (values, (ctypes.c_void_p,) * 6 + (ctypes.c_int,)), stream)

    def stop(self) -> None:
        """What waits for another rank waits no more; its numbers are nothing."""
        self._stop[:4] = 1

    def close(self) -> None:
        """The others' inboxes are theirs again."""
        while self._opened and not self._context.fault:
            self._context.call("cuIpcCloseMemHandle", self._opened.pop())


def connect(context: cuda.Context, group: Group) -> Peers | None:
    """Between all GPUs, of which each can write into every other's memory; None, everywhere, where one cannot."""
    peers, mine = None, np.zeros(1 + _HANDLE, np.uint8)
    if context.device.capability >= _FROM:
        try:
            peers = Peers(context, group)
            mine[1:], mine[0] = peers.handle, 1
        except DeviceError as error:
            log.warning("short sums of ranks go through NCCL (%s)", error)
    known = group.all_gather(mine)
    opened = np.zeros(1, np.uint8)
    if peers is not None and known[:, 0].all():
        try:
            peers.open(known[:, 1:], group.rank)
            opened[0] = 1
        except DeviceError as error:
            log.warning("short sums of ranks go through NCCL (%s)", error)
    return peers if group.all_gather(opened).all() else None
