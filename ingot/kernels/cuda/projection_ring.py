"""Projection of one row by float8 weights on tensor cores: blocks stay, and weights are under way to shared memory all
the time.

A block computes tiles of sixteen columns one after the other. What it asks for goes round a ring of slots, from the
very beginning: for the row it waits when the ring is full. The launch behind may begin at once and fill its own ring
beside this one. Weights lie in bricks, sixteen columns times 64 bytes of the depth: a warp takes one a round, and each
thread asks for the bytes that it reads itself, so that no warp waits for another before a tile is complete.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.projection_row import Work, loaded, store
from ingot.kernels.cuda.render import NARROW
from ingot.kernels.node import Node

Array = np.ndarray[Any, Any]
COLUMNS, LINE = 16, 64  # of a brick: columns, and the depth, which are bytes
BRICK = COLUMNS * LINE
_EACH = 8  # numbers of the row that a thread has at a time, 16 bytes
_MANY = 32  # tiles of a block from which on those that read faster take more of them
_PROCESSOR, _RESERVED = 228 << 10, 1 << 10  # bytes of shared memory: a processor's, those that a block takes besides
# Behind another ring a block must fit beside the other's; other launches' blocks must not fit a processor twice, so
# that they lie one on each, wherever those of attention are.
_BESIDE = 104 << 10
_WEIGHTS = "float8_e4m3fn"
_NUMBERS = {"bfloat16": "bfloats", "float16": "halves"}
# float16 has 30 powers of two in full: numbers below the bound are taken times UP, others times DOWN, to 2.7e8
_BOUND, _UP, _DOWN = 0.25, 2.0**17, 2.0**-12
_FORM = re.compile(r"ring(\d+)x(\d+)(drawn)?")


@dataclass(frozen=True)
class Ring:
    """How a product of one row goes round: the block's warps, slots of one brick for each. drawn: blocks take tiles as
    they get on, not in turn: some processors are further from the memory than others."""

    work: Work
    processors: int
    warps: int = 16
    slots: int = 3
    drawn: bool = False

    @classmethod
    def parse(cls, text: str, work: Work, processors: int) -> Ring:
        """Of "ring16x5"."""
        found = _FORM.fullmatch(text)
        assert found is not None, text
        return cls(work, processors, int(found[1]), int(found[2]), *map(bool, found.groups()[2:]))

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def bricks(self) -> int:
        """Of a tile."""
        return self.work.depth // LINE

    @property
    def rounds(self) -> int:
        """Of a tile."""
        return -(-self.bricks // self.warps)

    @property
    def tiles(self) -> int:
        """Of a part."""
        return -(-self.work.columns // COLUMNS)

    @property
    def blocks(self) -> int:
        return min(self.tiles, self.processors)

    @property
    def slot(self) -> int:
        """Bytes."""
        return self.warps * BRICK

    @property
    def length(self) -> int:
        """Numbers of the row, with zeros up to a whole round."""
        return self.rounds * self.warps * LINE

    @property
    def second(self) -> int:
        """Bytes from the row's first part to its second, so that both come out of different banks."""
        return 2 * self.length + 16

    @property
    def row(self) -> int:
        """Where both parts of the row begin."""
        return self.slots * self.slot

    @property
    def sums(self) -> int:
        """Where the sums of each warp begin, of two tiles in turn."""
        return self.row + 2 * self.second

    @property
    def squares(self) -> int:
        """Where the warps' sums of squares begin."""
        return self.sums + 2 * self.tile_sums

    @property
    def tile_sums(self) -> int:
        """Bytes."""
        return self.work.parts * self.warps * COLUMNS * 4

    @property
    def numbers(self) -> int:
        """Where the numbers of drawn tiles are, of two in turn."""
        return self.squares + 4 * self.warps

    @property
    def bytes(self) -> int:
        return self.numbers + 8 * self.drawn

    @property
    def turns(self) -> int:
        """Rounds of all parts of a tile."""
        return self.rounds * self.work.parts


def form(node: Node, target: Architecture) -> str | None:
    """The launch for one row of a node, if there is one."""
    work, weight = Work.of(node), node.input(1)
    if not target.hosts_two or weight.dtype != _WEIGHTS or node.input(0).dtype not in NARROW or work.depth % LINE:
        return None
    shape = Ring(work, target.processors)
    spare = (_BESIDE if node.has_input(2) else _PROCESSOR // 2 + shape.slot - _RESERVED) - shape.bytes
    found = replace(shape, slots=shape.slots + max(spare, 0) // shape.slot)
    drawn = found.turns > shape.slots and found.tiles >= _MANY * target.processors
    if drawn:  # what is asked for ahead is of the next tile at most
        found = replace(found, slots=min(found.slots, found.turns + 1))
    return f"ring{found.warps}x{found.slots}{'drawn' * drawn}" if found.bytes <= target.shared else None


def bricks(weight: Array, parts: int) -> Array:
    """Weights [K, parts * N] as [parts, tiles, bricks, 16 columns, 64 of the depth]; columns that fill the last tile
    are zeros."""
    depth, width = weight.shape
    columns = width // parts
    lines = weight.T.reshape(parts, columns, depth)
    if columns % COLUMNS:
        padded = np.zeros((parts, -(-columns // COLUMNS) * COLUMNS, depth), weight.dtype)
        padded[:, :columns] = lines
        lines = padded
    tiled = lines.reshape(parts, -1, COLUMNS, depth // LINE, LINE)
    return np.ascontiguousarray(tiled.transpose(0, 1, 3, 2, 4))


def lines(work: Work, columns: str) -> tuple[str, str]:
    """Where bricks have columns and `depths`, for tiles of many rows."""
    across = f"{columns} // {COLUMNS} * {COLUMNS * work.depth} + {columns} % {COLUMNS} * {LINE}"
    return across, f"(depths // {LINE} * {BRICK} + depths % {LINE})"


def ring(build: CudaBuilder, work: Work, packed: Handle, text: str) -> None:
    """The launch for one row."""
    shape = Ring.parse(text, work, build.target.processors)
    f = build.function(warps=shape.warps, stages=1, early=True, gluon=True)
    f.release()
    _open(f, shape, packed)
    for ahead in range(shape.slots - 1):
        _ask(f, shape, str(ahead), str(ahead))
    tickets = _draw(f, build, shape) if shape.drawn else ""
    _row(f, build, shape)
    f.emit(f"step = 0\nrounds = {f.core('ring', 'unknown')}(gl.to_tensor({shape.rounds}))")
    if tickets:
        f.emit(f"tile = 0\nahead = step + {shape.slots - 1}\nthis = block + 0")
        f.emit(f"coming = {f.core('ring', 'known')}(begin + {shape.numbers})")
    with f.block(f"while this < {shape.tiles}:" if tickets else "for tile in range(tiles):"):
        _tile(f, build, shape, tickets)
    with f.block("if tiles < 0:"):  # never: without an access of its own there were no shared memory to take places in
        f.emit("shared.index(0).store(gl.full([64], 0, gl.int32, layout=FLAT))")
    f.launch(shape.blocks)


def _tile(f: FunctionBuilder, build: CudaBuilder, shape: Ring, tickets: str) -> None:
    """Sixteen columns: those of the tile `this`, where tiles are drawn."""
    work, this = shape.work, "this" if tickets else f"(block + tile * {shape.blocks})"
    inside = f"(columns < {work.columns}) & " if work.columns % COLUMNS else ""
    f.emit(f"columns = {this} * {COLUMNS} + lane % {COLUMNS}")
    f.emit(f"last = warp == tile % {shape.warps}\nmine = {inside}last & (lane < {COLUMNS})")
    operands = loaded(f, build, "columns", "mine")
    if tickets:
        f.emit(f"drawn = {f.core('ring', 'draw')}({tickets}, (thread == 0) & (coming < {shape.tiles}))")
        f.emit(f"tile += 1\nplace = begin + ({shape.numbers} + tile % 2 * 4)")
    for part in range(work.parts):
        multiply(f, shape, part, lambda later: _ask(f, shape, later))
    if tickets:
        _keep_drawn(f, shape, tickets, "place")
    f.emit("gl.thread_barrier()")
    if tickets:
        f.emit(f"this = coming\ncoming = {f.core('ring', 'known')}(place)")
    scaled = factor(f, shape, build.node.attributes["epsilon"]) if build.node.has_input(2) else ""
    names = [f"({sum_of_sums(f, shape, part)}{scaled})" for part in range(work.parts)]
    store(f, build, names, operands, "columns", "mine")


def _draw(f: FunctionBuilder, build: CudaBuilder, shape: Ring) -> str:
    """The counter that a block draws its tiles from, all but the first: the second is drawn now, each of the others
    while the one before the one before it is computed, as it is asked for during the one before."""
    assert shape.slots - 1 <= shape.turns
    tickets = f.pointer(build.counter(4))
    f.emit(f"asking = block + 0\ndrawn = {f.core('ring', 'draw')}({tickets}, thread == 0)")
    _keep_drawn(f, shape, tickets, f"begin + {shape.numbers}")
    return tickets


def _keep_drawn(f: FunctionBuilder, shape: Ring, tickets: str, place: str) -> None:
    sizes = f"{shape.blocks}, {shape.tiles}, thread == 0"
    f.emit(f"{f.core('ring', 'keep_drawn')}({place}, {tickets}, drawn, {sizes})")


def _open(f: FunctionBuilder, shape: Ring, packed: Handle) -> None:
    """Shared memory, the thread's places, what the block has to do."""
    f.emit(f"FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [{shape.warps}], [0])")
    f.emit("PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])")
    f.emit(f"shared = gl.allocate_shared_memory(gl.int32, [{-(-shape.bytes // 256)}, 64], PLAIN)")
    f.emit(f"block = gl.program_id(0)\ntiles = ({shape.tiles + shape.blocks - 1} - block) // {shape.blocks}")
    f.emit(f"thread = gl.arange(0, {shape.threads}, layout=FLAT)\nwarp = thread // 32\nlane = thread % 32")
    f.emit(f"begin = {f.core('ring', 'base')}()\nmy_slots = begin + warp * {BRICK} + lane * 16")
    f.emit(f"my_row = begin + {shape.row} + lane // 4 % 2 * {shape.second} + lane % 4 * 32 + warp * {2 * LINE}")
    f.emit(f"my_sums = begin + {shape.sums} + warp * {4 * COLUMNS} + lane // 4 * 4")
    f.emit(f"all_sums = begin + {shape.sums} + lane // {COLUMNS} * {2 * COLUMNS * shape.warps} + lane % {COLUMNS} * 4")
    f.emit(f"words = {f.pointer(packed)}.to(gl.pointer_type(gl.int32)) + lane * 4")


def _ask(f: FunctionBuilder, shape: Ring, number: str, first: str = "") -> None:
    """For the weights of a round, if there are so many; what a tile's last round lacks is asked for twice, and
    multiplied by zeros. first: which of the first tile's rounds it is."""
    rounds, parts, words = shape.rounds, shape.work.parts, BRICK // 4
    now, tile = number, f"block + {number} // {shape.turns} * {shape.blocks}"
    there = f"{number} < tiles * {shape.turns}"
    if shape.drawn:
        now, tile, there = (first, "block", "block >= 0") if first else ("ahead", "asking", f"asking < {shape.tiles}")
    if shape.drawn and not first:
        with f.block(f"if ahead == {shape.turns}:"):
            f.emit("ahead = 0\nasking = coming")
    which = f"{now} // {rounds} % {parts} * {shape.tiles} + " if parts > 1 else ""
    f.emit(f"start = ({which}{tile}) * {shape.bricks * words}")
    f.emit(f"taken = {now} % {rounds} * {shape.warps} + warp")
    if shape.bricks % shape.warps:
        f.emit(f"taken = gl.minimum(taken, {shape.bricks - 1})")
    to = f"my_slots + {number} % {shape.slots} * {shape.slot}"
    f.emit(f"{f.core('ring', 'ask')}({to}, words + (start + taken * {words}), {there})")
    if shape.drawn and not first:
        f.emit("ahead += 1")


def _row(f: FunctionBuilder, build: CudaBuilder, shape: Ring) -> None:
    """The row as weights are multiplied by it, in shared memory, and the warps' sums of squares where there is a norm:
    these are needed when the first tile ends."""
    node = build.node
    pieces = range(0, shape.length, _EACH * shape.threads)
    scales = [_scales(f, build, shape, start) for start in pieces] if node.has_input(2) else []
    f.wait()
    held = list[list[str]]()
    for start in pieces:
        words = [f.name("w") for _ in range(4)]
        place = f"thread * {_EACH} + {start}"
        f.emit(f"{', '.join(words)} = {f.core('ring', 'four')}({f.pointer(build.input(0))} + ({place}), "
               f"{place} < {shape.work.depth})")  # fmt: skip
        held.append(words)
    squares = list[str]()
    for piece, start in enumerate(pieces):
        parts = list[tuple[str, str]]()
        for number, word in enumerate(held[piece]):
            ours = scales[piece][2 * number : 2 * number + 2] if scales else ()
            small, large, more = numbers(f, node, word, ours)
            parts.append((small, large))
            squares += more
        where = f"begin + {shape.row} + thread * {2 * _EACH} + {2 * start}"
        for second, chosen in enumerate(zip(*parts, strict=True)):
            f.emit(f"{f.core('ring', 'keep_four')}({where} + {second * shape.second}, {', '.join(chosen)}, "
                   f"thread * {_EACH} < {shape.length - start})")  # fmt: skip
    f.emit("gl.thread_barrier()")
    if squares:
        f.emit(f"{f.core('ring', 'keep_total')}(begin + {shape.squares} + warp * 4, {' + '.join(squares)}, lane)")


def _scales(f: FunctionBuilder, build: CudaBuilder, shape: Ring, start: int) -> list[str]:
    """The norm's scales of a thread's numbers, in float32."""
    pointer, found = norm_at(f, build, build.node), list[str]()
    for half in (0, _EACH // 2):
        words, place = [f.name("w") for _ in range(4)], f"thread * {_EACH} + {start + half}"
        f.emit(f"{', '.join(words)} = {f.core('ring', 'four')}({pointer} + ({place}), {place} < {shape.work.depth})")
        found += [f.let(f"{word}.to(gl.float32, bitcast=True)", "s") for word in words]
    return found


def norm_at(f: FunctionBuilder, build: CudaBuilder, node: Node) -> str:
    """The pointer to a norm's scales, in float32."""
    scale = node.input(2).constant
    assert scale is not None
    return f.pointer(build.pack(scale if scale.dtype == np.float32 else scale.astype(np.float32)))


def numbers(f: FunctionBuilder, node: Node, word: str, scales: Sequence[str]) -> tuple[str, str, list[str]]:
    """The two numbers of a word of the row as weights are multiplied by them, words of small and of large ones; their
    squares, if there are scales."""
    low, high = f.name("x"), f.name("x")
    f.emit(f"{low}, {high} = {f.core('ring', _NUMBERS[node.input(0).dtype])}({word})")
    squares = [f"{low} * {low}", f"{high} * {high}"] if scales else []
    if scales:
        low, high = (f.let(f"{x} * {s}", "x") for x, s in zip((low, high), scales, strict=True))
    small, large = f.name("a"), f.name("b")
    f.emit(f"{small}, {large} = {f.core('ring', 'small_and_large')}({low}, {high}, {_BOUND}, {_UP}, {_DOWN})")
    return small, large, squares


def multiply(f: FunctionBuilder, shape: Ring, part: int, ask: Callable[[str], None],
             before: Callable[[], None] = lambda: None) -> None:  # fmt: skip
    """A warp's sums of a part of `tile` to shared memory. ask: for the weights of a round of that number; before: what
    a round begins with."""
    sums = ", ".join(f"s{k}" for k in range(8))
    f.emit("\n".join(f"s{k} = gl.full([{shape.threads}], 0.0, gl.float32, layout=FLAT)" for k in range(8)))
    with f.block("for number in range(rounds):"):
        before()
        f.emit(f"slot = my_slots + step % {shape.slots} * {shape.slot}")
        f.emit(f"row = my_row + number * {2 * shape.warps * LINE}")
        f.emit(f"{sums} = gl.inline_asm_elementwise({_product(shape)!r}, "
               f"{','.join(['=f'] * 8 + ['r'] * 2 + list('01234567'))!r}, [slot, row, {sums}], "
               f"({', '.join(['gl.float32'] * 8)}), False, 1)")  # fmt: skip
        f.emit(f"later = step + {shape.slots - 1}")
        ask("later")
        f.emit("step += 1")
    for half, (a, b, c, d) in enumerate(((0, 4, 1, 5), (2, 6, 3, 7))):
        f.emit(f"half{half} = (s{a} + s{b}) * {1 / _UP!r} + (s{c} + s{d}) * {1 / _DOWN!r}")
    where = f"my_sums + (tile % 2 * {shape.tile_sums} + {part * shape.warps * COLUMNS * 4})"
    f.emit(f"{f.core('ring', 'keep_two')}({where}, half0, half1, lane % 4 == 0)")


def _product(shape: Ring) -> str:
    """PTX: a brick by its part of the row, when no more rounds than the ring has else are under way (PTX ISA,
    mma.m16n8k16). A lane has 16 bytes of two columns, eight apart, that lie along the depth as the row does; even and
    odd columns of the second factor are different parts of the row. $0 to $7 are the sums of two products that take
    turns, $8 the slot, $9 the row."""
    text = [
        "{ .reg .b16 low, high; .reg .b32 a, b, c, d, w<8>, x<8>;", f"cp.async.wait_group {shape.slots - 2};",
        "ld.shared.v4.b32 {w0, w1, w2, w3}, [$8]; ld.shared.v4.b32 {w4, w5, w6, w7}, [$8 + 512];",
        "ld.shared.v4.b32 {x0, x1, x2, x3}, [$9]; ld.shared.v4.b32 {x4, x5, x6, x7}, [$9 + 16];",
    ]  # fmt: skip
    for k in range(4):
        for word, first, second in ((k, "a", "c"), (k + 4, "b", "d")):
            text.append(f"mov.b32 {{low, high}}, w{word}; cvt.rn.f16x2.e4m3x2 {first}, low; "
                        f"cvt.rn.f16x2.e4m3x2 {second}, high;")  # fmt: skip
        sums = ", ".join(f"${4 * (k % 2) + j}" for j in range(4))
        text.append(f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{sums}}}, {{a, b, c, d}}, "
                    f"{{x{2 * k}, x{2 * k + 1}}}, {{{sums}}};")  # fmt: skip
    return " ".join([*text, "}"])


def factor(f: FunctionBuilder, shape: Ring, epsilon: float) -> str:
    """Text of the norm's factor, where the last warp is."""
    text = [f"ld.shared.v4.f32 {{a, b, c, d}}, [$1 + {start}]; add.f32 a, a, b; add.f32 c, c, d; add.f32 a, a, c; "
            "add.f32 y, y, a;" for start in range(0, 4 * shape.warps, 16)]  # fmt: skip
    total = _asked(f, text, f"thread * 0 + (begin + {shape.squares})")
    known = f"{total} / {shape.work.depth} + {epsilon!r}"
    return f" * {f.let(f'1.0 / libdevice.sqrt({known})', 'f')}"


def sum_of_sums(f: FunctionBuilder, shape: Ring, part: int) -> str:
    """The sum of a column by all warps, where the last warp is: a lane adds those of half of the warps."""
    text = [f"ld.shared.f32 a, [$1 + {4 * COLUMNS * warp}]; add.f32 y, y, a;" for warp in range(shape.warps // 2)]
    text.append("shfl.sync.bfly.b32 a, y, 16, 31, -1; add.f32 y, y, a;")
    return _asked(f, text, f"all_sums + (tile % 2 * {shape.tile_sums} + {part * shape.warps * COLUMNS * 4})")


def _asked(f: FunctionBuilder, text: Sequence[str], place: str) -> str:
    """The number `y` that PTX makes of shared memory at a place, `$1`; nothing but zero in warps that are not last."""
    whole = ["{ .reg .pred last; .reg .f32 y, a, b, c, d; setp.ne.s32 last, $2, 0; mov.f32 y, 0f00000000;",
             "@!last bra DONE;", *text, "DONE: mov.f32 $0, y; }"]  # fmt: skip
    return f.let(f"gl.inline_asm_elementwise({' '.join(whole)!r}, '=f,r,r', [{place}, last.to(gl.int32)], gl.float32, "
                 "False, 1)", "y")  # fmt: skip
