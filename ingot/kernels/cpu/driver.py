"""The segment function: every thread of the team enters it once and calls each step's phases on its share of the items.

    void symbol(ptr pointers, ptr extents, ptr scratch, ptr sync, i64 thread, i64 team)

Every thread begins with a range of items of its own and helps the others out when it has done it; a phase is over when
all its items are finished, not when all threads have arrived: a thread that the system holds up costs what it has
taken, one that sleeps costs nothing. Small phases run on one thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Function, Index, Value, module
from ingot.kernels.cpu.support import GROUP_LINES, SYNC_COUNTERS

ARGUMENTS = (
    ("ptr", "pointers"),
    ("ptr", "extents"),
    ("ptr", "scratch"),
    ("ptr", "sync"),
    ("i64", "thread"),
    ("i64", "team"),
)
CHUNKS_PER_THREAD = 6


@dataclass(frozen=True)
class Call:
    """One phase: function symbol, storage indices of its pointers, extent-table indices of its extents, work items.
    The last phase of a step carries the step's number within the segment as `stamp`."""

    symbol: str
    pointers: tuple[int, ...]
    extents: tuple[int, ...]
    count: int | None
    count_extent: int | None
    grain: int
    serial: bool
    stamp: int | None = None


Group = tuple[Call, ...]
"""One parallel phase, or small ones that follow each other and that one thread runs."""


def counters(calls: Sequence[Call]) -> int:
    """Cache lines of counters the segment needs to be shared by a team; 0 where nothing is worth sharing."""
    groups = _groups(calls)
    return GROUP_LINES * len(groups) if any(not call.serial for call in calls) else 0


def _groups(calls: Sequence[Call]) -> list[Group]:
    together = itertools.groupby(enumerate(calls), key=lambda pair: -1 if pair[1].serial else pair[0])
    return [tuple(call for _, call in group) for _, group in together]


def segment_text(symbol: str, calls: Sequence[Call], isa: Isa) -> str:
    """IR module of one segment function; the kernels it calls are declared."""
    f = Function(symbol, ARGUMENTS)
    declared = {call.symbol: _declaration(call) for call in calls}
    _stamp(f, 0)
    cursor = f.local("i64", 3)
    for number, group in enumerate(_groups(calls)):
        done = f.at(f["sync"], SYNC_COUNTERS + 64 * GROUP_LINES * number)
        if group[0].serial:
            _serial(f, group, done)
        else:
            _parallel(f, group[0], done, cursor)
    runtime = [
        "declare i64 @ingot_take(ptr, ptr, i64, i64, i64, i64)",
        "declare void @ingot_await(ptr, i64)",
        "declare void @ingot_finish(ptr, i64)",
        "declare void @ingot_stamp(ptr, i64)",
    ]
    extra = "\n".join([*runtime, *(declared[name] for name in sorted(declared))])
    return module([f], isa.attributes, extra)


def _declaration(call: Call) -> str:
    types = ["ptr"] * len(call.pointers) + ["i64"] * len(call.extents) + ["ptr", "i64", "i64"]
    return f"declare void @{call.symbol}({', '.join(types)})"


def _stamp(f: Function, slot: int) -> None:
    f.emit(f"call void @ingot_stamp(ptr %sync, i64 {slot})")


def _alone(f: Function) -> Value:
    return f.compare("eq", f["team"], 1)


def _count(f: Function, call: Call) -> Index:
    return call.count if call.count is not None else _extent(f, call.count_extent or 0)


def _extent(f: Function, index: int) -> Value:
    return f.load("i64", f["extents"], 8 * index)


def _emit_call(f: Function, call: Call, begin: Index, end: Index) -> None:
    pointers = [f"ptr {f.load('ptr', f['pointers'], 8 * p).text}" for p in call.pointers]
    extents = [f"i64 {_extent(f, e).text}" for e in call.extents]
    tail = ["ptr %scratch", f"i64 {f.index(begin).text}", f"i64 {f.index(end).text}"]
    f.emit(f"call void @{call.symbol}({', '.join([*pointers, *extents, *tail])})")


def _serial(f: Function, group: Group, done: Value) -> None:
    """Whoever comes first runs all of the group."""

    def work() -> None:
        for call in group:
            _emit_call(f, call, 0, _count(f, call))
            if call.stamp is not None:
                _stamp(f, call.stamp + 1)

    def shared() -> None:
        first = f.value("i64", f"atomicrmw add ptr {f.at(done, 64).text}, i64 1 monotonic")

        def run() -> None:
            work()
            f.emit(f"call void @ingot_finish(ptr {done.text}, i64 1)")

        f.when(f.compare("eq", first, 0), run)
        _await(f, done, 1)

    f.when(_alone(f), work, shared)


def _parallel(f: Function, call: Call, done: Value, cursor: Value) -> None:
    count = _count(f, call)

    def shared() -> None:
        share = f.index(f.divide(f.index(count) + f["team"] - 1, f["team"]))
        chunks = f.index(f.minimum(f.maximum(f.divide(share, call.grain), 1), CHUNKS_PER_THREAD))
        _chunks(f, call, done, cursor, count, f.index(f.divide(share + chunks - 1, chunks)))
        _await(f, done, count)

    f.when(_alone(f), lambda: _emit_call(f, call, 0, count), shared)
    if call.stamp is not None:
        _stamp(f, call.stamp + 1)


def _await(f: Function, done: Value, count: Index) -> None:
    """Until all items are finished. A thread that never came has taken none and is not missed."""
    f.emit(f"call void @ingot_await(ptr {done.text}, i64 {f.index(count).text})")


def _chunks(f: Function, call: Call, done: Value, cursor: Value, count: Index, chunk: Value) -> None:
    """while ((begin = take()) >= 0) call(begin, end)"""
    tag = len(f.lines)
    for place in range(3):
        f.store(f.constant("i64", 0), cursor, 8 * place)
    f.emit(f"br label %take{tag}")
    f._enter(f"take{tag}")
    begin = f.value(
        "i64",
        f"call i64 @ingot_take(ptr {done.text}, ptr {cursor.text}, i64 {f.index(count).text}, i64 {chunk.text}, "
        "i64 %thread, i64 %team)",
    )
    condition = f.compare("sge", begin, 0)
    f.emit(f"br i1 {condition.text}, label %chunk{tag}, label %taken{tag}")
    f._enter(f"chunk{tag}")
    _emit_call(f, call, begin, f.load("i64", cursor, 8))
    f.emit(f"br label %take{tag}")
    f._enter(f"taken{tag}")
