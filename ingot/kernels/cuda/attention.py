"""Attention: softmax(query key^T) value a block of queries at a time, never storing a score (Dao et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ingot.dtypes import size_of
from ingot.kernels import PLAIN, Ports, kernel
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.axes import HEADS, broadcast_strides, strides_of
from ingot.kernels.cuda.build import LANGUAGE, CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.render import NARROW, can_render, render
from ingot.kernels.cuda.rows import power_of_two
from ingot.kernels.node import Node, Port
from ingot.plan.extent import Extent, ceil_div, product

_DEEPEST = 256
_FEW = 128  # keys that are one block
_AHEAD = 0.8  # of the time that a block takes whose operands are not on their way while the one before is computed
_LONG, _MANY = 1024, 8  # keys for which more steps are in flight; whole blocks of keys that are walked without masks
# With depths that are filled up, two products one after the other without a loop around them gave wrong numbers on an
# H200 (Triton 3.6, float16); the same lines in a loop that runs once are right.
_WHOLE_DEPTHS = frozenset({16, 32, 64, 128, 256})
_WIDTH = "packed"  # columns of the one tensor that query, key and value are parts of
_LOW = 'float("-inf")'
_LOG2E = math.log2(math.e)


def _applies(node: Node, target: Any) -> bool:
    depths = (node.input(0).shape[3], node.input(2).shape[3])
    masks = not node.has_input(3) or node.input(3).dtype in ("bool", "float32", *NARROW)
    static = all(isinstance(d, int) and 0 < d <= _DEEPEST for d in (*depths, node.input(0).shape[1],
                                                                  node.input(1).shape[1]))  # fmt: skip
    return static and masks and node.dtype in ("float32", *NARROW) and can_render(node.epilogue, [node.dtype])


def attention_layouts(node: Node, target: Any) -> list[Ports]:
    """Each of query, key and value by heads or by positions in memory; all alike, and the result either way."""
    mask = ("",) * (len(node.inputs) - 3)
    return [PLAIN, Ports((HEADS,) * 3 + mask, (HEADS,)), Ports(("",) * 3 + mask, (HEADS,)),
            Ports((HEADS,) * 3 + mask, ("",))]  # fmt: skip


def _number(extent: Extent) -> int:
    return extent if isinstance(extent, int) else 128


def _cost(node: Node, target: Architecture, rows: int, columns: int, stages: int) -> float:
    batch, heads, queries, depth = map(_number, node.input(0).shape)
    keys = _number(node.input(1).shape[2])
    blocks = batch * heads * -(-queries // rows)
    steps = -(-keys // columns)
    work = 4 * rows * columns * power_of_two(depth) / (target.half_flops / target.processors * min(rows / 160, 0.55))
    together = 2 if rows <= 64 else 1
    waves = -(-blocks // (target.processors * together))
    return target.pace.step + 1.5 + waves * steps * max(work * together, 0.35)


def _fits(node: Node, target: Architecture, rows: int, columns: int, stages: int) -> bool:
    element = 4 if node.dtype == "float32" else 2
    depth = power_of_two(_number(node.input(0).shape[3]))
    return (rows + 2 * stages * columns) * depth * element <= target.shared and rows * depth <= 128 * 128


def _prune(node: Node, target: Architecture, rows: int, columns: int, stages: int) -> bool:
    queries, keys = _number(node.input(0).shape[2]), _number(node.input(1).shape[2])
    wasted = rows > max(2 * queries - 1, 16) or columns > max(2 * keys - 1, 32)
    return wasted or not _fits(node, target, rows, columns, stages)


def _stages(node: Node, target: Architecture) -> tuple[int, ...]:
    return (2, 3) if _number(node.input(1).shape[2]) >= _LONG else (2,)


_HOW: dict[str, Any] = {"on": "cuda", "when": _applies, "layouts": attention_layouts, "cost": _cost, "prune": _prune,
                        "space": {"rows": (64, 128, 32, 16), "columns": (64, 128, 32), "stages": _stages}}  # fmt: skip


@kernel("NarrowAttention", **_HOW)
@kernel("Attention", **_HOW)
def flash_attention(build: CudaBuilder, node: Node, rows: int, columns: int, stages: int) -> None:
    """A block is `rows` queries of one head; it walks over the keys, `columns` at a time"""
    query, value = node.input(0), node.input(2)
    depth, width = int(query.shape[3]), int(value.shape[3])
    f = build.function(warps=8 if rows >= 128 else 4, stages=stages)
    _open(f, build, node, rows, columns)
    f.emit(f"q = {_load(f, build, 0, 'queries[:, None]', f'depths[None, :] < {depth}', 'head')}")
    f.emit(f"peak = tl.full(({rows},), {_LOW}, tl.float32)\ntotal = tl.zeros(({rows},), tl.float32)")
    f.emit(f"sums = tl.zeros(({rows}, {max(power_of_two(width), 16)}), tl.float32)")
    for begin, end, whole in _walks(f, node, rows, columns):
        with f.block(f"for start in range({begin}, {end}, {columns}):"):
            _step(f, build, node, whole)
    _close(f, build, node)
    f.launch(ceil_div(query.shape[2], rows), product(query.shape[:2]))


def _close(f: FunctionBuilder, build: CudaBuilder, node: Node) -> None:
    """The block's results: sums over their weights' total, with the epilogue."""
    f.emit("sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]")
    made = render(f, node.epilogue, [f.let(f"sums.to({LANGUAGE[node.dtype]})")], [node.dtype])
    y = node.output
    place, mask = _place(f, y, strides_of(y.shape, y.layout), "queries[:, None]", "widths[None, :]", "head")
    width = int(node.input(2).shape[3])
    f.emit(f"tl.store({f.pointer(build.output())} + {place}, {made}, {mask} & (widths[None, :] < {width}))")


# few keys


def _few_apply(node: Node, target: Any) -> bool:
    """Keys that are one block, of static sizes."""
    shapes = [p.shape for p in node.inputs[:3] if p is not None]
    if not _applies(node, target) or node.dtype not in NARROW or not all(isinstance(n, int) for s in shapes for n in s):
        return False
    depths = {int(shapes[0][3]), int(shapes[2][3])}
    return int(shapes[1][2]) <= _FEW and depths <= _WHOLE_DEPTHS and max(depths) <= _FEW


def _few_sizes(node: Node) -> tuple[int, int, int]:
    """(queries of a block, keys as a block, pairs of a head and a block of queries)"""
    batch, heads, queries, _ = map(int, node.input(0).shape)
    rows = min(max(power_of_two(queries), 16), _FEW)
    return rows, max(power_of_two(int(node.input(1).shape[2])), 16), batch * heads * -(-queries // rows)


def _few_cost(node: Node, target: Architecture, together: int, stages: int) -> float:
    rows, columns, pairs = _few_sizes(node)
    depth = int(node.input(0).shape[3])
    work = 4 * rows * columns * depth / (target.half_flops / target.processors * min(rows / 160, 0.55))
    turns = -(-pairs // (target.processors * together))
    return target.pace.step + 1.5 + turns * max(work * together * _AHEAD, 0.35)


def _few_prune(node: Node, target: Architecture, together: int, stages: int) -> bool:
    rows, columns, pairs = _few_sizes(node)
    held = stages * (rows + 2 * columns) * int(node.input(0).shape[3]) * size_of(node.dtype)
    return held * together > target.shared or pairs <= target.processors * (together - 1)


_FEW_HOW: dict[str, Any] = {"on": "cuda", "when": _few_apply, "layouts": attention_layouts, "cost": _few_cost,
                            "prune": _few_prune, "space": {"together": (2, 1), "stages": (2, 3)}}  # fmt: skip


@kernel("NarrowAttention", **_FEW_HOW)
@kernel("Attention", **_FEW_HOW)
def attention_of_few_keys(build: CudaBuilder, node: Node, together: int, stages: int) -> None:
    """Blocks, `together` a processor, walk over heads: while one is computed what the next one needs is on its way"""
    rows, columns, pairs = _few_sizes(node)
    query, key = node.input(0), node.input(1)
    parts, blocks = -(-int(query.shape[2]) // rows), min(pairs, together * build.target.processors)
    f = build.function(warps=8 if rows >= _FEW else 4, stages=stages)
    heads, depth, width = int(query.shape[1]), int(query.shape[3]), int(node.input(2).shape[3])
    f.emit(f"keys = tl.arange(0, {columns})\ndepths = tl.arange(0, {depth})\nwidths = tl.arange(0, {width})")
    with f.block(f"for number in range(tl.program_id(0), {pairs}, {blocks}):"):
        f.emit(f"queries = number % {parts} * {rows} + tl.arange(0, {rows})\npair = number // {parts}")
        f.emit(f"image = pair // {heads}\nhead = pair % {heads}\ngroup = head // {heads // int(key.shape[1])}")
        given = _given(f, build, node) if node.has_input(3) else ""
        whole = (int(query.shape[2]) % rows == 0, int(key.shape[2]) == columns)
        q = _load(f, build, 0, "queries[:, None]", f"depths[None, :] < {depth}", "head", whole[0])
        k = _load(f, build, 1, "keys[None, :]", f"depths[:, None] < {depth}", "group", whole[1])
        v = _load(f, build, 2, "keys[:, None]", f"widths[None, :] < {width}", "group", whole[1])
        f.emit(f"scores = tl.dot({q}, {k})")
        factor = _scaled(f, build, node, given)
        hidden = _hide(f, build, node, whole[1], given)
        f.emit(f"peak = tl.max(scores, 1)\nbase = {f'tl.where(peak == {_LOW}, 0.0, peak)' if hidden else 'peak'}")
        f.emit(f"powers = tl.exp2(scores * {factor!r} - (base * {factor!r})[:, None])\ntotal = tl.sum(powers, 1)")
        f.emit(f"sums = tl.dot(powers.to({LANGUAGE[node.dtype]}), {v})")
        _close(f, build, node)
    f.launch(blocks)


def _walks(f: FunctionBuilder, node: Node, rows: int, columns: int) -> list[tuple[str, str, bool]]:
    """Parts of the keys: (begin, end, whether every block of them is whole and wholly seen). Of many blocks only the
    last one asks which keys there are."""
    query, key, value = (node.input(k) for k in range(3))
    queries, keys = f.extent(query.shape[2]), f.extent(key.shape[2])
    if node.attributes["causal"]:
        return [("0", f.let(f"tl.minimum({keys}, tl.program_id(0) * {rows} + {rows} + {keys} - {queries})"), False)]
    last = keys
    if isinstance(key.shape[2], int) and {query.shape[3], value.shape[3]} - _WHOLE_DEPTHS:
        last = f.let(f"{keys} * tl.minimum(tl.num_programs(0), 1)")  # a loop stays one: see _WHOLE_DEPTHS
    if not isinstance(key.shape[2], int):
        return [("0", last, False)]
    full = key.shape[2] // columns * columns
    if full == key.shape[2] or full < _MANY * columns:
        return [("0", last, full == key.shape[2])]
    return [("0", str(full), True), (str(full), last, False)]


def _step(f: FunctionBuilder, build: CudaBuilder, node: Node, whole: bool) -> None:
    """One block of keys and values."""
    depth, value = int(node.input(0).shape[3]), node.input(2)
    precision = f', input_precision="{"tf32" if build.target.precision == "tf32" else "tf32x3"}"'
    precision = precision if node.dtype == "float32" else ""
    f.emit("keys = start + places")
    k = _load(f, build, 1, "keys[None, :]", f"depths[:, None] < {depth}", "group", whole)
    f.emit(f"scores = tl.dot(q, {k}{precision})")
    factor = _scaled(f, build, node)
    hidden = _hide(f, build, node, whole)
    f.emit("higher = tl.maximum(peak, tl.max(scores, 1))")
    f.emit(f"base = tl.where(higher == {_LOW}, 0.0, higher)" if hidden else "base = higher")
    f.emit(f"powers = tl.exp2(scores * {factor!r} - (base * {factor!r})[:, None])")
    f.emit(f"factor = tl.exp2((peak - base) * {factor!r})\npeak = higher")
    f.emit("total = total * factor + tl.sum(powers, 1)\nsums = sums * factor[:, None]")
    v = _load(f, build, 2, "keys[:, None]", f"widths[None, :] < {int(value.shape[3])}", "group", whole)
    f.emit(f"sums = tl.dot(powers.to({LANGUAGE[value.dtype]}), {v}, sums{precision})")


def _open(f: FunctionBuilder, build: CudaBuilder, node: Node, rows: int, columns: int) -> None:
    heads, groups = int(node.input(0).shape[1]), int(node.input(1).shape[1])
    depth, width = int(node.input(0).shape[3]), int(node.input(2).shape[3])
    f.emit(f"image = tl.program_id(1) // {heads}\nhead = tl.program_id(1) % {heads}\ngroup = head // {heads // groups}")
    f.emit(f"queries = tl.program_id(0) * {rows} + tl.arange(0, {rows})\nplaces = tl.arange(0, {columns})")
    f.emit(f"depths = tl.arange(0, {max(power_of_two(depth), 16)})")
    f.emit(f"widths = tl.arange(0, {max(power_of_two(width), 16)})")


def _place(f: FunctionBuilder, port: Port, strides: Sequence[Extent], along: str, deep: str,
           head: str) -> tuple[str, str]:  # fmt: skip
    """(text of an element's place, whether its position exists)"""
    batch, heads, step, last = map(f.extent, strides)
    place = f"image * {batch} + {head} * {heads} + {along} * {step} + {deep} * {last}"
    return place, f"({along} < {f.extent(port.shape[2])})"


def _load(f: FunctionBuilder, build: CudaBuilder, index: int, along: str, deep: str, head: str,
          whole: bool = False) -> str:  # fmt: skip
    """A block of query, key or value; zeros where it ends, unless it is known to be `whole`."""
    port = build.node.input(index)
    address, strides = _lies(f, build, index)
    place, mask = _place(f, port, strides, along, deep.partition(" <")[0], head)
    size = int(port.shape[3])
    masks = [mask] * (not whole) + [f"({deep})"] * (power_of_two(size) != size or size < 16)
    held = f", {' & '.join(masks)}, other=0" if masks else ""
    return f.let(f"tl.load({address} + {place}{held})")


def _lies(f: FunctionBuilder, build: CudaBuilder, index: int) -> tuple[str, Sequence[Extent]]:
    """(where query, key or value begins, its strides)"""
    node, port = build.node, build.node.input(index)
    if _WIDTH not in node.attributes:
        return f.pointer(build.input(index)), strides_of(port.shape, port.layout)
    width, depth, before = node.attributes[_WIDTH], port.shape[3], [node.input(k).shape[1] for k in range(index)]
    start = product((depth, sum(map(int, before))))
    return f"{f.pointer(build.input(0))} + {start}", (product((port.shape[2], width)), depth, width, 1)


def _scaled(f: FunctionBuilder, build: CudaBuilder, node: Node, given: str = "") -> float:
    """Scores as they compare, with cap and mask (`given`, where that is loaded); the factor that makes powers of two of
    their differences."""
    cap, scale = node.attributes["softcap"], node.attributes["scale"]
    added = node.has_input(3) and node.input(3).dtype != "bool"
    if not cap and not added and scale > 0:
        return float(scale * _LOG2E)
    if cap:
        f.emit(f"scores = {cap!r} * libdevice.tanh(scores * {scale / cap!r})")
    factor = _LOG2E if cap else scale * _LOG2E
    mask = f" + {given or _given(f, build, node)}.to(tl.float32) * {_LOG2E!r}" if added else ""
    f.emit(f"scores = scores * {factor!r}{mask}")
    return 1.0


def _hide(f: FunctionBuilder, build: CudaBuilder, node: Node, whole: bool, given: str = "") -> bool:
    """What is later, masked or not there is -inf; whether a query may see nothing."""
    keys, queries = f.extent(node.input(1).shape[2]), f.extent(node.input(0).shape[2])
    seen = [f"(keys[None, :] < {keys})"] * (not whole)
    if node.attributes["causal"]:
        seen.append(f"(keys[None, :] <= queries[:, None] + {keys} - {queries})")
    if node.has_input(3) and node.input(3).dtype == "bool":
        seen.append(given or _given(f, build, node))
    if seen:
        f.emit(f"scores = tl.where({' & '.join(seen)}, scores, {_LOW})")
    return bool(seen) or node.has_input(3)


def _given(f: FunctionBuilder, build: CudaBuilder, node: Node) -> str:
    """A variable with the mask's elements for the block."""
    port, keys, queries = node.input(3), f.extent(node.input(1).shape[2]), f.extent(node.input(0).shape[2])
    shape = (*node.input(0).shape[:3], node.input(1).shape[2])
    batch, head, row, column = (f.extent(s) for s in broadcast_strides(port, shape))
    own = _WIDTH not in node.attributes or port.constant is not None
    held = build.input(3) if own else Handle("input", 1, port.dtype)
    start = f"{f.pointer(held)} + image * {batch} + head * {head}"
    if row == "0":  # all queries' alike
        return f.let(f"tl.load({start} + keys * {column}, keys < {keys}, other=0)[None, :]")
    inside = f"(queries[:, None] < {queries}) & (keys[None, :] < {keys})"
    return f.let(f"tl.load({start} + queries[:, None] * {row} + keys[None, :] * {column}, {inside}, other=0)")


# query, key and value in one tensor


def unpacked(node: Node) -> Node:
    """A PackedAttention as the Attention of parts of its first input; the mask's place is told apart by `_lies`."""
    packed, heads, groups = node.input(0), node.attributes["heads"], node.attributes["groups"]
    batch, length, width = packed.shape
    parts = tuple(Port(packed.dtype, (batch, n, length, node.output.shape[3])) for n in (heads, groups, groups))
    return replace(node, inputs=(*parts, *node.inputs[1:]), attributes={**node.attributes, _WIDTH: width})


def _packed_layouts(node: Node, target: Any) -> list[Ports]:
    inputs = ("",) * len(node.inputs)
    return [PLAIN, Ports(inputs, (HEADS,))]


def _seen(asked: Callable[..., Any]) -> Callable[..., Any]:
    """What is asked of a kernel of Attention, asked of a PackedAttention."""
    return lambda node, target, **tactic: asked(unpacked(node), target, **tactic)


def _packed(how: dict[str, Any]) -> dict[str, Any]:
    space = {name: _seen(axis) if callable(axis) else axis for name, axis in how["space"].items()}
    return {"on": "cuda", "layouts": _packed_layouts, "space": space,
            **{name: _seen(how[name]) for name in ("when", "cost", "prune")}}  # fmt: skip


@kernel("PackedAttention", **_packed(_HOW))
def packed_flash_attention(build: CudaBuilder, node: Node, rows: int, columns: int, stages: int) -> None:
    """flash_attention of one tensor's parts"""
    build.node = unpacked(node)
    flash_attention(build, build.node, rows, columns, stages)
    build.node = node


@kernel("PackedAttention", **_packed(_FEW_HOW))
def packed_attention_of_few_keys(build: CudaBuilder, node: Node, together: int, stages: int) -> None:
    """attention_of_few_keys of one tensor's parts"""
    build.node = unpacked(node)
    attention_of_few_keys(build, build.node, together, stages)
    build.node = node
