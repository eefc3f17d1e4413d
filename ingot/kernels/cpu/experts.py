"""Experts: a token's router picks, then columns of the picked networks are streamed for each token.

Weights lie in panels of a few vectors of columns, [expert, panel, K, columns]. Nothing is shared between tokens but
what the caches keep: few tokens wait for the weights' bytes anyway.
"""

from __future__ import annotations

import math as numbers
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.dtypes import size_of
from ingot.ir.elementwise import FLOATS
from ingot.ir.expression import Expression, parse
from ingot.kernels import kernel
from ingot.kernels.cpu import math
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Value, vector
from ingot.kernels.cpu.render import MEMORY, can_render, load, render_expression
from ingot.kernels.cpu.rows import each
from ingot.kernels.node import Node
from ingot.plan.extent import product

Array = np.ndarray[Any, Any]
VECTORS = 4  # of columns in a panel


@dataclass(frozen=True)
class Panels:
    """Weights [expert, panel, depth, columns] of `width` columns in all."""

    handle: Handle
    dtype: str
    depth: int
    width: int
    columns: int

    @property
    def count(self) -> int:
        """Panels of an expert."""
        return -(-self.width // self.columns)

    def at(self, f: PhaseFunction, expert: Value, panel: Value) -> Value:
        """The first row of a panel."""
        size = self.depth * self.columns * size_of(self.dtype)
        return f.at(f.pointer(self.handle), (expert * self.count + panel) * size)


@dataclass(frozen=True)
class Job:
    """One kernel: operands, panels and what passes between its phases."""

    lanes: int
    experts: int
    chosen: int
    normalised: bool
    activation: Expression
    x: Handle
    scores: Handle
    result: Handle
    gate: Panels
    up: Panels
    down: Panels
    picks: Handle
    shares: Handle
    inner: Handle
    held_at: int


def _applies(node: Node, isa: Isa) -> bool:
    weights = [node.input(i) for i in (2, 3, 4)]
    floats = all(port.constant is not None and port.dtype in FLOATS and port.dtype in MEMORY for port in weights)
    plain = all(node.input(i).dtype == "float32" for i in (0, 1)) and len(node.inputs) == 5
    return plain and floats and can_render(parse(node.attributes["activation"]), ["float32"])


def _panels(build: KernelBuilder, node: Node, index: int) -> Panels:
    weight = node.input(index).constant
    assert weight is not None
    count, depth, width = weight.shape
    columns = VECTORS * build.isa.lanes
    panels = -(-width // columns)
    packed = np.zeros((count, panels, depth, columns), weight.dtype)
    for panel in range(panels):
        part = weight[:, :, panel * columns : (panel + 1) * columns]
        packed[:, panel, :, : part.shape[2]] = part
    return Panels(build.pack(packed), weight.dtype.name, depth, width, columns)


def _job(build: KernelBuilder, node: Node) -> Job:
    gate, up, down = (_panels(build, node, index) for index in (2, 3, 4))
    chosen, tokens, experts = int(node.attributes["chosen"]), node.input(0).shape[0], node.input(1).shape[1]
    assert isinstance(experts, int)
    line = gate.count * gate.columns * 4
    return Job(
        build.isa.lanes, experts, chosen, bool(node.attributes["normalised"]), parse(node.attributes["activation"]),
        build.input(0), build.input(1), build.output(), gate, up, down,
        build.temporary(product((tokens, chosen * 4))), build.temporary(product((tokens, chosen * 4))),
        build.temporary(product((tokens, chosen * line))), build.scratch(experts * 4),
    )  # fmt: skip


@kernel("Experts", on="cpu", when=_applies)
def experts(build: KernelBuilder, node: Node) -> None:
    """Phases: picks of each token; columns of gate and up; columns of down."""
    job, tokens = _job(build, node), node.input(0).shape[0]
    build.phase(tokens, lambda f, begin, end: each(f, begin, end, lambda t: _pick(f, job, t)))
    build.phase(product((tokens, job.chosen, job.gate.count)),
                lambda f, begin, end: each(f, begin, end, lambda i: _inner(f, job, i)))  # fmt: skip
    build.phase(product((tokens, job.down.count)),
                lambda f, begin, end: each(f, begin, end, lambda i: _outer(f, job, i)))  # fmt: skip


def _power(f: PhaseFunction, job: Job, score: Value, peak: Value) -> Value:
    return f.extract(math.exp(f, f.splat(score - peak, job.lanes)), 0)


def _pick(f: PhaseFunction, job: Job, token: Value) -> None:
    """The token's experts, best first, and their shares."""
    scores, held = f.at(f.pointer(job.scores), token * (job.experts * 4)), f.at(f.scratch, job.held_at)
    lowest = f.constant("float", -numbers.inf)

    def best(source: Value, keep: bool) -> tuple[Value, ...]:
        def look(e: Value, peak: Value, place: Value) -> list[Value]:
            score = f.load("float", source, e * 4)
            if keep:
                f.store(score, held, e * 4)
            higher = f.compare("ogt", score, peak)
            return [f.select(higher, score, peak), f.select(higher, e, place)]

        return f.loop(0, job.experts, look, [lowest, f.index(0)])

    peak, _ = best(scores, True)
    picks, shares = (f.at(f.pointer(handle), token * (job.chosen * 4)) for handle in (job.picks, job.shares))

    def take(c: Value, total: Value) -> list[Value]:
        score, place = best(held, False)
        share = _power(f, job, score, peak)
        f.store(f.cast("trunc", place, "i32"), picks, c * 4)
        f.store(share, shares, c * 4)
        f.store(lowest, held, place * 4)
        return [total + share]

    def share_of_any(e: Value, total: Value) -> list[Value]:
        return [total + _power(f, job, f.load("float", scores, e * 4), peak)]

    zero = f.constant("float", 0.0)
    (total,) = f.loop(0, job.chosen, take, [zero])
    if not job.normalised:
        (total,) = f.loop(0, job.experts, share_of_any, [zero])

    def scale(c: Value) -> None:
        f.store(f.binary("fdiv", f.load("float", shares, c * 4), total), shares, c * 4)

    f.loop(0, job.chosen, scale)


def _product(f: PhaseFunction, job: Job, x: Value, panels: Panels, panel: Value) -> list[Value]:
    """x[depth] times a panel."""
    zero, size = f.constant(vector("float", job.lanes), 0.0), size_of(panels.dtype)

    def step(k: Value, *sums: Value) -> list[Value]:
        value, line = f.splat(f.load("float", x, k * 4), job.lanes), f.at(panel, k * (panels.columns * size))
        weights = [load(f, panels.dtype, line, v * job.lanes * size, job.lanes) for v in range(VECTORS)]
        return [f.fma(value, weight, total) for weight, total in zip(weights, sums, strict=True)]

    return list(f.loop(0, panels.depth, step, [zero] * VECTORS))


def _inner(f: PhaseFunction, job: Job, item: Value) -> None:
    """activation(x gate) * (x up) of a panel of a token's expert."""
    route, panel = f.index(f.divide(item, job.gate.count)), f.index(f.remainder(item, job.gate.count))
    token = f.index(f.divide(route, job.chosen))
    expert = f.cast("zext", f.load("i32", f.pointer(job.picks), route * 4), "i64")
    x = f.at(f.pointer(job.x), token * (job.gate.depth * 4))
    gates = _product(f, job, x, job.gate, job.gate.at(f, expert, panel))
    ups = _product(f, job, x, job.up, job.up.at(f, expert, panel))
    target = f.at(f.pointer(job.inner), (route * job.gate.count + panel) * (job.gate.columns * 4))
    for v, (gate, up) in enumerate(zip(gates, ups, strict=True)):
        active = render_expression(f, job.activation, [gate], ["float32"], job.lanes)
        f.store(active * up, target, v * job.lanes * 4)


def _outer(f: PhaseFunction, job: Job, item: Value) -> None:
    """A panel of a token's result: the sum over its experts."""
    down, line = job.down, job.gate.count * job.gate.columns * 4
    token, panel = f.index(f.divide(item, down.count)), f.index(f.remainder(item, down.count))

    def one(c: Value, *sums: Value) -> list[Value]:
        route = token * job.chosen + c
        expert = f.cast("zext", f.load("i32", f.pointer(job.picks), route * 4), "i64")
        share = f.splat(f.load("float", f.pointer(job.shares), route * 4), job.lanes)
        parts = _product(f, job, f.at(f.pointer(job.inner), route * line), down, down.at(f, expert, panel))
        return [f.fma(share, part, total) for part, total in zip(parts, sums, strict=True)]

    zero = f.constant(vector("float", job.lanes), 0.0)
    sums = f.loop(0, job.chosen, one, [zero] * VECTORS)
    target = f.at(f.pointer(job.result), token * (down.width * 4))
    for v, total in enumerate(sums):
        column = panel * down.columns + v * job.lanes
        f.store_masked(total, target, f.first_lanes(f.index(down.width) - column, job.lanes), column * 4)
