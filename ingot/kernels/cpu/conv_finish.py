"""What becomes of the sums of products over prepared maps: 32 positions by a panel of output channels, through the
epilogue, to those positions that count. Bytes are rounded four positions at a time and stored as one vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.kernels.cpu.build import Handle, PhaseFunction
from ingot.kernels.cpu.conv_epilogue import INLINE_LIMIT, Epilogue, block_values, finish, finished, rendered_lines
from ingot.kernels.cpu.conv_maps import Maps
from ingot.kernels.cpu.gemm_dot import SHORT
from ingot.kernels.cpu.gemm_tiles import COLUMNS, ROW_BYTES, SECOND_CACHE, TALLEST
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.cpu.render_convert import pack_bytes
from ingot.plan.extent import product

_GROUP_BYTES = 1 << 20  # of prepared maps that stay in the second cache while all weights pass
_WORTH_SPLITTING = 2  # times the weights, maps are better left with those who wrote them, by groups of images
_TOGETHER = 4  # positions whose bytes make a vector


@dataclass(frozen=True, eq=False)
class Job:
    """Prepared maps times packed weights: panels of `wide` × 16 output channels. Sums start from `start`, or zero."""

    maps: Maps
    wide: int
    packed: Handle
    start: Handle | None
    epilogue: Epilogue

    @property
    def panels(self) -> int:
        """Panels of output channels."""
        return -(-self.epilogue.channels // (self.wide * COLUMNS))

    @property
    def tap_bytes(self) -> int:
        """Packed weights of a tap of a step."""
        return self.wide * self.maps.dot.right_bytes

    @property
    def panel_bytes(self) -> int:
        """Packed weights of a panel."""
        return self.maps.steps * len(self.maps.taps) * self.tap_bytes

    @property
    def slot_bytes(self) -> int:
        """Scratch for the sums of a block."""
        return TALLEST * self.wide * ROW_BYTES

    @property
    def panels_outside(self) -> bool:
        """Whether all blocks pass a panel before the next one: where the weights are the larger operand."""
        image = self.maps.bytes
        return isinstance(image, int) and self.panels * self.panel_bytes > image

    @property
    def images(self) -> int:
        """Images that pass a panel before the next one: as many as the second cache holds."""
        image, batch = self.maps.bytes, self.maps.batch
        if not self.panels_outside or not isinstance(image, int):
            return 1
        there = max(_GROUP_BYTES // image, 1)
        if not isinstance(batch, int):
            return there
        if self.panels * self.panel_bytes <= _WORTH_SPLITTING * batch * image:
            batch = -(-batch // 2)
        return min(there, batch)

    @property
    def share(self) -> int:
        """Bytes of the next panel that a block of the group's first image fetches with every tap."""
        blocks = self.maps.blocks
        if not self.panels_outside or not isinstance(blocks, int):
            return 0
        return -(-self.tap_bytes // (blocks * ROW_BYTES)) * ROW_BYTES


def fetch_residuals(f: PhaseFunction, job: Job, place: tuple[Value, Value, Value]) -> None:
    """Ask for what the epilogue will read of a block, (image, panel, block): runs of half a kilobyte, too short for the
    processor to foresee."""
    (image, panel, block), maps = place, job.maps
    far = [extra for extra in job.epilogue.extras if extra.kind == "full" and not extra.padded]
    if not far or maps.width != maps.columns:
        return
    first = image * -(-job.epilogue.channels // COLUMNS) + panel * job.wide
    for j in range(job.wide):
        element = ((first + j) * f.extent(product((maps.rows, maps.columns))) + block * TALLEST) * COLUMNS
        for extra in far:
            size = size_of(extra.dtype)
            pointer = f.at(f.pointer(extra.handle), element * size)
            for line in range(0, TALLEST * COLUMNS * size, ROW_BYTES):
                f.prefetch(pointer, line, SECOND_CACHE)


def finish_block(f: PhaseFunction, job: Job, place: tuple[Value, Value, Value], slot: Value) -> None:
    """The sums of a block, (image, panel, block), to its positions that count: run by run of the map's rows."""
    (image, panel, block), maps = place, job.maps
    wide, blocks = job.wide, -(-job.epilogue.channels // COLUMNS)
    first, channel = block * TALLEST, panel * wide
    there = f.index(f.minimum(TALLEST, f.index(f.extent(maps.positions)) - first))
    columns, width = f.extent(maps.columns), f.extent(maps.width)

    def vectors(count: int) -> None:
        finisher = _Finisher(f, job, channel, count)
        plane = (image * blocks + channel) * f.extent(product((maps.rows, maps.columns)))

        def run(r: Value, place: Value, length: Value) -> None:
            _finish_run(f, finisher, f.at(slot, r * (wide * ROW_BYTES)), (plane + place) * COLUMNS, length)

        if maps.width == maps.columns:
            run(f.index(0), first, there)
            return

        def row(_: Value, r: Value, y: Value, x: Value) -> list[Value]:
            run(r, y * columns + x, f.index(f.maximum(f.minimum(f.index(columns) - x, there - r), 0)))
            return [r + width - x, y + 1, f.index(0)]

        y, x = f.index(f.divide(first, width)), f.index(f.remainder(first, width))
        f.loop(0, f.divide(x + there + (width - 1), width), row, [f.index(0), y, x])

    if blocks % wide == 0:
        vectors(wide)
        return
    whole = f.compare("sle", channel + wide, blocks)
    f.when(whole, lambda: vectors(wide), lambda: vectors(blocks % wide))


class _Finisher:
    """Applies the epilogue to the vectors of a position: what is the same for all positions is loaded once."""

    def __init__(self, f: PhaseFunction, job: Job, channel: Value, count: int) -> None:
        self.f, self.job, self.count = f, job, count
        self.values = [block_values(f, job.epilogue, channel + j) for j in range(count)]
        self.element = "float" if job.epilogue.accumulator == "float32" else "i32"

    def __call__(self, sums: Value, element: Index, positions: int) -> None:
        """Finish the sums of `positions` neighbouring positions, the first of which is output element `element`."""
        apart = self.f.extent(product((self.job.maps.rows, self.job.maps.columns))) * COLUMNS
        for j in range(self.count):
            place, further = (element, j * apart) if isinstance(apart, int) else (element + j * apart, 0)
            totals = [self._total(sums, position, j) for position in range(positions)]
            if positions == _TOGETHER and self.bytes:
                self._together(totals, j, place, further)
            else:
                for position, total in enumerate(totals):
                    finish(self.f, self.job.epilogue, total, self.values[j], place, further + position * COLUMNS)

    @property
    def bytes(self) -> bool:
        """Whether results are bytes that a Quantize makes."""
        instructions = self.job.epilogue.expression.instructions
        return self.job.epilogue.dtype in SHORT and bool(instructions) and instructions[-1].op == "Quantize"

    def _total(self, sums: Value, position: int, j: int) -> Value:
        return self.f.load(f"<16 x {self.element}>", sums, (position * self.job.wide + j) * ROW_BYTES)

    def _together(self, totals: Sequence[Value], j: int, place: Index, further: int) -> None:
        f, epilogue = self.f, self.job.epilogue
        results = [
            finished(f, epilogue, total, self.values[j], place, further + position * COLUMNS)
            for position, total in enumerate(totals)
        ]
        packed = pack_bytes(f, results, epilogue.dtype)
        assert packed is not None
        f.store(packed, f.at(f.pointer(epilogue.output), place), further)


def _finish_run(f: PhaseFunction, finisher: _Finisher, slot: Value, element: Value, length: Value) -> None:
    """Neighbouring positions of all blocks of channels, whose sums lie at `slot`."""
    lines = rendered_lines(finisher.job.epilogue) * finisher.count
    unroll = next(u for u in (_TOGETHER, 2, 1) if u == 1 or u * lines <= INLINE_LIMIT)

    def positions(count: int) -> Callable[[Value], None]:
        def body(p: Value) -> None:
            sums, place = f.at(slot, p * (finisher.job.wide * ROW_BYTES)), element + p * COLUMNS
            finisher(sums, place, count)

        return body

    whole = f.index(f.divide(length, unroll)) * unroll
    f.loop(0, whole, positions(unroll), step=unroll)
    if unroll > 1:
        f.loop(whole, length, positions(1))
