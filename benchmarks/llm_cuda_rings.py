"""Products of one row by float8 weights that stream through a ring of shared memory: Gluon texts, weights in bricks.

Blocks stay, and compute tiles of sixteen columns one after the other. What a block asks for goes round a ring of slots
from the very beginning; for the row it waits when the ring is full. The launch behind may begin at once. Weights lie in
bricks, sixteen columns times 64 of the depth, 1 KiB: a warp takes one a round, whose bytes are where its lanes need
them. `barriers`: copies are Gluon's, with barriers of the block; without, every thread reads what it asked for itself.
"""

from __future__ import annotations

import io
import linecache
import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.kernels.cuda.build import NAME
from ingot.kernels.cuda.compile import Cubin

Array = np.ndarray[Any, Any]
COLUMNS, DEPTH, WORDS = 16, 64, 256  # of a brick; words of 32 bits
_SPILLED = re.compile(r"(\d+) bytes spill stores")
_USED = re.compile(r"Used (\d+) registers")
# float16 has 30 powers of two in full: numbers below the bound are taken times UP, others times DOWN
BOUND, UP, DOWN = 0.25, 2.0**17, 2.0**-12


@dataclass(frozen=True)
class Ring:
    """A product of a row [depth] by [depth, parts * columns]; with two parts the first is gated by its sigmoid times
    the second. normalised: an RMS norm comes first; joined: a residual is added."""

    columns: int
    depth: int
    parts: int = 1
    normalised: bool = False
    joined: bool = False
    warps: int = 16
    slots: int = 5
    blocks: int = 132
    barriers: bool = False

    @property
    def bricks(self) -> int:
        """Of a tile."""
        return self.depth // DEPTH

    @property
    def rounds(self) -> int:
        """Of a tile."""
        return -(-self.bricks // self.warps)

    @property
    def tiles(self) -> int:
        """Of a part."""
        return -(-self.columns // COLUMNS)

    @property
    def slot(self) -> int:
        """Bytes."""
        return self.warps * 4 * WORDS

    @property
    def operands(self) -> dict[str, str]:
        """Arguments in their order, with Triton's names of their types."""
        found = {"x": "*bf16", "weights": "*fp8e4nv", "scales": "*fp32", "stream": "*bf16", "y": "*bf16"}
        unused = {"scales": not self.normalised, "stream": not self.joined}
        return {name: kind for name, kind in found.items() if not unused.get(name)}


def bricks(weight: Array, parts: int) -> Array:
    """Weights [K, parts * N] of one byte as [parts, tiles, bricks, 16 columns, 64 of the depth]."""
    depth, width = weight.shape
    lines = weight.T.reshape(parts, width // parts // COLUMNS, COLUMNS, depth // DEPTH, DEPTH)
    return np.ascontiguousarray(lines.transpose(0, 1, 3, 2, 4))


def parted(scales: Array) -> Array:
    """The norm's scales of even places, then those of odd ones."""
    return np.ascontiguousarray(scales.astype(np.float32).reshape(-1, 2).T)


def text(ring: Ring) -> str:
    """The module, whose kernel has `operands`; its shared memory begins with the slots."""
    lines = [*_head(ring), *_row(ring), "    step = 0", "    gl.thread_barrier()", "    for tile in range(tiles):"]
    lines.append(f"        columns = (block + tile * {ring.blocks}) * 16 + gl.arange(0, 16, layout=FLAT)")
    if ring.joined:
        lines.append("        beside = gl.load(stream + columns).to(gl.float32)")
    for part in range(ring.parts):
        lines += _sums(ring, part)
    factor = " * factor" if ring.normalised else ""
    for part in range(ring.parts):
        lines.append(f"        y{part} = of_columns(sums{part}, {1 / UP!r}, {1 / DOWN!r}, FLAT){factor}")
    made = "y0 / (1.0 + gl.exp(-y0)) * y1" if ring.parts == 2 else "y0 + beside" if ring.joined else "y0"
    lines += [f"        gl.store(y + columns, ({made}).to(gl.bfloat16))", "    ring._keep_alive()"]
    return "\n".join(lines) + "\n"


_IMPORTS = """import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from benchmarks.llm_cuda_gluon import ask, base, eighths_by_row, of_columns, small_and_large, total, two_bfloats


@gluon.jit"""


def _head(ring: Ring) -> list[str]:
    """To the rounds that are asked for before the wait."""
    step = ring.rounds * ring.parts
    body = [
        "gdc_launch_dependents()",
        f"PIECE: gl.constexpr = {_layout(ring, (1, 2, 1, 1, 1, 4), (1, 1, 4, 2, 4, 1))}",
        f"ROW: gl.constexpr = {_layout(ring, (1, 1, 1, 1, 1, 4), (4, 2, 1, 1, 4, 1))}",
        "PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [5, 4, 3, 2, 1, 0])",
        f"FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [{ring.warps}], [0])",
        f"ring = gl.allocate_shared_memory(gl.int32, [{ring.slots}, {ring.warps}, 2, 4, 2, 4, 4], PLAIN)",
        f"rounds = gl.allocate_shared_memory(gl.int32, [{ring.rounds}, {ring.warps}, 2, 1, 2, 4, 4], PLAIN)",
        f"block = gl.program_id(0)\n    tiles = ({ring.tiles + ring.blocks - 1} - block) // {ring.blocks}",
        f"count = tiles * {step}\n    words = weights.to(gl.pointer_type(gl.int32))",
        f"brick = {_axis('PIECE', 0, ring.warps)}",
        f"inner = {_places('PIECE', (0, 2, 4, 2, 4, 4), (0, 128, 32, 16, 4, 1))}",
        f"thread = gl.arange(0, {32 * ring.warps}, layout=FLAT)",
        f"shared = base() + thread // 32 * {4 * WORDS} + thread % 32 * 16",
        f"places = base() + brick * {4 * WORDS} + 4 * inner",
    ]
    lines = [*_IMPORTS.splitlines(), f"def {NAME}({', '.join(ring.operands)}):", *(f"    {line}" for line in body)]
    for ahead in range(ring.slots - 1):
        lines += _ask(ring, str(ahead), "    ")
    return lines


def _layout(ring: Ring, registers: Sequence[int], lanes: Sequence[int]) -> str:
    """Of six axes: warps share the first, the last is that of neighbours."""
    sizes = f"{list(registers)}, {list(lanes)}, [{ring.warps}, 1, 1, 1, 1, 1]"
    return f"gl.BlockedLayout({sizes}, [5, 4, 3, 2, 1, 0])"


def _axis(layout: str, axis: int, size: int) -> str:
    """Numbers along an axis of a layout of six."""
    others = [k for k in range(6) if k != axis]
    for k in reversed(others):
        layout = f"gl.SliceLayout({k}, {layout})"
    made = f"gl.arange(0, {size}, layout={layout})"
    for k in others:
        made = f"gl.expand_dims({made}, {k})"
    return made


def _places(layout: str, sizes: Sequence[int], strides: Sequence[int]) -> str:
    """Sums of strides along the axes that have any."""
    axes = [(k, sizes[k], strides[k]) for k in range(6) if sizes[k] > 1 and strides[k]]
    return " + ".join(f"{_axis(layout, k, size)} * {stride}" for k, size, stride in axes)


def _ask(ring: Ring, number: str, indent: str) -> list[str]:
    """For a round's weights, if there are so many; what a tile's last round lacks is asked for twice, and multiplied by
    nothing."""
    tile = ring.bricks * WORDS
    first = f"{number} // {ring.rounds} % {ring.parts} * {ring.tiles} + " if ring.parts > 1 else ""
    warp, last = "brick" if ring.barriers else "thread // 32", ring.bricks - 1
    taken = f"gl.minimum({number} % {ring.rounds} * {ring.warps} + {warp}, {last})"
    lines = [f"start = ({first}block + {number} // {ring.rounds * ring.parts} * {ring.blocks}) * {tile}"]
    if ring.barriers:
        lines += [f"if {number} < count:",
                  f"    from_ = words + (start + {taken} * {WORDS} + inner)",
                  f"    async_copy.async_copy_global_to_shared(ring.index({number} % {ring.slots}), from_)",
                  "async_copy.commit_group()"]  # fmt: skip
    else:
        from_ = f"words + (start + {taken} * {WORDS} + thread % 32 * 4)"
        lines.append(f"ask(shared + {number} % {ring.slots} * {ring.slot}, {from_}, {number} < count)")
    return [indent + line for line in lines]


def _row(ring: Ring) -> list[str]:
    """The row as weights are multiplied by it, in shared memory; pieces of as many rounds as a power of two."""
    pieces, start = list[tuple[int, int]](), 0
    while start < ring.rounds:
        pieces.append((start, 1 << ((ring.rounds - start).bit_length() - 1)))
        start += pieces[-1][1]
    before, after = list[str](), ["gdc_wait()"]
    for n, (start, count) in enumerate(pieces):
        places = _places("ROW", (count * ring.warps, 2, 1, 1, 4, 4), (DEPTH // 2, 4, 0, 0, 8, 1))
        before.append(f"at{n} = {start * ring.warps * DEPTH // 2} + {places}")
        mask = f"mask=at{n} < {ring.depth // 2}, other=0"
        if ring.normalised:
            before.append(f"even{n} = gl.load(scales + at{n}, {mask})")
            before.append(f"odd{n} = gl.load(scales + {ring.depth // 2} + at{n}, {mask})")
        after.append(f"low{n}, high{n} = two_bfloats(gl.load(x.to(gl.pointer_type(gl.int32)) + at{n}, {mask}))")
    for n, (start, count) in enumerate(pieces):
        if ring.normalised:
            squares = f"low{n} * low{n} + high{n} * high{n}, {count * ring.warps * DEPTH // 2}"
            after.append(f"square{n} = total({squares})\n    low{n} *= even{n}\n    high{n} *= odd{n}")
        after.append(f"first, second = small_and_large(low{n}, high{n}, {BOUND}, {UP}, {DOWN})")
        view = f"[{count * ring.warps}, 2, 1, 2, 4, 4]"
        after.append(f"held = rounds.index({start})._reinterpret(gl.int32, {view}, PLAIN)")
        after.append("held.slice(0, 1, 3).store(first)\n    held.slice(1, 1, 3).store(second)")
    if ring.normalised:
        squares = " + ".join(f"square{n}" for n in range(len(pieces)))
        after.append(f"factor = gl.rsqrt(({squares}) / {ring.depth} + 1e-5)")
    return [f"    {line}" for line in (*before, *after)]


def _sums(ring: Ring, part: int) -> list[str]:
    """A tile's sums of a part."""
    take = (f"cp.async.wait_group {ring.slots - 2}; ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$8]; "
            "ld.shared.v4.b32 {$4, $5, $6, $7}, [$12];")  # fmt: skip
    kinds = ",".join(["=r"] * 8 + ["r"] * 8)
    if ring.barriers:
        loads = [f"async_copy.wait_group({ring.slots - 2})", f"taken = ring.index(step % {ring.slots}).load(PIECE)"]
    else:
        place = f"places + step % {ring.slots} * {ring.slot}"
        loads = [f"taken = gl.inline_asm_elementwise({take!r}, {kinds!r}, [{place}], gl.int32, False, 8)"]
    zeros = f"gl.full([{ring.warps}, 2, 4, 2, 4, 4], 0.0, gl.float32, layout=PIECE)"
    lines = [*loads, "row = rounds.index(number).load(PIECE)", f"later = step + {ring.slots - 1}"]
    lines += [*_ask(ring, "later", ""), f"sums{part} = eighths_by_row(taken, row, sums{part})", "step += 1"]
    head = [f"        sums{part} = {zeros}", f"        for number in range({ring.rounds}):"]
    return [*head, *(f"            {line}" for line in lines)]


def compiled(ring: Ring) -> tuple[Cubin, str]:
    """For sm_90, without a GPU; with its PTX."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    written, name = text(ring), f"<{ring}>"
    linecache.cache[name] = (len(written), None, written.splitlines(keepends=True), name)
    scope: dict[str, Any] = {"__name__": "benchmarks.generated"}
    exec(compile(written, name, "exec"), scope)
    aligned = {(k,): [["tt.divisibility", 16]] for k in range(len(ring.operands))}
    source = GluonASTSource(scope[NAME], ring.operands, {}, aligned)
    words, before = io.StringIO(), knobs.nvidia.dump_ptxas_log
    knobs.nvidia.dump_ptxas_log = True
    try:
        with redirect_stdout(words):
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": ring.warps})
    finally:
        knobs.nvidia.dump_ptxas_log = before
    used, spilled = _USED.search(words.getvalue()), _SPILLED.search(words.getvalue())
    facts = (int(found[1]) if found else 0 for found in (used, spilled))
    return Cubin(made.asm["cubin"], made.metadata.shared, 32 * ring.warps, *facts), made.asm["ptx"]
