"""GatedLinear: a product whose columns come in pairs, one of each half, so that a block has all that it combines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ingot.ir.expression import parse
from ingot.kernels import kernel
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.build import CudaBuilder, Handle
from ingot.kernels.cuda.gemm import Site, Tile, cost, emit_product
from ingot.kernels.cuda.linear import linear_problem, linear_sides, linear_tiles
from ingot.kernels.cuda.render import NARROW, can_render, converted, render
from ingot.kernels.node import Node

_SUMS = ("float32", "float32")


def _applies(node: Node, target: Any) -> bool:
    weight = node.input(1).constant
    types = node.dtype == node.input(1).dtype and node.dtype in (*NARROW, "float32")
    return weight is not None and types and can_render(parse(node.attributes["after"]), _SUMS)


def _price(node: Node, target: Architecture, tile: str) -> float:
    return cost(linear_problem(node), Tile.parse(tile), 1, target)


@kernel("GatedLinear", on="cuda", when=_applies, cost=_price, space={"tile": linear_tiles})
def gated_linear(build: CudaBuilder, node: Node, tile: str) -> None:
    """after(first, second) of the halves of x[M, K] @ w[K, 2N] + bias[2N]; weights [2N, K], halves by turns"""
    weight, bias = node.input(1), node.input(2).constant
    assert weight.constant is not None and bias is not None
    paired = replace(weight, constant=_in_turn(weight.constant))
    node = build.node = replace(node, inputs=(node.input(0), paired, node.input(2)))
    problem, sides = linear_sides(build, node)
    held = build.pack(_in_turn(bias.astype(np.float32)))
    emit_product(build, problem, Tile.parse(tile), 1, replace(sides, write=lambda site: _write(build, site, held)))


def _in_turn(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Columns of the first and of the second half by turns."""
    first, second = np.split(array, 2, axis=-1)
    return np.ascontiguousarray(np.stack((first, second), axis=-1).reshape(array.shape))


def _write(build: CudaBuilder, site: Site, bias: Handle) -> None:
    f, tile, node = site.f, site.tile, build.node
    width, half = node.output.shape[-1], tile.columns // 2
    f.emit(f"sums += tl.load({f.pointer(bias)} + columns_in)[None, :]")
    f.emit(f"first, second = tl.split(tl.reshape(sums, ({tile.rows}, {half}, 2)))")
    f.emit(f"halves = column * {half} + tl.arange(0, {half})")
    after = parse(node.attributes["after"])
    value = render(f, after, ["first", "second"], _SUMS)
    made = converted(value, after.dtype or "float32", node.output.dtype)
    inside = f"(rows < {f.extent(site.problem.rows)})[:, None] & (halves < {width})[None, :]"
    f.emit(f"tl.store({f.pointer(build.output())} + rows[:, None] * {width} + halves[None, :], {made}, {inside})")
