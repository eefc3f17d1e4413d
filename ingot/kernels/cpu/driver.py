"""The segment function: every thread of the team enters it once and calls each step's phases on its share of the items.

    void symbol(ptr pointers, ptr extents, ptr scratch, ptr sync, i64 thread, i64 team)

Work is split dynamically (a lost core takes fewer chunks). Small phases run on thread 0 alone, without a barrier
between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Function, Index, Value, module
from ingot.kernels.cpu.support import SYNC_COUNTERS

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


def parallel_phases(calls: Sequence[Call]) -> int:
    """Number of work counters the segment needs."""
    return sum(not call.serial for call in calls)


def segment_text(symbol: str, calls: Sequence[Call], isa: Isa) -> str:
    """IR module of one segment function; the kernels it calls are declared."""
    f = Function(symbol, ARGUMENTS)
    declared: dict[str, str] = {}
    counter, pending = 0, False
    _stamp(f, 0)
    for position, call in enumerate(calls):
        declared[call.symbol] = _declaration(call)
        if call.serial:
            f.when(f.compare("eq", f["thread"], 0), partial(_emit_call, f, call, 0, _count(f, call)))
            pending = True
        else:
            if pending:
                _barrier(f)
            _parallel(f, call, SYNC_COUNTERS + 64 * counter)
            counter += 1
            pending = False
            if position + 1 < len(calls):
                _barrier(f)
        if call.stamp is not None:
            _stamp(f, call.stamp + 1)
    runtime = ["declare void @ingot_barrier(ptr, i64)", "declare void @ingot_stamp(ptr, i64, i64)"]
    extra = "\n".join([*runtime, *(declared[name] for name in sorted(declared))])
    return module([f], isa.attributes, extra)


def _declaration(call: Call) -> str:
    types = ["ptr"] * len(call.pointers) + ["i64"] * len(call.extents) + ["ptr", "i64", "i64"]
    return f"declare void @{call.symbol}({', '.join(types)})"


def _stamp(f: Function, slot: int) -> None:
    f.emit(f"call void @ingot_stamp(ptr %sync, i64 %thread, i64 {slot})")


def _barrier(f: Function) -> None:
    f.when(
        f.compare("ne", f["team"], 1),
        lambda: f.emit("call void @ingot_barrier(ptr %sync, i64 %team)"),
    )


def _count(f: Function, call: Call) -> Index:
    return call.count if call.count is not None else _extent(f, call.count_extent or 0)


def _extent(f: Function, index: int) -> Value:
    return f.load("i64", f["extents"], 8 * index)


def _emit_call(f: Function, call: Call, begin: Index, end: Index) -> None:
    pointers = [f"ptr {f.load('ptr', f['pointers'], 8 * p).text}" for p in call.pointers]
    extents = [f"i64 {_extent(f, e).text}" for e in call.extents]
    tail = ["ptr %scratch", f"i64 {f.index(begin).text}", f"i64 {f.index(end).text}"]
    f.emit(f"call void @{call.symbol}({', '.join([*pointers, *extents, *tail])})")


def _parallel(f: Function, call: Call, counter: int) -> None:
    count = _count(f, call)

    def shared() -> None:
        share = f.divide(count, f["team"] * CHUNKS_PER_THREAD)
        chunk = f.maximum(f.divide(f.index(share) + (call.grain - 1), call.grain), 1)
        chunk = f.index(chunk) * call.grain
        _chunks(f, call, counter, count, chunk)

    f.when(f.compare("eq", f["team"], 1), lambda: _emit_call(f, call, 0, count), shared)


def _chunks(f: Function, call: Call, counter: int, count: Index, chunk: Value) -> None:
    """while ((begin = fetch_add(counter, chunk)) < count) call(begin, min(begin + chunk, count))"""
    tag = len(f.lines)
    place = f.at(f["sync"], counter)
    f.emit(f"br label %take{tag}")
    f._enter(f"take{tag}")
    begin = f.value("i64", f"atomicrmw add ptr {place.text}, i64 {chunk.text} monotonic")
    condition = f.compare("slt", begin, f.index(count))
    f.emit(f"br i1 {condition.text}, label %chunk{tag}, label %taken{tag}")
    f._enter(f"chunk{tag}")
    _emit_call(f, call, begin, f.minimum(begin + chunk, count))
    f.emit(f"br label %take{tag}")
    f._enter(f"taken{tag}")
