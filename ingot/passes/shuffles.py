"""Chains of views and transpositions become one transposition at most.

Axes are followed as lists of factors of the source's axes: a View joins or splits neighbours, a Transpose permutes.
What comes out is one order of the factors, which one Transpose makes, with a View before and after where needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ingot.ir.graph import simplified
from ingot.ir.shapes import shape_of
from ingot.passes.canonical_table import over
from ingot.passes.facts import Shape, attribute, maker, only_reader, operands_of
from ingot.passes.rewrite import Builder, Result, rewrite_node
from ingot.plan.extent import Extent, product

_LONGEST = 8


@dataclass(frozen=True)
class Factor:
    """Part of an axis of the source; factors in the order of their places are the source's elements in order."""

    place: tuple[int, ...]
    size: Extent

    def split(self, outer: Extent, inner: Extent) -> tuple[Factor, Factor]:
        return Factor((*self.place, 0), outer), Factor((*self.place, 1), inner)


Axis = tuple[Factor, ...]  # outer to inner; none for an axis of one element
Axes = tuple[Axis, ...]


def axes_of(shape: Shape) -> Axes:
    return tuple(() if size == 1 else (Factor((axis,), size),) for axis, size in enumerate(shape))


def viewed(axes: Axes, shape: Shape) -> Axes | None:
    """The axes that a View to this shape makes of these; None where its sizes do not meet theirs."""
    rest = [factor for axis in axes for factor in axis]
    result: list[Axis] = []
    for size in shape:
        axis: list[Factor] = []
        while (whole := simplified(product(factor.size for factor in axis))) != size:
            if not rest:
                return None
            factor = rest.pop(0)
            missing = _quotient(size, whole)
            inner = None if missing is None else _quotient(factor.size, missing)
            if missing is not None and inner is not None and inner != 1:
                factor, remainder = factor.split(missing, inner)
                rest.insert(0, remainder)
            axis.append(factor)
        result.append(tuple(axis))
    return tuple(result) if not rest else None


def _quotient(size: Extent, part: Extent) -> Extent | None:
    """How many times the part makes the size; None where that is no whole number for every size."""
    quotient = over(size, part)
    return quotient if simplified(product((part, quotient))) == size else None


def _refined(axes: Axes, final: Axes) -> Axes:
    """The axes in the factors that `final` has split theirs into."""
    known = [factor for axis in final for factor in axis]

    def parts(factor: Factor) -> list[Factor]:
        within = [other for other in known if other.place[: len(factor.place)] == factor.place]
        return sorted(within, key=lambda other: other.place)

    return tuple(tuple(part for factor in axis for part in parts(factor)) for axis in axes)


@dataclass(frozen=True)
class Chain:
    """Views and transpositions from x to the value that a node makes; `inner` of them nothing else reads."""

    x: ir.Value
    nodes: tuple[ir.Node, ...]
    inner: int
    transposes: int

    def axes(self) -> tuple[Axes, Axes] | None:
        """The axes of x and of the result, in the same factors."""
        shape = shape_of(self.x)
        if shape is None:
            return None
        source = axes = axes_of(shape)
        for node in self.nodes:
            result = _after(axes, node)
            if result is None:
                return None
            axes = result
        return _refined(source, axes), axes


def _after(axes: Axes, node: ir.Node) -> Axes | None:
    if node.op_type == "Transpose":
        return tuple(axes[axis] for axis in attribute(node, "perm"))
    shape = shape_of(node.outputs[0])
    return None if shape is None or 0 in shape else viewed(axes, shape)


def _chains(node: ir.Node) -> list[Chain]:
    """The chains that end at a node, the longest first; a Transpose that others read too is left alone."""
    found = [Chain(operands_of(node)[0], (node,), 1, int(node.op_type == "Transpose"))]
    while len(found) < _LONGEST:
        chain = found[-1]
        source = maker(chain.x, "View", "Transpose")
        alone = only_reader(chain.x) is not None
        if source is None or (source.op_type == "Transpose" and not alone) or source.graph is not node.graph:
            break
        moves = chain.transposes + int(source.op_type == "Transpose")
        found.append(Chain(operands_of(source)[0], (source, *chain.nodes), chain.inner + int(alone), moves))
    return found[:0:-1]


def _order(source: Axes, result: Axes) -> tuple[int, ...] | None:
    """For every axis of the result the one of the source that it is; None where they do not correspond."""
    if len(source) != len(result):
        return None
    free = [axis for axis, factors in enumerate(source) if not factors]
    whole = {factors: axis for axis, factors in enumerate(source) if factors}
    order = [whole.get(factors) if factors else free.pop(0) if free else None for factors in result]
    return tuple(axis for axis in order if axis is not None) if None not in order else None


def _sizes(axes: Axes) -> tuple[Extent, ...]:
    return tuple(simplified(product(factor.size for factor in axis)) for axis in axes)


def _merged(order: Sequence[Factor], by_place: Sequence[Factor]) -> list[Axis]:
    """Factors in an order, those joined that are neighbours in the source as well."""
    place = {factor: index for index, factor in enumerate(by_place)}
    axes: list[Axis] = []
    for factor in order:
        if axes and place[axes[-1][-1]] + 1 == place[factor]:
            axes[-1] = (*axes[-1], factor)
        else:
            axes.append((factor,))
    return axes


@dataclass(frozen=True)
class Plan:
    """View to `before`, Transpose by `perm`, View to `after`; what changes nothing is left out."""

    before: Shape | None
    perm: tuple[int, ...] | None
    after: Shape | None

    @property
    def nodes(self) -> int:
        return sum(step is not None for step in (self.before, self.perm, self.after))


def _plan(source: Axes, result: Axes) -> Plan:
    """The fewest nodes, by the axes of the source, by those of the result, or by the fewest axes."""
    factors = [factor for axis in source for factor in axis]
    wanted = [factor for axis in result for factor in axis]
    if factors == wanted:
        return Plan(None, None, _sizes(result))
    if (perm := _order(source, result)) is not None:
        return Plan(None, perm, None)
    return _viewed_first(source, result) or _viewed_last(source, result) or _viewed_twice(source, result)


def _viewed_first(source: Axes, result: Axes) -> Plan | None:
    """A View to the axes of the result, then a Transpose, which may be one that a product takes in."""
    factors = [factor for axis in source for factor in axis]
    long = _sorted_by(factors, result)
    if [factor for axis in long for factor in axis] != factors or result.count(()) > source.count(()):
        return None
    before = (*(axis for axis in result if not axis), *long)
    return Plan(_sizes(before), _order(before, result), None)


def _viewed_last(source: Axes, result: Axes) -> Plan | None:
    """A Transpose of the axes of the source, then a View."""
    wanted = [factor for axis in result for factor in axis]
    moved = _sorted_by(wanted, source)
    if [factor for axis in moved for factor in axis] != wanted:
        return None
    ones = (axis for axis in source if not axis)
    return Plan(None, _order(source, (*ones, *moved)), _sizes(result))


def _viewed_twice(source: Axes, result: Axes) -> Plan:
    """As few axes as there can be in between."""
    factors = [factor for axis in source for factor in axis]
    merged = tuple(_merged([factor for axis in result for factor in axis], factors))
    ordered = _sorted_by(factors, merged)
    return Plan(_sizes(ordered), _order(ordered, merged), _sizes(result))


def _sorted_by(factors: Sequence[Factor], axes: Axes) -> Axes:
    """The axes of more than one element in the order in which their first factors stand among these."""
    return tuple(sorted((axis for axis in axes if axis), key=lambda axis: factors.index(axis[0])))


@rewrite_node("View", "Transpose")
def shuffles(op: Builder, node: ir.Node) -> Result:
    """Transpose(View(Transpose(x))) => View(Transpose(View(x))) with one Transpose, or none, and the fewest views"""
    for chain in _chains(node):
        axes = chain.axes()
        if axes is None:
            continue
        plan = _plan(*axes)
        if (plan.perm is not None, plan.nodes) < (chain.transposes, chain.inner):
            return _made(op, chain.x, plan)
    return None


def _made(op: Builder, x: ir.Value, plan: Plan) -> ir.Value:
    x = x if plan.before is None else op.View(x, shape=plan.before)
    x = x if plan.perm is None else op.Transpose(x, perm=plan.perm)
    return x if plan.after is None else op.View(x, shape=plan.after)
