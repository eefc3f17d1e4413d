"""AArch64 for tests: the instruction set, and kernels as static executables that qemu-user can run.

An executable has two parts in memory: code, which begins with a stub that calls the kernel's phases, writes the output
to standard output and exits; and data, everything the kernel points at. Source of relocations and instructions: ELF for
the Arm 64-bit Architecture; Arm Architecture Reference Manual, A64.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.kernels import Candidate, with_layouts
from ingot.kernels.cpu.build import KernelBuilder
from ingot.kernels.cpu.compile import compile_object
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.link import _RELA, _RELOCATION, _Object, _place, _read_symbols
from ingot.kernels.cpu.standalone import generate
from ingot.kernels.layout import from_blocked, physical_shape, to_blocked
from ingot.kernels.node import Node, Port

NEON = Isa("neon", 4, 32, "generic", "+neon", frozenset({"asimd"}), "aarch64-unknown-linux-gnu")
MACHINE = 183  # AArch64 in an ELF header
CODE, DATA = 0x401000, 0x800000
_CALLS, _PAGE, _OFFSET = {282, 283}, 275, 277
_SCALED = {278: 0, 284: 1, 285: 2, 286: 3, 299: 4}  # loads and stores count in elements of their size


def emulator() -> str | None:
    """qemu-user for AArch64, where it is installed (Debian: qemu-user or qemu-user-static)."""
    return shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


def linked(data: bytes) -> tuple[bytearray, dict[str, int]]:
    """An object placed behind the stub's room, its relocations resolved; undefined symbols raise KeyError."""
    image = bytearray(64)
    item = _place(data, image)
    _read_symbols(item)
    known = {name: place for name, place in item.symbols if place is not None}
    for kind, place, target in _relocations(item, known):
        (word,) = struct.unpack_from("<I", image, place)
        struct.pack_into("<I", image, place, word | _resolved(kind, CODE + place, CODE + target))
    return image, known


def _relocations(item: _Object, known: dict[str, int]) -> list[tuple[int, int, int]]:
    """(type, place, target) of everything to resolve."""
    found = []
    for section in item.sections:
        if section[1] != _RELA or section[7] not in item.placed:
            continue
        for k in range(section[5] // _RELOCATION.size):
            offset, info, addend = _RELOCATION.unpack_from(item.data, section[4] + k * _RELOCATION.size)
            name, address = item.symbols[info >> 32]
            target = known[name] if address is None else address
            found.append((info & 0xFFFFFFFF, item.placed[section[7]] + offset, target + addend))
    return found


def _resolved(kind: int, place: int, target: int) -> int:
    """The bits that a relocation puts into its instruction."""
    if kind in _CALLS:
        return (target - place) >> 2 & 0x3FFFFFF
    if kind == _PAGE:
        pages = (target >> 12) - (place >> 12)
        return (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5
    if kind == _OFFSET:
        return (target & 0xFFF) << 10
    return (target & 0xFFF) >> _SCALED[kind] << 10


def _stub(main: int, output: int, size: int) -> bytes:
    """Call main, write(1, output, size), exit(0)."""
    call = 0x94000000 | ((main - CODE) >> 2 & 0x3FFFFFF)
    words = (call, 0xD2800020, 0x58000101, 0x58000122, 0xD2800808, 0xD4000001, 0xD2800000, 0xD2800BA8, 0xD4000001, 0)
    return struct.pack("<10IQQ", *words, output, size)


def _elf(code: bytes, data: bytes) -> bytes:
    """A static executable of two segments."""
    offset = 0x1000 + -(-len(code) // 0x1000) * 0x1000
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, MACHINE, 1, CODE, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    for place, start, content in ((0x1000, CODE, code), (offset, DATA, data)):
        header += struct.pack("<IIQQQQQQ", 1, 7, place, start, start, len(content), len(content), 0x1000)
    return header.ljust(0x1000, b"\0") + code.ljust(offset - 0x1000, b"\0") + data


class _Memory:
    """The data segment while it is filled."""

    def __init__(self) -> None:
        self.content = bytearray()

    def add(self, array: np.ndarray) -> int:
        """Its address."""
        start = len(self.content)
        data = np.ascontiguousarray(array).tobytes()
        self.content += data + bytes(-len(data) % 64 + 64)
        return DATA + start


def run(node: Node, candidate: Candidate, inputs: Sequence[np.ndarray | None], folder: Path) -> np.ndarray:
    """The candidate's first output, computed by the emulator."""
    node = with_layouts(node, candidate.ports)
    build = generate(node, candidate, NEON)
    memory = _Memory()
    port = node.output
    shape = tuple(int(size) for size in physical_shape(port.shape, port.layout, NEON.lanes))
    output = np.zeros(shape, numpy_dtype(port.dtype))
    places = {"output": memory.add(output)}
    addresses = [_address(build, node, handle, inputs, memory, places) for handle in build.handles]
    scratch = memory.add(np.zeros(build.scratch_bytes + 64, np.uint8))
    image, symbols = linked(compile_object(f"{build.text()}\n{_main(build, addresses, scratch)}", NEON))
    image[:56] = _stub(CODE + symbols["main"], places["output"], output.nbytes)
    program = folder / "program"
    program.write_bytes(_elf(bytes(image), bytes(memory.content)))
    program.chmod(0o755)
    found = emulator()
    assert found is not None
    done = subprocess.run([found, str(program)], capture_output=True, check=True, timeout=60)
    result = np.frombuffer(done.stdout, output.dtype).reshape(shape)
    return from_blocked(result, int(port.shape[1])) if port.layout == "blocked" else result


def _address(build: KernelBuilder, node: Node, handle: object, inputs: Sequence[np.ndarray | None], memory: _Memory,
             places: dict[str, int]) -> int:  # fmt: skip
    kind, index = handle.kind, handle.index  # type: ignore[attr-defined]
    if kind == "output":
        return places["output"]
    if kind == "constant":
        return memory.add(build.constants[index])
    if kind == "temporary":
        return memory.add(np.zeros(int(build.temporaries[index]), np.uint8))
    array, port = inputs[index], node.input(index)
    assert array is not None
    return memory.add(_stored(array, port))


def _stored(array: np.ndarray, port: Port) -> np.ndarray:
    return to_blocked(array, NEON.lanes) if port.layout == "blocked" else array


def _main(build: KernelBuilder, addresses: Sequence[int], scratch: int) -> str:
    """IR of a function that runs every phase over all its items."""
    calls = []
    for number, phase in enumerate(build.phases):
        pointers = [f"ptr inttoptr (i64 {address} to ptr)" for address in (*addresses, scratch)]
        calls.append(f"call void @KERNEL_p{number}({', '.join(pointers)}, i64 0, i64 {int(phase.count)})")
    return "\n".join(["define void @main() {", *calls, "ret void", "}"])
