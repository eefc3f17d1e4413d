"""Meanings of our own, by family. Importing this package fills the table."""

from ingot.ir.oracle_ops import (
    control,
    convolution,
    elementwise,
    microsoft,
    microsoft_attention,
    pool,
    quantize,
    recurrent,
)
from ingot.ir.oracle_ops.table import Value, find, meaning

FAMILIES = (control, convolution, elementwise, microsoft, microsoft_attention, pool, quantize, recurrent)

__all__ = ["FAMILIES", "Value", "find", "meaning"]
