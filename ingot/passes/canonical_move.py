"""Operators that only move elements become View, Transpose, Slice, Split, Concat, Pad, Expand and Tile."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ingot.dtypes import numpy_dtype
from ingot.ir.elementwise import INTEGERS, Array
from ingot.ir.graph import dtype_of, scalar_value, shape, simplified
from ingot.ir.ops_table import Shape
from ingot.passes.canonical_table import (
    Builder,
    Reject,
    Result,
    attribute_or_input,
    axis_of,
    canonical,
    known,
    minus,
    over,
    reject,
    undetermined,
)
from ingot.plan.extent import Extent, add, product


@canonical("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def view(op: Builder) -> Result:
    """The same elements in another shape, which inference has found"""
    target = shape(op.y)
    return undetermined(target) or op.view(op.x(), target)


@canonical("Identity")
def identity(op: Builder) -> Result:
    """x"""
    return op.x()


@canonical("Dropout")
def dropout(op: Builder) -> Result:
    """x; the mask is all true"""
    training = scalar_value(op.optional(2)) if op.given(2) else 0
    ratio = scalar_value(op.optional(1)) if op.given(1) else op.attribute("ratio", 0.5)
    if training is None or (training and ratio != 0):
        return reject("it drops at random, as in training", "export the model for inference (training_mode=False)")
    if not op.used(1):
        return op.x(), None
    return op.x(), filled(op, op.node.outputs[1], 1)


def filled(op: Builder, like: ir.Value, number: float) -> ir.Value:
    """A number in the type and shape of a value."""
    array = np.asarray(number).astype(numpy_dtype(dtype_of(like)))
    return op.expand(op.constant(array.reshape([1] * len(shape(like))), like), shape(like))


@canonical("Transpose")
def transpose(op: Builder) -> Result:
    """Permuted axes, reversed by default"""
    rank = len(shape(op.x()))
    return op.transpose(op.x(), op.attribute("perm") or list(reversed(range(rank))))


@canonical("Expand")
def expand(op: Builder) -> Result:
    """x broadcast"""
    return undetermined(shape(op.y)) or op.expand(op.x(), shape(op.y))


@canonical("Tile")
def tile(op: Builder) -> Result:
    """x repeated; opset 6 and later name a count for every axis"""
    repeats: Sequence[Extent] | None = op.extents(1)
    source, target = known(shape(op.x())), known(shape(op.y))
    if repeats is None and source is not None and target is not None and all(source):
        repeats = [after // before for before, after in zip(source, target, strict=True)]
    if repeats is None:
        return reject("its repeats vary at run time", "make the input 'repeats' a constant")
    return op.x() if all(count == 1 for count in repeats) else op.Tile(op.x(), repeats=list(repeats))


@canonical("Concat")
def concat(op: Builder) -> Result:
    """Values one after the other, empty ones left out"""
    axis = axis_of(op, 1, len(shape(op.y)))
    values = [value for value in op.inputs if shape(value)[axis] != 0] or op.inputs[:1]
    return op.concat(values, axis)


@canonical("Split")
def split(op: Builder) -> Result:
    """Consecutive parts, whose sizes inference has found"""
    axis = axis_of(op, 0, len(shape(op.x())))
    sizes = [shape(value)[axis] for value in op.node.outputs]
    return undetermined(sizes) or op.split_axis(op.x(), axis, sizes)


@canonical("Slice")
def slice_(op: Builder) -> Result:
    """A start, a step and a size for every axis; sizes come from inference"""
    sizes, source = shape(op.y), shape(op.x())
    settings = _slice_settings(op)
    problem = settings if isinstance(settings, Reject) else undetermined(sizes)
    if isinstance(problem, Reject) or isinstance(settings, Reject):
        return problem or reject("its bounds are unknown")
    starts: list[Extent] = [0] * len(source)
    steps = [1] * len(source)
    for axis, start, step in zip(*settings, strict=True):
        place = _start(start, step, source[axis % len(source)])
        if place is None:
            return reject(f"its start {start} may lie before the axis", "make the slice's start a constant")
        starts[axis % len(source)], steps[axis % len(source)] = place, step
    if sizes == source and all(step == 1 for step in steps):
        return op.x()
    starts = [0 if size == 0 else start for start, size in zip(starts, sizes, strict=True)]
    return op.Slice(op.x(), starts=starts, steps=steps, sizes=list(sizes))


def _slice_settings(op: Builder) -> tuple[Sequence[int], Shape, Sequence[int]] | Reject:
    """(axes, starts, steps) from attributes, or from inputs since opset 10."""
    if op.version < 10:
        starts = tuple(op.attribute("starts"))
        return op.attribute("axes") or list(range(len(starts))), starts, [1] * len(starts)
    bounds = op.extents(1)
    if bounds is None or op.varies(3) or op.varies(4):
        return reject("its bounds vary at run time", "make starts, axes and steps constants")
    axes, steps = op.ints(3), op.ints(4)
    return axes if axes is not None else list(range(len(bounds))), bounds, steps or [1] * len(bounds)


def _start(start: Extent, step: int, size: Extent) -> Extent | None:
    """The first element taken, counted from 0 and within the axis; None where that cannot be known."""
    if isinstance(start, str):
        return None if start.startswith("-") else start
    last = 0 if step > 0 else 1
    if isinstance(size, int):
        place = start + size if start < 0 else start
        return min(max(place, 0), size - last)
    if start >= 0:
        return minus(size, 1) if step < 0 and start >= 2**31 - 1 else start
    return simplified(f"max({size}-{-start},0)")


@canonical("Pad")
def pad(op: Builder) -> Result:
    """Borders; negative ones are cropped first"""
    borders = _borders(op)
    value = op.attribute("value", 0.0) if op.version < 11 else scalar_value(op.optional(2)) if op.given(2) else 0
    if isinstance(borders, Reject):
        return borders
    cropped = _cropped(op, op.x(), [min(border, 0) for border in borders])
    positive = [max(border, 0) for border in borders]
    if not any(positive):
        return cropped
    mode = op.attribute("mode", "constant")
    if value is not None or mode != "constant":
        return op.Pad(cropped, pads=positive, mode=mode, value=value or 0)
    inside = op.Pad(op.Expand(op.constant(np.array(True)), shape=shape(cropped)), pads=positive)
    return op.pointwise(f"Where %0 %1 %2 -> {op.dtype}", inside, op.Pad(cropped, pads=positive), op.x(2))


def _borders(op: Builder) -> list[int] | Reject:
    """Begins, then ends, of every axis."""
    rank = len(shape(op.x()))
    name = "pads" if op.version >= 2 else "paddings"
    pads, axes = attribute_or_input(op, name, 1, since=11), op.ints(3)
    if isinstance(pads, Reject):
        return pads
    if pads is None or op.varies(3):
        return reject("its pads are not constant", "make the inputs 'pads' and 'axes' constants")
    axes = list(range(rank)) if axes is None else [axis % rank for axis in axes]
    borders = [0] * (2 * rank)
    for place, axis in enumerate(axes):
        borders[axis], borders[rank + axis] = pads[place], pads[len(axes) + place]
    return borders


def _cropped(op: Builder, x: ir.Value, borders: Sequence[int]) -> ir.Value:
    if not any(borders):
        return x
    rank = len(shape(x))
    sizes = [add(size, begin + end) for size, begin, end in zip(shape(x), borders[:rank], borders[rank:], strict=True)]
    result: ir.Value = op.Slice(x, starts=[-border for border in borders[:rank]], steps=[1] * rank,
                                sizes=[simplified(size) for size in sizes])  # fmt: skip
    return result


@canonical("CenterCropPad")
def center_crop_pad(op: Builder) -> Result:
    """Slice and Pad of the middle, on static shapes"""
    source, target = known(shape(op.x())), known(shape(op.y))
    if source is None or target is None:
        return reject("its input or output shape is symbolic", "build for static shapes")
    growth = [goal - size for size, goal in zip(source, target, strict=True)]
    begins = [change // 2 if change > 0 else -(-change // 2) for change in growth]
    borders = [*begins, *(change - begin for change, begin in zip(growth, begins, strict=True))]
    cropped = _cropped(op, op.x(), [min(border, 0) for border in borders])
    positive = [max(border, 0) for border in borders]
    return op.Pad(cropped, pads=positive) if any(positive) else cropped


@canonical("DepthToSpace")
def depth_to_space(op: Builder) -> Result:
    """View, Transpose, View: channels spread over blocks"""
    batch, channels, *sizes = shape(op.x())
    block, rank = int(op.attribute("blocksize")), len(sizes)
    inner = over(channels, block**rank)
    if op.attribute("mode", "DCR") == "DCR":
        parts, perm = [batch, *[block] * rank, inner, *sizes], [0, rank + 1]
        first_block = 1
    else:
        parts, perm = [batch, inner, *[block] * rank, *sizes], [0, 1]
        first_block = 2
    for axis in range(rank):
        perm += [rank + 2 + axis, first_block + axis]
    spread = op.transpose(op.view(op.x(), parts), perm)
    return op.view(spread, [batch, inner, *(product((size, block)) for size in sizes)])


@canonical("SpaceToDepth")
def space_to_depth(op: Builder) -> Result:
    """View, Transpose, View: blocks gathered into channels"""
    batch, channels, *sizes = shape(op.x())
    block, rank = int(op.attribute("blocksize")), len(sizes)
    outer = [over(size, block) for size in sizes]
    parts = [batch, channels, *(part for size in outer for part in (size, block))]
    blocks, places = [3 + 2 * axis for axis in range(rank)], [2 + 2 * axis for axis in range(rank)]
    order = [0, *blocks, 1, *places] if op.attribute("mode", "DCR") == "DCR" else [0, 1, *blocks, *places]
    gathered = op.transpose(op.view(op.x(), parts), order)
    return op.view(gathered, [batch, product((channels, block**rank)), *outer])


@canonical("Shape", "Size")
def shape_(op: Builder) -> Result:
    """What remains of them varies at run time"""
    return reject("the shape it reads is symbolic", "build for static shapes")


@canonical("ConstantOfShape")
def constant_of_shape(op: Builder) -> Result:
    """One number expanded"""
    tensor = op.attribute("value")
    number = 0.0 if tensor is None else tensor.numpy().reshape(-1)[0]
    if dtype_of(op.y) == "string":
        return reject("its elements are strings")
    return undetermined(shape(op.y)) or filled(op, op.y, number)


@canonical("EyeLike")
def eye_like(op: Builder) -> Result:
    """Equal(row + diagonal, column) of the shape alone"""
    rows, columns = shape(op.y)
    text = f"Add %0 {int(op.attribute('k', 0))} -> int64; Equal $0 %1 -> bool; Cast $1 -> {op.dtype}"
    return op.pointwise(text, op.steps(rows, 0, 2), op.steps(columns, 1, 2))


@canonical("Range")
def range_(op: Builder) -> Result:
    """Range of extents; constant ones have been folded"""
    bounds = [op.extents(index) for index in (0, 1, 2)]
    problem = undetermined(shape(op.y))
    if problem or any(bound is None for bound in bounds) or op.dtype not in INTEGERS:
        return problem or reject("its start or step varies at run time", "make them constants")
    (start,), _, (step,) = (bound or (0,) for bound in bounds)
    return op.Range(start=start, step=step, size=shape(op.y)[0], dtype=op.dtype)


@canonical("Trilu")
def trilu(op: Builder) -> Result:
    """Where(row + k <= column, x, 0), or the other side"""
    rows, columns = shape(op.x())[-2:]
    diagonal = op.x(1) if op.given(1) else 0
    kept = "LessOrEqual $0 %2 -> bool" if op.attribute("upper", 1) else "GreaterOrEqual $0 %2 -> bool"
    text = f"Add %1 %3 -> int64; {kept}; Where $1 %0 0 -> {op.dtype}"
    return op.pointwise(text, op.x(), op.steps(rows, 0, 2), op.steps(columns, 1, 2), diagonal)


@canonical("ReverseSequence")
def reverse_sequence(op: Builder) -> Result:
    """GatherElements at len - 1 - t before the length, at t beyond"""
    time, batch = int(op.attribute("time_axis", 0)), int(op.attribute("batch_axis", 1))
    sizes, rank = shape(op.x()), len(shape(op.x()))
    steps = op.steps(sizes[time], time, rank)
    lengths = op.view(op.x(1), [sizes[batch] if axis == batch else 1 for axis in range(rank)])
    text = "Less %0 %1 -> bool; Sub %1 1 -> int64; Sub $1 %0 -> int64; Where $0 $2 %0 -> int64"
    indices = op.expand(op.pointwise(text, steps, lengths), sizes)
    return op.GatherElements(op.x(), indices, axis=time)


@canonical("Col2Im")
def col2im(op: Builder) -> Result:
    """Columns added into a zero image at constant places"""
    image, block = op.ints(1), op.ints(2)
    columns = known(shape(op.x()))
    if image is None or block is None or columns is None:
        return reject("its shapes vary at run time", "build for static shapes")
    rank = len(image)
    steps, spread = op.attribute("strides") or [1] * rank, op.attribute("dilations") or [1] * rank
    pads = op.attribute("pads") or [0] * 2 * rank
    padded = [size + pads[axis] + pads[rank + axis] for axis, size in enumerate(image)]
    places = _patch_places(padded, block, steps, spread)
    channels = columns[1] // math.prod(block)
    zeros = op.constant(np.zeros((1, 1, 1), numpy_dtype(op.dtype)))
    canvas = op.Expand(zeros, shape=[columns[0], channels, math.prod(padded)])
    updates = op.view(op.x(), [columns[0], channels, places.size])
    indices = op.expand(op.constant(places.reshape(1, 1, -1)), [columns[0], channels, places.size])
    full = op.ScatterElements(canvas, indices, updates, axis=2, reduction="add")
    borders = [0, 0, *(-pad for pad in pads[:rank]), 0, 0, *(-pad for pad in pads[rank:])]
    return _cropped(op, op.view(full, [columns[0], channels, *padded]), borders)


def _patch_places(image: Sequence[int], block: Sequence[int], steps: Sequence[int], spread: Sequence[int]) -> Array:
    """Place in the flat image of every [tap, position]."""
    total = np.zeros((1, 1), np.int64)
    axes = zip(image, block, steps, spread, strict=True)
    taps_and_positions = [(np.arange(k) * d, np.arange((n - (k - 1) * d - 1) // s + 1) * s) for n, k, s, d in axes]
    for size, (taps, positions) in zip(image, taps_and_positions, strict=True):
        grid = taps[:, None] + positions[None, :]
        total = (total[:, None, :, None] * size + grid[None, :, None, :]).reshape(
            total.shape[0] * taps.size, total.shape[1] * positions.size
        )
    return total
