"""Renderers of Cast, Quantize and Dequantize."""

from __future__ import annotations
