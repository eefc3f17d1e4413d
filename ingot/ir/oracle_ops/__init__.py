"""Meanings of our own, by family. Importing this package fills the table."""

from ingot.ir.oracle_ops import control, convolution, elementwise, pool, quantize
from ingot.ir.oracle_ops.table import Value, find, meaning

__all__ = ["Value", "control", "convolution", "elementwise", "find", "meaning", "pool", "quantize"]
