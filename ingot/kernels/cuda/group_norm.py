"""Norm over groups of channels that lie last: sums of parts of the positions by all processors, then the result."""

from __future__ import annotations

from ingot.ir.expression import operands_of
from ingot.kernels import Ports, kernel
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.axes import LAST, broadcast_strides, offset, unravel
from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.norm import MAIN, extras_of, norm_applies
from ingot.kernels.cuda.render import NARROW, converted, render
from ingot.kernels.cuda.rows import power_of_two
from ingot.kernels.node import Node
from ingot.kernels.work import bytes_of
from ingot.plan.extent import Extent, ceil_div, product

_LEAST_CHANNELS = 4  # of a group: fewer would be read in pieces too small
_MOST_PARTS, _ELEMENTS, _COLUMNS = 16, 4096, 64  # of a tile
_FLOAT = 4


def _applies(node: Node, target: Architecture) -> bool:
    x, a = node.input(0), node.attributes
    if a["kind"] != "group" or len(x.shape) < 3 or not isinstance(x.shape[1], int):
        return False
    wide = x.shape[1] // a["groups"] >= _LEAST_CHANNELS
    return wide and x.dtype in (*NARROW, "float32") and norm_applies(node, target)


def _layouts(node: Node, target: Architecture) -> list[Ports]:
    extras = (LAST if p.constant is None and p.shape == node.output.shape else "" for p in extras_of(node))
    return [Ports((LAST, *("" for _ in node.inputs[1:MAIN]), *extras), (LAST,))]


def _cost(node: Node, target: Architecture) -> float:
    size = bytes_of(node)
    return 2 * target.pace.step + (1.5 * size / target.pace.bytes if isinstance(size, int) else 0.0)


def _parts(node: Node, target: Architecture) -> int:
    """Into how many parts the positions of a group are divided, so that every processor has two."""
    images = node.input(0).shape[0]
    rows = node.attributes["groups"] * (images if isinstance(images, int) else 1)
    return max(min(power_of_two(2 * target.processors // rows), _MOST_PARTS), 1)


@kernel("Norm", on="cuda", when=_applies, layouts=_layouts, cost=_cost)
def group_norm(build: CudaBuilder, node: Node) -> None:
    """epilogue((x - mean) / sqrt(variance + epsilon) * scale + bias) in two launches"""
    x, parts = node.input(0), _parts(node, build.target)
    groups, positions = int(node.attributes["groups"]), product(x.shape[2:])
    figures = build.temporary(product((x.shape[0], groups, parts, 2, _FLOAT)), "float32")
    _sum_parts(build, node, figures, (groups, parts), positions)
    _write(build, node, figures, (groups, parts), positions)


def _sum_parts(build: CudaBuilder, node: Node, figures: Handle, sizes: tuple[int, int], positions: Extent) -> None:
    """figures[image, group, part] = (sum, sum of squared distances from the part's mean)"""
    (groups, parts), channels = sizes, int(node.input(0).shape[1])
    inner = channels // groups
    across = power_of_two(inner)
    down = max(_ELEMENTS // across, 1)
    f = build.function(warps=4)
    f.emit(f"number = tl.program_id(0)\npart = number % {parts}\ngroup = number // {parts} % {groups}")
    f.emit(f"image = number // {parts * groups}\ncolumns = tl.arange(0, {across})[None, :]")
    _count(f, parts, positions)
    base = f"{f.pointer(build.input(0))} + image * {f.extent(product((positions, channels)))} + group * {inner}"
    f.emit(f"base = {base} + columns\nsums = tl.zeros(({down}, {across}), tl.float32)")
    load = f"x = tl.load(base + row * {channels}, inside, other=0).to(tl.float32)"
    for line in ("sums += x", "sums += tl.where(inside, (x - mean) * (x - mean), 0.0)"):
        with f.block(f"for start in range(begin, end, {down}):"):
            f.emit(f"row = start + tl.arange(0, {down})[:, None]\ninside = (row < end) & (columns < {inner})")
            f.emit(f"{load}\n{line}")
        if line == "sums += x":
            f.emit("total = tl.sum(tl.sum(sums, 1), 0)")
            f.emit(f"mean = total / tl.maximum((end - begin) * {inner}, 1)\nsums = tl.zeros_like(sums)")
    f.emit(f"place = {f.pointer(figures)} + number * 2\ntl.store(place, total)")
    f.emit("tl.store(place + 1, tl.sum(tl.sum(sums, 1), 0))")
    f.launch(product((node.input(0).shape[0], groups * parts)))


def _count(f: FunctionBuilder, parts: int, positions: Extent) -> None:
    """`begin` and `end` of the positions of `part`."""
    share, last = f.extent(ceil_div(positions, parts)), f.extent(positions)
    f.emit(f"begin = tl.minimum(part * {share}, {last})\nend = tl.minimum(begin + {share}, {last})")


def _write(build: CudaBuilder, node: Node, figures: Handle, sizes: tuple[int, int], positions: Extent) -> None:
    x, channels = node.input(0), int(node.input(0).shape[1])
    across = min(power_of_two(channels), _COLUMNS)
    down, wide = _ELEMENTS // across, -(-channels // across)
    f = build.function(warps=8)
    tall = ceil_div(positions, down)
    f.emit(f"number = tl.program_id(0)\ncolumn = number % {wide} * {across} + tl.arange(0, {across})[None, :]")
    f.emit(f"row = number // {wide} % {f.extent(tall)} * {down} + tl.arange(0, {down})[:, None]")
    f.emit(f"image = number // ({f.extent(product((tall, wide)))})\nheld = column < {channels}")
    f.emit(f"inside = (row < {f.extent(positions)}) & held")
    f.emit(f"place = (image * {f.extent(positions)} + row) * {channels} + column")
    _figures(f, node, figures, sizes, positions)
    f.emit(f"x = tl.load({f.pointer(build.input(0))} + place, inside, other=0).to(tl.float32)")
    value = "(x - mean) * factor"
    for index, sign in ((1, "*"), (2, "+")):
        if node.has_input(index):
            step = "column, held, other=0" if node.input(index).elements != 1 else "0"
            value = f"({value}) {sign} tl.load({f.pointer(build.input(index))} + {step}).to(tl.float32)"
    made = render(f, node.epilogue, [f.let(value), *_extras(f, build, node)],
                  ["float32", *(p.dtype for p in extras_of(node))])  # fmt: skip
    held = node.epilogue.dtype or "float32"
    f.emit(f"tl.store({f.pointer(build.output())} + place, {converted(made, held, node.output.dtype)}, inside)")
    f.launch(product((x.shape[0], tall, wide)))


def _figures(f: FunctionBuilder, node: Node, figures: Handle, sizes: tuple[int, int], positions: Extent) -> None:
    """`mean` and `factor` of the columns, from those of all parts (Chan et al. 1979)."""
    (groups, parts), channels = sizes, int(node.input(0).shape[1])
    inner = channels // groups
    f.emit(f"part = tl.arange(0, {parts})[:, None]")
    _count(f, parts, positions)
    f.emit(f"source = {f.pointer(figures)} + ((image * {groups} + column // {inner}) * {parts} + part) * 2")
    f.emit(f"total = tl.load(source, held, other=0)\ncount = ((end - begin) * {inner}).to(tl.float32)")
    whole = f"tl.full((), {inner}, tl.float32) * {f.extent(positions)}"
    f.emit(f"whole = {whole}\nmean = tl.sum(total, 0)[None, :] / whole\naway = total / tl.maximum(count, 1.0) - mean")
    f.emit("spread = tl.sum(tl.load(source + 1, held, other=0) + count * away * away, 0)[None, :] / whole")
    f.emit(f"factor = 1.0 / libdevice.sqrt(spread + {node.attributes['epsilon']!r})")


def _extras(f: FunctionBuilder, build: CudaBuilder, node: Node) -> list[str]:
    """The epilogue's operands for the tile."""
    used, texts = set(operands_of(node.epilogue)), []
    shape = node.output.shape
    spots = unravel(f, "row", shape[2:])
    for k in range(MAIN, len(node.inputs)):
        where = offset(f, ["image", "column", *spots], broadcast_strides(node.input(k), shape))
        mask = ", inside" if where != "0" else ""
        place = f"{f.pointer(build.input(k))} + {where}{' + row * 0 + column * 0' if mask else ''}"
        texts.append(f.let(f"tl.load({place}{mask})") if k - MAIN + 1 in used else "")
    return texts
