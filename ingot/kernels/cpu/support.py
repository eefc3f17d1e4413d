"""The native side of the runtime, part of every code image: worker loop, run entry, waiting. No libc underneath.

The sync block (zeroed by the runtime, 64-byte aligned) is:
    128 job generation    192 sleepers    256 stop flag
    320 function  328 pointers  336 extents  344 scratch  352 scratch stride  360 team
    368 stamps or null    376 whether the job is open    448 workers inside
    512 … GROUP_LINES lines per group of phases: items finished, then items taken of each range

Items are divided into as many contiguous ranges as threads, at most RANGES. A thread takes chunks of its own range,
then of the others': most of what it reads was written by itself in the phase before, and lies in its own cache, as does
the counter. It tells what it has finished when nothing is left to take.
"""

from __future__ import annotations

SYNC_COUNTERS = 512
SPINS = 4000
RANGES = 8  # where threads are more, neighbours share a range
GROUP_LINES = 1 + RANGES

_FUTEX_WAIT, _FUTEX_WAKE, _SYS_FUTEX, _SYS_YIELD = 128, 129, 202, 24

_TEXT = """
declare void @llvm.x86.sse2.pause()
declare i64 @llvm.readcyclecounter()

define void @ingot_clock(ptr %out) #0 {
  %t = call i64 @llvm.readcyclecounter()
  store i64 %t, ptr %out, align 8
  ret void
}

; Note the time in slot %k of the stamps, if anybody asked for them: the first thread that comes by does.
define void @ingot_stamp(ptr %sync, i64 %k) #0 {
  %sp = getelementptr i8, ptr %sync, i64 368
  %s = load ptr, ptr %sp, align 8
  %none = icmp eq ptr %s, null
  br i1 %none, label %out, label %write
write:
  %p = getelementptr i64, ptr %s, i64 %k
  %t = call i64 @llvm.readcyclecounter()
  %x = cmpxchg ptr %p, i64 0, i64 %t monotonic monotonic, align 8
  ret void
out:
  ret void
}

define internal i64 @syscall6(i64 %n, ptr %a, i64 %b, i64 %c) #0 {
  %r = call i64 asm sideeffect "syscall", "={rax},{rax},{rdi},{rsi},{rdx},{r10},{r8},{r9},~{rcx},~{r11},~{memory}"(
    i64 %n, ptr %a, i64 %b, i64 %c, i64 0, i64 0, i64 0)
  ret i64 %r
}

; Wait until the i64 at %p differs from %old: spin, then give the core away.
define internal void @wait_change(ptr %p, i64 %old) #0 {
entry:
  br label %spin
spin:
  %i = phi i64 [0, %entry], [%i1, %again]
  %now = load atomic i64, ptr %p acquire, align 8
  %same = icmp eq i64 %now, %old
  br i1 %same, label %again, label %out
again:
  call void @llvm.x86.sse2.pause()
  %i1 = add i64 %i, 1
  %patient = icmp ult i64 %i, SPINS
  br i1 %patient, label %spin, label %yield
yield:
  %r = call i64 @syscall6(i64 SYS_YIELD, ptr null, i64 0, i64 0)
  %now2 = load atomic i64, ptr %p acquire, align 8
  %same2 = icmp eq i64 %now2, %old
  br i1 %same2, label %yield, label %out
out:
  ret void
}

define internal i64 @bound(i64 %count, i64 %ranges, i64 %i) #0 {
  %x = mul i64 %count, %i
  %low = udiv i64 %x, %ranges
  ret i64 %low
}

; Take a chunk: its begin, or -1 when none is left, which tells what was finished. %cursor: the ranges tried so far,
; where the chunk ends, items taken; zeros at first.
define i64 @ingot_take(ptr %group, ptr %cursor, i64 %count, i64 %chunk, i64 %thread, i64 %team) #0 {
entry:
  %few = icmp ult i64 %team, RANGES
  %ranges = select i1 %few, i64 %team, i64 RANGES
  %w = mul i64 %thread, %ranges
  %own = udiv i64 %w, %team
  %ep = getelementptr i8, ptr %cursor, i64 8
  %mp = getelementptr i8, ptr %cursor, i64 16
  %mine = load i64, ptr %mp, align 8
  %tried0 = load i64, ptr %cursor, align 8
  br label %look
look:
  %tried = phi i64 [%tried0, %entry], [%tried1, %next]
  %some = icmp ult i64 %tried, %ranges
  br i1 %some, label %range, label %none
range:
  %place = add i64 %own, %tried
  %i = urem i64 %place, %ranges
  %i1 = add i64 %i, 1
  %low = call i64 @bound(i64 %count, i64 %ranges, i64 %i)
  %high = call i64 @bound(i64 %count, i64 %ranges, i64 %i1)
  %line = shl i64 %i1, 6
  %cp = getelementptr i8, ptr %group, i64 %line
  %at = atomicrmw add ptr %cp, i64 %chunk monotonic
  %begin = add i64 %low, %at
  %inside = icmp slt i64 %begin, %high
  br i1 %inside, label %found, label %next
next:
  %tried1 = add i64 %tried, 1
  store i64 %tried1, ptr %cursor, align 8
  br label %look
found:
  %full = add i64 %begin, %chunk
  %over = icmp sgt i64 %full, %high
  %end = select i1 %over, i64 %high, i64 %full
  store i64 %end, ptr %ep, align 8
  %items = sub i64 %end, %begin
  %more = add i64 %mine, %items
  store i64 %more, ptr %mp, align 8
  ret i64 %begin
none:
  %idle = icmp eq i64 %mine, 0
  br i1 %idle, label %out, label %tell
tell:
  %x = atomicrmw add ptr %group, i64 %mine release
  br label %out
out:
  ret i64 -1
}

; Count items as finished; wait until enough are.
define void @ingot_finish(ptr %done, i64 %items) #0 {
  %x = atomicrmw add ptr %done, i64 %items release
  ret void
}

define void @ingot_await(ptr %done, i64 %count) #0 {
entry:
  br label %look
look:
  %now = load atomic i64, ptr %done acquire, align 8
  %enough = icmp sge i64 %now, %count
  br i1 %enough, label %out, label %wait
wait:
  call void @wait_change(ptr %done, i64 %now)
  br label %look
out:
  ret void
}

define internal void @enter(ptr %sync, i64 %thread) #0 {
  %fp = getelementptr i8, ptr %sync, i64 320
  %pp = getelementptr i8, ptr %sync, i64 328
  %ep = getelementptr i8, ptr %sync, i64 336
  %sp = getelementptr i8, ptr %sync, i64 344
  %dp = getelementptr i8, ptr %sync, i64 352
  %tp = getelementptr i8, ptr %sync, i64 360
  %f = load ptr, ptr %fp, align 8
  %p = load ptr, ptr %pp, align 8
  %e = load ptr, ptr %ep, align 8
  %s = load ptr, ptr %sp, align 8
  %d = load i64, ptr %dp, align 8
  %t = load i64, ptr %tp, align 8
  %o = mul i64 %d, %thread
  %mine = getelementptr i8, ptr %s, i64 %o
  call void %f(ptr %p, ptr %e, ptr %mine, ptr %sync, i64 %thread, i64 %t)
  ret void
}

; A worker thread's whole life: park, run the job unless it is over already, until the stop flag is set.
define void @ingot_worker(ptr %sync, i64 %thread) #0 {
entry:
  %jp = getelementptr i8, ptr %sync, i64 128
  %zp = getelementptr i8, ptr %sync, i64 192
  %qp = getelementptr i8, ptr %sync, i64 256
  %np = getelementptr i8, ptr %sync, i64 448
  %op = getelementptr i8, ptr %sync, i64 376
  br label %next
next:
  %seen = phi i64 [0, %entry], [%now, %worked]
  br label %spin
spin:
  %i = phi i64 [0, %next], [%i1, %again], [0, %woken]
  %now = load atomic i64, ptr %jp acquire, align 8
  %same = icmp eq i64 %now, %seen
  br i1 %same, label %again, label %go
again:
  call void @llvm.x86.sse2.pause()
  %i1 = add i64 %i, 1
  %patient = icmp ult i64 %i, SPINS
  br i1 %patient, label %spin, label %sleep
sleep:
  %a = atomicrmw add ptr %zp, i64 1 seq_cst
  %low = trunc i64 %seen to i32
  %wide = zext i32 %low to i64
  %r = call i64 @syscall6(i64 SYS_FUTEX, ptr %jp, i64 FUTEX_WAIT, i64 %wide)
  %b = atomicrmw sub ptr %zp, i64 1 seq_cst
  br label %woken
woken:
  br label %spin
go:
  %q = load atomic i64, ptr %qp acquire, align 8
  %stop = icmp ne i64 %q, 0
  br i1 %stop, label %out, label %work
work:
  %b1 = atomicrmw add ptr %np, i64 1 seq_cst
  %open = load atomic i64, ptr %op seq_cst, align 8
  %late = icmp eq i64 %open, 0
  br i1 %late, label %worked, label %inside
inside:
  call void @enter(ptr %sync, i64 %thread)
  br label %worked
worked:
  %b2 = atomicrmw sub ptr %np, i64 1 seq_cst
  br label %next
out:
  ret void
}

define internal void @wake(ptr %sync) #0 {
  %jp = getelementptr i8, ptr %sync, i64 128
  %zp = getelementptr i8, ptr %sync, i64 192
  %j = atomicrmw add ptr %jp, i64 1 seq_cst
  %z = load atomic i64, ptr %zp seq_cst, align 8
  %any = icmp ne i64 %z, 0
  br i1 %any, label %call, label %out
call:
  %r = call i64 @syscall6(i64 SYS_FUTEX, ptr %jp, i64 FUTEX_WAKE, i64 2147483647)
  br label %out
out:
  ret void
}

define void @ingot_stop(ptr %sync) #0 {
  %qp = getelementptr i8, ptr %sync, i64 256
  store atomic i64 1, ptr %qp release, align 8
  call void @wake(ptr %sync)
  ret void
}

; Run a segment: the caller is worker 0 of a team. Returns when all work is done and nobody is inside any more.
define void @ingot_run(ptr %sync, ptr %f, ptr %p, ptr %e, ptr %s, i64 %stride, i64 %team, i64 %phases) #0 {
entry:
  %alone = icmp eq i64 %team, 1
  br i1 %alone, label %single, label %clear
single:
  call void %f(ptr %p, ptr %e, ptr %s, ptr %sync, i64 0, i64 1)
  ret void
clear:
  %few = icmp ult i64 %team, RANGES
  %ranges = select i1 %few, i64 %team, i64 RANGES
  br label %group
group:
  %k = phi i64 [0, %clear], [%k1, %cleared]
  %more = icmp ult i64 %k, %phases
  br i1 %more, label %line, label %ready
line:
  %l = phi i64 [0, %group], [%l1, %line]
  %number = add i64 %k, %l
  %o = shl i64 %number, 6
  %o2 = add i64 %o, COUNTERS
  %cp = getelementptr i8, ptr %sync, i64 %o2
  store atomic i64 0, ptr %cp monotonic, align 8
  %l1 = add i64 %l, 1
  %another = icmp ule i64 %l1, %ranges
  br i1 %another, label %line, label %cleared
cleared:
  %k1 = add i64 %k, GROUP_LINES
  br label %group
ready:
  %fp = getelementptr i8, ptr %sync, i64 320
  %pp = getelementptr i8, ptr %sync, i64 328
  %ep = getelementptr i8, ptr %sync, i64 336
  %sp = getelementptr i8, ptr %sync, i64 344
  %dp = getelementptr i8, ptr %sync, i64 352
  %tp = getelementptr i8, ptr %sync, i64 360
  %np = getelementptr i8, ptr %sync, i64 448
  store ptr %f, ptr %fp, align 8
  store ptr %p, ptr %pp, align 8
  store ptr %e, ptr %ep, align 8
  store ptr %s, ptr %sp, align 8
  store i64 %stride, ptr %dp, align 8
  store i64 %team, ptr %tp, align 8
  %op = getelementptr i8, ptr %sync, i64 376
  store atomic i64 1, ptr %op seq_cst, align 8
  call void @wake(ptr %sync)
  call void %f(ptr %p, ptr %e, ptr %s, ptr %sync, i64 0, i64 %team)
  store atomic i64 0, ptr %op seq_cst, align 8
  br label %poll
poll:
  %n = load atomic i64, ptr %np seq_cst, align 8
  %done = icmp eq i64 %n, 0
  br i1 %done, label %out, label %idle
idle:
  call void @wait_change(ptr %np, i64 %n)
  br label %poll
out:
  ret void
}
"""


def support_text(attributes: str) -> str:
    """IR of the support functions."""
    numbers = {
        "SPINS": SPINS,
        "SYS_YIELD": _SYS_YIELD,
        "SYS_FUTEX": _SYS_FUTEX,
        "FUTEX_WAIT": _FUTEX_WAIT,
        "FUTEX_WAKE": _FUTEX_WAKE,
        "COUNTERS": SYNC_COUNTERS,
        "RANGES": RANGES,
        "GROUP_LINES": GROUP_LINES,
    }
    text = _TEXT
    for word, number in numbers.items():
        text = text.replace(word, str(number))
    return f"{text}\nattributes #0 = {{ {attributes} }}\n"
