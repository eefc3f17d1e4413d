"""PTX run in numpy, thread blocks one after the other: values of kernels that Triton's interpreter cannot run.

`Module(text).run(block, arguments, shared)` knows the instructions that one-row products compile to, and names one that
it does not know. A warp's branches must go one way. Copies to shared memory arrive when they are waited for, not
before; what one thread writes there no other may touch before a barrier of the block, or of the warp. Blocks that wait
for each other run by turns (`run_together`). Nothing is said about time.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]
LANES, POISON = 32, 0x7B
_LOOKS = 1_000_000
_SOME, _OWN = -1000, -5000  # less a warp's number: several of its threads, and the same after they have met
_STATEMENT = re.compile(r"\s*(?:([$\w]+):(?!:)|([{}])|((?:[^;{}]|\{[^;{}]*\})+);)", re.S)
_PARTS = re.compile(r"(?:@(!?)([%$\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_ADDRESS = re.compile(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+))?\s*\]")
_MANY = re.compile(r"(\w+)<(\d+)>")
_COMPARED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "neu": lambda a, b: ~(a == b), "geu": lambda a, b: ~(a < b), "gtu": lambda a, b: ~(a <= b),
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "lo": np.less, "hs": np.greater_equal,
}  # fmt: skip
_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum, "div": np.divide,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
_UNARY: dict[str, Callable[[Array], Array]] = {
    "neg": np.negative, "abs": np.abs, "not": np.invert, "ex2": np.exp2, "sqrt": np.sqrt, "rcp": np.reciprocal,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """An instruction; names of registers are unique in the module."""

    name: str
    operands: tuple[str, ...]
    guard: str
    negated: bool


@dataclass(eq=False)
class Shared:
    """A block's shared memory: who wrote and read which byte since which barrier, and which are still under way."""

    bytes: Array
    barriers: int = 0

    def __post_init__(self) -> None:
        size = len(self.bytes)
        self.under_way = np.zeros(size, bool)
        self._times = {how: np.full(size, -1) for how in ("read", "written")}
        self._threads = {how: np.full(size, -1) for how in ("read", "written")}

    def touch(self, how: str, places: Array, threads: Array, data: Array | None = None) -> None:
        """Bytes [lanes, size] that threads [lanes] read or write now. Two may write the same."""
        who = np.broadcast_to(threads[:, None], places.shape)
        for before in ("written",) if how == "read" else ("written", "read"):
            now = self._times[before][places] == self.barriers
            if before == "written" and data is not None:
                now &= self.bytes[places] != data
            owner = self._threads[before][places]
            now &= (owner != who) & (owner != _OWN - who // LANES)
            assert not now.any(), f"bytes {before} by another thread: {how}"
        owner = self._threads[how][places]
        known = (self._times[how][places] == self.barriers) & (owner != who) & (owner != _OWN - who // LANES)
        several = np.where((owner // LANES == who // LANES) | (owner == _SOME - who // LANES), _SOME - who // LANES, -2)
        self._times[how][places], self._threads[how][places] = self.barriers, np.where(known, several, who)
        if how == "read":
            assert not self.under_way[places].any(), "bytes are read that are still under way"

    def meet(self, warp: int) -> None:
        """Threads of a warp wait for each other."""
        for owner in self._threads.values():
            owner[(owner // LANES == warp) | (owner == _SOME - warp)] = _OWN - warp


@dataclass(eq=False)
class Warp:
    """Registers of 32 threads, as bits, and copies that they have asked for: groups of (to, from) of a lane."""

    number: int
    block: int
    registers: dict[str, Array] = field(default_factory=dict)
    groups: list[list[tuple[int, int]]] = field(default_factory=list)
    open: list[tuple[int, int]] = field(default_factory=list)

    @property
    def threads(self) -> Array:
        return self.number * LANES + np.arange(LANES)


class Module:
    """A kernel's PTX."""

    def __init__(self, text: str) -> None:
        code = re.sub(r"//[^\n]*|^\s*\.(?:loc|file)\b[^\n]*", "", text, flags=re.M)
        head, body = code[code.index(".entry") :].split("{", 1)
        self.parameters = re.findall(r"(\w+_param_\d+)", head)
        self.threads = int((re.search(r"\.reqntid (\d+)", head) or ["", "128"])[1])
        self.instructions, self.labels = list[Instruction](), dict[str, int]()
        self._parse(body)

    def _parse(self, body: str) -> None:
        scopes, names, place, count = [""], list[dict[str, str]]([{}]), 0, 0
        while (found := _STATEMENT.match(body, place)) is not None and scopes:
            place = found.end()
            label, brace, statement = found.groups()
            if label:
                self.labels[scopes[-1] + label] = len(self.instructions)
            elif brace == "{":
                count += 1
                scopes.append(f"{count}.")
                names.append(dict(names[-1]))
            elif brace:
                scopes.pop()
                names.pop()
            elif statement.strip().startswith(".reg"):
                for name in statement.split(None, 2)[2].replace(" ", "").split(","):
                    many = _MANY.fullmatch(name.lstrip("%"))
                    for one in [f"{many[1]}{k}" for k in range(int(many[2]))] if many and "%" not in name else [name]:
                        names[-1][one] = scopes[-1] + one
            elif not statement.strip().startswith("."):
                self._add(statement.strip(), names[-1], scopes[-1])

    def _add(self, statement: str, names: dict[str, str], scope: str) -> None:
        found = _PARTS.fullmatch(statement)
        assert found is not None, statement
        negated, guard, name, rest = found.groups()
        operands = tuple(re.sub(r"[%$\w.]+", lambda m: names.get(m[0], m[0]), part.strip())
                         for part in re.split(r",(?![^{\[]*[}\]])", rest) if part.strip())  # fmt: skip
        if name.startswith("bra"):
            operands = (operands[0] if operands[0].startswith("$") else scope + operands[0],)
        self.instructions.append(Instruction(name, operands, names.get(guard, guard or ""), bool(negated)))

    def run(self, block: int, arguments: Sequence[Array], shared: int, special: dict[str, int] | None = None) -> None:
        """One block, which waits for no other. Arrays [bytes] are the arguments, in place; missing ones are null."""
        it = Block(self, block, arguments, shared, special or {})
        while not it.ended:
            it.go_on()

    def run_together(self, blocks: int, arguments: Sequence[Array], shared: int, rng: random.Random) -> None:
        """All blocks of a launch, warp by warp in a random order: they take turns where a warp looks at what others
        write."""
        running = [Block(self, k, arguments, shared, {"%nctaid.x": blocks}) for k in range(blocks)]
        for _ in range(_LOOKS):
            running = [block for block in running if not block.ended]
            if not running:
                return
            rng.choice(running).go_on(rng)
        raise AssertionError("nothing arrives")


class Block:
    """A block's warps, each as far as it has come."""

    def __init__(self, module: Module, number: int, arguments: Sequence[Array], shared: int,
                 special: dict[str, int]) -> None:  # fmt: skip
        self.memory = Shared(np.full(shared, POISON, np.uint8))
        state = _State(module, list(arguments), self.memory, {"%nsmid": 132, "%nctaid.x": 1, **special})
        self._warps = [state.steps(Warp(k, number)) for k in range(module.threads // LANES)]
        self._states = ["look"] * len(self._warps)
        self.ended = False

    def go_on(self, rng: random.Random | None = None) -> None:
        """One of the warps goes on, the first if nobody draws one, or all of them where they wait for each other."""
        ready = [k for k, state in enumerate(self._states) if state == "look"]
        if ready:
            k = rng.choice(ready) if rng is not None else ready[0]
            self._states[k] = next(self._warps[k], "ended")
        else:
            assert len(set(self._states)) == 1, "some warps wait at a barrier, others have ended"
            self.ended = self._states[0] == "ended"
            self._states, self.memory.barriers = ["look"] * len(self._states), self.memory.barriers + 1
            assert not self.ended or not self.memory.under_way.any(), "copies are under way when the block ends"


@dataclass(eq=False)
class _State:
    module: Module
    arguments: list[Array]
    shared: Shared
    special: dict[str, int]

    def steps(self, warp: Warp) -> Iterator[str]:
        """Runs a warp from barrier to barrier, and to where it looks at what others write."""
        place, code = 0, self.module.instructions
        while True:
            it = code[place]
            place += 1
            active = np.ones(LANES, bool)
            if it.guard:
                active = warp.registers[it.guard].astype(bool) ^ it.negated
            kind = it.name.split(".")[0]
            if kind in ("bra", "ret"):
                assert active.all() or not active.any(), f"a warp's branch goes two ways: {it}"
                if active.all() and kind == "ret":
                    return
                place = self.module.labels[it.operands[0]] if active.all() else place
            elif it.name == "bar.warp.sync":
                self.shared.meet(warp.number)
            elif it.name.startswith("bar"):
                yield f"barrier {it.operands[0]}"
            elif active.any():
                if "ld.relaxed" in it.name or "atom" in it.name:
                    yield "look"
                with np.errstate(all="ignore"):
                    self._do(warp, it, active)

    def _do(self, warp: Warp, it: Instruction, active: Array) -> None:
        kinds = it.name.split(".")
        handler = getattr(self, f"_{kinds[0]}", None)
        if handler is not None:
            handler(warp, it, kinds, active)
        elif kinds[0] in _BINARY or kinds[0] in _UNARY:
            values = [self._value(warp, operand, kinds[-1]) for operand in it.operands[1:]]
            function: Callable[..., Array] = _BINARY[kinds[0]] if kinds[0] in _BINARY else _UNARY[kinds[0]]
            self._set(warp, it.operands[0], _bits(function(*values), kinds[-1]), active)
        else:
            raise NotImplementedError(f"the interpreter does not know {it}")

    # registers

    def _value(self, warp: Warp, operand: str, kind: str) -> Array:
        """Of a register, a number or a special register, as the type has it."""
        if operand in warp.registers:
            return _typed(warp.registers[operand], kind)
        if operand == "%tid.x":
            return _typed(warp.threads.astype(np.uint64), kind)
        if operand == "%ctaid.x" or operand in self.special or operand == "global_smem":
            known = warp.block if operand == "%ctaid.x" else self.special.get(operand, 0)
            return _typed(np.full(LANES, known, np.uint64), kind)
        if operand[0] == "%":  # nobody wrote it: it holds anything
            return _typed(np.full(LANES, 0x7B7B7B7B7B7B7B7B, np.uint64), kind)
        assert re.fullmatch(r"-?(0[fF][0-9a-fA-F]{8}|0x[0-9a-fA-F]+|\d+(\.\d+)?)", operand), f"{operand} is not set"
        if operand.lower().startswith("0f"):
            return _typed(np.full(LANES, int(operand[2:], 16), np.uint64), kind)
        if kind.startswith("f"):
            return np.full(LANES, float(operand), np.float32)
        return _typed(np.full(LANES, int(operand, 0) & (1 << 64) - 1, np.uint64), kind)

    def _set(self, warp: Warp, name: str, bits: Array, active: Array) -> None:
        before = warp.registers.get(name, np.zeros(LANES, np.uint64))
        warp.registers[name] = np.where(active, bits, before)

    def _mov(self, warp: Warp, it: Instruction, kinds: list[str], active: Array) -> None:
        to, source = it.operands
        kind = "u" + re.sub(r"\D", "", kinds[-1]) if kinds[-1] != "pred" else "u8"
        half = np.uint64(int(kind[1:]) // 2)
        if to.startswith("{"):
            bits = self._value(warp, source, kind).astype(np.uint64)
            low, high = _listed(to)
            self._set(warp, low, bits & (np.uint64(1) << half) - np.uint64(1), active)
            self._set(warp, high, bits >> half, active)
        elif source.startswith("{"):
            low, high = (self._value(warp, name, f"u{half}").astype(np.uint64) for name in _listed(source))
            self._set(warp, to, low | high << half, active)
        else:
            self._set(warp, to, _bits(self._value(warp, source, kind), kind), active)

    def _setp(self, warp: Warp, it: Instruction, kinds: list[str], active: Array) -> None:
        a, b = (self._value(warp, operand, kinds[-1]) for operand in it.operands[1:3])
        found = _COMPARED[kinds[1]](a, b)
        if len(kinds) > 3:
            found = _BINARY[kinds[2]](found, warp.registers[it.operands[3]].astype(bool))
        self._set(warp, it.operands[0], found.astype(np.uint64), active)

    def _selp(self, warp: Warp, it: Instruction, kinds: list[str], active: Array) -> None:
        a, b = (_bits(self._value(warp, operand, kinds[-1]), kinds[-1]) for operand in it.operands[1:3])
        self._set(warp, it.operands[0], np.where(warp.registers[it.operands[3]].astype(bool), a, b), active)

    def _wide(self, warp: Warp, it: Instruction, kinds: list[str], active: Array) -> None:
        """Products of integers and sums with them: low, high or both halves."""
        size = int(kinds[-1][1:])
        kept = 2 * size if kinds[1] == "wide" else size
        a, b = (self._value(warp, operand, kinds[-1]).astype(object) for operand in it.operands[1:3])
        whole = a * b
        if kinds[1] == "hi":
            whole = np.array([int(x) >> size for x in whole], object)
        if kinds[0] == "mad":
            whole = whole + self._value(warp, it.operands[3], f"s{kept}").astype(object)
        self._set(warp, it.operands[0], np.array([int(x) & (1 << kept) - 1 for x in whole], np.uint64), active)

    _mad = _wide

    def _mul(self, warp: Warp, it: Instruction, kinds: list[str], active: Array) -> None:
        if kinds[-1].startswith("f"):
            values = [self._value(warp, operand, kinds[-1]) for operand in it.operands[1:]]
            self._set(warp, it.operands[0], _bits(values[0] * values[1], kinds[-1]), active)
        else:
            self._wide(warp, it, kinds, active)

    def _fma(self, warp: Warp, it: Instruction, kinds: list[str], active: Array) -> None:
        a, b, c = (self._value(warp, operand, "f32").astype(np.float64) for operand in it.operands[1:])
        self._set(warp, it.operands[0], _bits((a * b + c).astype(np.float32), "f32"), active)

    def _shift(self, warp: Warp, it: Instruction, kinds: list[str], active: Array) -> None:
        size = int(kinds[-1][1:])
        x, by = self._value(warp, it.operands[1], kinds[-1]), self._value(warp, it.operands[2], "u32")
        by = np.minimum(by, size - 1) if kinds[-1][0] == "s" else by
        moved = [int(a) << int(b) if kinds[0] == "shl" else int(a) >> int(b) for a, b in zip(x, by, strict=True)]
        self._set(warp, it.operands[0], np.array([m & (1 << size) - 1 for m in moved], np.uint64), active)

    _shl = _shr = _shift

    def _bfe(self, warp: Warp, it: Instruction, kinds: list[str], active: Array) -> None:
        x = self._value(warp, it.operands[1], "u32")
        first, size = (int(self._value(warp, operand, "u32")[0]) for operand in it.operands[2:])
        part = x.astype(np.int64) >> first & (1 << size) - 1
        if kinds[-1][0] == "s":
            part = (part ^ 1 << size - 1) - (1 << size - 1)
        self._set(warp, it.operands[0], _bits(part.astype(np.int32), "s32"), active)

    def _cvt(self, warp: Warp, it: Instruction, kinds: list[str], active: Array) -> None:
        to, source = [kind for kind in kinds[1:] if re.fullmatch(r"[sufbe]+\d.*|bf16x?2?", kind)]
        if source == "e4m3x2":
            pair = self._value(warp, it.operands[1], "u16").astype(np.uint16)
            made = pair.view(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float16).view(np.uint32)
        elif to in ("f16x2", "bf16x2"):
            kind = np.dtype(np.float16 if to == "f16x2" else ml_dtypes.bfloat16)
            high, low = (self._value(warp, operand, source).astype(kind) for operand in it.operands[1:])
            made = np.stack([low, high], 1).reshape(-1).view(np.uint32)
        else:
            made = _bits(self._value(warp, it.operands[1], source).astype(_DTYPES[to]), to)
        self._set(warp, it.operands[0], made.astype(np.uint64), active)

    def _shfl(self, warp: Warp, it: Instruction, kinds: list[str], active: Array) -> None:
        assert active.all(), "a warp's threads must exchange together"
        value = self._value(warp, it.operands[1], "u32")
        by = self._value(warp, it.operands[2], "u32").astype(np.int64)
        lane = np.arange(LANES)
        sources = {"bfly": lane ^ by, "idx": by % LANES, "down": np.where(lane + by < LANES, lane + by, lane)}
        self._set(warp, it.operands[0].split("|")[0], value[sources[kinds[2]]].astype(np.uint64), active)

    def _mma(self, warp: Warp, it: Instruction, kinds: list[str], active: Array) -> None:
        assert kinds[3] == "m16n8k16" and kinds[-1] == "f32", it
        kind = np.dtype(np.float16 if kinds[-2] == "f16" else ml_dtypes.bfloat16)
        a, b = ([_typed(warp.registers[name], "u32").view(kind).reshape(LANES, 2).astype(np.float64)
                 for name in _listed(part)] for part in it.operands[1:3])  # fmt: skip
        c = [self._value(warp, name, "f32").astype(np.float64) for name in _listed(it.operands[3])]
        group, lane = np.arange(LANES) // 4, np.arange(LANES) % 4 * 2
        left, right, sums = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
        for k in range(2):
            for part, (down, along) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
                left[group + down, lane + along + k] = a[part][:, k]
            for part in range(2):
                right[lane + 8 * part + k, group] = b[part][:, k]
                sums[group + 8 * part, lane + k] = c[2 * part + k]
        whole = (left @ right + sums).astype(np.float32)
        for place, name in enumerate(_listed(it.operands[0])):
            self._set(warp, name, _bits(whole[group + 8 * (place // 2), lane + place % 2], "f32"), active)

    # memory

    def _ld(self, warp: Warp, it: Instruction, kinds: list[str], active: Array) -> None:
        kinds = [k for k in kinds if k not in _ORDER]
        names, size = _listed(it.operands[0]), int(re.sub(r"\D", "", kinds[-1])) // 8
        if kinds[1] == "param":
            number = self.module.parameters.index(it.operands[1].strip("[]"))
            if size == 4:
                self._set(warp, names[0], np.full(LANES, self.arguments[number].view(np.uint32)[0], np.uint64), active)
                return
            self._set(warp, names[0], np.full(LANES, (number + 1) << 40, np.uint64), active)
            return
        for place, name in enumerate(names):
            data = np.zeros((LANES, 8), np.uint8)
            data[active, :size] = self._bytes(warp, it.operands[1], kinds[1], size, active, place * size)
            self._set(warp, name, data.view(np.uint64)[:, 0], active)

    def _st(self, warp: Warp, it: Instruction, kinds: list[str], active: Array) -> None:
        kinds = [k for k in kinds if k not in _ORDER]
        size = int(re.sub(r"\D", "", kinds[-1])) // 8
        for place, name in enumerate(_listed(it.operands[1])):
            bits = self._value(warp, name, f"u{8 * size}").astype(np.uint64)
            data = bits.view(np.uint8).reshape(LANES, 8)[active, :size]
            self._bytes(warp, it.operands[0], kinds[1], size, active, place * size, data)

    def _bytes(self, warp: Warp, operand: str, where: str, size: int, active: Array, further: int,
               data: Array | None = None) -> Array:  # fmt: skip
        """Bytes [active lanes, size] at an operand's addresses, which `data` takes the place of."""
        places = self._addresses(warp, operand)[active, None] + further + np.arange(size)
        assert (places[:, 0] % size == 0).all(), f"addresses of {operand} are no multiples of {size}"
        held = self.shared.bytes
        if where == "shared":
            assert places.max() < len(held), f"beyond shared memory: {operand}"
            self.shared.touch("read" if data is None else "written", places, warp.threads[active], data)
        else:
            assert where == "global" and (places >> 40 == places[0, 0] >> 40).all(), operand
            held = self.arguments[int(places[0, 0] >> 40) - 1]
            places = places & (1 << 40) - 1
            assert places.max() < len(held), f"beyond an argument: {operand}"
        if data is not None:
            held[places] = data
        return held[places]

    def _addresses(self, warp: Warp, operand: str) -> Array:
        found = _ADDRESS.fullmatch(operand)
        assert found is not None, operand
        return self._value(warp, found[1], "u64").astype(np.int64) + int(found[2] or 0)

    def _atom(self, warp: Warp, it: Instruction, kinds: list[str], active: Array) -> None:
        """One lane adds to a number of global memory and takes what was there."""
        assert kinds[-2] == "add" and active.sum() == 1, it
        before = self._bytes(warp, it.operands[1], "global", 4, active, 0).copy()
        wide = np.zeros((LANES, 8), np.uint8)
        wide[active, :4] = before
        self._set(warp, it.operands[0], wide.view(np.uint64)[:, 0], active)
        added = before.view(np.uint32) + self._value(warp, it.operands[2], "u32")[active][:, None]
        self._bytes(warp, it.operands[1], "global", 4, active, 0, added.view(np.uint8))

    def _cp(self, warp: Warp, it: Instruction, kinds: list[str], active: Array) -> None:
        if "commit_group" in kinds:
            warp.groups.append(warp.open)
            warp.open = []
        elif "wait_group" in kinds:
            left = int(it.operands[0])
            while len(warp.groups) > left:
                for to, source in warp.groups.pop(0):
                    held, place = self.arguments[(source >> 40) - 1], source & (1 << 40) - 1
                    assert place + 16 <= len(held), "a copy from beyond an argument"
                    self.shared.bytes[to : to + 16] = held[place : place + 16]
                    self.shared.under_way[to : to + 16] = False
        else:
            to, source = (self._addresses(warp, operand)[active] for operand in it.operands[:2])
            assert kinds[:3] == ["cp", "async", "cg"] and it.operands[2] == "16", it
            assert (to % 16 == 0).all() and (source % 16 == 0).all(), "copies of 16 bytes lie at multiples of 16"
            places = to[:, None] + np.arange(16)
            assert not self.shared.under_way[places].any(), "a copy to where another is under way"
            self.shared.touch("written", places, warp.threads[active])
            self.shared.bytes[places], self.shared.under_way[places] = POISON, True
            warp.open += zip(to.tolist(), source.tolist(), strict=True)

    def _nothing(self, warp: Warp, it: Instruction, kinds: list[str], active: Array) -> None:
        """What tells the processor something."""

    _griddepcontrol = _createpolicy = _nanosleep = _nothing

    def _vote(self, warp: Warp, it: Instruction, kinds: list[str], active: Array) -> None:
        found = warp.registers[it.operands[1]].astype(bool).any()
        self._set(warp, it.operands[0], np.full(LANES, found, np.uint64), active)


_ORDER = ("relaxed", "volatile", "gpu", "sys")
_DTYPES: dict[str, Any] = {
    **{f"u{size}": np.dtype(f"uint{size}") for size in (8, 16, 32, 64)},
    **{f"b{size}": np.dtype(f"uint{size}") for size in (8, 16, 32, 64)},
    **{f"s{size}": np.dtype(f"int{size}") for size in (8, 16, 32, 64)},
    "f16": np.dtype(np.float16), "f32": np.dtype(np.float32), "f64": np.dtype(np.float64),
    "bf16": np.dtype(ml_dtypes.bfloat16), "pred": np.dtype(bool),
}  # fmt: skip


def _typed(bits: Array, kind: str) -> Array:
    """Numbers of a type from bits."""
    dtype = _DTYPES[kind]
    if kind == "pred":
        return bits.astype(bool)
    return bits.astype(np.uint64).view(np.uint8).reshape(LANES, 8)[:, : dtype.itemsize].copy().view(dtype)[:, 0]


def _bits(values: Array, kind: str) -> Array:
    """The same the other way."""
    dtype = _DTYPES[kind]
    data = np.zeros((LANES, 8), np.uint8)
    data[:, : dtype.itemsize] = np.ascontiguousarray(values.astype(dtype)).view(np.uint8).reshape(LANES, -1)
    return data.view(np.uint64)[:, 0]


def _listed(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{}").split(",")]
