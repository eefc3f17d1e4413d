"""Projections of one row, each of the one before, in one launch whose blocks all are there at once.

A block has tiles of each product, and what it asks for goes round its ring from one product to the next (see
projection_ring), so that reading goes on while a row is handed over. Rows travel as words that are zero until they are
there, without a fence, which would wait for all that is under way: a warp waits for the numbers that it multiplies by,
and for no more. They are zeros again when the launch comes next: two halves take turns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from ingot.ir import expression as expressions
from ingot.ir.ops_projection import chained
from ingot.kernels import kernel
from ingot.kernels.cuda import projection as single
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.ladder import Rung, only
from ingot.kernels.cuda.projection_ring import (
    BRICK,
    COLUMNS,
    LINE,
    Ring,
    factor,
    multiply,
    norm_at,
    numbers,
    sum_of_sums,
)
from ingot.kernels.cuda.projection_row import Work, operands_in
from ingot.kernels.cuda.render import converted, render
from ingot.kernels.node import Node, Port

WARPS, SLOTS = 16, 5
_WORDS = BRICK // 4
_TOGETHER = "together"
_TRIES = 1 << 22  # looks, some seconds: of what never comes the kernel ends with an error
_HELD = 8  # rounds whose numbers registers hold; of more a warp waits for each round's


@dataclass(frozen=True)
class Link:
    """A product of a chain. node: the Projection; operands: where what its expression reads is, by input: a pointer, or
    the number of a link before; output: where its result goes beside the next link."""

    node: Node
    weights: Handle
    operands: dict[int, Handle | int]
    output: Handle | None = None

    @property
    def work(self) -> Work:
        return Work.of(self.node)


@dataclass(frozen=True)
class Shape(Ring):
    """Of a link; where the row, sums and squares lie is the same of all. number: the link's."""

    longest: int = 0
    most: int = 1
    number: int = 0

    @property
    def second(self) -> int:
        return 2 * self.longest + 16

    @property
    def tile_sums(self) -> int:
        return self.most * self.warps * COLUMNS * 4

    @property
    def squares(self) -> int:
        """Of links in turn: a warp may be at the next row while another still reads those of the last."""
        return self.sums + 2 * self.tile_sums + self.number % 2 * 4 * self.warps

    @property
    def bytes(self) -> int:
        return self.sums + 2 * self.tile_sums + 8 * self.warps

    @property
    def unit(self) -> int:
        """Words of a tile's part."""
        return self.bricks * _WORDS


def parts_of(node: Node) -> list[Node]:
    """The Projections of a ProjectionChain."""
    found, row = list[Node](), node.input(0)
    for link in chained(node.attributes):
        weight, text = node.input(link.weight), expressions.parse(link.expression)
        norm = node.input(link.norm) if link.norm is not None else None
        operands = [found[~k].output if k < 0 else node.input(k) for k in link.operands]
        dtype = expressions.result_dtype(text, ["float32"] * link.parts + [port.dtype for port in operands])
        stated = {"parts": link.parts, "epsilon": link.epsilon, "expression": link.expression,
                  "early": node.attributes["early"]}  # fmt: skip
        output = Port(dtype, (*row.shape[:-1], int(weight.shape[1]) // link.parts))
        found.append(Node("Projection", (row, weight, norm, *operands), (output,), stated, text, node.name))
        row = output
    return found


def _applies(node: Node, target: Any) -> bool:
    return all(single.applies(part, target) for part in parts_of(node))


def _together(nodes: Sequence[Node], node: Node, target: Architecture) -> bool:
    """Whether there is a launch of all for one row."""
    narrow = {port.dtype for n in nodes for port in (n.input(0), n.output)} == {"bfloat16"}
    works, most = [Work.of(n) for n in nodes], _HELD * WARPS * LINE
    own = all(works[~k].columns == work.columns and ~k + 1 < number  # else it might not be stored yet
              for number, (work, link) in enumerate(zip(works, chained(node.attributes), strict=True))
              for k in link.operands if k < 0)  # fmt: skip
    held = all(work.depth <= most or not n.has_input(2) for n, work in zip(nodes, works, strict=True))
    rings = all(single.ring_of(n, target) for n in nodes)
    return narrow and own and held and works[0].depth <= most and rings and fits(works, target)


def _streams(node: Node, target: Architecture) -> tuple[str, ...]:
    """How one row is computed: by all products together, or by the stream of each."""
    nodes = parts_of(node)
    together = _together(nodes, node, target)
    return (_TOGETHER if together else " ".join(single.usual(n, target) for n in nodes),)


@kernel("ProjectionChain", on="cuda", when=_applies, space={"streams": _streams})
def projection_chain(build: CudaBuilder, node: Node, streams: str) -> None:
    """One row in one launch; more product by product"""
    nodes, links = parts_of(node), list(chained(node.attributes))
    rows, one = Work.of(nodes[0]).rows, Rung(1, 1)
    together, of_each = streams == _TOGETHER, streams.split()
    places, packed = dict(zip(node.attributes["results"], range(len(node.outputs)), strict=True)), list[Handle]()
    for k, n in enumerate(nodes):
        packed.append(single.kept(build, n, together or of_each[k].startswith(single.RING)))
    if together and one.takes(rows):
        chosen = [Link(n, handle, {3 + i: ~k if k < 0 else build.input(k) for i, k in enumerate(link.operands)},
                       build.output(places[number]) if number in places else None)
                  for number, (n, handle, link) in enumerate(zip(nodes, packed, links, strict=True))]  # fmt: skip
        with only(build, one, rows):
            chain(build, build.input(0), chosen)
        if not Rung(2).takes(rows):
            return
    made = [build.output(places[k]) if k in places else build.temporary(n.output.bytes, n.output.dtype)
            for k, n in enumerate(nodes)]  # fmt: skip
    for k, (n, handle, link) in enumerate(zip(nodes, packed, links, strict=True)):
        norm = build.input(link.norm) if link.norm is not None else None
        operands = [made[~i] if i < 0 else build.input(i) for i in link.operands]
        part = build.part(n, [made[k - 1] if k else build.input(0), handle, norm, *operands], [made[k]])
        if together:
            single.more_rows(part, n, handle, True)
        else:
            single.rows_of(part, n, handle, of_each[k])


def fits(works: Sequence[Work], target: Architecture) -> bool:
    """Whether there is a chain of products of such sizes: every block has a tile of each, warps have whole rounds."""
    sizes = all(w.depth % (WARPS * LINE) == 0 and w.columns % COLUMNS == 0 for w in works)
    enough = all(w.columns >= COLUMNS * target.processors for w in works)
    handed = all(a.columns == b.depth for a, b in pairwise(works))
    return sizes and enough and handed and max(s.bytes for s in shapes(works, target)) <= target.shared


def shapes(works: Sequence[Work], target: Architecture, slots: int = SLOTS) -> list[Shape]:
    """Of all links."""
    longest, most = max(w.depth for w in works), max(w.parts for w in works)
    return [Shape(w, target.processors, WARPS, slots, longest=longest, most=most, number=k)
            for k, w in enumerate(works)]  # fmt: skip


def chain(build: CudaBuilder, row: Handle, links: Sequence[Link], slots: int = SLOTS) -> None:
    """The launch. row: the first link's, of one row."""
    all_of = shapes([link.work for link in links], build.target, slots)
    f = build.function(warps=WARPS, stages=1, early=True, gluon=True, together=True)
    f.release()
    told = [s.work.columns for s in all_of[:-1]]
    words, turns = f.pointer(build.counter(4 * sum(told))), f.pointer(build.counter(4 * build.target.processors))
    _open(f, all_of, links, turns, sum(told))
    f.emit("left = block * 0\nunit = left - 1\nspot = words0\nmore = left + 1")
    _next_unit(f, all_of)
    with f.block(f"for ahead in range({f.core('ring', 'unknown')}(gl.to_tensor({slots - 1}))):"):
        _ask(f, all_of, "ahead")
    f.emit("step = 0\ntile = 0")
    for k, shape in enumerate(all_of):
        f.emit(f"rounds = {f.core('ring', 'unknown')}(gl.to_tensor({shape.rounds}))")
        place = f"{words} + (half + {sum(told[: k - 1])}) // 2"
        given = place if k else f"{f.pointer(row)}.to(gl.pointer_type(gl.int32))"
        late = _row(f, build, all_of, links, k, words, given)
        if late:
            f.emit("index = 0")
            _tile(f, build, all_of, links, k, words, True)
        with f.block(f"for index in range({int(late)}, tiles{k}):"):
            _tile(f, build, all_of, links, k, words)
    f.emit(f"{f.core('ring', 'turn_over')}({turns} + (block + thread * 0), turn, thread == 0)")
    with f.block("if tiles0 < 0:"):  # never, see projection_ring
        f.emit("shared.index(0).store(gl.full([64], 0, gl.int32, layout=FLAT))")
    f.launch(build.target.processors)


def _open(f: FunctionBuilder, all_of: Sequence[Shape], links: Sequence[Link], turns: str, told: int) -> None:
    """The thread's places, what the block has to do, where weights begin for a warp."""
    first = all_of[0]
    f.emit(f"FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [{first.warps}], [0])")
    f.emit("PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])")
    f.emit(f"shared = gl.allocate_shared_memory(gl.int32, [{-(-first.bytes // 256)}, 64], PLAIN)")
    f.emit("block = gl.program_id(0)\nblocks = gl.num_programs(0)")
    f.emit(f"turn = {f.core('ring', 'number_at')}({turns} + block)\nhalf = turn * {told}\nother = {told} - half")
    f.emit(f"thread = gl.arange(0, {first.threads}, layout=FLAT)\nwarp = thread // 32\nlane = thread % 32")
    f.emit(f"begin = {f.core('ring', 'base')}()\nmy_slots = begin + warp * {BRICK} + lane * 16")
    f.emit(f"my_row = begin + {first.row} + lane // 4 % 2 * {first.second} + lane % 4 * 32 + warp * {2 * LINE}")
    f.emit(f"my_place = begin + {first.row} + warp * {2 * LINE} + lane * 4")
    f.emit(f"my_sums = begin + {first.sums} + warp * {4 * COLUMNS} + lane // 4 * 4")
    f.emit(f"all_sums = begin + {first.sums} + lane // {COLUMNS} * {2 * COLUMNS * first.warps} + lane % {COLUMNS} * 4")
    f.emit("units = 0")
    for k, (shape, link) in enumerate(zip(all_of, links, strict=True)):
        f.emit(f"words{k} = {f.pointer(link.weights)}.to(gl.pointer_type(gl.int32)) + (lane * 4 + warp * {_WORDS})")
        f.emit(f"tiles{k} = ({shape.tiles - 1} - block + blocks) // blocks")
        f.emit(f"units += tiles{k} * {shape.work.parts}\nend{k} = units")


def _next_unit(f: FunctionBuilder, all_of: Sequence[Shape]) -> None:
    """Where the next tile's part begins, whatever product it is of; after the last there is nothing to ask for."""
    f.emit("unit += 1")
    for k, shape in enumerate(all_of):
        with f.block(f"{'el' * (k > 0)}if unit < end{k}:"):
            f.emit(f"since = unit - end{k - 1}" if k else "since = unit")
            parts = shape.work.parts
            which = f"since % {parts} * {shape.tiles} + block + since // {parts}" if parts > 1 else "block + since"
            f.emit(f"spot = words{k} + ({which} * blocks) * {shape.unit}\nleft = block * 0 + {shape.rounds}")
    with f.block("else:"):
        f.emit("more = block * 0\nleft = block * 0 - 1")


def _ask(f: FunctionBuilder, all_of: Sequence[Shape], number: str) -> None:
    """For the next round's weights."""
    first = all_of[0]
    f.emit(f"{f.core('ring', 'ask')}(my_slots + {number} % {first.slots} * {first.slot}, spot, more > 0)")
    f.emit(f"spot += {first.warps * _WORDS}\nleft -= 1")
    with f.block("if left == 0:"):
        _next_unit(f, all_of)


def _row(f: FunctionBuilder, build: CudaBuilder, all_of: Sequence[Shape], links: Sequence[Link], k: int, words: str,
         row: str) -> bool:  # fmt: skip
    """What a warp multiplies by, in shared memory; whether each round's numbers are waited for before it instead."""
    shape, link = all_of[k], links[k]
    rounds, apart = shape.rounds, 32 * shape.warps
    scales = _scales(f, build, shape, link.node)
    f.emit(f"my_words = {row} + (warp * 32 + lane)\nindex = 0\ncolumns = block * {COLUMNS} + lane % {COLUMNS}")
    known = [i for i in link.operands if k or link.node.input(i).constant is not None]
    _operands(f, all_of, link, words, known)
    if k == 0:
        f.wait()
        _operands(f, all_of, link, words, [i for i in link.operands if i not in known])
        names = [f.let(f"tl.load(my_words + {r * apart})", "w") for r in range(rounds)]
    elif not scales and rounds > _HELD:
        f.emit(f"word = {f.core('ring', 'glance')}(my_words)")
        return True
    else:
        names = _arriving(f, rounds, apart)
        names = [f"({name} ^ -1)" for name in names]
    squares = list[str]()
    for r, word in enumerate(names):
        place = f"my_place + {2 * shape.warps * LINE * r}"
        squares += _own(f, shape, link.node, place, word, scales[2 * r : 2 * r + 2])
    if squares:
        f.emit(f"{f.core('ring', 'keep_total')}(begin + {shape.squares} + warp * 4, {' + '.join(squares)}, lane)")
    f.emit(f"{f.core('ring', 'sync_warp')}(lane)")
    return False


def _arriving(f: FunctionBuilder, rounds: int, apart: int) -> list[str]:
    """A thread's words of a row, one of each round, as soon as the warp's are all there: it looks at the last first."""
    n = rounds
    f.emit(f"{f.core('ring', 'look')}(my_words + ({(n - 1) * apart} - lane))")
    text = ["{ .reg .pred none; .reg .b32 x, y, z, n; mov.b32 n, 0; AGAIN:"]
    text += [f"ld.relaxed.gpu.global.b32 ${k}, [${n} + {4 * apart * k}];" for k in range(n)]
    text.append(f"mov.b32 z, 0; add.s32 n, n, 1; setp.gt.s32 none, n, {_TRIES}; @none trap;")
    text += [f"sub.u32 x, ${k}, 65537; not.b32 y, ${k}; and.b32 x, x, y; or.b32 z, z, x;" for k in range(n)]
    text += ["and.b32 z, z, 0x80008000; setp.ne.s32 none, z, 0; vote.sync.any.pred none, none, -1;",
             "@none bra AGAIN; }"]  # fmt: skip
    names = [f.name("w") for _ in range(n)]
    f.emit(f"{', '.join(names)} = gl.inline_asm_elementwise({' '.join(text)!r}, {','.join(['=&r'] * n + ['l'])!r}, "
           f"[my_words], ({', '.join(['gl.int32'] * n)}), False, 1)")  # fmt: skip
    return names


def _scales(f: FunctionBuilder, build: CudaBuilder, shape: Shape, node: Node) -> list[str]:
    """The norm's scales of a thread's numbers, in float32."""
    if not node.has_input(2):
        return []
    pointer = norm_at(f, build, node)
    places = [f"({r * shape.warps} + warp) * {LINE} + lane * 2" for r in range(shape.rounds)]
    return [f.let(f"tl.load({pointer} + ({place} + {j}))", "s") for place in places for j in (0, 1)]


def _tile(f: FunctionBuilder, build: CudaBuilder, all_of: Sequence[Shape], links: Sequence[Link], k: int, words: str,
          late: bool = False) -> None:  # fmt: skip
    """Sixteen columns of a product."""
    shape, link, node = all_of[k], links[k], links[k].node
    f.emit(f"columns = (block + index * blocks) * {COLUMNS} + lane % {COLUMNS}")
    f.emit(f"last = warp == tile % {shape.warps}\nmine = last & (lane < {COLUMNS})")
    operands = {i: f.let(f"ahead{i}", "h") for i in link.operands}
    f.emit(f"columns += blocks * {COLUMNS}")
    _operands(f, all_of, link, words, link.operands)
    f.emit(f"columns -= blocks * {COLUMNS}")
    for part in range(shape.work.parts):
        begin = partial(_settle, f, shape, node) if late and part == 0 else lambda: None
        multiply(f, shape, part, partial(_ask, f, all_of), begin)
    f.emit("gl.thread_barrier()")
    scaled = factor(f, shape, node.attributes["epsilon"]) if node.has_input(2) else ""
    sums = [f"({sum_of_sums(f, shape, part)}{scaled})" for part in range(shape.work.parts)]
    dtypes = ["float32"] * len(sums) + [node.input(i).dtype for i in operands_in(node)]
    made = render(f, node.epilogue, [*sums, *(operands[i] for i in operands_in(node))], dtypes)
    made = f.let(converted(made, node.epilogue.dtype or "float32", node.output.dtype), "made")
    if link.output is not None:
        f.emit(f"tl.store({f.pointer(link.output)} + columns, {made}, mine)")
    if k + 1 < len(links):
        at = f"({sum(s.work.columns for s in all_of[:k])} + columns)"
        halves = [f"{words}.to(gl.pointer_type(gl.int16)) + ({start} + {at})" for start in ("half", "other")]
        inverse = f.let(f"{made}.to(gl.int16, bitcast=True) ^ -1", "inverse")
        told = f"gl.where({inverse} == 0, -32768, {inverse}).to(gl.int32)"  # of two NaN one
        f.emit(f"{f.core('ring', 'tell')}({', '.join(halves)}, {told}, mine)")
    f.emit("tile += 1")


def _operands(f: FunctionBuilder, all_of: Sequence[Shape], link: Link, words: str, which: Iterable[int]) -> None:
    """What the expression reads at `columns`, asked for a tile ahead: of a link before, what this block has stored for
    the same columns."""
    inside = f"columns < {link.work.columns}"
    for i in which:
        source = link.operands[i]
        if isinstance(source, int):
            at = f"half + {sum(s.work.columns for s in all_of[:source])} + columns"
            held = f.let(f"{f.core('ring', 'told')}({words}.to(gl.pointer_type(gl.int16)) + ({at}), {inside})", "h")
            f.emit(f"ahead{i} = {held}.to(gl.int16).to(gl.bfloat16, bitcast=True)")
        else:
            one = link.node.input(i).elements == 1
            f.emit(f"ahead{i} = tl.load({f.pointer(source)} + columns * {int(not one)}, {inside})")


def _settle(f: FunctionBuilder, shape: Shape, node: Node) -> None:
    """A round's numbers of the row, which are waited for; the next round's are asked for."""
    f.emit(f"held = {f.core('ring', 'settled')}(my_words + number * {32 * shape.warps}, word)")
    f.emit(f"after = my_words + gl.minimum(number + 1, {shape.rounds - 1}) * {32 * shape.warps}")
    f.emit(f"word = {f.core('ring', 'glance')}(after)")
    _own(f, shape, node, f"my_place + number * {2 * shape.warps * LINE}", "(held ^ -1)", ())
    f.emit(f"{f.core('ring', 'sync_warp')}(lane)")


def _own(f: FunctionBuilder, shape: Shape, node: Node, place: str, word: str, scales: Sequence[str]) -> list[str]:
    """A thread's two numbers of the row to shared memory; their squares, if there are scales."""
    small, large, squares = numbers(f, node, word, scales)
    f.emit(f"{f.core('ring', 'keep_words')}({place}, {small}, {large}, {shape.second})")
    return squares
