"""THE pipeline: what happens to an imported graph, in this order, until every node is a canonical, fused operator.

`run(model)` works in place on a graph whose shapes have been inferred and returns what happened, with reasons.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir

from ingot.ir.shapes import infer
from ingot.passes import canonical, fold
from ingot.passes.branches import inline_branches, seal_branches
from ingot.passes.common import graphs_of, remove_dead, share
from ingot.passes.fuse_attention import ATTENTION
from ingot.passes.fuse_conv import CONVOLUTION
from ingot.passes.fuse_epilogue import EPILOGUES
from ingot.passes.fuse_float8 import FLOAT8
from ingot.passes.fuse_heads import HEADS
from ingot.passes.fuse_linear import LINEAR, VIEWS, WEIGHTS
from ingot.passes.fuse_norm import NORM
from ingot.passes.fuse_pointwise import CHAINS, UNARY
from ingot.passes.fuse_quant import QUANT
from ingot.passes.idioms import IDIOMS
from ingot.passes.requantize import REQUANTIZE
from ingot.passes.rewrite import Fired, Journal, Refused, Table
from ingot.passes.simplify import SIMPLIFY
from ingot.passes.weight_only import keep_weights


@dataclass
class State:
    """What the steps of one run share."""

    journal: Journal = field(default_factory=Journal)
    remaining: tuple[canonical.Remaining, ...] = ()
    float8: bool = False


@dataclass(frozen=True)
class Pass:
    """One step: changes the model in place and says how often; `option` is the keyword of `run` that switches it on."""

    name: str
    function: Callable[[ir.Model, State], int]
    option: str | None = None


def _canonicalise(model: ir.Model, state: State) -> int:
    report = canonical.canonicalise(model)
    state.remaining = report.remaining
    return report.replaced


def _keep_weights(model: ir.Model, state: State) -> int:
    return keep_weights(model)


def _fold(model: ir.Model, state: State) -> int:
    return fold.fold(model)


def _fold_but_weights(model: ir.Model, state: State) -> int:
    """Folds all but 8-bit weights, which may stay so."""
    return fold.fold(model, keep_integers=True, keep_float8=state.float8)


def _share(model: ir.Model, state: State) -> int:
    return sum(map(share, graphs_of(model)))


def _remove_dead(model: ir.Model, state: State) -> int:
    return remove_dead(model)


TABLES = (
    SIMPLIFY, IDIOMS, NORM, ATTENTION, QUANT, FLOAT8, CONVOLUTION, LINEAR, UNARY, EPILOGUES, WEIGHTS, VIEWS, HEADS,
    CHAINS, REQUANTIZE,
)  # fmt: skip


def summaries() -> dict[str, str]:
    """What each rewrite does, by name: the algebra."""
    return {rule.name: rule.summary for table in TABLES for rule in table.rewrites}


def rewriting(table: Table, option: str | None = None) -> Pass:
    """The pass that applies a table to every graph of the model."""

    def apply(model: ir.Model, state: State) -> int:
        return sum(table.apply(graph, state.journal) for graph in graphs_of(model))

    return Pass(table.name, apply, option)


def _empty_inputs(model: ir.Model, state: State) -> int:
    """Axes that are known to be none may decide shapes."""
    count = fold.empty_inputs(model)
    if count:
        infer(model)
    return count


def _inline_branches(model: ir.Model, state: State) -> int:
    """A branch taken makes shapes known, which may decide the next one."""
    total = 0
    while count := inline_branches(model):
        total += count
        infer(model)
    return total


def _seal_branches(model: ir.Model, state: State) -> int:
    return seal_branches(model)


PIPELINE: tuple[Pass, ...] = (
    Pass("empty inputs", _empty_inputs),
    Pass("decided branches", _inline_branches),
    Pass("quantized weights", _keep_weights, option="quantized_weights"),
    Pass("fold", _fold_but_weights),
    Pass("canonicalise", _canonicalise),
    Pass("impossible branches", _seal_branches),
    Pass("fold", _fold_but_weights),
    Pass("common subexpressions", _share),
    rewriting(SIMPLIFY),
    rewriting(IDIOMS),
    rewriting(NORM),
    rewriting(ATTENTION),
    rewriting(QUANT),
    rewriting(FLOAT8, option="float8"),
    Pass("fold", _fold),
    rewriting(CONVOLUTION),
    rewriting(LINEAR),
    rewriting(UNARY),
    rewriting(EPILOGUES),
    rewriting(WEIGHTS),
    rewriting(VIEWS),
    rewriting(SIMPLIFY),
    rewriting(HEADS, option="merge_heads"),
    rewriting(CHAINS),
    rewriting(EPILOGUES),
    rewriting(SIMPLIFY),
    rewriting(REQUANTIZE),
    Pass("fold", _fold),
    Pass("common subexpressions", _share),
    Pass("dead code", _remove_dead),
)


@dataclass(frozen=True)
class PassTime:
    """One step of a run: how often it changed something, and how long it took."""

    name: str
    changes: int
    seconds: float


@dataclass(frozen=True)
class PassReport:
    """What a run did: rewrites that fired, those that nearly did, nodes that stay on the host, times."""

    fired: tuple[Fired, ...]
    rejections: tuple[Refused, ...]
    remaining: tuple[canonical.Remaining, ...]
    times: tuple[PassTime, ...]

    @property
    def counts(self) -> Counter[str]:
        """How often each rewrite fired."""
        return Counter(entry.rewrite for entry in self.fired)


Check = Callable[[ir.Model], None]


def run(model: ir.Model, check: Check | None = None, merge_heads: bool = False,
        quantized_weights: bool = False, float8: bool = False) -> PassReport:  # fmt: skip
    """Every pass in order, in place; `check` (ir.verify's, in tests) looks at the model after each.

    merge_heads: one Linear for query, key and value. Not by default: its result must be copied apart again, so that it
    was no faster than three (BERT-base within 1 %, MiniLM at most 3 % on two threads; AVX-512 with AMX, 128 tokens).
    quantized_weights: those that are dequantized stay integers (QuantizedLinear): for targets that have kernels for it.
    float8: products of two dequantized float8e4m3fn are products of these: for targets that multiply them.
    """
    state, times = State(float8=float8), []
    options = {"merge_heads": merge_heads, "quantized_weights": quantized_weights, "float8": float8}
    for step in PIPELINE:
        if step.option is not None and not options[step.option]:
            continue
        start = time.perf_counter()
        changes = step.function(model, state)
        times.append(PassTime(step.name, changes, time.perf_counter() - start))
        if check is not None:
            check(model)
    journal = state.journal
    return PassReport(tuple(journal.fired), journal.latest_refusals(model), state.remaining, tuple(times))
