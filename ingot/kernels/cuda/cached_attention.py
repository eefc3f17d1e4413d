"""CachedAttention: of one token CacheUpdate and PagedAttention in one launch, whose keys are under way before the token
is there.

Keys and values that earlier steps left in the pool go to registers before the wait, and those of a block's next step
while it multiplies: a block takes no more shared memory than products need, so that launches that stream weights
through theirs find room beside it. Blocks turn the token's query and key themselves; the first part of the keys begins
with the token's own, and puts it into the pool, where nobody reads it in this step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ingot.dtypes import size_of
from ingot.kernels import kernel
from ingot.kernels.cuda import paged_attention
from ingot.kernels.cuda.build import LANGUAGE, CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.ladder import Rung, only
from ingot.kernels.cuda.paged_attention import (
    FLOAT,
    LOG2E,
    LOW,
    Sizes,
    attend,
    keys_at,
    places_of,
    pointers,
    values_at,
    weigh,
)
from ingot.kernels.cuda.paged_update import LARGEST, STORED, cache_update
from ingot.kernels.cuda.render import NARROW
from ingot.kernels.cuda.rows import power_of_two
from ingot.kernels.node import Node, Port
from ingot.plan.extent import Extent, product

_ONE, _MORE = Rung(1, 1), Rung(2)
_KEYS, _PARTS, _WARPS = 32, 32, 4  # of a step; blocks that share a group's keys: two lie beside one of weights
_LEAST, _BYTES = 16, 16 << 10  # keys of a step whose numbers are many; of a step's keys that products have room for
_SUMS = 16 << 10  # numbers of parts that registers hold when they are added up
_CACHE, _PROJECTED, _POSITIONS, _SLOTS, _OWNERS, _TABLES, _COSINE, _SINE = range(8)
_UPDATE, _ATTENTION = ("heads", "groups", "epsilon"), ("scale", "window", "softcap")


@dataclass(frozen=True)
class _Steps:
    """What a block walks over: `keys` positions a step, of a table of so many columns; window: 0 for none."""

    sizes: Sizes
    columns: Extent
    window: int
    keys: int

    @classmethod
    def of(cls, node: Node, sizes: Sizes) -> _Steps:
        """Of a node."""
        most = _BYTES // (sizes.wide * size_of(node.input(_CACHE).dtype))
        return cls(sizes, node.input(_TABLES).shape[1], int(node.attributes["window"]), max(min(_KEYS, most), _LEAST))


def _halves(node: Node) -> tuple[Node, Node]:
    """The CacheUpdate and the PagedAttention that it is."""
    (pool, result), early = node.outputs, {"early": node.attributes.get("early", 0)}
    query = Port(node.input(_PROJECTED).dtype, result.shape)
    angles = [node.input(k) if node.has_input(k) else None for k in (_COSINE, _SINE)]
    update = Node("CacheUpdate", (*node.inputs[:_OWNERS], *angles), (pool, query),
                  {name: node.attributes[name] for name in _UPDATE} | early, name=node.name)  # fmt: skip
    read = (query, *(node.input(k) for k in (_CACHE, _POSITIONS, _OWNERS, _TABLES)))
    attention = Node("PagedAttention", read, (result,), {name: node.attributes[name] for name in _ATTENTION} | early,
                     name=node.name)  # fmt: skip
    return update, attention


def _applies(node: Node, target: Any) -> bool:
    _, attention = _halves(node)
    cache, angles = node.input(_CACHE), [port for port in node.inputs[_COSINE:] if port is not None]
    if cache.dtype not in STORED or cache.dtype in LARGEST or {p.dtype for p in angles} - {*NARROW, "float32"}:
        return False
    return paged_attention.applies(attention, target) and _LEAST % Sizes.of(attention).block == 0


@kernel("CachedAttention", on="cuda", when=_applies, in_place=lambda node: (_CACHE,))
def cached_attention(build: CudaBuilder, node: Node) -> None:
    """One token in one launch; more as an update and attention behind it"""
    update, attention = _halves(node)
    tokens, pool, seen = node.input(_PROJECTED).shape[0], build.output(0), build.output(1)
    held = [build.input(k) if node.has_input(k) else None for k in range(_SINE + 1)]
    if _ONE.takes(tokens):
        with only(build, _ONE, tokens):
            _one(build, node, attention, held)
    if _MORE.takes(tokens):
        query = build.temporary(update.outputs[1].bytes, update.outputs[1].dtype)
        with only(build, _MORE, tokens):
            cache_update(build.part(update, [*held[:_OWNERS], *held[_COSINE:]], [pool, query]), update)
        read = [query, pool, *(held[k] for k in (_POSITIONS, _OWNERS, _TABLES))]
        attend(build.part(attention, read, [seen]), attention, _MORE.low)


def _one(build: CudaBuilder, node: Node, attention: Node, held: Sequence[Handle | None]) -> None:
    """A block is a group and a part of the keys; the last of the parts that have some adds them up."""
    f, sizes = build.function(_WARPS, 1, early=True), Sizes.of(attention)
    if node.attributes.get("early"):
        f.release()
    p, rows, walk = _pointers(f, build, attention, held), max(power_of_two(sizes.share), 16), _Steps.of(node, sizes)
    f.emit(f"group = tl.program_id(0)\npart = tl.program_id(1)\nrows = tl.arange(0, {rows})")
    f.emit(f"depths = tl.arange(0, {sizes.wide})\nplaces = tl.arange(0, {walk.keys})")
    f.emit(f"heads = group * {sizes.share} + rows\nexists = rows < {sizes.share}")
    _parts(f, walk, p)
    with f.block("if part >= used:"):
        f.emit("return")
    _find(f, walk, p, "begin")
    _ask(f, walk, p, "begin")
    _find(f, walk, p, "begin + 1")
    _turns(f, node, sizes, p)
    f.wait()
    _token(f, node, sizes, p)
    _begin(f, node, rows, sizes)
    with f.block("for number in range(begin, end):"):
        keys, values = f.let("held_keys", "k"), f.let("held_values", "v")
        _ask(f, walk, p, "number + 1")
        _find(f, walk, p, "number + 2")
        _numbered(f, walk, "number")
        seen = "({0} < position)" + (f" & ({{0}} > position - {walk.window})" if walk.window else "")
        weigh(f, attention, [keys], [[values]], seen)
    _share_out(f, build, sizes)
    f.launch(sizes.groups, _PARTS)


def _pointers(f: FunctionBuilder, build: CudaBuilder, attention: Node, held: Sequence[Handle | None]) -> dict[str, str]:
    """Those of attention, the token in the query's place, and those of the update."""
    read = [held[k] for k in (_PROJECTED, _CACHE, _POSITIONS, _OWNERS, _TABLES)]
    p = pointers(f, build.part(attention, read, [build.output(1)]))
    others = {"slots": held[_SLOTS], "pool": build.output(0), "cosine": held[_COSINE], "sine": held[_SINE]}
    return p | {name: f.pointer(handle) for name, handle in others.items() if handle is not None}


# the keys of earlier steps


def _parts(f: FunctionBuilder, walk: _Steps, p: dict[str, str]) -> None:
    """The token, how many of the parts have keys, and which are this one's: of the step's inputs."""
    f.emit(f"position = tl.load({p['positions']})\nowner = tl.load({p['owners']})")
    f.emit("low = " + (f"tl.maximum(position + 1 - {walk.window}, 0) // {walk.keys}" if walk.window else "0"))
    f.emit(f"steps = tl.maximum((position + {walk.keys - 1}) // {walk.keys} - low, 0)")
    f.emit(f"share = tl.maximum((steps + {_PARTS - 1}) // {_PARTS}, 1)")
    f.emit("used = tl.maximum((steps + share - 1) // share, 1)")
    f.emit("begin = low + part * share\nend = tl.minimum(begin + share, low + steps)")
    f.emit("first = (part == 0) & (position >= 0)")


def _numbered(f: FunctionBuilder, walk: _Steps, step: str) -> None:
    """`keys`: the positions of a step."""
    f.emit(f"keys = {step} * {walk.keys} + tl.arange(0, {walk.keys})")


def _find(f: FunctionBuilder, walk: _Steps, p: dict[str, str], step: str) -> None:
    """Where the blocks of a step `start`, one step before they are asked for."""
    f.emit(f"step = {step}")
    places_of(f, walk.sizes, p, walk.columns, 1, walk.keys)


def _ask(f: FunctionBuilder, walk: _Steps, p: dict[str, str], step: str) -> None:
    """For the keys and values of a step, if it is the part's: they are there when they are used."""
    f.emit(f"step = {step}")
    _numbered(f, walk, "step")
    f.emit(f"held_keys = {keys_at(walk.sizes, p, 1, '(step < end)')}")
    gone = f"position - {walk.window}" if walk.window else ""
    (values,) = values_at(f, walk.sizes, p, 1, "tl.where(step < end, position - 1, -1)", gone)
    f.emit(f"held_values = {values}")


# the token


def _half(node: Node) -> int:
    """Elements of a head that are turned with as many others."""
    return int(node.input(_COSINE).shape[1]) if node.has_input(_COSINE) else 0


def _turns(f: FunctionBuilder, node: Node, sizes: Sizes, p: dict[str, str]) -> None:
    """Angles, and where the token's key and value go."""
    half = _half(node)
    f.emit(f"slot = tl.load({p['slots']})\ndeep = depths < {sizes.depth}")
    start = f"((slot // {sizes.block}).to(tl.int64) * {2 * sizes.groups} + group) * {sizes.block * sizes.depth}"
    f.emit(f"own = {p['pool']} + {start}\noffset = slot % {sizes.block}")
    if half:
        rows = int(node.input(_COSINE).shape[0])
        f.emit(f"angle = tl.minimum(tl.maximum(position, 0), {rows - 1}) * {half} + depths % {half}")
        f.emit(f"turned = depths < {2 * half}\nother = tl.where(depths < {half}, depths + {half}, depths - {half})")
        for name, none in (("cosine", 1.0), ("sine", 0.0)):
            f.emit(f"{name} = tl.load({p[name]} + angle, turned, other={none}).to(tl.float32)")
        f.emit(f"sine = tl.where(depths < {half}, -sine, sine)")


def _turned(f: FunctionBuilder, node: Node, name: str, origin: str, several: bool) -> None:
    """`name`: heads, or a head, in float32."""
    line, each, there = ("[None, :]", "[:, None]", "exists[:, None] & ") if several else ("", "", "")
    row = f"({origin}){each}"
    f.emit(f"{name} = tl.load({row} + depths{line}, {there}deep{line}, other=0.0).to(tl.float32)")
    if _half(node):
        f.emit(f"partner = tl.load({row} + other{line}, {there}turned{line}, other=0.0).to(tl.float32)")
        f.emit(f"{name} = {name} * cosine{line} + partner * sine{line}")


def _token(f: FunctionBuilder, node: Node, sizes: Sizes, p: dict[str, str]) -> None:
    """`q` [rows, depth], `key` and `value` [depth], rounded as the pool has them; these two put there."""
    x, depth, kept = p["query"], sizes.depth, STORED[node.input(_CACHE).dtype]
    _turned(f, node, "q", f"{x} + heads * {depth}", True)
    f.emit(f"q = q.to({LANGUAGE[node.input(_PROJECTED).dtype]}).to({kept})")
    _turned(f, node, "key", f"{x} + {sizes.heads} * {depth} + group * {depth}", False)
    f.emit(f"value = tl.load({x} + ({sizes.heads + sizes.groups} + group) * {depth} + depths, deep, other=0.0)")
    f.emit(f"key = key.to({kept})\nvalue = value.to({kept})\nwritten = first & (slot >= 0) & deep")
    f.emit(f"tl.store(own + depths * {sizes.block} + offset, key, written)")
    f.emit(f"tl.store(own + {sizes.groups * sizes.block * depth} + offset * {depth} + depths, value, written)")
    f.emit("key = key.to(tl.float32)\nvalue = tl.where(first, value.to(tl.float32), 0.0)")


# the sums


def _begin(f: FunctionBuilder, node: Node, rows: int, sizes: Sizes) -> None:
    """Before any step: the first part's are of the token's own key alone, the others' of none."""
    cap = float(node.attributes["softcap"])
    f.emit(f"score = tl.sum(q.to(tl.float32) * key[None, :], 1) * {float(node.attributes['scale'])!r}")
    if cap:
        f.emit(f"score = {cap!r} * libdevice.tanh(score / {cap!r})")
    f.emit(f"peak = tl.where(first, score * {LOG2E!r}, {LOW})")
    f.emit(f"total = tl.where(first, 1.0, 0.0) + tl.zeros(({rows},), tl.float32)")
    f.emit(f"sums0 = tl.broadcast_to(value[None, :], ({rows}, {sizes.wide}))")


def _share_out(f: FunctionBuilder, build: CudaBuilder, sizes: Sizes) -> None:
    """Parts to memory, each its heads alone; the last block of a group adds them up."""
    lines = power_of_two(sizes.share)
    together = max(min(_PARTS, _SUMS // (lines * sizes.wide)), 1)
    sums = f.pointer(build.temporary(product((sizes.groups, _PARTS, lines, sizes.wide, FLOAT)), "float32"))
    facts = f.pointer(build.temporary(product((sizes.groups, _PARTS, lines, 2, FLOAT)), "float32"))
    tickets = f.pointer(build.counter(product((sizes.groups, FLOAT))))
    f.emit(f"mine = (group * {_PARTS} + part) * {lines} + rows")
    f.emit(f"tl.store({sums} + mine[:, None] * {sizes.wide} + depths[None, :], sums0, exists[:, None])")
    f.emit(f"tl.store({facts} + mine * 2, peak, exists)\ntl.store({facts} + mine * 2 + 1, total, exists)")
    f.emit(f"tl.debug_barrier()\nticket = tl.atomic_add({tickets} + group, 1, sem='acq_rel')")
    with f.block("if ticket == used - 1:"):
        f.emit(f"tl.store({tickets} + group, 0)\nlines = tl.arange(0, {lines})\nthere = lines < {sizes.share}")
        f.emit(f"parts = tl.arange(0, {_PARTS})\nall = (group * {_PARTS} + parts)[:, None] * {lines} + lines[None, :]")
        f.emit("known_parts = (parts < used)[:, None] & there[None, :]")
        for name, place, other in (("peaks", "", LOW), ("totals", " + 1", "0.0")):
            f.emit(f"{name} = tl.load({facts} + all * 2{place}, known_parts, other={other}, cache_modifier='.cg')")
        f.emit(f"peak_all = tl.max(peaks, 0)\nbase = tl.where(peak_all == {LOW}, 0.0, peak_all)")
        f.emit("whole = tl.sum(tl.exp2(peaks - base[None, :]) * totals, 0)")
        f.emit(f"joined = tl.zeros(({lines}, {sizes.wide}), tl.float32)")
        with f.block(f"for nth in range(0, used, {together}):"):
            f.emit(f"some = nth + tl.arange(0, {together})\nasked = (some < used)[:, None] & there[None, :]")
            f.emit(f"their = (group * {_PARTS} + some)[:, None] * {lines} + lines[None, :]")
            f.emit(f"theirs = tl.load({facts} + their * 2, asked, other={LOW}, cache_modifier='.cg')")
            f.emit(f"part_sums = tl.load({sums} + their[:, :, None] * {sizes.wide} + depths[None, None, :], "
                   "asked[:, :, None], other=0.0, cache_modifier='.cg')")  # fmt: skip
            f.emit("joined += tl.sum(part_sums * tl.exp2(theirs - base[None, :])[:, :, None], 0)")
        f.emit("joined = joined / tl.where(whole == 0.0, 1.0, whole)[:, None]")
        f.emit(f"result = (group * {sizes.share} + lines)[:, None] * {sizes.depth} + depths[None, :]")
        f.emit(f"tl.store({f.pointer(build.output(1))} + result, joined.to({LANGUAGE[build.node.outputs[1].dtype]}), "
               f"there[:, None] & (depths < {sizes.depth})[None, :])")  # fmt: skip
