"""Linear, MatMul and Conv of what the tiled products do not take: any types, zero points, weights that vary, tiny
sizes. A block is some elements of the result by some of the depth; every factor is loaded on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ingot.ir.expression import operands_of
from ingot.ir.ops_linear import SHORT_INTEGERS
from ingot.kernels import kernel, others_apply
from ingot.kernels.cuda.axes import broadcast_strides, offset, strides_of, unravel
from ingot.kernels.cuda.build import LANGUAGE, TYPES, CudaBuilder, FunctionBuilder
from ingot.kernels.cuda.render import can_render, converted, render, wide
from ingot.kernels.cuda.rows import power_of_two
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, ceil_div, product

_DEEP, _BLOCK = 32, 2048  # places of the depth, elements times depth a block


@dataclass(frozen=True)
class Factors:
    """The depth's axes; `left` and `right` give (offset, mask) texts of a factor for places of the result and of the
    depth, "" where it always exists."""

    depth: tuple[Extent, ...]
    left: Callable[[FunctionBuilder, Sequence[str], Sequence[str]], tuple[str, str]]
    right: Callable[[FunctionBuilder, Sequence[str], Sequence[str]], tuple[str, str]]


def sums_in(dtype: str) -> str:
    """Type that products are summed in."""
    return "int32" if dtype in SHORT_INTEGERS else wide(dtype)


def _applies(node: Node, target: Any) -> bool:
    ports = [p for p in node.inputs if p is not None]
    if len(ports) != len(node.inputs) or any(p.dtype not in TYPES or p.dtype == "bool" for p in ports[:2]):
        return False
    if node.op != "Conv" and min(len(p.shape) for p in ports[:2]) < (2 if node.op == "MatMul" else 1):
        return False
    fits = can_render(node.epilogue, [sums_in(node.dtype), *(p.dtype for p in ports[2:])])
    return fits and not others_apply(direct, node, "cuda", target)


@kernel("Linear", on="cuda", when=_applies)
@kernel("MatMul", on="cuda", when=_applies)
@kernel("Conv", on="cuda", when=_applies)
def direct(build: CudaBuilder, node: Node) -> None:
    """epilogue(Σ over the depth of (left - its zero point) · (right - its zero point))"""
    factors, y, type = _FACTORS[node.op](node), node.output, sums_in(node.dtype)
    depth = product(factors.depth)
    deep = min(power_of_two(depth), _DEEP) if isinstance(depth, int) else _DEEP
    block = _BLOCK // deep
    f = build.function(warps=4, stages=1)
    f.emit(f"index = tl.program_id(0) * {block} + tl.arange(0, {block})\nmask = index < {f.extent(y.elements)}")
    places = unravel(f, "index", y.shape) if y.shape else []
    f.emit(f"sums = tl.zeros(({block}, {deep}), {LANGUAGE[type]})")
    with f.block(f"for start in range(0, {f.extent(depth)}, {deep}):"):
        f.emit(f"depth = start + tl.arange(0, {deep})[None, :]")
        within = unravel(f, "depth", factors.depth)
        held = f"mask[:, None] & (depth < {f.extent(depth)})"
        across = [f"{place}[:, None]" for place in places]
        sides = ((0, factors.left, "x_zero_point"), (1, factors.right, "weight_zero_point"))
        a, b = (_factor(build, f, index, side(f, across, within), held, node.attributes.get(zero, 0))
                for index, side, zero in sides)  # fmt: skip
        f.emit(f"sums += {a} * {b}")
    f.emit("total = tl.sum(sums, 1)")
    store(build, node, f, places, type)
    f.launch(ceil_div(y.elements, block))


def _factor(build: CudaBuilder, f: FunctionBuilder, index: int, site: tuple[str, str], held: str, zero: int) -> str:
    """A variable with one side's elements as they enter the products; 0 where there is none."""
    place, inside = site
    type = LANGUAGE[sums_in(build.node.dtype)]
    exists = f.let(f"{held} & {inside}" if inside else held)
    x = f.let(f"tl.load({f.pointer(build.input(index))} + {place}, {exists}, other=0).to({type})")
    return f.let(f"tl.where({exists}, {x} - {zero}, 0)") if zero else x


def store(build: CudaBuilder, node: Node, f: FunctionBuilder, places: Sequence[str], type: str, first: int = 2) -> None:
    """The epilogue on `total`, one element of the result for each `index` where `mask`; its operands begin at input
    `first`."""
    used, y = operands_of(node.epilogue), node.output
    texts = []
    for k in range(first, len(node.inputs)):
        strides = broadcast_strides(node.input(k), y.shape)
        masked = ", mask" if any(stride != 0 for stride in strides) else ""
        read = f"tl.load({f.pointer(build.input(k))} + {offset(f, places, strides)}{masked})"
        texts.append(f.let(read) if k - first + 1 in used else "")
    dtypes = [type, *(node.input(k).dtype for k in range(first, len(node.inputs)))]
    value = render(f, node.epilogue, ["total", *texts], dtypes)
    result = converted(value, node.epilogue.dtype or type, y.dtype)
    f.emit(f"tl.store({f.pointer(build.output())} + index, {result}, mask)")


# what is multiplied


def _linear(node: Node) -> Factors:
    x, weight = node.input(0), node.input(1)
    along, down = strides_of(x.shape), strides_of(weight.shape)
    return Factors(
        (weight.shape[0],),
        lambda f, places, depth: (offset(f, [*places[:-1], *depth], along), ""),
        lambda f, places, depth: (offset(f, [*depth, places[-1]], down), ""),
    )


def _matmul(node: Node) -> Factors:
    a, b, outer = node.input(0), node.input(1), node.output.shape[:-2]
    turned = bool(node.attributes.get("transpose_a")), bool(node.attributes.get("transpose_b"))
    strides = [broadcast_strides(port, (*outer, *port.shape[-2:])) for port in (a, b)]

    def side(number: int, own: int) -> Callable[[FunctionBuilder, Sequence[str], Sequence[str]], tuple[str, str]]:
        def site(f: FunctionBuilder, places: Sequence[str], depth: Sequence[str]) -> tuple[str, str]:
            pair = (places[-2], depth[0]) if number == 0 else (depth[0], places[-1])
            return offset(f, [*places[:-2], *(pair[::-1] if own else pair)], strides[number]), ""

        return site

    return Factors((a.shape[-2 if turned[0] else -1],), side(0, turned[0]), side(1, turned[1]))


def _conv(node: Node) -> Factors:
    x, weight, a = node.input(0), node.input(1), node.attributes
    outputs, channels, *kernel = weight.shape
    along, down = strides_of(x.shape), strides_of(weight.shape)
    each = int(outputs) // a["group"]

    def left(f: FunctionBuilder, places: Sequence[str], depth: Sequence[str]) -> tuple[str, str]:
        channel = depth[0] if a["group"] == 1 else f.let(f"({places[1]} // {each}) * {f.extent(channels)} + {depth[0]}")
        spots = [f.let(f"{place} * {stride} - {begin} + {tap} * {dilation}")
                 for place, tap, stride, begin, dilation
                 in zip(places[2:], depth[1:], a["strides"], a["pads"], a["dilations"], strict=False)]  # fmt: skip
        inside = [f"({spot} >= 0) & ({spot} < {f.extent(size)})" for spot, size in zip(spots, x.shape[2:], strict=True)]
        return offset(f, [places[0], channel, *spots], along), " & ".join(inside)

    return Factors((channels, *kernel), left, lambda f, places, depth: (offset(f, [places[1], *depth], down), ""))


_FACTORS: dict[str, Callable[[Node], Factors]] = {"Linear": _linear, "MatMul": _matmul, "Conv": _conv}
