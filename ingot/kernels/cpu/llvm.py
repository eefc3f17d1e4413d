"""LLVM IR as text, built from typed values with operators: `acc = f.fma(x, w, acc)`, `offset = row * stride + 4`.

Values are SSA names with an LLVM type; Python ints stand for constants and fold. Control flow takes functions as
bodies,
loop-carried values go in and come out as tuples. Nothing here knows about operators or layouts.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Body = Callable[..., "Sequence[Value] | None"]

FLOATS = {"half": 16, "bfloat": 16, "float": 32, "double": 64}
_INTEGER_OPS = {"+": "add", "-": "sub", "*": "mul"}
_FLOAT_OPS = {"+": "fadd", "-": "fsub", "*": "fmul"}


def lanes_of(type_: str) -> int:
    """Number of lanes: 16 for "<16 x float>", 1 for a scalar."""
    return int(type_[1 : type_.index(" ")]) if type_.startswith("<") else 1


def element_of(type_: str) -> str:
    """Element type: "float" for "<16 x float>"."""
    return type_[type_.index(" x ") + 3 : -1] if type_.startswith("<") else type_


def vector(element: str, lanes: int) -> str:
    """Type of `lanes` elements; a single lane is the scalar."""
    return f"<{lanes} x {element}>" if lanes > 1 else element


def bits_of(type_: str) -> int:
    """Bits of one element."""
    element = element_of(type_)
    return FLOATS[element] if element in FLOATS else 64 if element == "ptr" else int(element[1:])


def bytes_of(type_: str) -> int:
    """Bytes of a whole scalar or vector (i1 counts as one byte a lane)."""
    return max(bits_of(type_) // 8, 1) * lanes_of(type_)


def is_float(type_: str) -> bool:
    """Whether the elements are floating point."""
    return element_of(type_) in FLOATS


def _float_literal(element: str, value: float) -> str:
    if element == "half":
        return "0xH" + struct.pack(">e", value).hex().upper()
    if element == "bfloat":
        return "0xR" + struct.pack(">f", value).hex().upper()[:4]
    if element == "float" and value == value and abs(value) != float("inf"):
        value = struct.unpack("<f", struct.pack("<f", value))[0]
    return "0x" + struct.pack(">d", value).hex().upper()


@dataclass(frozen=True, eq=False)
class Value:
    """An SSA value of one function; `+ - *` with values of the same type or Python numbers."""

    function: Function
    type: str
    text: str

    def __add__(self, other: Operand) -> Value:
        return self if other == 0 and isinstance(other, int) else self.function.arithmetic("+", self, other)

    def __radd__(self, other: Operand) -> Value:
        return self + other

    def __sub__(self, other: Operand) -> Value:
        return self if other == 0 and isinstance(other, int) else self.function.arithmetic("-", self, other)

    def __rsub__(self, other: Operand) -> Value:
        return self.function.arithmetic("-", other, self)

    def __mul__(self, other: Operand) -> Value:
        return self if other == 1 and isinstance(other, int) else self.function.arithmetic("*", self, other)

    def __rmul__(self, other: Operand) -> Value:
        return self * other


Operand = Value | int | float
Index = Value | int


@dataclass(eq=False)
class Function:
    """One `define void` under construction. `arguments` are (type, name) pairs, reachable as `f["name"]`."""

    name: str
    arguments: tuple[tuple[str, str], ...]
    noalias: bool = False
    internal: bool = False
    lines: list[str] = field(default_factory=list)
    declarations: set[str] = field(default_factory=set)
    origins: dict[str, object] = field(default_factory=dict)  # what values were made from, where that helps later
    _locals: list[str] = field(default_factory=list)
    _count: int = 0
    _block: str = "entry"

    @property
    def rounds_bfloat16(self) -> bool:
        """Whether the processor has an instruction that rounds to bfloat16."""
        return False

    def __getitem__(self, name: str) -> Value:
        return Value(self, {n: t for t, n in self.arguments}[name], f"%{name}")

    def text(self) -> str:
        """The finished definition."""
        alias = " noalias" if self.noalias else ""
        arguments = ", ".join(f"{t}{alias if t == 'ptr' else ''} %{n}" for t, n in self.arguments)
        linkage = "internal " if self.internal else ""
        body = "\n".join([*self._locals, *self.lines])
        return f"define {linkage}void @{self.name}({arguments}) #0 {{\nentry:\n{body}\n  ret void\n}}\n"

    # -- emission -------------------------------------------------------------------------------------------------
    def emit(self, line: str) -> None:
        """Append a line that yields no value."""
        self.lines.append("  " + line)

    def value(self, type_: str, expression: str) -> Value:
        """Append `%n = expression` of the given type."""
        self._count += 1
        self.lines.append(f"  %v{self._count} = {expression}")
        return Value(self, type_, f"%v{self._count}")

    def constant(self, type_: str, number: float) -> Value:
        """A number as a scalar or, splatted, a vector of the type."""
        element = element_of(type_)
        if element == "i1":
            literal = "true" if number else "false"
        elif element in FLOATS:
            literal = _float_literal(element, float(number))
        else:
            literal = str(int(number))
        return Value(self, type_, literal if element == type_ else f"splat ({element} {literal})")

    def lift(self, operand: Operand, type_: str) -> Value:
        """A Python number as a constant of the type; a value unchanged."""
        return operand if isinstance(operand, Value) else self.constant(type_, operand)

    def index(self, operand: Index) -> Value:
        """An i64 value."""
        return self.lift(operand, "i64")

    # -- arithmetic -----------------------------------------------------------------------------------------------
    def arithmetic(self, symbol: str, a: Operand, b: Operand) -> Value:
        """`a symbol b` for + - *; one side may be a Python number."""
        type_ = a.type if isinstance(a, Value) else b.type  # type: ignore[union-attr]
        table = _FLOAT_OPS if is_float(type_) else _INTEGER_OPS
        return self.binary(table[symbol], self.lift(a, type_), self.lift(b, type_))

    def binary(self, instruction: str, a: Operand, b: Operand) -> Value:
        """An LLVM binary instruction by name: fdiv, sdiv, udiv, srem, and, or, xor, shl, lshr, ashr …"""
        type_ = a.type if isinstance(a, Value) else b.type  # type: ignore[union-attr]
        a, b = self.lift(a, type_), self.lift(b, type_)
        return self.value(type_, f"{instruction} {type_} {a.text}, {b.text}")

    def divide(self, a: Index, b: Index) -> Index:
        """Unsigned i64 quotient; folds Python ints."""
        if b == 1 and isinstance(b, int):
            return a
        return a // b if isinstance(a, int) and isinstance(b, int) else self.binary("udiv", a, b)

    def remainder(self, a: Index, b: Index) -> Index:
        """Unsigned i64 remainder; folds Python ints."""
        if b == 1 and isinstance(b, int):
            return 0
        return a % b if isinstance(a, int) and isinstance(b, int) else self.binary("urem", a, b)

    def minimum(self, a: Index, b: Index) -> Index:
        """Signed i64 minimum; folds Python ints."""
        return min(a, b) if isinstance(a, int) and isinstance(b, int) else self.call("llvm.smin", "i64", a, b)

    def maximum(self, a: Index, b: Index) -> Index:
        """Signed i64 maximum; folds Python ints."""
        return max(a, b) if isinstance(a, int) and isinstance(b, int) else self.call("llvm.smax", "i64", a, b)

    def compare(self, predicate: str, a: Operand, b: Operand) -> Value:
        """icmp or fcmp by element type: predicate such as slt, eq, ult, olt, oeq, uno."""
        type_ = a.type if isinstance(a, Value) else b.type  # type: ignore[union-attr]
        a, b = self.lift(a, type_), self.lift(b, type_)
        instruction = "fcmp" if is_float(type_) else "icmp"
        return self.value(vector("i1", lanes_of(type_)), f"{instruction} {predicate} {type_} {a.text}, {b.text}")

    def select(self, condition: Value, a: Operand, b: Operand) -> Value:
        """Lane-wise `condition ? a : b`."""
        type_ = a.type if isinstance(a, Value) else b.type  # type: ignore[union-attr]
        a, b = self.lift(a, type_), self.lift(b, type_)
        return self.value(type_, f"select {condition.type} {condition.text}, {type_} {a.text}, {type_} {b.text}")

    def cast(self, instruction: str, value: Value, element: str) -> Value:
        """A conversion instruction (sitofp, fptosi, trunc, zext, sext, fpext, fptrunc) to another element type."""
        target = vector(element, lanes_of(value.type))
        return value if target == value.type else self.value(
            target, f"{instruction} {value.type} {value.text} to {target}"
        )  # fmt: skip

    def bitcast(self, value: Value, type_: str) -> Value:
        """The same bits as another type."""
        if value.type == type_:
            return value
        return self.value(type_, f"bitcast {value.type} {value.text} to {type_}")

    # -- intrinsics -----------------------------------------------------------------------------------------------
    def call(self, intrinsic: str, result: str, *operands: Operand, overload: str | None = None) -> Value:
        """An overloaded LLVM intrinsic `name.<type>`; numbers become constants of the result type."""
        values = [self.lift(o, result) for o in operands]
        element = element_of(overload or result)
        suffix = {"float": "f32", "double": "f64", "half": "f16", "bfloat": "bf16"}.get(element, element)
        lanes = lanes_of(overload or result)
        return self.intrinsic(f"{intrinsic}.{f'v{lanes}' if lanes > 1 else ''}{suffix}", result, *values)

    def intrinsic(self, name: str, result: str, *values: Value) -> Value:
        """Any intrinsic by its full name; declared once."""
        types = ", ".join(v.type for v in values)
        self.declarations.add(f"declare {result} @{name}({types})")
        arguments = ", ".join(f"{v.type} {v.text}" for v in values)
        if result != "void":
            return self.value(result, f"call {result} @{name}({arguments})")
        self.emit(f"call void @{name}({arguments})")
        return Value(self, "void", "")

    def fma(self, a: Operand, b: Operand, c: Value) -> Value:
        """a * b + c in one rounding."""
        return self.call("llvm.fma", c.type, a, b, c)

    # -- memory ---------------------------------------------------------------------------------------------------
    def at(self, pointer: Value, offset: Index) -> Value:
        """The pointer moved by `offset` bytes."""
        if isinstance(offset, int) and offset == 0:
            return pointer
        return self.value("ptr", f"getelementptr i8, ptr {pointer.text}, i64 {self.index(offset).text}")

    def load(self, type_: str, pointer: Value, offset: Index = 0, align: int | None = None) -> Value:
        """Read a scalar or vector; alignment defaults to the element's size."""
        align = align or max(bits_of(type_) // 8, 1)
        return self.value(type_, f"load {type_}, ptr {self.at(pointer, offset).text}, align {align}")

    def store(self, value: Value, pointer: Value, offset: Index = 0, align: int | None = None) -> None:
        """Write a scalar or vector."""
        align = align or max(bits_of(value.type) // 8, 1)
        self.emit(f"store {value.type} {value.text}, ptr {self.at(pointer, offset).text}, align {align}")

    def splat(self, scalar: Value, lanes: int) -> Value:
        """A scalar in every lane."""
        if lanes == 1:
            return scalar
        type_ = vector(scalar.type, lanes)
        first = self.value(type_, f"insertelement {type_} poison, {scalar.type} {scalar.text}, i64 0")
        return self.value(type_, f"shufflevector {type_} {first.text}, {type_} poison, <{lanes} x i32> zeroinitializer")

    def shuffle(self, a: Value, b: Value | None, lanes: Sequence[int]) -> Value:
        """Lanes picked from a then b, by position."""
        mask = ", ".join(f"i32 {lane}" for lane in lanes)
        second = "poison" if b is None else b.text
        return self.value(
            vector(element_of(a.type), len(lanes)),
            f"shufflevector {a.type} {a.text}, {a.type} {second}, <{len(lanes)} x i32> <{mask}>",
        )

    def extract(self, value: Value, lane: Index) -> Value:
        """One lane as a scalar."""
        return self.value(
            element_of(value.type), f"extractelement {value.type} {value.text}, i64 {self.index(lane).text}"
        )

    def insert(self, value: Value, scalar: Value, lane: Index) -> Value:
        """The vector with one lane replaced."""
        return self.value(
            value.type,
            f"insertelement {value.type} {value.text}, {scalar.type} {scalar.text}, i64 {self.index(lane).text}",
        )

    def first_lanes(self, count: Index, lanes: int) -> Value:
        """Mask of the first `count` of `lanes` lanes (count may exceed lanes)."""
        steps = ", ".join(f"i64 {i}" for i in range(lanes))
        limit = self.splat(self.index(count), lanes) if isinstance(count, Value) else self.constant(
            vector("i64", lanes), count
        )  # fmt: skip
        return self.value(f"<{lanes} x i1>", f"icmp sgt <{lanes} x i64> {limit.text}, <{steps}>")

    def load_masked(self, type_: str, pointer: Value, mask: Value, offset: Index = 0, other: float = 0) -> Value:
        """Read the lanes of `mask`; the others are `other` and their memory is not touched."""
        width, place = f"v{lanes_of(type_)}{self._suffix(type_)}", self.at(pointer, offset)
        name, align = f"llvm.masked.load.{width}.p0", max(bits_of(type_) // 8, 1)
        self.declarations.add(f"declare {type_} @{name}(ptr, {mask.type}, {type_})")
        return self.value(
            type_,
            f"call {type_} @{name}(ptr align {align} {place.text}, {mask.type} {mask.text}, "
            f"{type_} {self.constant(type_, other).text})",
        )

    def store_masked(self, value: Value, pointer: Value, mask: Value, offset: Index = 0) -> None:
        """Write the lanes of `mask` only."""
        width, place = f"v{lanes_of(value.type)}{self._suffix(value.type)}", self.at(pointer, offset)
        name, align = f"llvm.masked.store.{width}.p0", max(bits_of(value.type) // 8, 1)
        self.declarations.add(f"declare void @{name}({value.type}, ptr, {mask.type})")
        self.emit(
            f"call void @{name}({value.type} {value.text}, ptr align {align} {place.text}, {mask.type} {mask.text})"
        )

    @staticmethod
    def _suffix(type_: str) -> str:
        element = element_of(type_)
        return {"float": "f32", "double": "f64", "half": "f16", "bfloat": "bf16"}.get(element, element)

    def prefetch(self, pointer: Value, offset: Index = 0, locality: int = 3) -> None:
        """Ask for the cache line at pointer + offset: into the first-level cache (3) or the second (2)."""
        self.declarations.add("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
        self.emit(f"call void @llvm.prefetch.p0(ptr {self.at(pointer, offset).text}, i32 0, i32 {locality}, i32 1)")

    def local(self, type_: str, count: int = 1, align: int = 64) -> Value:
        """Stack memory of the function, allocated once at entry."""
        self._count += 1
        self._locals.append(f"  %s{self._count} = alloca {type_}, i64 {count}, align {align}")
        return Value(self, "ptr", f"%s{self._count}")

    # -- control flow ---------------------------------------------------------------------------------------------
    def loop(
        self, begin: Index, end: Index, body: Body, carried: Sequence[Value] = (), step: Index = 1
    ) -> tuple[Value, ...]:
        """`for i in range(begin, end, step): carried = body(i, *carried)`; returns the carried values after it."""
        self._count += 1
        tag, before, end_value = self._count, self._block, self.index(end)
        start = self.index(begin)
        head, inside, after = f"head{tag}", f"body{tag}", f"done{tag}"
        self.emit(f"br label %{head}")
        self._enter(head)
        slot = len(self.lines)
        self.lines.append("")
        variable = Value(self, "i64", f"%i{tag}")
        state = [Value(self, v.type, f"%c{tag}_{k}") for k, v in enumerate(carried)]
        condition = self.compare("slt", variable, end_value)
        self.emit(f"br i1 {condition.text}, label %{inside}, label %{after}")
        self._enter(inside)
        results = tuple(body(variable, *state) or ())
        if len(results) != len(state):
            raise ValueError(f"loop body returned {len(results)} values for {len(state)} carried ones")
        advanced = variable + step
        phis = [(variable, start, advanced), *zip(state, carried, results, strict=True)]
        self.lines[slot] = "\n".join(
            f"  {v.text} = phi {v.type} [{a.text}, %{before}], [{b.text}, %{self._block}]" for v, a, b in phis
        )
        self.emit(f"br label %{head}")
        self._enter(after)
        return tuple(state)

    def loop_while(
        self, condition: Callable[..., Value], body: Body, carried: Sequence[Value]
    ) -> tuple[Value, ...]:  # fmt: skip
        """`while condition(*carried): carried = body(*carried)`; returns the carried values after it."""
        self._count += 1
        tag, before = self._count, self._block
        head, inside, after = f"head{tag}", f"body{tag}", f"done{tag}"
        self.emit(f"br label %{head}")
        self._enter(head)
        slot = len(self.lines)
        self.lines.append("")
        state = [Value(self, v.type, f"%c{tag}_{k}") for k, v in enumerate(carried)]
        asked = condition(*state)
        self.emit(f"br i1 {asked.text}, label %{inside}, label %{after}")
        self._enter(inside)
        results = tuple(body(*state) or ())
        self.lines[slot] = "\n".join(
            f"  {v.text} = phi {v.type} [{a.text}, %{before}], [{b.text}, %{self._block}]"
            for v, a, b in zip(state, carried, results, strict=True)
        )
        self.emit(f"br label %{head}")
        self._enter(after)
        return tuple(state)

    def when(
        self, condition: Value, then: Body, otherwise: Body | None = None, unchanged: Sequence[Value] = ()
    ) -> tuple[Value, ...]:
        """`then()` if the i1 condition holds, else `otherwise()`, else `unchanged`; returns the merged values."""
        self._count += 1
        yes, no, after = f"then{self._count}", f"else{self._count}", f"join{self._count}"
        self.emit(f"br i1 {condition.text}, label %{yes}, label %{no}")
        self._enter(yes)
        first = tuple(then() or ())
        first_block = self._block
        self.emit(f"br label %{after}")
        self._enter(no)
        second = tuple((otherwise() if otherwise else unchanged) or ())
        second_block = self._block
        self.emit(f"br label %{after}")
        self._enter(after)
        return tuple(
            self.value(a.type, f"phi {a.type} [{a.text}, %{first_block}], [{b.text}, %{second_block}]")
            for a, b in zip(first, second, strict=True)
        )

    def _enter(self, label: str) -> None:
        self.lines.append(f"{label}:")
        self._block = label


def module(functions: Sequence[Function], attributes: str, extra: str = "") -> str:
    """A complete module of the functions; `attributes` is what follows `attributes #0 =`."""
    declarations = sorted(set().union(*(f.declarations for f in functions)))
    return "\n".join([*declarations, extra, *(f.text() for f in functions), f"attributes #0 = {{ {attributes} }}\n"])
