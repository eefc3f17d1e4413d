"""LinearNorm: parts of the products' sums, then a block a row that adds them and normalises what the epilogue gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ingot.ir.expression import operands_of, parse
from ingot.kernels import kernel
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.axes import Axis
from ingot.kernels.cuda.build import CudaBuilder, Handle
from ingot.kernels.cuda.gemm import SPLITS, Problem, Tile, cost, emit_product, epilogue_fits, splits_for
from ingot.kernels.cuda.linear import linear_problem, linear_sides, linear_tiles
from ingot.kernels.cuda.norm import statistics
from ingot.kernels.cuda.render import NARROW, converted, render
from ingot.kernels.cuda.rows import WHOLE, Rows, open_tile, rows_of
from ingot.kernels.cuda.rows import Tile as RowTile
from ingot.kernels.node import Node

_EXTRAS = 4  # x, weight, scale, bias; what the epilogue inside reads follows
_FINISH = 2.0  # microseconds of the second launch


def _with_epilogue(node: Node) -> Node:
    return replace(node, epilogue=parse(node.attributes["inside"]))


def _applies(node: Node, target: Any) -> bool:
    weight = node.input(1).constant
    if weight is None or weight.ndim != 2 or 0 in weight.shape or weight.shape[1] > WHOLE:
        return False
    if node.dtype not in (*NARROW, "float32") or node.input(1).dtype != node.dtype:
        return False
    return epilogue_fits(_with_epilogue(node), _EXTRAS, "float32")


def _price(node: Node, target: Architecture, tile: str, split: int) -> float:
    return cost(linear_problem(node), Tile.parse(tile), split, target) + (_FINISH if split == 1 else 0.0)


def _prune(node: Node, target: Architecture, tile: str, split: int) -> bool:
    return split not in splits_for(linear_problem(node), Tile.parse(tile), target)


@kernel("LinearNorm", on="cuda", when=_applies, cost=_price, prune=_prune,
        space={"tile": linear_tiles, "split": SPLITS})  # fmt: skip
def linear_norm(build: CudaBuilder, node: Node, tile: str, split: int) -> None:
    """(y - mean) / sqrt(variance + epsilon) * scale + bias of y = epilogue(x[M, K] @ w[K, N]), row by row"""
    build.node = _with_epilogue(node)
    problem, sides = linear_sides(build, node)
    emit_product(build, problem, Tile.parse(tile), split, replace(sides, finish=_normalise))


def _rows(node: Node, problem: Problem) -> Rows:
    """Operands by input; input 0 stands for everything that is like the result."""
    whole, vector, number = (problem.columns, 1), (0, 1), (0, 0)
    strides = [whole if p is None or k == 0 or p.shape == node.output.shape else number if p.elements == 1 else vector
               for k, p in enumerate(node.inputs)]  # fmt: skip
    down, across = zip(*strides, strict=True)
    return rows_of([Axis(problem.rows, down)], [Axis(problem.columns, across)])


def _normalise(build: CudaBuilder, problem: Problem, partial: Handle, split: int) -> None:
    """A block a row: the parts' sum, the epilogue, the norm."""
    node = build.node
    tile = open_tile(build, _rows(node, problem))
    f = tile.f
    with tile.columns():
        loaded = _load(build, tile, constant=True)
        f.wait()
        loaded |= _load(build, tile, constant=False)
        f.emit(f"stride = {f.extent(problem.rows)} * {f.extent(problem.columns)}")
        f.emit(f"place = {tile.offset(0)}")
        f.emit(f"sums = tl.load({f.pointer(partial)} + place, inside, other=0.0)")
        with f.block(f"for part in tl.static_range(1, {split}):"):
            f.emit(f"sums += tl.load({f.pointer(partial)} + part * stride + place, inside, other=0.0)")
        texts = [loaded.get(k, "") for k in range(_EXTRAS, len(node.inputs))]
        dtypes = ["float32", *(node.input(k).dtype for k in range(_EXTRAS, len(node.inputs)))]
        made = f.let(render(f, node.epilogue, ["sums", *texts], dtypes))
        held = node.epilogue.dtype or "float32"
        if node.attributes["whole"]:
            _store(build, tile, 1, converted(made, held, node.output.dtype))
        f.emit(f"x = tl.where(inside, {made}.to(tl.float32), 0.0)")
        value = statistics(tile, node, lambda element: f"tl.sum({element}, 1)[:, None]")
        value = f"({value}) * {loaded[2]}.to(tl.float32)" if 2 in loaded else value
        value = f"{value} + {loaded[3]}.to(tl.float32)" if 3 in loaded else value
        _store(build, tile, 0, converted(value, "float32", node.output.dtype))
    tile.launch()


def _store(build: CudaBuilder, tile: RowTile, output: int, value: str) -> None:
    tile.f.emit(f"tl.store({tile.f.pointer(build.output(output))} + place, {value}, inside)")


def _load(build: CudaBuilder, tile: RowTile, constant: bool) -> dict[int, str]:
    """Scale, bias and the epilogue's operands by input: those that are known at build, or the others."""
    node, wanted = build.node, operands_of(build.node.epilogue)
    used = [k for k in range(2, len(node.inputs)) if k < _EXTRAS or k - _EXTRAS + 1 in wanted]
    return {k: tile.load(build.input(k), k) for k in used
            if node.has_input(k) and (node.input(k).constant is not None) == constant}  # fmt: skip
