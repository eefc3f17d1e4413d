"""PagedAttention of one token by blocks of one warp: a form that is not in the engine, as no GPU has timed it there.

A block is of a group and a part of its keys, or, behind those, of a slice of the result. What earlier steps left in the
pool is in registers before the wait. Results and their weights go from warp to warp in words that are zero while
nothing is there, so that whoever waits needs no more than to look: no counter, no order of writes. It waits for blocks
of lower numbers alone, which a GPU begins no later, and leaves zeros. Products are [keys, heads] and [depth, heads]: 8
columns of heads where rows would be 16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

from ingot import kernels
from ingot.dtypes import size_of
from ingot.kernels.cuda import paged_attention as pa
from ingot.kernels.cuda.build import LANGUAGE, CudaBuilder, FunctionBuilder
from ingot.kernels.cuda.ladder import Rung, only
from ingot.kernels.cuda.paged_attention import Sizes
from ingot.kernels.cuda.rows import power_of_two
from ingot.kernels.node import Node
from ingot.plan import assemble
from ingot.plan.extent import product
from ingot.plan.plan import Storage

Pointers = dict[str, str]
_PARTS = 64  # warps that share the keys of a group
_JOINED = 32  # numbers of a result that a warp joins, and parts that it joins at a time
_NOTHING = -1e30  # the logarithm of a sum of nothing, as a word that is not zero
_LARGE = 1 << 16  # bytes of counters from which all steps share them


@contextmanager
def lone_attention() -> Iterator[None]:
    """Engines and candidates that are made inside have this form for one token, and the engine's own for more. Large
    counters are shared by all steps, as each leaves zeros: those of every layer were cold in memory (1.5 us)."""
    kernels._load("cuda")
    entries = kernels._TABLE["PagedAttention", "cuda"]
    ours = {("PagedAttention", "cuda"): [replace(entry, generate=attention) for entry in entries]}
    with mock.patch.dict(kernels._TABLE, ours), mock.patch.object(assemble._Assembly, "_new_storage", _shared):
        yield


def attention(build: CudaBuilder, node: Node) -> None:
    """One token by this form, more by the engine's"""
    sizes = Sizes.of(node)
    if Rung(1, 1).takes(sizes.tokens):
        with only(build, Rung(1, 1), sizes.tokens):
            lone(build, node, sizes)
    if Rung(2).takes(sizes.tokens):
        others = tuple((replace(rung, low=max(rung.low, 2)), splits) for rung, splits in pa._SPLITS)
        with mock.patch.object(pa, "_SPLITS", others):
            pa.paged_attention(build, node)


_new_storage = assemble._Assembly._new_storage


def _shared(assembly: Any, storage: Storage) -> int:
    """The number of a storage; of a large one that lives as long as the run the known one of its size."""
    lasting = storage.place == "arena" and (storage.first, storage.last) == (0, len(assembly.items))
    if not lasting or not isinstance(storage.bytes, int) or storage.bytes < _LARGE:
        return _new_storage(assembly, storage)
    known = [k for k, other in enumerate(assembly.storages) if other == storage]
    return known[0] if known else _new_storage(assembly, storage)


def _convert_queries(f: FunctionBuilder, node: Node) -> None:
    """`q` as products take it."""
    dtype = pa._multiplied(node)
    if dtype == "float16" != node.dtype:
        f.emit(f"q = tl.minimum(tl.maximum(q.to(tl.float32), -{pa._MOST_HALF}), {pa._MOST_HALF})")
    f.emit(f"q = q.to({LANGUAGE[dtype]})")


def lone(build: CudaBuilder, node: Node, sizes: Sizes) -> None:
    """The launch for one token."""
    lines = power_of_two(sizes.share)
    many = min(max(_JOINED // lines, 1), sizes.wide)
    slices, f = sizes.wide // many, build.function(warps=1, stages=1, early=True)
    p = pa._pointers(f, build)
    f.emit("group = tl.program_id(0)\npart = tl.program_id(1)")
    _whose_keys(f, node, sizes, p)
    with f.block(f"if (part >= used) & (part < {_PARTS}):"):
        f.emit("return")
    f.emit(f"places = tl.arange(0, {sizes.block})\nlines = tl.arange(0, {lines})\nstep = begin")
    f.emit(f"depths = tl.arange(0, {sizes.wide})\ndeep = depths < {sizes.depth}")
    _ask_keys(f, build, sizes, p)
    count = product((sizes.groups, _PARTS, lines, pa._FLOAT))
    words = build.counter(product((count, sizes.wide)))
    weights = build.counter(product((count, slices + 1)))  # one more: `_shared` takes those of a size for the same
    f.emit(f"result_words = {f.pointer(words)}\nweight_words = {f.pointer(weights)}")
    f.wait()
    head = f"(group * {sizes.share} + tl.minimum(lines, {sizes.share - 1}))[None, :] * {sizes.depth}"
    f.emit(f"query = tl.load({p['query']} + {head} + depths[:, None], deep[:, None], other=0.0)")
    with f.block(f"if part < {_PARTS}:"):
        _sum_up(f, build, sizes, p)
        _hand_over(f, sizes, slices)
        f.emit("return")
    _own_key(f, node, sizes, p, many)
    _join(f, build, sizes, many)
    f.launch(sizes.groups, _PARTS + slices)


def _whose_keys(f: FunctionBuilder, node: Node, sizes: Sizes, p: Pointers) -> None:
    """How many positions earlier steps left in the pool, and which of their blocks are this part's."""
    block, window = sizes.block, int(node.attributes["window"])
    f.emit(f"position = tl.load({p['positions']})\nowner = tl.load({p['owners']})\nknown = tl.maximum(position, 0)")
    f.emit("low = " + (f"tl.maximum(position + 1 - {window}, 0) // {block}" if window else "0"))
    f.emit(f"steps = tl.maximum((known + {block - 1}) // {block} - low, 0)")
    f.emit(f"share = tl.maximum((steps + {_PARTS - 1}) // {_PARTS}, 1)\nused = (steps + share - 1) // share")
    f.emit("begin = low + part * share\nend = tl.minimum(begin + share, low + steps)")


def _ask_keys(f: FunctionBuilder, build: CudaBuilder, sizes: Sizes, p: Pointers) -> None:
    """For the part's first keys and values, and for later ones as far as the second level of cache; `own_start`: the
    block of the token's own."""
    dtype, width = LANGUAGE[pa._multiplied(build.node)], f.extent(build.node.input(4).shape[1])
    line, each = sizes.block * sizes.depth, pa._LINE // size_of(build.node.input(1).dtype)
    f.emit("held_places = places")
    for name, shape in (("keys", (sizes.wide, sizes.block)), ("values", (sizes.block, sizes.wide))):
        f.emit(f"held_{name} = tl.zeros({shape}, {dtype})")
    with f.block("if step < end:"):  # Triton takes what a branch gives for numbers of 16 bits, and loads them as such
        _load_block(f, build, sizes, p)
    with f.block("for later in range(begin + 1, end):"):
        f.emit(f"later_block = tl.load({p['tables']} + owner * {width} + later).to(tl.int64)")
        f.emit(f"later_start = {p['cache']} + (later_block * {2 * sizes.groups} + group) * {line}")
        f.emit(f"pieces = tl.minimum(tl.arange(0, {power_of_two(-(-line // each))}) * {each}, {line - 1})")
        for part in range(2):
            f.prefetch(f"later_start + {part * sizes.groups * line} + pieces")
    f.emit(f"own_block = tl.load({p['tables']} + owner * {width} + known // {sizes.block}).to(tl.int64)")
    f.emit(f"own_start = {p['cache']} + (own_block * {2 * sizes.groups} + group) * {line}")


def _load_block(f: FunctionBuilder, build: CudaBuilder, sizes: Sizes, p: Pointers) -> None:
    """Keys [depth, block] and values [block, depth] of `step`, as products take them."""
    turns, dtype = pa._turns(build.node), LANGUAGE[pa._multiplied(build.node)]
    line, groups, width = sizes.block * sizes.depth, sizes.groups, f.extent(build.node.input(4).shape[1])
    f.emit(f"block = tl.load({p['tables']} + owner * {width} + step).to(tl.int64)")
    f.emit(f"start = {pa._units(p, turns)} + (block * {2 * groups} + group) * {line // turns}")
    f.emit(f"held_places = step * {sizes.block} + places")
    f.emit(f"pairs = tl.arange(0, {sizes.block // turns})\nacross = tl.arange(0, {sizes.wide // turns})")
    for name, place, inside, shape in (
        ("keys", f"depths[:, None] * {sizes.block // turns} + pairs[None, :]", "deep[:, None]",
         (sizes.wide, sizes.block)),
        ("values", f"{groups * line // turns} + places[:, None] * {sizes.depth // turns} + across[None, :]",
         f"(held_places < known)[:, None] & (across < {sizes.depth // turns})[None, :]", (sizes.block, sizes.wide)),
    ):  # fmt: skip
        found = pa._numbers(f, f"tl.load(start + {place}, {inside}, other=0)", turns, "unit")
        ordered = found[0] if turns == 1 else f"tl.reshape(tl.join({', '.join(found)}), {shape})"
        f.emit(f"held_{name} = {ordered}.to({dtype})")


def _sum_up(f: FunctionBuilder, build: CudaBuilder, sizes: Sizes, p: Pointers) -> None:
    """`peak`, `total` and `sums` [depth, columns] of the part's keys, whose first block is there."""
    lines, columns = power_of_two(sizes.share), max(power_of_two(sizes.share), 8)
    f.emit("q = query")
    _convert_queries(f, build.node)
    if columns > lines:
        copies = f"tl.broadcast_to(q[:, None, :], ({sizes.wide}, {columns // lines}, {lines}))"
        f.emit(f"q = tl.reshape({copies}, ({sizes.wide}, {columns}))")
    _weigh_block(f, build.node, first=True)
    with f.block("for number in range(begin + 1, end):"):
        f.emit("step = number")
        with f.block("if step < end:"):
            _load_block(f, build, sizes, p)
        _weigh_block(f, build.node, first=False)


def _weigh_block(f: FunctionBuilder, node: Node, first: bool) -> None:
    """What the sums are, or become, by the block's keys and values."""
    dtype, cap, window = LANGUAGE[pa._multiplied(node)], node.attributes["softcap"], int(node.attributes["window"])
    precision = ', input_precision="tf32x3"' if dtype == "tl.float32" else ""
    f.emit(f"scores = tl.dot(tl.trans(held_keys), q{precision}) * {float(node.attributes['scale'])!r}")
    if cap:
        f.emit(f"scores = {float(cap)!r} * libdevice.tanh(scores / {float(cap)!r})")
    f.emit("seen = held_places < known" + (f"\nseen = seen & (held_places > position - {window})" if window else ""))
    f.emit(f"scores = tl.where(seen[:, None], scores * {pa._LOG2E!r}, {pa._LOW})")
    f.emit("higher = tl.max(scores, 0)" if first else "higher = tl.maximum(peak, tl.max(scores, 0))")
    f.emit(f"base = tl.where(higher == {pa._LOW}, 0.0, higher)\npowers = tl.exp2(scores - base[None, :])")
    added = f"tl.trans(held_values), powers.to({dtype})"
    if first:
        f.emit(f"total = tl.sum(powers, 0)\nsums = tl.dot({added}{precision})")
    else:
        f.emit("factor = tl.exp2(peak - base)\ntotal = total * factor + tl.sum(powers, 0)")
        f.emit(f"sums = tl.dot({added}, sums * factor[None, :]{precision})")
    f.emit("peak = higher")


def _hand_over(f: FunctionBuilder, sizes: Sizes, slices: int) -> None:
    """The part's results [lines, depth], and for every slice the logarithms of their weights, as words."""
    lines, share = power_of_two(sizes.share), sizes.share
    f.emit("sums = sums * (1.0 / tl.where(total == 0.0, 1.0, total))[None, :]")
    f.emit(f"weight = tl.where(total == 0.0, {_NOTHING}, peak + tl.log2(total))")
    f.emit(f"columns = tl.arange(0, {max(lines, 8)})\nown = group * {_PARTS} + part")
    f.emit(f"place = (own * {lines} + columns)[None, :] * {sizes.wide} + depths[:, None]")
    f.emit(f"tl.store(result_words + place, sums.to(tl.int32, bitcast=True) | 1, (columns < {share})[None, :])")
    f.emit(f"place = (own * {slices} + tl.arange(0, {slices}))[:, None] * {lines} + columns[None, :]")
    f.emit("weight = tl.broadcast_to((weight.to(tl.int32, bitcast=True) | 1)[None, :], place.shape)")
    f.emit(f"tl.store(weight_words + place, weight, (columns < {share})[None, :])")


def _own_key(f: FunctionBuilder, node: Node, sizes: Sizes, p: Pointers, many: int) -> None:
    """`highest`, `total`, `sums` [lines, elements] of the token's own key, which the launch ahead wrote."""
    scale, cap = float(node.attributes["scale"]), float(node.attributes["softcap"])
    f.emit(f"nth = part - {_PARTS}\nelements = nth * {many} + tl.arange(0, {many})")
    f.emit(f"there = position >= 0\noffset = known % {sizes.block}")
    values = f"{sizes.groups * sizes.block * sizes.depth} + offset * {sizes.depth} + elements"
    for name, place, inside in (("key", f"depths * {sizes.block} + offset", "there & deep"),
                                ("value", values, f"there & (elements < {sizes.depth})")):  # fmt: skip
        f.emit(f"{name} = tl.load(own_start + {place}, {inside}, other=0.0).to(tl.float32)")
    f.emit(f"score = tl.sum(query.to(tl.float32) * key[:, None], 0) * {scale!r}")
    if cap:
        f.emit(f"score = {cap!r} * libdevice.tanh(score / {cap!r})")
    f.emit(f"highest = tl.where(there, score * {pa._LOG2E!r}, {_NOTHING})\ntotal = tl.where(there, 1.0, 0.0 * score)")
    f.emit("sums = value[None, :] + 0.0 * score[:, None]")


def _join(f: FunctionBuilder, build: CudaBuilder, sizes: Sizes, many: int) -> None:
    """The slice of all parts' results, some at a time: looks until they are there, leaves zeros."""
    lines, slices = power_of_two(sizes.share), sizes.wide // many
    with f.block(f"for first in range(0, used, {_JOINED}):"):
        f.emit(f"parts = first + tl.arange(0, {_JOINED})\npresent = (parts < used)[:, None]")
        if lines > sizes.share:
            f.emit(f"present = present & (lines < {sizes.share})[None, :]")
        f.emit(f"own = (group * {_PARTS} + parts)[:, None]\nplace = own * {lines} + lines[None, :]")
        f.emit(f"place = place[:, :, None] * {sizes.wide} + elements[None, None, :]")
        f.emit(f"weight_place = (own * {slices} + nth) * {lines} + lines[None, :]")
        look = ("weights = tl.load(weight_words + weight_place, present, other=1, volatile=True)\n"
                "words = tl.load(result_words + place, present[:, :, None], other=1, volatile=True)\n"
                "missing = tl.max((words == 0).to(tl.int32)) + tl.max((weights == 0).to(tl.int32))")  # fmt: skip
        f.emit(look)
        with f.block("while missing > 0:"):
            f.emit(look)
        f.emit(f"weights = tl.where(present, weights.to(tl.float32, bitcast=True), {_NOTHING})")
        f.emit("higher = tl.maximum(highest, tl.max(weights, 0))\nfactor = tl.exp2(highest - higher)")
        f.emit("factors = tl.where(present, tl.exp2(weights - higher[None, :]), 0.0)\nhighest = higher")
        f.emit("total = total * factor + tl.sum(factors, 0)")
        f.emit("added = tl.sum(words.to(tl.float32, bitcast=True) * factors[:, :, None], 0)")
        f.emit("sums = sums * factor[:, None] + added")
        f.emit("tl.store(result_words + place, 0, present[:, :, None])")
        f.emit("tl.store(weight_words + weight_place, 0, present)")
    f.emit("sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]")
    f.emit(f"place = (group * {sizes.share} + lines)[:, None] * {sizes.depth} + elements[None, :]")
    inside = f"(lines < {sizes.share})[:, None] & (elements < {sizes.depth})[None, :]"
    dtype = LANGUAGE[build.node.output.dtype]
    f.emit(f"tl.store({f.pointer(build.output())} + place, sums.to({dtype}), {inside})")
