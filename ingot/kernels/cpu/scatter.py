"""ScatterElements, ScatterND: a copy of data (unless it shares the result's storage), then updates in their order."""

from __future__ import annotations

from collections.abc import Callable

from ingot.ir.elementwise import NARROW_FLOATS
from ingot.ir.expression import Input, apply
from ingot.kernels import kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.copying import copy_bytes, multiply
from ingot.kernels.cpu.gather import indexable, load_index, offset_of
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.cpu.moving import grain_of, stretches
from ingot.kernels.cpu.render import can_render, load, render_expression, store
from ingot.kernels.cpu.strided import element_size, move_cost, row_major
from ingot.kernels.node import Node
from ingot.plan.extent import product

_NUMBERS = {"add": "Add", "mul": "Mul", "max": "Max", "min": "Min"}
_TRUTHS = {"add": "Or", "mul": "And", "max": "Or", "min": "And"}


def _reduction(node: Node) -> str | None:
    """The instruction that joins an update with what is there; None replaces it."""
    table = _TRUTHS if node.dtype == "bool" else _NUMBERS
    return table.get(node.attributes.get("reduction", "none"))


def _applies(node: Node, isa: Isa) -> bool:
    instruction = _reduction(node)
    if instruction is None:
        return indexable(node, isa)
    if node.dtype in NARROW_FLOATS and instruction in ("Add", "Mul"):
        return False  # many updates of one element would round many times
    expression = apply(instruction, Input(0), Input(1), dtype=node.dtype)
    return indexable(node, isa) and can_render(expression, [node.dtype, node.dtype])


def _cost(node: Node, isa: Isa) -> float:
    return move_cost(product((2, node.output.bytes))) + move_cost(product((4, node.input(2).bytes)))


Join = Callable[[PhaseFunction, Value, Value, Index], None]


def _join(build: KernelBuilder, node: Node) -> Join:
    """Code that joins `count` consecutive updates (source) into the result (target)."""
    element, dtype, instruction = element_size(node.output), node.dtype, _reduction(node)
    if instruction is None:
        return lambda f, source, target, count: copy_bytes(f, build.isa, source, target, multiply(count, element))
    expression = apply(instruction, Input(0), Input(1), dtype=dtype)
    lanes = max(build.isa.lanes * 4 // max(element, 4), 1)

    def vectors(f: PhaseFunction, source: Value, target: Value, i: Index, width: int) -> None:
        values = [load(f, dtype, pointer, multiply(i, element), width) for pointer in (target, source)]
        result = render_expression(f, expression, values, [dtype, dtype], width)
        store(f, dtype, result, target, multiply(i, element))

    def join(f: PhaseFunction, source: Value, target: Value, count: Index) -> None:
        if isinstance(count, int) and count == 1:
            vectors(f, source, target, 0, 1)
            return
        whole = count - count % lanes if isinstance(count, int) else f.binary("and", count, -lanes)
        f.loop(0, whole, lambda i: vectors(f, source, target, i, lanes), step=lanes)
        f.loop(whole, count, lambda i: vectors(f, source, target, i, 1))

    return join


def _copy_data(build: KernelBuilder, node: Node) -> tuple[Handle, Handle]:
    """The phase before the updates; (data, result)."""
    data, result, element = build.input(0), build.output(), element_size(node.output)

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        source, target = f.pointer(data), f.pointer(result)

        def copy() -> None:
            copy_bytes(f, build.isa, f.at(source, begin * element), f.at(target, begin * element),
                       (end - begin) * element)  # fmt: skip

        f.when(f.compare("ne", source, target), copy)

    build.phase(node.output.elements, body, grain=grain_of(node.output.elements, node.output.bytes))
    return data, result


@kernel("ScatterND", on="cpu", when=_applies, cost=_cost, in_place=lambda node: (0,))
def scatter_nd(build: KernelBuilder, node: Node) -> None:
    """y = data; y[indices[k]] joined with updates[k], k ascending; a work item is one element of every slice."""
    data, indices = node.input(0), node.input(1)
    _, result = _copy_data(build, node)
    places, updates, join, element = build.input(1), build.input(2), _join(build, node), element_size(data)
    depth = indices.shape[-1]
    assert isinstance(depth, int)
    count, inner = product(indices.shape[:-1]), product(data.shape[depth:])

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        row = multiply(f.extent(inner), element)
        width = 1 if inner == 1 else end - begin

        def update(k: Value) -> None:
            place: Index = 0
            for position, size in enumerate(data.shape[:depth]):
                index = load_index(f, f.pointer(places), k * depth + position, indices.dtype, f.extent(size))
                place = index + multiply(place, f.extent(size))
            join(f, f.at(f.pointer(updates), multiply(k, row) + begin * element),
                 f.at(f.pointer(result), multiply(place, row) + begin * element), width)  # fmt: skip

        f.when(f.compare("slt", begin, end), lambda: f.loop(0, f.extent(count), update))

    build.phase(inner, body, grain=max(grain_of(inner, product((2, node.input(2).bytes))), 64))


@kernel("ScatterElements", on="cpu", when=_applies, cost=_cost, in_place=lambda node: (0,))
def scatter_elements(build: KernelBuilder, node: Node) -> None:
    """y = data; y[indices[i, j], j] joined with updates[i, j] for axis 0, i ascending; an item is a column of it."""
    data, indices, axis = node.input(0), node.input(1), node.attributes.get("axis", 0)
    _, result = _copy_data(build, node)
    places, updates, join, element = build.input(1), build.input(2), _join(build, node), element_size(data)
    last = len(data.shape) - 1
    sides = [k for k in range(last + 1) if k != axis]
    sizes, targets, sources = indices.shape, row_major(data.shape), row_major(indices.shape)
    count = product(sizes[k] for k in sides)
    line = [sides.pop()] if axis != last else []  # the axis along which the items of a row follow one another

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        along, step = f.extent(targets[axis].extent), f.extent(sources[axis].extent)

        def row(number: Value, low: Index, high: Index) -> None:
            to, origin = (offset_of(f, number, [sizes[k] for k in sides], [side[k] for k in sides])
                          for side in (targets, sources))  # fmt: skip

            def update(i: Value) -> None:
                def column(j: Value) -> None:
                    place = multiply(i, step) + origin + j
                    index = load_index(f, f.pointer(places), place, indices.dtype, f.extent(data.shape[axis]))
                    join(f, f.at(f.pointer(updates), place * element),
                         f.at(f.pointer(result), (multiply(index, along) + to + j) * element), 1)  # fmt: skip

                f.loop(low, high, column)

            f.loop(0, f.extent(sizes[axis]), update)

        length = f.extent(product(sizes[k] for k in line))
        f.when(f.compare("slt", begin, end), lambda: stretches(f, begin, end, length, row))

    build.phase(count, body, grain=grain_of(count, product((4, node.input(2).bytes))))
