"""Conv in tile registers (AMX), blocked maps: float32 as two bfloat16 parts or rounded to one, bfloat16 and bytes as
they are.

A first phase prepares the input (conv_maps.py; conv_stem.py for few channels). Then y = Σ over channels and taps, 32
positions by 32 channels, finished by vectors of 16 channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ingot.config import BFLOAT16_ERROR, SPLIT_ERROR
from ingot.kernels import Ports, kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.conv_byte_sums import start_of_bytes
from ingot.kernels.cpu.conv_epilogue import (
    can_finish,
    epilogue_of,
    extra_layouts,
    residuals,
)
from ingot.kernels.cpu.conv_finish import Job, fetch_residuals, finish_block
from ingot.kernels.cpu.conv_maps import Maps, Window, prepare, prepare_block, source_of, window_of
from ingot.kernels.cpu.gemm_dot import SHORT
from ingot.kernels.cpu.gemm_pack import Array
from ingot.kernels.cpu.gemm_plan import GIGAHERTZ
from ingot.kernels.cpu.gemm_tiles import (
    BFLOAT16,
    BYTES,
    COLUMNS,
    ROUNDED,
    ROW_BYTES,
    ROWS,
    SPLIT,
    TALLEST,
    Rows,
    TileDot,
    add_products,
    begin,
    begin_alike,
    configuration,
    configure,
    pack_tiles,
    release,
)
from ingot.kernels.cpu.gemm_tiles import (
    end as end_sums,
)
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.linear import zero_points
from ingot.kernels.cpu.llvm import Value
from ingot.kernels.node import Node
from ingot.plan.extent import product

Applies = Callable[[Node, Isa], bool]
Emit = Callable[[KernelBuilder, Window, Job], None]
MOST_TAPS = 9
_BLOCKS = 128  # of positions, where the map's size is not known
_NEAR_BYTES = 256 << 10
_PRODUCT_CYCLES, _VECTOR_CYCLES, _BLOCK_CYCLES = 18, 12, 300
_ROW_BYTES_PER_MICROSECOND, _WEIGHTS_PER_MICROSECOND, _AGAIN_PER_MICROSECOND = 30_000, 16_000, 80_000
_FIRST_CACHE = 32 << 10  # bytes of weights that stay there


# what applies and what it costs


def fits_tiles(node: Node, accumulator: str, groups: bool = False, ranks: tuple[int, ...] = (2,)) -> bool:
    """Whether sizes, groups (none unless told otherwise), spatial axes and epilogue are such as kernels over prepared
    maps take."""
    weight = node.input(1)
    if weight.constant is None or len(weight.shape) - 2 not in ranks or not isinstance(node.output.shape[1], int):
        return False
    some = all(size != 0 for size in (*node.input(0).shape[1:], *node.output.shape[1:]))
    return some and (groups or node.attributes["group"] == 1) and can_finish(node, 2, accumulator)


def takes_weights(node: Node) -> bool:
    """Whether the weights are bytes, or sums of two, once their zero point is subtracted."""
    if node.input(1).dtype not in SHORT:
        return False
    return (node.input(1).dtype == "int8" and not zero_points(node)[1]) or bool(byte_parts(centred_weight(node)))


def byte_parts(weight: Array) -> list[Array]:
    """Arrays of int8 whose sum it is: one where that does, two for most weights with a zero point far from the middle,
    none for the rest. Twice the products cost less than sums of every window."""
    parts: list[Array] = []
    while not parts or (weight.any() and len(parts) < 2):
        part = np.clip(weight, -128, 127)
        parts.append(part.astype(np.int8))
        weight = weight - part
    return [] if weight.any() else parts


def _few_taps(node: Node) -> bool:
    return math.prod(int(size) for size in node.input(1).shape[2:]) <= MOST_TAPS


def _floats_apply(node: Node, isa: Isa) -> bool:
    return node.dtype == "float32" and _numbers_apply(node, isa)


def _bfloat16_applies(node: Node, isa: Isa) -> bool:
    return node.dtype == "bfloat16" and _numbers_apply(node, isa)


def _numbers_apply(node: Node, isa: Isa) -> bool:
    if not isa.has("amx_bf16") or node.input(1).dtype != node.dtype or not fits_tiles(node, "float32"):
        return False
    outputs, inputs = map(int, node.input(1).shape[:2])
    return inputs % COLUMNS == 0 and outputs >= COLUMNS // 2 and _few_taps(node)


def _bytes_apply(node: Node, isa: Isa) -> bool:
    fits = isa.has("amx_int8") and node.dtype in SHORT and fits_tiles(node, "int32") and takes_weights(node)
    return fits and int(node.input(1).shape[1]) >= COLUMNS // 2 and _few_taps(node)


def _copies(applies: Applies, dot: TileDot) -> Applies:
    """Where blocks of positions can be prepared one by one, and fit in the second cache."""

    def also(node: Node, isa: Isa) -> bool:
        window = window_of(node, dot) if applies(node, isa) else None
        return window is not None and window.copies and window.block_bytes <= _NEAR_BYTES

    return also


def cost(maps: Maps, outputs: int, wide: int, near: bool = False) -> float:
    """Microseconds on one core; `near`: blocks are prepared where they are used, and each reads all weights."""
    batch = maps.batch if isinstance(maps.batch, int) else 1
    blocks, step_bytes = maps.blocks, maps.step_bytes
    if not isinstance(blocks, int) or not isinstance(step_bytes, int):
        blocks, step_bytes = _BLOCKS, _BLOCKS * TALLEST * maps.pitch
    panels, steps = -(-outputs // (wide * COLUMNS)), maps.steps * len(maps.taps)
    products = steps * len(maps.dot.products) * 2 * wide * _PRODUCT_CYCLES
    block = products + wide * TALLEST * _VECTOR_CYCLES + _BLOCK_CYCLES
    compute = batch * blocks * panels * block / (GIGAHERTZ * 1000)
    moved = step_bytes * (1 + maps.dot.source / maps.dot.parts)
    prepared = batch * maps.steps * moved / _ROW_BYTES_PER_MICROSECOND
    weights = steps * panels * wide * maps.dot.right_bytes
    if not near:
        return 2 + compute + prepared + weights / _WEIGHTS_PER_MICROSECOND
    again = (blocks - 1) * weights / _AGAIN_PER_MICROSECOND if weights > _FIRST_CACHE else 0.0
    return 1 + compute + prepared / 3 + weights / _WEIGHTS_PER_MICROSECOND + again


def declaration(applies: Applies, maps_of: Callable[[Node], Maps], layout: str, near: bool = False) -> dict[str, Any]:
    """What kernels over prepared maps have in common; `layout` is the input's."""

    def wides(node: Node, isa: Isa) -> tuple[int, ...]:
        return (2, 1) if int(node.input(1).shape[0]) > COLUMNS else (1,)

    def layouts(node: Node, isa: Isa) -> list[Ports]:
        return [Ports((layout, "", *extra_layouts(node, 2)), ("blocked",))]

    def price(node: Node, isa: Isa, wide: int) -> float:
        return cost(maps_of(node), int(node.input(1).shape[0]), wide, near)

    return {"when": applies, "cost": price, "layouts": layouts, "space": {"wide": wides}, "in_place": residuals}


# the kernels


def _far(applies: Applies, dot: TileDot) -> dict[str, Any]:
    return declaration(applies, lambda node: window_of(node, dot).maps, "blocked")


def _near(applies: Applies, dot: TileDot) -> dict[str, Any]:
    return declaration(_copies(applies, dot), lambda node: window_of(node, dot).maps, "blocked", near=True)


@kernel("Conv", on="cpu", tolerance=SPLIT_ERROR, **_far(_floats_apply, SPLIT))
def conv_split(build: KernelBuilder, node: Node, wide: int) -> None:
    """float32 as the sum of two bfloat16 numbers."""
    _floats(build, node, wide, SPLIT, emit_products)


@kernel("Conv", on="cpu", tolerance=SPLIT_ERROR, **_near(_floats_apply, SPLIT))
def conv_split_near(build: KernelBuilder, node: Node, wide: int) -> None:
    """The same for windows of one tap, each block prepared where it is used."""
    _floats(build, node, wide, SPLIT, emit_near)


@kernel("Conv", on="cpu", tolerance=BFLOAT16_ERROR, **_far(_floats_apply, ROUNDED))
def conv_rounded(build: KernelBuilder, node: Node, wide: int) -> None:
    """float32 rounded to bfloat16, sums in float32."""
    _floats(build, node, wide, ROUNDED, emit_products)


@kernel("Conv", on="cpu", tolerance=BFLOAT16_ERROR, **_near(_floats_apply, ROUNDED))
def conv_rounded_near(build: KernelBuilder, node: Node, wide: int) -> None:
    """The same for windows of one tap, each block prepared where it is used."""
    _floats(build, node, wide, ROUNDED, emit_near)


@kernel("Conv", on="cpu", **_far(_bfloat16_applies, BFLOAT16))
def conv_tiles_bfloat16(build: KernelBuilder, node: Node, wide: int) -> None:
    """bfloat16, sums in float32."""
    _floats(build, node, wide, BFLOAT16, emit_products)


@kernel("Conv", on="cpu", **_near(_bfloat16_applies, BFLOAT16))
def conv_near_bfloat16(build: KernelBuilder, node: Node, wide: int) -> None:
    """The same for windows of one tap, each block prepared where it is used."""
    _floats(build, node, wide, BFLOAT16, emit_near)


def _floats(build: KernelBuilder, node: Node, wide: int, dot: TileDot, emit: Emit) -> None:
    window, weight = window_of(node, dot), node.input(1).constant
    assert weight is not None
    packed = build.pack(_packed(weight.astype(np.float32), window, wide))
    emit(build, window, Job(window.maps, wide, packed, None, epilogue_of(build, node, 2)))


@kernel("Conv", on="cpu", **_far(_bytes_apply, BYTES))
def conv_tiles_bytes(build: KernelBuilder, node: Node, wide: int) -> None:
    """uint8 or int8 by int8 or uint8, exactly, with sums in int32."""
    _bytes(build, node, wide, emit_products)


@kernel("Conv", on="cpu", **_near(_bytes_apply, BYTES))
def conv_near_bytes(build: KernelBuilder, node: Node, wide: int) -> None:
    """The same for windows of one tap, each block prepared where it is used."""
    _bytes(build, node, wide, emit_near)


def _bytes(build: KernelBuilder, node: Node, wide: int, emit: Emit) -> None:
    weight = centred_weight(node)
    parts = byte_parts(weight)
    window = replace(window_of(node, BYTES), copies_of_taps=len(parts))
    packed = build.pack(_packed(np.stack(parts, -1), window, wide))
    emit(build, window, Job(window.maps, wide, packed, *start_of_bytes(build, node, weight, wide)))


def centred_weight(node: Node) -> Array:
    """The weights less their zero point."""
    weight = node.input(1).constant
    assert weight is not None
    return weight.astype(np.int16) - zero_points(node)[1]


def _packed(weight: Array, window: Window, wide: int) -> Array:
    """w[O, I, *K, parts] → tiles in the order [panel][step of channels][tap][part]."""
    taps, depth = len(window.taps) * window.copies_of_taps, window.dot.depth
    full = np.zeros((window.steps * depth, taps, window.outputs), weight.dtype)
    full[: window.inputs] = weight.reshape(window.outputs, window.inputs, taps).transpose(1, 2, 0)
    ordered = full.reshape(window.steps, depth, taps, window.outputs).transpose(0, 2, 1, 3)
    return pack_tiles(np.ascontiguousarray(ordered).reshape(-1, window.outputs), window.dot, wide)


# the products


def emit_products(build: KernelBuilder, window: Window, job: Job) -> None:
    """A phase prepares the maps, then come the products."""
    emit_prepared(build, job, prepare(build, window))


def emit_prepared(build: KernelBuilder, job: Job, prepared: Handle) -> None:
    """A work item is 32 positions by a panel of output channels; the larger is read once by a group of images."""
    maps = job.maps
    shape, slots = build.pack(configuration()), build.scratch(2 * job.slot_bytes)

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        slot = f.at(f.scratch, slots)

        def products(number: Value) -> list[Value]:
            image, panel, block = _place(f, job, number)
            start = image * f.extent(maps.bytes) + block * (TALLEST * maps.pitch)
            _products(f, job, f.at(f.pointer(prepared), start), (image, panel, block))
            return [image, panel, block]

        configure(f, shape)
        _overlapped(f, job, begin, end, products, slot)
        release(f)

    build.phase(product((maps.batch, job.panels, maps.blocks)), body)


def _overlapped(f: PhaseFunction, job: Job, begin: Value, end: Value, products: Callable[[Value], list[Value]],
                slot: Value) -> None:  # fmt: skip
    """Items [begin, end): while the tile unit multiplies for one, its `products` returning (image, panel, block), the
    vector units finish the one before it. Sums rest for a turn in one of two slots: what tiles have stored can be read
    only when it has reached the cache."""

    def turn(number: Value, *before: Value) -> list[Value]:
        image, panel, block, this, other = before

        def multiply() -> list[Value]:
            place = products(number)
            end_sums(f, _tops(job.maps), job.wide, this)
            return place

        place = f.when(f.compare("slt", number, end), multiply, unchanged=before[:3])
        f.when(f.compare("sgt", number, begin), lambda: finish_block(f, job, (image, panel, block), other))
        return [*place, other, this]

    f.loop(begin, end + 1, turn, [*[f.index(0)] * 3, slot, f.at(slot, job.slot_bytes)])


def _place(f: PhaseFunction, job: Job, number: Value) -> tuple[Value, Value, Value]:
    """(image, panel, block) of a work item."""
    blocks, images = f.extent(job.maps.blocks), job.images
    count = f.extent(product((job.panels, job.maps.blocks)))
    if images == 1:
        image, place = f.index(f.divide(number, count)), f.index(f.remainder(number, count))
        inner = blocks if job.panels_outside else job.panels
        outer, rest = f.index(f.divide(place, inner)), f.index(f.remainder(place, inner))
        return (image, outer, rest) if job.panels_outside else (image, rest, outer)
    group, place = f.index(f.divide(number, count * images)), f.index(f.remainder(number, count * images))
    there = f.minimum(images, f.index(f.extent(job.maps.batch)) - group * images)
    panel, rest = f.index(f.divide(place, there * blocks)), f.index(f.remainder(place, there * blocks))
    return group * images + f.index(f.divide(rest, blocks)), panel, f.index(f.remainder(rest, blocks))


def emit_near(build: KernelBuilder, window: Window, job: Job) -> None:
    """A work item is 32 positions, prepared in scratch, by all output channels."""
    near, source = replace(job, maps=window.block), source_of(build)
    shape, slots = build.pack(configuration()), build.scratch(2 * job.slot_bytes)
    place = build.scratch(window.block_bytes)

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        blocks, panels = f.extent(near.maps.blocks), near.panels
        left, slot = f.at(f.scratch, place), f.at(f.scratch, slots)

        def products(number: Value) -> list[Value]:
            item, panel = f.index(f.divide(number, panels)), f.index(f.remainder(number, panels))
            image, block = f.index(f.divide(item, blocks)), f.index(f.remainder(item, blocks))

            def fresh() -> None:
                there = f.minimum(TALLEST, f.index(f.extent(near.maps.positions)) - block * TALLEST)
                prepare_block(f, window, source, image, block * TALLEST, there, left)

            f.when(f.compare("eq", panel, 0), fresh)
            _products(f, near, left, (image, panel, block))
            return [image, panel, block]

        configure(f, shape)
        _overlapped(f, near, begin * panels, end * panels, products, slot)
        release(f)

    build.phase(product((near.maps.batch, near.maps.blocks)), body)


def _tops(maps: Maps) -> int:
    """Tiles of rows of a block."""
    return 1 if isinstance(maps.positions, int) and maps.positions <= ROWS else 2


def _products(f: PhaseFunction, job: Job, left: Value, place: tuple[Value, Value, Value]) -> None:
    """32 positions, prepared at `left`, by a panel, in registers; `place` is (image, panel, block)."""
    maps, (image, panel, block), taps = job.maps, place, len(job.maps.taps)
    right = f.at(f.pointer(job.packed), panel * job.panel_bytes)
    far = f.at(right, block * (job.share * maps.steps * taps) + job.panel_bytes)
    tops = _tops(maps)
    fetch_residuals(f, job, (image, panel, block + 1))
    if job.start is None:
        begin(f, tops, job.wide, None)
    else:
        begin_alike(f, tops, job.wide, f.at(f.pointer(job.start), panel * (job.wide * ROW_BYTES)))

    def step(_: Value, *pointers: Value) -> list[Value]:
        read, weights, ahead = pointers
        for number, tap in enumerate(maps.taps):
            there = f.at(read, maps.shift(f, tap))
            rows = Rows([f.at(there, top * ROWS * maps.pitch) for top in range(tops)], maps.part_bytes, maps.pitch)
            fetched = f.at(ahead, number * job.share)
            add_products(f, maps.dot, job.wide, rows, f.at(weights, number * job.tap_bytes), fetched, job.share)
        moved = f.at(read, f.extent(maps.step_bytes))
        return [moved, f.at(weights, taps * job.tap_bytes), f.at(ahead, taps * job.share)]

    f.loop(0, maps.steps, step, [left, right, far])
