"""Softmax along any axis: a row at once where it fits, else by a running maximum and sum."""

from __future__ import annotations

from typing import Any

from ingot.kernels import kernel
from ingot.kernels.cuda.axes import Axis, memory_order, strides_of
from ingot.kernels.cuda.build import LANGUAGE, CudaBuilder
from ingot.kernels.cuda.copying import same_layouts
from ingot.kernels.cuda.reduce import accumulator
from ingot.kernels.cuda.render import NARROW, REAL
from ingot.kernels.cuda.rows import Rows, Tile, open_tile, rows_of
from ingot.kernels.node import Node

_LOW = 'float("-inf")'


def _rows(node: Node) -> Rows:
    x, y, axis = node.input(0), node.output, node.attributes["axis"]
    sides = strides_of(x.shape, x.layout), strides_of(y.shape, y.layout)
    order = memory_order(len(x.shape), x.layout)
    axes = {a: Axis(x.shape[a], tuple(s[a] for s in sides)) for a in order}
    return rows_of([axes[a] for a in order if a != axis], [axes[axis]])


@kernel("Softmax", on="cuda", when=lambda node, target: node.dtype in (*NARROW, *REAL), layouts=same_layouts,
        in_place=lambda node: (0,))  # fmt: skip
def softmax(build: CudaBuilder, node: Node) -> None:
    """exp(x - max) / sum, or its logarithm"""
    tile = open_tile(build, _rows(node))
    (_whole if tile.shape.whole else _running)(build, node, tile)
    tile.launch()


def _x(build: CudaBuilder, node: Node, tile: Tile) -> None:
    loaded = tile.load(build.input(0), 0, other=_LOW)
    tile.f.emit(f"x = {loaded}.to({LANGUAGE[accumulator(node.dtype)]})")


def _store(build: CudaBuilder, node: Node, tile: Tile, value: str) -> None:
    f = tile.f
    f.emit(f"tl.store({f.pointer(build.output())} + {tile.offset(1)}, ({value}).to({LANGUAGE[node.output.dtype]}), "
           f"{tile.mask})")  # fmt: skip


def _whole(build: CudaBuilder, node: Node, tile: Tile) -> None:
    f = tile.f
    with tile.columns():
        _x(build, node, tile)
        f.emit("x = x - tl.max(x, 1)[:, None]\npowers = tl.exp(x)\ntotal = tl.sum(powers, 1)[:, None]")
        _store(build, node, tile, "x - tl.log(total)" if node.attributes["log"] else "powers / total")


def _running(build: CudaBuilder, node: Node, tile: Tile) -> None:
    """Every lane keeps a maximum and a sum of its own; they meet at the end."""
    f, whole = tile.f, f"({tile.shape.rows}, {tile.shape.columns})"
    type = LANGUAGE[accumulator(node.dtype)]
    f.emit(f"peaks = tl.full({whole}, {_LOW}, {type})\nsums = tl.zeros({whole}, {type})")
    with tile.columns():
        _x(build, node, tile)
        f.emit(f"higher = tl.maximum(peaks, x)\nscale = tl.where(higher == {_LOW}, 0.0, higher)")
        f.emit("sums = sums * tl.exp(peaks - scale) + tl.exp(x - scale)\npeaks = higher")
    f.emit("peak = tl.max(peaks, 1)[:, None]")
    f.emit(f"total = tl.sum(sums * tl.exp(peaks - tl.where(peak == {_LOW}, 0.0, peak)), 1)[:, None]")
    with tile.columns():
        _x(build, node, tile)
        _store(build, node, tile, "x - peak - tl.log(total)" if node.attributes["log"] else
               "tl.exp(x - peak) / total")  # fmt: skip
