"""`CudaBuilder`: what a CUDA kernel generator writes with. A step is one or more launches of Triton functions.

    @kernel("Scale", on="cuda")
    def scale(build, node):
        f = build.function(warps=4)
        x, y = f.pointer(build.input(0)), f.pointer(build.output())
        f.emit(f"i = tl.program_id(0) * 1024 + tl.arange(0, 1024)")
        ...
        f.launch(ceil_div(node.output.elements, 1024))

Texts are complete modules; static sizes are numbers in them, symbolic ones arguments. Triton is not needed to write.
"""

from __future__ import annotations

import ast
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ingot.errors import BuildError
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

TYPES = {
    "float32": "fp32", "float64": "fp64", "float16": "fp16", "bfloat16": "bf16", "bool": "i1",
    "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64",
    "uint8": "u8", "uint16": "u16", "uint32": "u32", "uint64": "u64", "float8_e4m3fn": "fp8e4nv",
}  # fmt: skip
LANGUAGE = {
    "float32": "tl.float32", "float64": "tl.float64", "float16": "tl.float16", "bfloat16": "tl.bfloat16",
    "float8_e4m3fn": "tl.float8e4nv", "bool": "tl.int1",
    **{f"{u}int{b}": f"tl.{u}int{b}" for u in ("", "u") for b in (8, 16, 32, 64)},
}  # fmt: skip
NAME = "KERNEL"
# Begins lines that are code only on architectures where a kernel may begin before the one before it has ended.
OVERLAP = "#overlap "
# The same of lines with instructions that architectures have from EIGHTHS_FROM on.
NATIVE = "#native "
# A line of kernels whose blocks wait for each other: all of them have to be on the processors at once.
TOGETHER = "#together"
GLUON = "@gluon.jit"
_OF_GLUON = (
    "from triton.experimental import gluon",
    "from triton.experimental.gluon import language as gl",
)
_ALIGNED = 16
_FEW_BLOCKS = 4  # a processor: launches of more gain nothing by an early beginning, and each block pays for the wait


@dataclass(frozen=True)
class Handle:
    """A pointer argument: an operand, a packed constant, a temporary or a counter, with its element type."""

    kind: Literal["input", "output", "constant", "temporary", "counter"]
    index: int
    dtype: str

    @property
    def name(self) -> str:
        """Argument name."""
        return f"{self.kind}{self.index}"


@dataclass(frozen=True)
class Unit:
    """What is compiled: a module's text with one function NAME, its arguments' types, which numbers are multiples of
    16 (pointers always are), and Triton's options."""

    text: str
    signature: tuple[tuple[str, str], ...]
    aligned: tuple[str, ...]
    warps: int
    stages: int

    @property
    def gluon(self) -> bool:
        """Whether the text is Gluon, where layouts and shared memory are the kernel's own."""
        return GLUON in self.text

    @property
    def overlaps(self) -> bool:
        """Whether it waits itself for the launch before, on architectures where it can."""
        return OVERLAP in self.text

    @property
    def beside(self) -> bool:
        """Whether it lets the launch behind begin before its own wait: both are meant to be there together."""
        return self.text.find(f"{OVERLAP}gdc_launch_dependents()") < self.text.find(f"{OVERLAP}gdc_wait()")

    @property
    def together(self) -> bool:
        """Whether its blocks wait for each other, so that all must be there at once; it may have fewer than its grid
        says, one for each processor."""
        return TOGETHER in self.text

    def symbol(self, target: Architecture) -> str:
        """Content-addressed name."""
        known = repr((target.capability, self.text, self.signature, self.aligned, self.warps, self.stages))
        return "k" + hashlib.sha256(known.encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Call:
    """A launch: what to compile, its operands, and how many blocks. `copies`: it copies its operands onto each other in
    order, so that there is nothing to do where they share their storage."""

    unit: Unit
    handles: tuple[Handle, ...]
    extents: tuple[Extent, ...]
    grid: tuple[Extent, ...]
    copies: bool = False


@dataclass(frozen=True)
class LibraryUse:
    """What a library computes in the place of the launches: its recipe, the operands whose addresses it takes, a plan
    of its own making that the engine keeps."""

    library: str
    recipe: Mapping[str, Any]
    handles: tuple[Handle, ...]
    code: bytes = b""

    @property
    def entry(self) -> str:
        """What the code is called in the engine; "" for none."""
        return "l" + hashlib.sha256(self.code).hexdigest()[:20] if self.code else ""


@dataclass(eq=False)
class FunctionBuilder:
    """One Triton function being written; `launch` ends it."""

    build: CudaBuilder
    warps: int
    stages: int
    early: bool = False  # however many blocks there are
    gluon: bool = False
    together: bool = False
    handles: list[Handle] = field(default_factory=list)
    extents: list[Extent] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    imports: dict[str, None] = field(default_factory=dict)
    _indent: int = 1
    _names: int = 0
    _independent: int = 0
    _released: bool = False

    def pointer(self, handle: Handle) -> str:
        """Argument name of an operand's address."""
        if handle not in self.handles:
            self.handles.append(handle)
        return handle.name

    def extent(self, extent: Extent) -> str:
        """A number for a static extent, an argument's name for a symbolic one."""
        if isinstance(extent, int):
            return str(extent)
        if extent not in self.extents:
            self.extents.append(extent)
        return f"n{self.extents.index(extent)}"

    def emit(self, text: str) -> None:
        """Lines of the body, indented as written relative to each other."""
        self.lines += ["    " * self._indent + line for line in text.splitlines() if line.strip()]

    def name(self, stem: str = "v") -> str:
        """A fresh variable."""
        self._names += 1
        return f"{stem}{self._names}"

    def let(self, expression: str, stem: str = "v") -> str:
        """A fresh variable holding the expression."""
        name = self.name(stem)
        self.emit(f"{name} = {expression}")
        return name

    def core(self, module: str, function: str) -> str:
        """Name of a function of ingot.kernels.cuda.cores."""
        self.imports[f"from ingot.kernels.cuda.cores.{module} import {function}"] = None
        return function

    def prefetch(self, addresses: str) -> None:
        """Ask for the cache lines of constants at a block of addresses, while the launch before may still run."""
        self.imports[f"{OVERLAP}from ingot.kernels.cuda.cores.fetch import prefetch"] = None
        self.emit(f"{OVERLAP}prefetch({addresses})")

    def wait(self) -> None:
        """What was emitted until here needs nothing that an earlier launch writes, and writes nothing."""
        self._independent = len(self.lines)

    def release(self) -> None:
        """From here on the launch behind may begin, in the place of after the own wait."""
        self._released = True
        self.emit(f"{OVERLAP}gdc_launch_dependents()")

    def faster(self, line: str, module: str, function: str) -> None:
        """A line that takes the place of the one before it where the architecture has instructions for float8."""
        self.imports[f"{NATIVE}from ingot.kernels.cuda.cores.{module} import {function}"] = None
        self.emit(NATIVE + line.format(function))

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """Lines below a `for …:` or `if …:`."""
        self.emit(head)
        self._indent += 1
        yield
        self._indent -= 1

    def launch(self, *grid: Extent, copies: bool = False) -> None:
        """The function is complete; run it on a grid of blocks (`copies`: see Call)."""
        self.build.launches.append(self.call(*grid, copies=copies))

    def repeated(self, *grid: Extent) -> Callable[[int], Call]:
        """The function is complete; its launch for a value of the argument `count`, which its text may use."""
        call = self.call(*grid, further=("count",))
        return lambda count: replace(call, extents=(*call.extents, count))

    def call(self, *grid: Extent, copies: bool = False, further: Sequence[str] = ()) -> Call:
        """A launch of the function as it is; `further` arguments are numbers that the caller adds to its extents."""
        names = [*(h.name for h in self.handles), *(f"n{i}" for i in range(len(self.extents))), *further]
        types = [*("*" + TYPES[h.dtype] for h in self.handles), *["i32"] * (len(self.extents) + len(further))]
        aligned = tuple(f"n{i}" for i, e in enumerate(self.extents) if divisor_of(e) % _ALIGNED == 0)
        head = ["import triton", "import triton.language as tl", "from triton.language.extra import libdevice"]
        head.append(f"{OVERLAP}from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait")
        first, rest = self.lines[: self._independent], self.lines[self._independent :]
        overlap = [f"    {OVERLAP}gdc_wait()"]
        overlap += [] if self._released else [f"    {OVERLAP}gdc_launch_dependents()"]
        head += [*(_OF_GLUON if self.gluon else ()), *[TOGETHER] * self.together]
        define = ["", "", GLUON if self.gluon else "@triton.jit", f"def {NAME}({', '.join(names)}):"]
        lines = [*head, *self.imports, *define, *first, *overlap, *rest]
        blocks = product(grid)
        if isinstance(blocks, int) and blocks > _FEW_BLOCKS * self.build.target.processors and not self.early:
            lines = [line for line in lines if OVERLAP not in line]
        text = "\n".join(lines)
        unit = Unit(text + "\n", tuple(zip(names, types, strict=True)), aligned, self.warps, self.stages)
        return Call(unit, tuple(self.handles), tuple(self.extents), tuple(grid), copies)


@dataclass(eq=False)
class CudaBuilder:
    """Collects the launches, constants and temporaries of one step."""

    node: Node
    target: Architecture
    launches: list[Call] = field(default_factory=list)
    libraries: list[LibraryUse] = field(default_factory=list)
    constants: list[np.ndarray[Any, Any]] = field(default_factory=list)
    temporaries: list[Extent] = field(default_factory=list)
    counters: list[Extent] = field(default_factory=list)
    scratch_bytes: int = 0

    def input(self, index: int) -> Handle:
        """Input `index`; a constant one is stored with the engine as it is."""
        port = self.node.input(index)
        return self.pack(port.constant) if port.constant is not None else Handle("input", index, port.dtype)

    def output(self, index: int = 0) -> Handle:
        """Output `index`."""
        return Handle("output", index, self.node.outputs[index].dtype)

    def pack(self, array: np.ndarray[Any, Any]) -> Handle:
        """A constant stored with the engine at a multiple of 64 bytes."""
        for index, known in enumerate(self.constants):
            if known is array:
                return Handle("constant", index, array.dtype.name)
        self.constants.append(array)
        return Handle("constant", len(self.constants) - 1, array.dtype.name)

    def temporary(self, size: Extent, dtype: str) -> Handle:
        """Device memory of `size` bytes that lives during this step."""
        self.temporaries.append(size)
        return Handle("temporary", len(self.temporaries) - 1, dtype)

    def counter(self, size: Extent) -> Handle:
        """Device memory of `size` bytes of int32 that are zero when a launch begins, and when it ends must be."""
        self.counters.append(size)
        return Handle("counter", len(self.counters) - 1, "int32")

    def function(self, warps: int = 4, stages: int = 2, early: bool = False, gluon: bool = False,
                 together: bool = False) -> FunctionBuilder:  # fmt: skip
        """A Triton function to write. early: it does much before its wait, and may begin before the launch before it
        has ended however many blocks it has. gluon: it says itself what lies where in registers and shared memory.
        together: its blocks wait for each other."""
        return FunctionBuilder(self, warps, stages, early, gluon, together)

    def part(self, node: Node, inputs: Sequence[Handle | None], outputs: Sequence[Handle]) -> CudaBuilder:
        """A builder of a node that is a part of this step: its launches are this step's, its operands are those."""
        return _Part(node, self.target, self.launches, self.libraries, self.constants, self.temporaries, self.counters,
                     given=inputs, made=outputs)  # fmt: skip

    def checked(self) -> Sequence[Call]:
        """The launches; there must be one."""
        if not self.launches:
            raise BuildError(f"the kernel for {self.node.op} {self.node.name!r} launches nothing; a bug in Ingot")
        return self.launches


@dataclass(eq=False)
class _Part(CudaBuilder):
    """A builder whose operands another builder has named."""

    given: Sequence[Handle | None] = ()
    made: Sequence[Handle] = ()

    def input(self, index: int) -> Handle:
        """Input `index`, which is there."""
        handle = self.given[index]
        assert handle is not None, f"{self.node.op} has no input {index}"
        return handle

    def output(self, index: int = 0) -> Handle:
        """Output `index`."""
        return self.made[index]


def divisor_of(extent: Extent) -> int:
    """A number that divides the extent whatever its symbols are: "N*64" gives 64."""
    return extent if isinstance(extent, int) else _divisor(ast.parse(extent, mode="eval").body)


def _divisor(tree: ast.expr) -> int:
    match tree:
        case ast.Constant(value=int() as value):
            return value
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _divisor(left) * _divisor(right)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub(), right=right):
            return math.gcd(_divisor(left), _divisor(right))
    return 1
