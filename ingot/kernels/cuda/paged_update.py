"""CacheUpdate: queries and keys normalised and rotated, keys and values written where they belong in the pool."""

from __future__ import annotations

from typing import Any

from ingot.kernels import kernel
from ingot.kernels.cuda.architecture import EIGHTHS_FROM
from ingot.kernels.cuda.build import LANGUAGE, CudaBuilder, FunctionBuilder
from ingot.kernels.cuda.render import NARROW
from ingot.kernels.cuda.rows import power_of_two
from ingot.kernels.node import Node
from ingot.plan.extent import ceil_div

STORED = {**{dtype: LANGUAGE[dtype] for dtype in (*NARROW, "float32")}, "float8_e4m3fn": "tl.float8e4nv"}
LARGEST = {"float8_e4m3fn": 448.0}  # the largest number of a type; those beyond become it
_HEADS = 8  # a block
_COSINE, _SINE, _QUERY_SCALE, _KEY_SCALE = 4, 5, 6, 7


def _applies(node: Node, target: Any) -> bool:
    kinds = {p.dtype for p in (node.input(1), *node.inputs[_COSINE:]) if p is not None}
    if node.input(0).dtype in LARGEST and target.capability < EIGHTHS_FROM:
        return False
    return kinds <= {*NARROW, "float32"} and node.input(0).dtype in STORED and isinstance(node.input(0).shape[3], int)


@kernel("CacheUpdate", on="cuda", when=_applies, in_place=lambda node: (0,))
def cache_update(build: CudaBuilder, node: Node) -> None:
    """A block is a token's `_HEADS` heads: of pairs of elements that are rotated, then of the rest"""
    heads, groups = int(node.attributes["heads"]), int(node.attributes["groups"])
    width = int(node.input(1).shape[1])
    depth = width // (heads + 2 * groups)
    half = int(node.input(_COSINE).shape[1]) if node.has_input(_COSINE) else 0
    f = build.function(warps=4, stages=1, early=True)
    if node.attributes.get("early"):
        f.release()
    f.emit(f"token = tl.program_id(0)\nhead = tl.program_id(1) * {_HEADS} + tl.arange(0, {_HEADS})[:, None]")
    f.emit(f"exists = head < {heads + 2 * groups}\nis_query = head < {heads}")
    f.emit(f"is_value = head >= {heads + groups}")
    f.emit(f"position = tl.load({f.pointer(build.input(2))} + token)")
    f.emit(f"slot = tl.load({f.pointer(build.input(3))} + token)\nkept = (position >= 0) & (slot >= 0)")
    pieces = _pieces(f, depth, half)
    if half:
        _angles(f, build, half)
    f.wait()
    f.emit(f"x = {f.pointer(build.input(1))} + token * {width} + head * {depth}")
    for name, place, mask in pieces:
        f.emit(f"{name} = tl.load(x + {place}, {mask}, other=0.0).to(tl.float32)")
    if node.has_input(_QUERY_SCALE):
        _normalise(f, build, node, pieces, depth)
    if half:
        f.emit("turned = a * cosine - b * sine\nb = tl.where(is_value, b, b * cosine + a * sine)")
        f.emit("a = tl.where(is_value, a, turned)")
    for name, place, mask in pieces:
        _write(f, build, name, place, mask, heads, groups, depth)
    f.launch(node.input(1).shape[0], ceil_div(heads + 2 * groups, _HEADS))


def _pieces(f: FunctionBuilder, depth: int, half: int) -> list[tuple[str, str, str]]:
    """(variable, elements, which exist): the first and second halves of what is rotated, and what is not."""
    spans = [("a", 0, half), ("b", half, half), ("rest", 2 * half, depth - 2 * half)]
    pieces = []
    for name, start, size in spans:
        if size:
            f.emit(f"at_{name} = tl.arange(0, {power_of_two(size)})[None, :]")
            pieces.append((name, f"({start} + at_{name})", f"exists & (at_{name} < {size})"))
    return pieces


def _normalise(f: FunctionBuilder, build: CudaBuilder, node: Node, pieces: list[tuple[str, str, str]],
               depth: int) -> None:  # fmt: skip
    """Queries and keys by their root mean squares, times their scales."""
    squares = " + ".join(f"tl.sum({name} * {name}, 1)" for name, _, _ in pieces)
    factor = f"1.0 / libdevice.sqrt(({squares}) / {depth} + {node.attributes['epsilon']!r})"
    f.emit(f"factor = tl.where(is_value, 1.0, ({factor})[:, None])")
    query, key = (f.pointer(build.input(k)) for k in (_QUERY_SCALE, _KEY_SCALE))
    for name, place, _ in pieces:
        inside = f"{place} < {depth}"
        f.emit(f"query_scale = tl.load({query} + {place}, {inside}, other=0.0).to(tl.float32)")
        f.emit(f"key_scale = tl.load({key} + {place}, {inside}, other=0.0).to(tl.float32)")
        f.emit(f"{name} = {name} * factor * tl.where(is_value, 1.0, tl.where(is_query, query_scale, key_scale))")


def _angles(f: FunctionBuilder, build: CudaBuilder, half: int) -> None:
    """Of the token's position."""
    rows = int(build.node.input(_COSINE).shape[0])
    f.emit(f"angle = tl.minimum(tl.maximum(position, 0), {rows - 1}) * {half} + at_a")
    for name, index in (("cosine", _COSINE), ("sine", _SINE)):
        f.emit(f"{name} = tl.load({f.pointer(build.input(index))} + angle, at_a < {half}, other=0.0).to(tl.float32)")


def _write(f: FunctionBuilder, build: CudaBuilder, name: str, place: str, mask: str, heads: int, groups: int,
           depth: int) -> None:  # fmt: skip
    """Queries to the result; keys of a block lie [depth, block], values [block, depth]."""
    cache = build.node.input(0)
    line = int(cache.shape[3])
    size = line // depth
    query, pool = f.pointer(build.output(1)), f.pointer(build.output(0))
    f.emit(f"tl.store({query} + token * {heads * depth} + head * {depth} + {place}, "
           f"{name}.to({LANGUAGE[build.node.outputs[1].dtype]}), {mask} & is_query)")  # fmt: skip
    f.emit(f"key = (head - {heads}) * {line} + {place} * {size} + slot % {size}")
    f.emit(f"value = (head - {heads}) * {line} + slot % {size} * {depth} + {place}")
    f.emit(f"start = (slot // {size}).to(tl.int64) * {2 * groups * line}")
    if cache.dtype in LARGEST:
        most = LARGEST[cache.dtype]
        f.emit(f"{name} = tl.minimum(tl.maximum({name}, {-most}), {most})")
    f.emit(f"tl.store({pool} + start + tl.where(is_value, value, key), {name}.to({STORED[cache.dtype]}), "
           f"{mask} & kept & (head >= {heads}))")  # fmt: skip
