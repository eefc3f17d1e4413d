"""The code section of a CUDA variant: a table of kernels (JSON), then their cubins."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from ingot.errors import EngineError

_LENGTH = struct.Struct("<Q")
_BESIDE, _TOGETHER = 2, 3  # in the place of whether a kernel overlaps


@dataclass(frozen=True)
class Code:
    """One kernel: `function` of the cubin, launched with so many threads and bytes of dynamic shared memory.
    `overlaps`: it waits itself for the launch before, and may be begun while that runs; `beside`: both are meant to
    share a processor's shared memory; `together`: besides, its blocks wait for each other, one on each processor, so
    that no other such kernel may be there. What a library keeps here has no function."""

    cubin: bytes | memoryview
    function: str
    threads: int
    shared: int
    overlaps: bool = False
    beside: bool = False
    together: bool = False


def pack(codes: Mapping[str, Code]) -> bytes:
    """The section, kernels in order of their names."""
    table, parts, offset = {}, [], 0
    for name, code in sorted(codes.items()):
        begins = _TOGETHER if code.together else _BESIDE if code.beside else code.overlaps
        table[name] = [offset, len(code.cubin), code.function, code.threads, code.shared, begins]
        parts.append(bytes(code.cubin))
        offset += len(code.cubin)
    text = json.dumps(table, sort_keys=True, separators=(",", ":")).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *parts])


def unpack(section: bytes | memoryview) -> dict[str, Code]:
    """The kernels by name; EngineError when the section makes no sense."""
    try:
        view = memoryview(section)
        (length,) = _LENGTH.unpack_from(view)
        start = _LENGTH.size + length
        table = json.loads(bytes(view[_LENGTH.size : start]))
        return {
            name: Code(
                view[start + offset : start + offset + size],
                function,
                threads,
                shared,
                bool(begins),
                begins >= _BESIDE,
                begins == _TOGETHER,
            )
            for name, (offset, size, function, threads, shared, begins) in table.items()
        }
    except (ValueError, TypeError, struct.error) as error:
        raise EngineError(f"the kernels inside the engine cannot be read ({error}); rebuild the engine") from None
