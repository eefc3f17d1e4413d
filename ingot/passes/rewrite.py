"""The rewrite engine: a table of rewrites, an index by root operator, a worklist to a fixpoint, a journal with reasons.

    @rewrite(lambda op, x, w, b: op.Add(op.MatMul(x, w), b))
    def linear(op, x, w, b):
        \"\"\"Add(MatMul(x, w), b) => Linear(x, w, b)\"\"\"
        return op.Linear(x, w, b) if is_constant(w) else reject("the weight varies at run time", w)

A rewrite returns the value that replaces its root's output (or a dict of old to new values), `reject(…)` to say why it
holds back, or None when there is nothing to tell. What becomes dead goes; new nodes inherit the origins of what went.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import onnx_ir as ir

from ingot.errors import BuildError
from ingot.ir.elementwise import Array
from ingot.ir.graph import DOMAIN, add_constant, make_node, substitute
from ingot.ir.provenance import merged_origins, origins, set_origins
from ingot.passes.pattern import (
    Found,
    Match,
    Pattern,
    describe,
    keys_of,
    roots_of,
    size_of,
    solve,
    trace,
    used_elsewhere,
)

_REWRITES_PER_NODE = 50  # a table that needs more goes in circles


@dataclass(frozen=True)
class Rejection:
    """Why a rewrite that matched holds back, and at which value or node."""

    reason: str
    where: ir.Value | ir.Node | None = None


def reject(reason: str, where: ir.Value | ir.Node | None = None) -> Rejection:
    return Rejection(reason, where)


Result = ir.Value | Mapping[ir.Value, ir.Value] | Rejection | None


@dataclass(frozen=True)
class Rewrite:
    """One line of a table: where it starts, what it looks for, what it makes of that."""

    name: str
    roots: tuple[tuple[str, str], ...]
    pattern: Pattern | None
    function: Callable[..., Result]
    parameters: tuple[str, ...]
    takes_all: bool = False
    size: int = 0

    def call(self, op: Builder, bound: Mapping[str, object]) -> Result:
        """The function with what it names (all that is bound, where it takes `**found`); None for what is not bound."""
        named = {name: bound.get(name) for name in self.parameters}
        return self.function(op, **({**bound, **named} if self.takes_all else named))

    @property
    def summary(self) -> str:
        """The first line of the docstring: the algebra."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]


def rewrite(pattern: Callable[..., Pattern]) -> Callable[[Callable[..., Result]], Rewrite]:
    """Makes `(op, <variables and captures by name>) -> value | reject(…)` a rewrite of what the pattern matches."""
    traced = trace(pattern)
    roots = tuple(dict.fromkeys(roots_of(traced)))

    def decorate(function: Callable[..., Result]) -> Rewrite:
        _, *parameters = inspect.signature(function).parameters.values()
        named = tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
        return Rewrite(_name(function), roots, traced, function, named, len(named) < len(parameters), size_of(traced))

    return decorate


def rewrite_node(*ops: str) -> Callable[[Callable[..., Result]], Rewrite]:
    """Makes `(op, node) -> value | reject(…)` a rewrite of every node of these canonical operators."""

    def decorate(function: Callable[..., Result]) -> Rewrite:
        return Rewrite(_name(function), tuple((DOMAIN, op) for op in ops), None, function, ())

    return decorate


def _name(function: Callable[..., Result]) -> str:
    return function.__name__.strip("_").replace("_", " ")


class Builder:
    """The `op` of a rewrite: `op.Linear(x, w, epilogue="…")` makes a node; it goes where the root stood."""

    def __init__(self, root: ir.Node) -> None:
        self.root = root
        self.nodes: list[ir.Node] = []
        self.anchor: ir.Value | None = None

    def __getattr__(self, op: str) -> Callable[..., Any]:
        return partial(self.make, op)

    def make(self, op: str, *inputs: ir.Value | None, _outputs: int = 1, **attributes: Any) -> Any:
        """A canonical node's output (a tuple of several), with the dtype and shape of the operator's definition."""
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        node = make_node(op, inputs, attributes, outputs=_outputs)
        self.nodes.append(node)
        return node.outputs[0] if _outputs == 1 else tuple(node.outputs)

    def constant(self, array: Array, like: ir.Value | None = None) -> ir.Value:
        """A new initializer, named after `like`."""
        assert self.root.graph is not None
        return add_constant(self.root.graph, array, like.name if like is not None else self.root.name)

    def discard(self) -> None:
        """Forgets the nodes made so far: they must not count as readers of their inputs."""
        for node in self.nodes:
            node.resize_inputs(0)
        self.nodes.clear()

    def after(self, value: ir.Value) -> None:
        """Puts the new nodes right after the one that makes `value`, for a rewrite that serves several roots."""
        self.anchor = value


@dataclass(frozen=True)
class Fired:
    """A rewrite that happened, and the user's nodes that it replaced."""

    rewrite: str
    node: str
    origins: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """A rewrite that got past its root and then held back."""

    rewrite: str
    node: str
    origins: tuple[str, ...]
    reason: str


@dataclass
class Journal:
    """What the tables did. Refusals are kept by node, so that one that later fires, or goes, is forgotten."""

    fired: list[Fired] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    tries: int = 0
    _open: dict[tuple[str, ir.Node], Rejection] = field(default_factory=dict)

    def refuse(self, rule: Rewrite, node: ir.Node, rejection: Rejection) -> None:
        self._open[rule.name, node] = rejection

    def close(self) -> None:
        """Settles the refusals of one table: those whose node is still there are worth telling."""
        for (name, node), rejection in self._open.items():
            if node.graph is not None:
                reason = rejection.reason + _place(rejection.where)
                self.refused.append(Refused(name, node.name or "", origins(node), reason))
        self._open.clear()

    def latest_refusals(self, model: ir.Model) -> tuple[Refused, ...]:
        """One line for each rewrite and node that is still there: what the last table to try it said."""
        alive = {node.name for node in ir.traversal.RecursiveGraphIterator(model.graph)}
        latest = {(entry.rewrite, entry.node): entry for entry in self.refused if entry.node in alive}
        return tuple(latest.values())


def _place(where: ir.Value | ir.Node | None) -> str:
    if where is None:
        return ""
    node = where.producer() if isinstance(where, ir.Value) else where
    if node is None:
        return f" ({where.name})"
    return f" ({node.op_type} {', '.join(origins(node)) or node.name})"


@dataclass(frozen=True)
class Table:
    """Rewrites in order of preference; `apply` runs them over a graph until none fires."""

    name: str
    rewrites: tuple[Rewrite, ...]

    def index(self) -> dict[tuple[str, str], list[Rewrite]]:
        by_root: dict[tuple[str, str], list[Rewrite]] = {}
        for rule in self.rewrites:
            for root in rule.roots:
                by_root.setdefault(root, []).append(rule)
        return by_root

    def apply(self, graph: ir.Graph, journal: Journal) -> int:
        """Number of rewrites that fired, in this graph alone (not in the bodies of its If and Loop nodes)."""
        work = _Work(graph, self.index())
        limit, count = _REWRITES_PER_NODE * (len(graph) + 20), 0
        while (node := work.next()) is not None:
            if any(_attempt(rule, node, work, journal) for rule in work.rules(node)):
                count += 1
            if count > limit:
                raise BuildError(f"the rewrites {self.name!r} go in circles at node {node.name!r}: report this model")
        journal.close()
        return count


class _Work:
    """The nodes still to look at, each at most once at a time, first in the order of the graph."""

    def __init__(self, graph: ir.Graph, by_root: dict[tuple[str, str], list[Rewrite]]) -> None:
        self.graph = graph
        self.by_root = by_root
        self.pending: dict[ir.Node, None] = {}
        self.queue: deque[ir.Node] = deque()
        self.add(graph)

    def add(self, nodes: Iterable[ir.Node | None]) -> None:
        for node in nodes:
            if node is not None and node not in self.pending and any(key in self.by_root for key in keys_of(node)):
                self.pending[node] = None
                self.queue.append(node)

    def rules(self, node: ir.Node) -> Iterable[Rewrite]:
        return (rule for key in keys_of(node) for rule in self.by_root.get(key, ()))

    def next(self) -> ir.Node | None:
        while self.queue:
            node = self.queue.popleft()
            del self.pending[node]
            if node.graph is self.graph:
                return node
        return None


def _attempt(rule: Rewrite, node: ir.Node, work: _Work, journal: Journal) -> bool:
    journal.tries += 1
    matched: Sequence[ir.Node] = (node,)
    op = Builder(node)
    if rule.pattern is None:
        result = rule.function(op, node)
    else:
        match = Match(work.graph)
        if not solve(rule.pattern, node.outputs[0], match):
            if match.deepest > max(1, rule.size // 2):  # nearer than that, it is worth telling
                journal.refuse(rule, node, _mismatch(match))
            return False
        if (value := used_elsewhere(match)) is not None:
            journal.refuse(rule, node, Rejection("a value inside is used elsewhere", value))
            return False
        matched = [n for _, n in match.nodes]
        result = rule.call(op, match.bindings())
    if result is None or isinstance(result, Rejection):
        op.discard()
        if result is not None:
            journal.refuse(rule, node, result)
        return False
    replaced = result if isinstance(result, Mapping) else {node.outputs[0]: result}
    return _replace(rule, op, replaced, matched, work, journal)


def _mismatch(match: Match) -> Rejection:
    assert match.failure is not None
    pattern, value = match.failure
    where = value if isinstance(value, ir.Value) else None
    return Rejection(f"expected {describe(pattern)}, found {_found(value)}", where)


def _found(value: Found) -> str:
    if not isinstance(value, ir.Value):
        return "nothing" if value is None else f"{value:g}"
    node = value.producer()
    return node.op_type if node is not None else "a constant" if value.const_value is not None else "an input"


def _replace(
    rule: Rewrite,
    op: Builder,
    replaced: Mapping[ir.Value, ir.Value],
    matched: Sequence[ir.Node],
    work: _Work,
    journal: Journal,
) -> bool:
    if any(_would_lose_an_output(old, new, work.graph) for old, new in replaced.items()):
        op.discard()
        journal.refuse(rule, op.root, Rejection("an output of the graph needs a node of its own"))
        return False
    root_name = op.root.name
    for index, node in enumerate(op.nodes, 1):
        node.name = root_name if index == len(op.nodes) else f"{root_name}.{index}"
    _insert(op, work.graph)
    made = set(op.nodes)
    for old, new in replaced.items():
        substitute(old, new, inherit=new.producer() in made or old.is_graph_output())
    makers = [maker for old in replaced if (maker := old.producer()) is not None]
    removed, neighbours = _sweep([*makers, *matched], work.graph)
    names = merged_origins(reversed([*removed, *matched]))
    for node in op.nodes:
        set_origins(node, names)
    work.add(op.nodes)
    work.add(use.node for new in replaced.values() for use in new.uses())
    work.add(neighbours)
    journal.fired.append(Fired(rule.name, root_name or "", names))
    return True


def _would_lose_an_output(old: ir.Value, new: ir.Value, graph: ir.Graph) -> bool:
    if not old.is_graph_output():
        return False
    producer = new.producer()
    return new.is_graph_output() or producer is None or producer.graph not in (None, graph)


def _insert(op: Builder, graph: ir.Graph) -> None:
    if op.anchor is None:
        graph.insert_before(op.root, op.nodes)
    elif (producer := op.anchor.producer()) is not None and producer.graph is graph:
        graph.insert_after(producer, op.nodes)
    else:
        graph.insert_before(graph[0], op.nodes)


def _sweep(roots: Iterable[ir.Node], graph: ir.Graph) -> tuple[list[ir.Node], list[ir.Node]]:
    """Removes the nodes that nothing reads any more; returns them, and those that lost a fellow reader."""
    stack, removed, neighbours = list(roots), [], []
    while stack:
        node = stack.pop()
        if node.graph is not graph or any(o.is_graph_output() or o.uses() for o in node.outputs):
            continue
        inputs = [value for value in node.inputs if value is not None]
        detach(node)
        removed.append(node)
        for value in inputs:
            if (producer := value.producer()) is not None:
                stack.append(producer)
                neighbours.append(producer)
                if len(uses := value.uses()) == 1:
                    neighbours.append(next(iter(uses)).node)
    return removed, neighbours


def detach(node: ir.Node) -> None:
    """Takes a node whose results nothing reads out of its graph; the bodies it holds let go of outer values too."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in ir.traversal.RecursiveGraphIterator(attribute.as_graph()):
                inner.resize_inputs(0)
    assert node.graph is not None
    node.graph.remove(node)
    node.resize_inputs(0)
