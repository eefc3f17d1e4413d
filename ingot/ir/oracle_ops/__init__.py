"""Meanings of our own, by family. Importing this package fills the table."""

from ingot.ir.oracle_ops import (
    control,
    convolution,
    elementwise,
    gather,
    microsoft,
    microsoft_attention,
    normalize,
    pool,
    quantize,
    recurrent,
    sample,
)
from ingot.ir.oracle_ops.table import Value, find, meaning

FAMILIES = (
    control, convolution, elementwise, gather, microsoft, microsoft_attention, normalize, pool, quantize, recurrent,
    sample,
)  # fmt: skip

__all__ = ["FAMILIES", "Value", "find", "meaning"]
