"""Fourier transforms as products with constant matrices, affine grids, causal convolutions with state."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ingot.dtypes import numpy_dtype
from ingot.ir.elementwise import Array
from ingot.ir.graph import dtype_of, scalar_value, shape
from ingot.passes.canonical_table import Builder, Reject, Result, canonical, known, reject

_LARGEST_TRANSFORM = 1024  # a matrix beyond this loses against a fast transform


@canonical("DFT")
def dft(op: Builder) -> Result:
    """Linear with the transform's matrix over [real, imaginary] pairs"""
    rank = len(shape(op.x()))
    axis = op.attribute("axis", 1) if op.version < 20 else scalar_value(op.optional(2)) if op.given(2) else -2
    length = scalar_value(op.optional(1)) if op.given(1) else shape(op.x())[-2 if axis is None else int(axis) % rank]
    inverse, onesided = op.attribute("inverse", 0), bool(op.attribute("onesided", 0))
    if inverse:
        return reject("an inverse is left to the fast transform")
    if axis is None or not isinstance(length, int):
        return reject("its axis or length varies", "make axis and length constants")
    place, source = int(axis) % rank, shape(op.x())[int(axis) % rank]
    if not isinstance(source, int) or length > _LARGEST_TRANSFORM:
        return reject("its length is symbolic or large", "build for static shapes")
    parts = shape(op.x())[-1]
    matrix = _transform(source, length, onesided, int(parts) == 2).astype(numpy_dtype(op.dtype))
    order = [*(a for a in range(rank - 1) if a != place), place, rank - 1]
    moved = op.transpose(op.x(), order)
    kept = shape(moved)[:-2]
    flat = op.Linear(op.view(moved, [*kept, source * int(parts)]), op.constant(matrix))
    return op.transpose(op.view(flat, [*kept, matrix.shape[1] // 2, 2]), [order.index(a) for a in range(rank)])


def _transform(source: int, length: int, onesided: bool, is_complex: bool) -> Array:
    """[source * parts, outputs * 2]: cosines and sines of every pair of places."""
    outputs = length // 2 + 1 if onesided else length
    angle = -2 * np.pi * np.outer(np.arange(min(source, length)), np.arange(outputs)) / length
    cosine, sine = np.cos(angle), np.sin(angle)
    real = np.stack([cosine, sine], axis=-1)
    rows = [real, np.stack([-sine, cosine], axis=-1)] if is_complex else [real]
    table = np.stack(rows, axis=1).reshape(-1, outputs * 2)
    return np.pad(table, [(0, source * len(rows) - table.shape[0]), (0, 0)])


@canonical("STFT")
def stft(op: Builder) -> Result:
    """Gather of frames, then Linear with the window's transform"""
    step, window = scalar_value(op.optional(1)), op.constant_input(2)
    length = scalar_value(op.optional(3)) if op.given(3) else None if window is None else window.size
    sizes = known(shape(op.x()))
    varies = step is None or length is None or op.varies(2)
    if varies or sizes is None or (len(sizes) == 3 and sizes[2] != 1):
        return reject("its step, window or signal is symbolic or complex", "make step and window constants")
    frame, hop = int(length or 0), int(step or 1)
    if frame > _LARGEST_TRANSFORM:
        return reject("its frame is large", "use a shorter frame")
    shaped = np.ones(frame) if window is None else np.asarray(window, np.float64)
    centred = np.pad(shaped, ((frame - shaped.size) // 2, frame - shaped.size - (frame - shaped.size) // 2))
    matrix = _transform(frame, frame, bool(op.attribute("onesided", 1)), False) * centred[:, None]
    count = (sizes[1] - frame) // hop + 1
    places = np.arange(count)[:, None] * hop + np.arange(frame)
    frames = op.Gather(op.view(op.x(), sizes[:2]), op.constant(places), axis=1)
    flat = op.Linear(frames, op.constant(matrix.astype(numpy_dtype(op.dtype))))
    return op.view(flat, [sizes[0], count, matrix.shape[1] // 2, 2])


@canonical("AffineGrid")
def affine_grid(op: Builder) -> Result:
    """theta @ the homogeneous base grid"""
    size = known(shape(op.y))
    if size is None:
        return reject("its size is symbolic", "make the input 'size' a constant")
    batch, *places, rank = size
    axes = [_centres(n, bool(op.attribute("align_corners", 0))) for n in places]
    grid = np.stack([*np.meshgrid(*axes, indexing="ij")[::-1], np.ones(places)], axis=-1).reshape(-1, rank + 1)
    base = op.constant(grid.astype(numpy_dtype(op.dtype)))
    return op.view(op.MatMul(base, op.x(), transpose_b=1), [batch, *places, rank])


def _centres(count: int, corners: bool) -> Array:
    if corners:
        return np.linspace(-1, 1, count)
    return (2 * np.arange(count) + 1) / count - 1


@canonical("CausalConvWithState")
def causal_conv(op: Builder) -> Result:
    """Concat of the state, depthwise Conv, an activation; the last inputs are the new state"""
    x, weight, t = op.x(), op.x(1), op.dtype
    batch, channels, length = shape(x)
    kernel = known(shape(weight))
    if kernel is None or not isinstance(channels, int):
        return reject("the shape of its weight is symbolic", "give the weight a static shape")
    reach = kernel[2] - 1
    zeros = op.constant(np.zeros((1, 1, 1), numpy_dtype(t)))
    past = op.optional(3) or op.Expand(zeros, shape=[batch, channels, reach])
    joined = op.concat([past, x], 2) if reach else x
    epilogue, extras = "", []
    if op.given(2):
        epilogue, extras = f"Add %0 %1 -> {t}", [op.view(op.x(2), [channels, 1])]
    y = op.Conv(joined, weight, *extras, strides=[1], pads=[0, 0], dilations=[1], group=channels, epilogue=epilogue)
    if op.attribute("activation", "none") in ("silu", "swish"):
        y = op.pointwise(f"Sigmoid %0 -> {t}; Mul %0 $0 -> {t}", y)
    state = op.Slice(joined, starts=[0, 0, length], steps=[1, 1, 1], sizes=[batch, channels, reach])
    return y, state


@canonical("SwiGLU")
def swiglu(op: Builder) -> ir.Value | Reject:
    """a * Sigmoid(alpha * a) * b"""
    alpha, t = float(op.attribute("alpha", 1.0)), dtype_of(op.x())
    text = f"Mul %0 {alpha} -> {t}; Sigmoid $0 -> {t}; Mul %0 $1 -> {t}; Mul $2 %1 -> {t}"
    return op.pointwise(text, op.x(), op.x(1))
