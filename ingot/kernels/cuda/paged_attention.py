"""PagedAttention: tokens that are alone in their sequence's part of the step share its keys among blocks; tokens that
follow each other go in tiles of queries, as flash attention has them (Dao et al. 2022; Flash-Decoding)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ingot.dtypes import size_of
from ingot.kernels import kernel
from ingot.kernels.cuda.build import LANGUAGE, CudaBuilder, FunctionBuilder
from ingot.kernels.cuda.ladder import Rung, only
from ingot.kernels.cuda.paged_update import LARGEST, STORED
from ingot.kernels.cuda.render import NARROW
from ingot.kernels.cuda.rows import power_of_two
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, ceil_div, product

LOW = 'float("-inf")'
LOG2E = math.log2(math.e)
FLOAT = 4
_SPLITS = ((Rung(1, 8), 16), (Rung(9, 32), 4), (Rung(33), 1))  # blocks that share a token's keys
_FEW = 8  # tokens up to which the launch behind may begin at once
_KEYS = 64  # a step
_USUAL, _EIGHTHS = (4, 2), (2, 6)  # warps and stages of a token that is alone; of many of eight bits
_MOST_HALF = 65504.0
_LINE = 128  # bytes that memory is asked for at a time
_ROWS = 128  # queries and their heads in a tile of tokens that follow each other
_FLOATS = 4096  # numbers of such a tile's queries in float32: a product has three parts of each, and of keys and values
_LITTLE = 128 << 10  # bytes of shared memory: where there are fewer, tiles of depth 256 are smaller


@dataclass(frozen=True)
class Sizes:
    """`share` query heads read one group's keys; `block` tokens lie together in the pool."""

    tokens: Extent
    heads: int
    groups: int
    depth: int
    block: int

    @classmethod
    def of(cls, node: Node) -> Sizes:
        """Of a node."""
        tokens, heads, depth = node.input(0).shape
        _, _, groups, line = node.input(1).shape
        return cls(tokens, int(heads), int(groups), int(depth), int(line) // int(depth))

    @property
    def share(self) -> int:
        """Query heads of a group."""
        return self.heads // self.groups

    @property
    def wide(self) -> int:
        """The depth as a block has it."""
        return max(power_of_two(self.depth), 16)


def applies(node: Node, target: Any) -> bool:
    """Whether there are launches for the node."""
    if node.dtype not in (*NARROW, "float32") or node.input(1).dtype not in STORED:
        return False
    sizes = Sizes.of(node)
    even = sizes.depth % 2 == sizes.block % 2 == 0 or node.input(1).dtype not in LARGEST
    return sizes.depth <= 256 and _KEYS % sizes.block == 0 and even


@kernel("PagedAttention", on="cuda", when=applies)
def paged_attention(build: CudaBuilder, node: Node) -> None:
    """Every token to the positions up to its own of its sequence"""
    attend(build, node, 1)


def attend(build: CudaBuilder, node: Node, first: int) -> None:
    """The launches for `first` tokens and more."""
    sizes = Sizes.of(node)
    for every, splits in _SPLITS:
        rung = replace(every, low=max(every.low, first))
        if rung.takes(sizes.tokens):
            with only(build, rung, sizes.tokens):
                _alone(build, node, sizes, rung, splits)
    if Rung(2).takes(sizes.tokens):
        with only(build, Rung(2), sizes.tokens):
            _together(build, node, sizes)


def pointers(f: FunctionBuilder, build: CudaBuilder) -> dict[str, str]:
    """Names of the operands' addresses."""
    names = ("query", "cache", "positions", "owners", "tables")
    return {name: f.pointer(build.input(k)) for k, name in enumerate(names)}


# tokens that are alone


def _alone(build: CudaBuilder, node: Node, sizes: Sizes, rung: Rung, splits: int) -> None:
    """A block is a token, a group, and a part of the keys; the last of the parts adds them up."""
    warps, stages = _EIGHTHS if splits == 1 and node.input(1).dtype in LARGEST else _USUAL
    stages = 1 if sizes.wide > 128 and _multiplied(node) == "float32" else stages
    f = build.function(warps=warps, stages=stages, early=True)
    if node.attributes.get("early") and rung.high is not None and rung.high <= _FEW:
        f.release()
    p, rows, window = pointers(f, build), max(power_of_two(sizes.share), 16), int(node.attributes["window"])
    f.emit("token = tl.program_id(0)\ngroup = tl.program_id(1)\npart = tl.program_id(2)")
    f.emit(f"rows = tl.arange(0, {rows})\ndepths = tl.arange(0, {sizes.wide})\nplaces = tl.arange(0, {_KEYS})")
    f.emit(f"heads = group * {sizes.share} + rows\nexists = rows < {sizes.share}")
    _whose(f, sizes, p)
    f.emit("low = " + (f"tl.maximum(position + 1 - {window}, 0) // {_KEYS}" if window else "0"))
    f.emit(f"steps = (position + {_KEYS}) // {_KEYS} - low\nshare = (steps + {splits - 1}) // {splits}")
    f.emit("begin = low + part * share\nend = tl.minimum(begin + share, low + steps)")
    _ask(f, build, sizes, p)
    f.wait()
    with f.block("if mine:"):
        place = f"token * {sizes.heads * sizes.depth} + heads[:, None] * {sizes.depth} + depths[None, :]"
        f.emit(f"place = {place}\ninside = exists[:, None] & (depths < {sizes.depth})[None, :]")
        _load_queries(f, node, p["query"])
        _begin(f, node, rows, sizes)
        with f.block("for step in range(begin, end):"):
            _step(f, build, sizes, p, ("position", "", "position", f"position - {window}"))
        _end(f, node, rows, sizes)
        if splits == 1:
            f.emit("sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]")
            f.emit(f"tl.store({f.pointer(build.output())} + place, sums.to({LANGUAGE[node.output.dtype]}), inside)")
        else:
            _share_out(f, build, sizes, rung, splits, rows)
    f.launch(sizes.tokens, sizes.groups, splits)


def _whose(f: FunctionBuilder, sizes: Sizes, p: dict[str, str]) -> None:
    """The token's position and owner, and whether it is alone: of the step's inputs, which no launch writes."""
    last = f.extent(sizes.tokens)
    f.emit(f"position = tl.load({p['positions']} + token)\nowner = tl.load({p['owners']} + token)")
    f.emit(f"before = tl.load({p['owners']} + tl.maximum(token - 1, 0)) == owner")
    f.emit(f"after = tl.load({p['owners']} + tl.minimum(token + 1, {last} - 1)) == owner")
    f.emit(f"after = after & (tl.load({p['positions']} + tl.minimum(token + 1, {last} - 1)) >= 0)")
    f.emit(f"together = ((token > 0) & before) | ((token < {last} - 1) & after)")
    f.emit("mine = (position < 0) | (together == 0)")


def _ask(f: FunctionBuilder, build: CudaBuilder, sizes: Sizes, p: dict[str, str]) -> None:
    """For the first keys and values, while the launches before still run: all but the newest are there."""
    block, line, each = sizes.block, sizes.block * sizes.depth, _LINE // size_of(build.node.input(1).dtype)
    width = f.extent(build.node.input(4).shape[1])
    f.emit(f"early = tl.minimum(begin * {_KEYS} + places, tl.maximum(position, 0))")
    f.emit(f"number = tl.load({p['tables']} + owner * {width} + early // {block}).to(tl.int64)")
    f.emit(f"early_at = number * {2 * sizes.groups * line} + group * {line} + early % {block} * {sizes.depth}")
    f.emit(f"lines = tl.arange(0, {power_of_two(max(sizes.depth // each, 1))}) * {each}")
    for part in range(2):
        f.prefetch(f"{p['cache']} + {part * sizes.groups * line} + early_at[:, None] + lines[None, :]")


def _share_out(f: FunctionBuilder, build: CudaBuilder, sizes: Sizes, rung: Rung, splits: int, rows: int) -> None:
    """Parts to memory; the last block of a token and group joins them."""
    held = product((rung.cut(sizes.tokens), sizes.groups, splits, rows))
    sums = f.pointer(build.temporary(product((held, sizes.wide, FLOAT)), "float32"))
    facts = f.pointer(build.temporary(product((held, 2, FLOAT)), "float32"))
    tickets = f.pointer(build.counter(product((rung.cut(sizes.tokens), sizes.groups, FLOAT))))
    f.emit(f"site = token * {sizes.groups} + group\nown = (site * {splits} + part) * {rows} + rows")
    f.emit(f"tl.store({sums} + own[:, None] * {sizes.wide} + depths[None, :], sums, exists[:, None])")
    f.emit(f"tl.store({facts} + own * 2, peak)\ntl.store({facts} + own * 2 + 1, total)")
    f.emit(f"tl.debug_barrier()\nticket = tl.atomic_add({tickets} + site, 1, sem='acq_rel')")
    with f.block(f"if ticket == {splits - 1}:"):
        f.emit(f"tl.store({tickets} + site, 0)\nparts = tl.arange(0, {splits})")
        f.emit(f"all = (site * {splits} + parts)[:, None] * {rows} + rows[None, :]")
        f.emit(f"peaks = tl.load({facts} + all * 2, cache_modifier='.cg')\npeak = tl.max(peaks, 0)")
        f.emit(f"base = tl.where(peak == {LOW}, 0.0, peak)\nfactors = tl.exp2(peaks - base[None, :])")
        f.emit(f"total = tl.sum(factors * tl.load({facts} + all * 2 + 1, cache_modifier='.cg'), 0)")
        f.emit(f"sums = tl.zeros(({rows}, {sizes.wide}), tl.float32)")
        with f.block(f"for other in tl.static_range({splits}):"):
            f.emit(f"their = (site * {splits} + other) * {rows} + rows")
            f.emit(f"theirs = tl.load({facts} + their * 2, cache_modifier='.cg')")
            f.emit(f"part_sums = tl.load({sums} + their[:, None] * {sizes.wide} + depths[None, :], "
                   "exists[:, None], other=0.0, cache_modifier='.cg')")  # fmt: skip
            f.emit("sums += part_sums * tl.exp2(theirs - base)[:, None]")
        f.emit("sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]")
        f.emit(f"tl.store({f.pointer(build.output())} + place, sums.to({LANGUAGE[build.node.output.dtype]}), inside)")


# tokens that follow each other


def _fitting(build: CudaBuilder, sizes: Sizes) -> tuple[int, int]:
    """Rows of a tile, and stages, that shared memory has room for."""
    if _multiplied(build.node) == "float32" and sizes.wide > 64:
        return _FLOATS // sizes.wide, 1
    return (32, 1) if sizes.wide > 128 and build.target.shared < _LITTLE else (_ROWS, 2)


def _together(build: CudaBuilder, node: Node, sizes: Sizes) -> None:
    """A block is a tile of tokens and a group; it walks over the sequences of its tokens, and their keys."""
    (most, stages), share = _fitting(build, sizes), power_of_two(sizes.share)
    tile = max(most // share, 1)
    rows = tile * share
    f = build.function(warps=8 if rows >= 128 else 4, stages=stages)
    p, count = pointers(f, build), f.extent(sizes.tokens)
    f.emit(f"group = tl.program_id(1)\nrows = tl.arange(0, {rows})")
    f.emit(f"depths = tl.arange(0, {sizes.wide})\nplaces = tl.arange(0, {_KEYS})")
    f.emit(f"origin = (tl.num_programs(0) - 1 - tl.program_id(0)) * {tile}\ntokens = origin + rows // {share}")
    f.emit(f"heads = group * {sizes.share} + rows % {share}")
    f.emit(f"there = (tokens < {count}) & (rows % {share} < {sizes.share})")
    f.wait()
    f.emit(f"positions = tl.load({p['positions']} + tokens, there, other=-1)")
    f.emit(f"owners = tl.load({p['owners']} + tokens, there, other=-1)\nvalid = there & (positions >= 0)")
    f.emit(f"before = tl.load({p['owners']} + tokens - 1, there & (tokens > 0), other=-1) == owners")
    f.emit(f"following = there & (tokens + 1 < {count})")
    f.emit(f"after = (tl.load({p['owners']} + tokens + 1, following, other=-1) == owners) & "
           f"(tl.load({p['positions']} + tokens + 1, following, other=-1) >= 0)")  # fmt: skip
    f.emit("valid = valid & (before | after)")
    f.emit("first = tl.min(tl.where(valid, owners, 2147483647))\nfinal = tl.max(tl.where(valid, owners, -1))")
    with f.block("if final >= 0:"):
        place = f"tokens[:, None] * {sizes.heads * sizes.depth} + heads[:, None] * {sizes.depth} + depths[None, :]"
        f.emit(f"place = {place}\ninside = valid[:, None] & (depths < {sizes.depth})[None, :]")
        _load_queries(f, node, p["query"])
        _begin(f, node, rows, sizes)
        with f.block("for owner in range(first, final + 1):"):
            f.emit("mine = valid & (owners == owner)\nlimit = tl.max(tl.where(mine, positions, -1))")
            window = int(node.attributes["window"])
            if window:
                f.emit(f"gone = tl.min(tl.where(mine, positions, 2147483647)) - {window}")
            low = f"tl.maximum(gone + 1, 0) // {_KEYS}"
            f.emit(f"begin = tl.where(limit >= 0, {low}, 0)" if window else "begin = 0")
            with f.block(f"for step in range(begin, (limit + {_KEYS}) // {_KEYS}):"):
                _step(f, build, sizes, p, ("positions[:, None]", "mine[:, None] & ", "limit", "gone"))
        _end(f, node, rows, sizes)
        f.emit("sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]")
        f.emit(f"tl.store({f.pointer(build.output())} + place, sums.to({LANGUAGE[node.output.dtype]}), inside)")
    f.launch(ceil_div(sizes.tokens, tile), sizes.groups)


# both


def _multiplied(node: Node) -> str:
    """What queries, keys and values are multiplied as: of eight bits two at a time become float16."""
    kept = node.input(1).dtype
    return "float16" if kept in LARGEST else kept


def _load_queries(f: FunctionBuilder, node: Node, query: str) -> None:
    f.emit(f"q = tl.load({query} + place, inside, other=0.0)")
    dtype = _multiplied(node)
    if dtype == "float16" != node.dtype:
        f.emit(f"q = tl.minimum(tl.maximum(q.to(tl.float32), -{_MOST_HALF}), {_MOST_HALF})")
    f.emit(f"q = q.to({LANGUAGE[dtype]})")


def _begin(f: FunctionBuilder, node: Node, rows: int, sizes: Sizes) -> None:
    f.emit(f"peak = tl.full(({rows},), {LOW}, tl.float32)\ntotal = tl.zeros(({rows},), tl.float32)")
    halves = _turns(node)
    for turn in range(halves):
        f.emit(f"sums{turn} = tl.zeros(({rows}, {sizes.wide // halves}), tl.float32)")


def _turns(node: Node) -> int:
    """Numbers that are loaded as one: of eight bits two, which products have two apart."""
    return 2 if node.input(1).dtype in LARGEST else 1


def _end(f: FunctionBuilder, node: Node, rows: int, sizes: Sizes) -> None:
    """The sums in their order."""
    joined = f"tl.reshape(tl.join(sums0, sums1), ({rows}, {sizes.wide}))" if _turns(node) == 2 else "sums0"
    f.emit(f"sums = {joined}")


def _step(f: FunctionBuilder, build: CudaBuilder, sizes: Sizes, p: dict[str, str],
          seeing: tuple[str, str, str, str]) -> None:  # fmt: skip
    """`_KEYS` positions of `owner`: scores, and what the sums become. seeing: the rows' positions, a
    condition for rows that are concerned ("": all), the last position of them all, and with a window the last one that
    has left all of theirs. What lies behind the one or before the other may be another's, and no number at all."""
    position, mine, most, gone = seeing
    node, turns, window = build.node, _turns(build.node), int(build.node.attributes["window"])
    places_of(f, sizes, p, node.input(4).shape[1], turns, _KEYS)
    keys = _numbers(f, keys_at(sizes, p, turns), turns, "k")
    loads = values_at(f, sizes, p, turns, most, gone if window else "")
    values = [_numbers(f, loaded, turns, "v") for loaded in loads]
    after = f" & ({{0}} > {position} - {window})" if window else ""
    weigh(f, node, keys, values, f"{mine}({{0}} <= {position}){after}")


def weigh(f: FunctionBuilder, node: Node, keys: Sequence[str], values: Sequence[Sequence[str]], seen: str) -> None:
    """What the sums become by the positions `keys`: for each turn keys [depth, keys], and values [keys, depth]. seen:
    which positions "{0}" are."""
    turns, dtype, cap = _turns(node), LANGUAGE[_multiplied(node)], float(node.attributes["softcap"])
    precision = ', input_precision="tf32x3"' if dtype == "tl.float32" else ""
    scores = [f.let(f"tl.dot(q, {key}{precision}) * {float(node.attributes['scale'])!r}", "scores") for key in keys]
    for turn, name in enumerate(scores):
        if cap:
            f.emit(f"{name} = {cap!r} * libdevice.tanh({name} / {cap!r})")
        key = f"(keys[None, :] + {turn})" if turn else "keys[None, :]"
        f.emit(f"{name} = tl.where({seen.format(key)}, {name} * {LOG2E!r}, {LOW})")
    f.emit("higher = peak")
    for name in scores:
        f.emit(f"higher = tl.maximum(higher, tl.max({name}, 1))")
    f.emit(f"base = tl.where(higher == {LOW}, 0.0, higher)\nfactor = tl.exp2(peak - base)\npeak = higher")
    powers = [f.let(f"tl.exp2({name} - base[:, None])", "powers") for name in scores]
    f.emit(f"total = total * factor + {' + '.join(f'tl.sum({name}, 1)' for name in powers)}")
    for half in range(turns):
        f.emit(f"sums{half} = sums{half} * factor[:, None]")
        for turn, name in enumerate(powers):
            f.emit(f"sums{half} = tl.dot({name}.to({dtype}), {values[turn][half]}, sums{half}{precision})")


def places_of(f: FunctionBuilder, sizes: Sizes, p: dict[str, str], columns: Extent, turns: int,
              count: int) -> None:  # fmt: skip
    """`keys`, the first of each `turns` of a step's `count`, and where their blocks `start`, in units of as many
    numbers; columns: of the tables."""
    line, width = sizes.block * sizes.depth, f.extent(columns)
    f.emit(f"keys = step * {count} + " + (f"{turns} * tl.arange(0, {count // turns})" if turns > 1 else "places"))
    number = f"tl.load({p['tables']} + owner * {width} + tl.minimum(keys // {sizes.block}, {width} - 1))"
    f.emit(f"start = {number}.to(tl.int64) * {2 * sizes.groups * line // turns} + group * {line // turns}")


def keys_at(sizes: Sizes, p: dict[str, str], turns: int, there: str = "") -> str:
    """Loads units [depth, keys] of `turns` numbers each; there: a condition, "" for none."""
    block = sizes.block // turns
    deep = [] if sizes.wide == sizes.depth else [f"(depths < {sizes.depth})[:, None]"]
    mask = " & ".join([*deep, *([there] if there else [])])
    place = f"start[None, :] + (depths * {block})[:, None] + (keys // {turns} % {block})[None, :]"
    place = f"tl.max_contiguous(tl.multiple_of({place}, [1, {block}]), [1, {block}])"
    return f"tl.load({_units(p, turns)} + {place}{f', {mask}, other=0' if mask else ''})"


def values_at(f: FunctionBuilder, sizes: Sizes, p: dict[str, str], turns: int, most: str, gone: str) -> list[str]:
    """Loads units [keys, depth], for each turn of the keys."""
    found, depth = [], sizes.depth // turns
    f.emit(f"across = tl.arange(0, {sizes.wide // turns})")
    deep = "" if sizes.wide == sizes.depth else f" & (across < {depth})[None, :]"
    aligned = min(depth & -depth, 16)
    for turn in range(turns):
        row = f"(start + {sizes.groups * sizes.block * depth} + (keys % {sizes.block} + {turn}) * {depth})[:, None]"
        place = f"tl.multiple_of({row} + across[None, :], [1, {aligned}])"
        after = f" & (keys + {turn} > {gone})" if gone else ""
        there = f"((keys + {turn} <= {most}){after})[:, None]{deep}"
        found.append(f"tl.load({_units(p, turns)} + {place}, {there}, other=0)")
    return found


def _units(p: dict[str, str], turns: int) -> str:
    return f"{p['cache']}.to(tl.pointer_type(tl.int16))" if turns == 2 else p["cache"]


def _numbers(f: FunctionBuilder, loaded: str, turns: int, stem: str) -> list[str]:
    """What is multiplied: what was loaded, or the two numbers of every unit."""
    if turns == 1:
        return [f.let(loaded, stem)]
    pair, names = f.let(loaded, "pair"), [f.name(stem) for _ in range(2)]
    f.emit(f"{', '.join(names)} = {f.core('words', 'two_eighths')}({pair})")
    f.faster(f"{', '.join(names)} = {{}}({pair})", "words", "converted_two_eighths")
    return names
