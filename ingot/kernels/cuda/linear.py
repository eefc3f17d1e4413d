"""Linear and MatMul: products of row-major tensors with any transposition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ingot.ir.expression import parse
from ingot.ir.ops_parallel import with_bias
from ingot.kernels import kernel
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.axes import broadcast_strides, offset, unravel
from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.gemm import (
    JOINS,
    SPLITS,
    TYPES,
    Load,
    Open,
    Problem,
    Sides,
    Site,
    Tile,
    cost,
    emit_product,
    epilogue_fits,
    extra_bytes,
    splits_for,
    tiles_for,
)
from ingot.kernels.cuda.render import nothing
from ingot.kernels.node import Node, Port
from ingot.plan.extent import Extent, product


def _no_zero_points(node: Node) -> bool:
    return not (node.attributes.get("x_zero_point") or node.attributes.get("weight_zero_point"))


def _same_types(node: Node) -> bool:
    return node.dtype in TYPES and node.input(1).dtype == node.dtype and _no_zero_points(node)


def linear_problem(node: Node) -> Problem:
    """Of a Linear, or what else multiplies input 0 by a constant input 1."""
    weight = node.input(1).shape
    depth, columns = int(weight[0]), int(weight[1])
    return Problem(product(node.input(0).shape[:-1]), columns, depth, node.dtype, 1, extra_bytes(node.inputs[2:]))


def _linear_applies(node: Node, target: Any) -> bool:
    weight = node.input(1).constant
    if weight is None or weight.ndim != 2 or 0 in weight.shape or not _same_types(node):
        return False
    return epilogue_fits(node, 2, linear_problem(node).accumulator)


def _price(node: Node, target: Architecture, tile: str, split: int, join: int) -> float:
    return cost(_of(node), Tile.parse(tile), split, target, bool(join))


def _of(node: Node) -> Problem:
    return _batched(node) if node.op == "MatMul" else linear_problem(node)


def _prune(node: Node, target: Architecture, tile: str, split: int, join: int) -> bool:
    return join > split - 1 or split not in splits_for(_of(node), Tile.parse(tile), target)


def linear_tiles(node: Node, target: Architecture) -> tuple[str, ...]:
    """Tiles for its product."""
    return tiles_for(_of(node), target)


_SPACE = {"tile": linear_tiles, "split": SPLITS, "join": JOINS}


@kernel("Linear", on="cuda", when=_linear_applies, cost=_price, prune=_prune, space=_SPACE)
def linear(build: CudaBuilder, node: Node, tile: str, split: int, join: int) -> None:
    """epilogue(x[M, K] @ w[K, N]); the weights are stored [N, K]"""
    _emit_linear(build, node, tile, split, join)


def _parallel_applies(node: Node, target: Any) -> bool:
    return node.input(1).constant is not None and _same_types(node) and node.dtype != "int8"


@kernel("ParallelLinear", on="cuda", when=_parallel_applies, cost=_price, prune=_prune, space=_SPACE)
def parallel_linear(build: CudaBuilder, node: Node, tile: str, split: int, join: int) -> None:
    """scale * (x[M, K] @ w[K, N]) + bias[N], the columns divided among the outputs"""
    scale = float(node.attributes.get("scale", 1.0))
    build.node = replace(node, epilogue=parse(with_bias(scale, node.output.dtype)))
    _emit_linear(build, build.node, tile, split, join, tuple(node.attributes["sizes"]))


def _emit_linear(build: CudaBuilder, node: Node, tile: str, split: int, join: int,
                 sizes: tuple[int, ...] = ()) -> None:  # fmt: skip
    problem, sides = linear_sides(build, node)
    emit_product(build, problem, Tile.parse(tile), split, replace(sides, sizes=sizes), join)


def linear_sides(build: CudaBuilder, node: Node) -> tuple[Problem, Sides]:
    """The product of rows of input 0 with a constant input 1."""
    problem, weight = linear_problem(node), node.input(1).constant
    assert weight is not None and problem.depth is not None
    packed = build.pack(np.ascontiguousarray(weight.T))
    strides = (problem.depth, 1)
    left, right = _opened(build.input(0), strides, "rows"), _opened(packed, strides, "columns")
    return problem, Sides(left, right, 2, (packed, problem.depth))


def _opened(handle: Handle, strides: tuple[Extent, Extent], axis: str, batch: str = "") -> Open:
    """Loads of a side: `strides` along its axis (rows of the left side, columns of the right) and along the depth."""

    def open_side(site: Site) -> Load:
        f, problem, tile = site.f, site.problem, site.tile
        assert problem.depth is not None
        across, deep = ("[:, None]", "[None, :]") if axis == "rows" else ("[None, :]", "[:, None]")
        along = f"{axis}_in{across} * {f.extent(strides[0])} + depths{deep} * {f.extent(strides[1])}"
        base = f.let(f"{f.pointer(handle)}{batch} + {along}")

        def load(f: FunctionBuilder, step: str) -> str:
            place = f"{base} + {step} * {f.extent(product((tile.depth, strides[1])))}"
            if problem.depth is not None and problem.depth % tile.depth == 0:
                return f.let(f"tl.load({place})")
            mask = f"(depths < {problem.depth} - {step} * {tile.depth}){deep}"
            return f.let(f"tl.load({place}, {mask}, other={nothing(problem.dtype)})")

        return load

    return open_side


# MatMul


def _batched(node: Node) -> Problem:
    a, y = node.input(0).shape, node.output.shape
    depth = a[-2 if node.attributes.get("transpose_a") else -1]
    return Problem(y[-2], y[-1], depth if isinstance(depth, int) else None, node.dtype, product(y[:-2]),
                   extra_bytes(node.inputs[2:]))  # fmt: skip


def _matmul_applies(node: Node, target: Any) -> bool:
    if len(node.input(0).shape) < 2 or len(node.input(1).shape) < 2 or not _same_types(node):
        return False
    problem = _batched(node)
    return problem.depth is not None and problem.depth > 0 and epilogue_fits(node, 2, problem.accumulator)


@kernel("MatMul", on="cuda", when=_matmul_applies, cost=_price, prune=_prune, space=_SPACE)
def matmul(build: CudaBuilder, node: Node, tile: str, split: int, join: int) -> None:
    """epilogue(a[…, M, K] @ b[…, K, N]) for every batch; broadcast ones stand still"""
    a, b = node.input(0), node.input(1)
    along_a = _matrix_strides(a, bool(node.attributes.get("transpose_a")))
    along_b = _matrix_strides(b, not node.attributes.get("transpose_b"))
    left = _with_batch(build, node, 0, along_a, "rows")
    right = _with_batch(build, node, 1, along_b, "columns")
    emit_product(build, _batched(node), Tile.parse(tile), split, Sides(left, right, 2), join)


def _matrix_strides(port: Port, transposed: bool) -> tuple[Extent, Extent]:
    """(along the result's axis, along the depth)"""
    width = port.shape[-1]
    return (1, width) if transposed else (width, 1)


def _with_batch(build: CudaBuilder, node: Node, index: int, strides: tuple[Extent, Extent], axis: str) -> Open:
    """A side whose matrix depends on the batch."""
    port, outer = node.input(index), node.output.shape[:-2]
    matrix = product(port.shape[-2:])
    own = broadcast_strides(Port(port.dtype, port.shape[:-2]), outer)

    def open_side(site: Site) -> Load:
        f = site.f
        if not outer or all(s == 0 for s in own):
            return _opened(build.input(index), strides, axis)(site)
        places = unravel(f, site.batch, outer)
        start = f.let(f"({offset(f, places, own)}) * {f.extent(matrix)}")
        return _opened(build.input(index), strides, axis, f" + {start}")(site)

    return open_side
