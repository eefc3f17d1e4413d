"""Rows that a launch keeps for the products behind it: as they are, or rounded to eight bits, each with its size."""

from __future__ import annotations

from ingot.dtypes import size_of
from ingot.kernels.cuda.build import LANGUAGE, FunctionBuilder, Handle
from ingot.kernels.cuda.paged_update import LARGEST
from ingot.plan.extent import Extent, product

_LARGEST = {**LARGEST, "int8": 127.0}  # numbers that rows are rounded to
_FLOAT = 4


def keep(f: FunctionBuilder, dtype: str, rows: Extent, depth: int) -> tuple[Handle, Handle | None]:
    """A block's `x` at the places `columns` becomes a `row` of [rows, depth] of a type; of eight bits with the size
    [rows] that each is to be multiplied by, which is no number for a row with NaN or infinities."""
    made = f.build.temporary(product((rows, depth, size_of(dtype))), dtype)
    largest, sizes = _LARGEST.get(dtype), None
    if largest is not None:
        sizes = f.build.temporary(product((rows, _FLOAT)), "float32")
        f.emit(f"size = tl.maximum(tl.max(tl.abs(x)), 1e-12) / {largest!r}\nx = x / size")
        # maxima and minima lose NaN, sums keep it; those of large numbers would be infinite before the division
        f.emit(f"tl.store({f.pointer(sizes)} + row, size + 0.0 * tl.sum(x))")
        f.emit(f"x = tl.minimum(tl.maximum(x, -{largest!r}), {largest!r})")
    x = "libdevice.rint(x)" if dtype == "int8" else "x"
    place = f"{f.pointer(made)} + row.to(tl.int64) * {depth} + columns"
    f.emit(f"tl.store({place}, {x}.to({LANGUAGE[dtype]}), columns < {depth})")
    return made, sizes
