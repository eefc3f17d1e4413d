"""Relocatable objects → one position-independent image, so that the runtime only maps it.

All relocations the kernels need are PC-relative and are resolved here; anything else, and any undefined symbol (LLVM
calling
memset or expf behind our back), is refused. Source: System V ABI, AMD64 supplement, section 4.4.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from ingot.errors import BuildError

_ALLOCATED, _NOBITS, _SYMTAB, _RELA = 2, 8, 2, 4
_PC_RELATIVE = {2, 4}  # R_X86_64_PC32, R_X86_64_PLT32
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")


@dataclass
class _Object:
    data: bytes
    sections: list[tuple[int, ...]] = field(default_factory=list)
    placed: dict[int, int] = field(default_factory=dict)
    symbols: list[tuple[str, int | None]] = field(default_factory=list)


def link(objects: Sequence[bytes]) -> tuple[bytes, dict[str, int]]:
    """Image bytes and the offset of every global symbol. BuildError names what cannot be resolved."""
    image = bytearray()
    parsed = [_place(data, image) for data in objects]
    exported: dict[str, int] = {}
    for item in parsed:
        _read_symbols(item)
        exported.update({name: address for name, address in item.symbols if address is not None and name})
    for item in parsed:
        _relocate(item, image, exported)
    return bytes(image), exported


def _place(data: bytes, image: bytearray) -> _Object:
    offset = struct.unpack_from("<Q", data, 40)[0]
    size, count = struct.unpack_from("<HH", data, 58)
    item = _Object(data, [_SECTION.unpack_from(data, offset + i * size) for i in range(count)])
    for index, (_, kind, flags, _, start, length, _, _, alignment, _) in enumerate(item.sections):
        if not flags & _ALLOCATED or not length or _is_unwind(item, index):
            continue
        image.extend(b"\0" * (-len(image) % max(alignment, 64)))
        item.placed[index] = len(image)
        image.extend(b"\0" * length if kind == _NOBITS else data[start : start + length])
    return item


def _is_unwind(item: _Object, index: int) -> bool:
    names = item.sections[struct.unpack_from("<H", item.data, 62)[0]]
    start = names[4] + item.sections[index][0]
    return item.data[start : item.data.index(b"\0", start)] in (b".eh_frame", b".note.GNU-stack")


def _read_symbols(item: _Object) -> None:
    for section in item.sections:
        if section[1] != _SYMTAB:
            continue
        strings = item.sections[section[6]][4]
        for k in range(section[5] // _SYMBOL.size):
            name, _, _, home, value, _ = _SYMBOL.unpack_from(item.data, section[4] + k * _SYMBOL.size)
            start = strings + name
            text = item.data[start : item.data.index(b"\0", start)].decode()
            item.symbols.append((text, item.placed[home] + value if home in item.placed else None))


def _relocate(item: _Object, image: bytearray, exported: dict[str, int]) -> None:
    for section in item.sections:
        if section[1] != _RELA or section[7] not in item.placed:
            continue
        for k in range(section[5] // _RELOCATION.size):
            offset, info, addend = _RELOCATION.unpack_from(item.data, section[4] + k * _RELOCATION.size)
            name, address = item.symbols[info >> 32]
            target = address if address is not None else exported.get(name)
            if target is None:
                raise BuildError(f"generated code calls {name!r}, which nothing defines; this is a bug in Ingot")
            if info & 0xFFFFFFFF not in _PC_RELATIVE:
                raise BuildError(f"generated code needs relocation type {info & 0xFFFFFFFF}, a bug in Ingot")
            place = item.placed[section[7]] + offset
            struct.pack_into("<i", image, place, target + addend - place)
