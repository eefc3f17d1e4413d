"""Rows and weights as words of 32 bits: what lies where in them, and the numbers they hold."""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.dtypes import size_of
from ingot.kernels.cuda.build import FunctionBuilder

Array = np.ndarray[Any, Any]
Integers = np.ndarray[Any, np.dtype[np.int64]]
WORD = 4  # bytes
_UNPACKING = {"bfloat16": "bfloats", "float16": "halves", "float8_e4m3fn": "eighths"}


def places(each: int, pair: int) -> list[str]:
    """Where the row's words are that go with a word of `each` weights, `pair` numbers a word."""
    if each == pair:
        return ["words"]
    if pair == 1:
        lone = "words // 4 * 16 + words % 4 * 2 +" if each == WORD else f"words * {each} +"
        return [f"{lone} {k // 2 * 8 + k % 2 if each == WORD else k}" for k in range(each)]
    return [f"words // 4 * 8 + words % 4 + {4 * half}" for half in range(2)]


def order_of(depth: int, dtype: str) -> Integers | None:
    """Where the depth's numbers lie in memory, None: in their own order. Sixteen of eight bits, a thread's, lie so that
    their words fit two loads of 16 bytes of a row of 16 bits: word i has the numbers 2i, 2i + 1, 8 + 2i, 9 + 2i."""
    if size_of(dtype) != 1:
        return None
    return np.arange(depth).reshape(-1, 2, 4, 2).transpose(0, 2, 1, 3).reshape(-1)


def source_of(columns: str) -> str:
    """The same for a kernel's columns."""
    return f"({columns} // 16 * 16 + {columns} % 16 // 4 * 2 + {columns} % 4 // 2 * 8 + {columns} % 2)"


def parted(row: Array, each: int) -> Array:
    """[each, words]: the first numbers of all words, the second ones, …"""
    order = order_of(len(row), "float8_e4m3fn") if each == WORD else None
    return np.ascontiguousarray((row if order is None else row[order]).reshape(-1, each).T)


def numbers(f: FunctionBuilder, word: str, dtype: str, stem: str) -> list[str]:
    """What a word of 32 bits holds, in float32."""
    if dtype == "float32":
        return [f.let(f"({word}).to(tl.float32, bitcast=True)", stem)]
    names = [f.name(stem) for _ in range(WORD // size_of(dtype))]
    f.emit(f"{', '.join(names)} = {f.core('words', _UNPACKING[dtype])}({word})")
    if dtype == "float8_e4m3fn":
        f.faster(f"{', '.join(names)} = {{}}({word})", "words", "converted_eighths")
    return names
