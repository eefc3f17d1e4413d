"""Renderers of Cast, Quantize and Dequantize."""
