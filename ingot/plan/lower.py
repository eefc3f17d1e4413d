"""Graph → works: which nodes become native kernels, which host steps, which control steps, on which tensors.

Views become aliases, constants stay with their users. Choosing candidates (tune/choose.py) and assembling the plan
(plan/assemble.py) come after.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import numpy as np
import onnx_ir

from ingot.config import SPLIT_ERROR
from ingot.dtypes import SIZES
from ingot.ir.expression import Expression, parse
from ingot.ir.graph import attributes, constant_of, dtype_of
from ingot.ir.ops_group import COLLECTIVE
from ingot.ir.provenance import origins
from ingot.ir.shapes import is_data_dependent, shape_of
from ingot.kernels import Candidate, candidates
from ingot.kernels.demands import demands_of
from ingot.kernels.node import Node, Port
from ingot.plan.extent import Extent, symbols_of
from ingot.plan.plan import Demand

Array = np.ndarray[Any, Any]
REJECTED = "ingot.rejected"  # metadata key: why a node stayed an ONNX operator
CONTROL = {"If": ("then_branch", "else_branch"), "Loop": ("body",), "Scan": ("body",), "SequenceMap": ("body",)}
_EPILOGUE_KEYS = ("epilogue", "expression")


@dataclass(eq=False)
class Tensor:
    """A value of the graph. `shape` is None for sequences, optionals and unknown ranks, which only the host can
    hold."""

    name: str
    dtype: str
    shape: tuple[Extent, ...] | None
    constant: Array | None = None
    alias: Tensor | None = None
    given: bool = False  # as a Port's

    @property
    def root(self) -> Tensor:
        """The tensor whose storage this one views."""
        return self if self.alias is None else self.alias.root

    @property
    def native(self) -> bool:
        """Whether native code may touch it."""
        return self.shape is not None and self.dtype in SIZES

    def port(self) -> Port:
        """What a kernel sees of it."""
        assert self.shape is not None
        return Port(self.dtype, self.shape, self.constant, given=self.given)


@dataclass(eq=False)
class Work:
    """One node on its way to a step. Native works carry their candidates, the others their reason for being on the
    host."""

    kind: Literal["native", "host", "control", "collective"]
    name: str
    op: str
    origins: tuple[str, ...]
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    node: Node | None = None
    choices: tuple[Candidate, ...] = ()
    proto: bytes = b""
    fused: bool = False
    reason: str = ""
    bodies: tuple[Module, ...] = ()
    captures: tuple[tuple[Tensor, ...], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Module:
    """A graph's works in order; `opsets` is what host nodes are read with."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    works: list[Work]
    opsets: Mapping[str, int]
    derived: tuple[str, ...] = ()
    demands: Sequence[Demand] = ()

    def all_works(self) -> Iterator[Work]:
        """Works of this module and of all bodies below it."""
        for work in self.works:
            yield work
            for body in work.bodies:
                yield from body.all_works()


def lower(model: onnx_ir.Model, isa: Any | None, target: str = "cpu", banned: frozenset[str] = frozenset(),
          tolerance: float = SPLIT_ERROR) -> Module:  # fmt: skip
    """Works of the model's main graph. isa None: everything on the host. `banned`: labels of candidates not to use, nor
    those that add a larger error than `tolerance`."""
    lowering = _Lowering(isa, target, dict(model.opset_imports), banned, tolerance)
    return lowering.module(model.graph, {}, given=True)


@dataclass(eq=False)
class _Lowering:
    isa: Any | None
    target: str
    opsets: Mapping[str, int]
    banned: frozenset[str] = frozenset()
    tolerance: float = SPLIT_ERROR
    names: int = 0

    def module(self, graph: onnx_ir.Graph, scope: dict[onnx_ir.Value, Tensor], given: bool = False) -> Module:
        """Lower one graph; `scope` maps values of enclosing graphs. given: its inputs are the run's."""
        known = dict(scope)
        inputs = tuple(self._tensor(v, known, given) for v in graph.inputs)
        works = [w for node in graph if (w := self._work(node, known)) is not None]
        demands = self._demands(graph, known)
        outputs = tuple(self._lookup(v, known) for v in graph.outputs)
        symbols = {s for t in known.values() for d in t.shape or () for s in symbols_of(d) if is_data_dependent(s)}
        bound = {s for t in inputs for d in t.shape or () for s in symbols_of(d)}
        return Module(inputs, outputs, works, self.opsets, tuple(sorted(symbols - bound)), demands)

    def _demands(self, graph: onnx_ir.Graph, known: Mapping[onnx_ir.Value, Tensor]) -> list[Demand]:
        """What native nodes and views rely on, each pair of extents once."""
        found: dict[tuple[Extent, Extent], Demand] = {}
        for node in graph if self.isa is not None else ():
            inputs = [None if value is None else known[value] for value in node.inputs]
            outputs = [known[value] for value in node.outputs]
            odd = not all(tensor is None or tensor.native for tensor in (*inputs, *outputs))
            if odd or node.domain != "ingot" or node.op_type == "Unreachable":
                continue
            for pair in demands_of(kernel_node(node, inputs, outputs)):
                found.setdefault(pair, Demand(*pair, f"{', '.join(origins(node)) or node.name} ({node.op_type})"))
        return list(found.values())

    def _tensor(self, value: onnx_ir.Value, known: dict[onnx_ir.Value, Tensor], given: bool = False) -> Tensor:
        is_tensor = isinstance(value.type, onnx_ir.TensorType) and value.dtype is not None
        dtype, shape = (dtype_of(value), shape_of(value)) if is_tensor else ("object", None)
        self.names += 1
        known[value] = Tensor(value.name or f"value{self.names}", dtype, shape, given=given)
        return known[value]

    def _lookup(self, value: onnx_ir.Value, known: dict[onnx_ir.Value, Tensor]) -> Tensor:
        """The tensor of a value that is read: an input, an output of an earlier node, or a constant."""
        if value not in known:
            constant = constant_of(value)
            if constant is None:
                raise AssertionError(f"{value.name!r} is read before it is defined; verify() should have caught it")
            known[value] = Tensor(value.name or "", constant.dtype.name, constant.shape, constant)
        return known[value]

    def _inputs(self, node: onnx_ir.Node, known: dict[onnx_ir.Value, Tensor]) -> tuple[Tensor | None, ...]:
        return tuple(None if v is None else self._lookup(v, known) for v in node.inputs)

    def _work(self, node: onnx_ir.Node, known: dict[onnx_ir.Value, Tensor]) -> Work | None:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            return None
        inputs = self._inputs(node, known)
        outputs = tuple(self._tensor(v, known) for v in node.outputs)
        if node.domain == "ingot" and node.op_type == "View" and self._is_alias(inputs, outputs):
            _see(outputs[0], inputs[0])
            return None
        if node.domain == "ingot" and node.op_type == "Unreachable":
            return Work("control", node.name or "", node.op_type, origins(node), (), outputs, settings=attributes(node))
        if node.op_type in CONTROL and node.domain in ("", "ai.onnx"):
            return self._control(node, inputs, outputs, known)
        native = self._native(node, inputs, outputs)
        if native is None and node.domain == "ingot" and node.op_type in COLLECTIVE:
            return Work("collective", node.name or "", node.op_type, origins(node), inputs, outputs)
        return native or self._host(node, inputs, outputs, known)

    @staticmethod
    def _is_alias(inputs: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> bool:
        source = inputs[0]
        return source is not None and source.native and outputs[0].native

    def _native(
        self, node: onnx_ir.Node, inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor, ...]
    ) -> Work | None:
        tensors = [t for t in (*inputs, *outputs) if t is not None]
        if self.isa is None or node.domain != "ingot" or not all(t.native for t in tensors):
            return None
        used = _without_unused_tail(node, outputs)
        described = kernel_node(node, inputs, used)
        choices = tuple(self._allowed(described))
        if not choices:
            return None
        return Work("native", node.name or "", node.op_type, origins(node), inputs, used, described, choices)

    def _allowed(self, node: Node) -> Iterator[Candidate]:
        every = ((k, list(found)) for k, found in groupby(candidates(node, self.target, self.isa), lambda c: c.kernel))
        allowed = [(k, [c for c in found if c.label not in self.banned]) for k, found in every
                   if k.error(node) <= self.tolerance]  # fmt: skip
        outdone = {name for kernel, found in allowed if found for name in kernel.instead_of}
        return (c for kernel, found in allowed if kernel.name not in outdone for c in found)

    def _host(
        self,
        node: onnx_ir.Node,
        inputs: tuple[Tensor | None, ...],
        outputs: tuple[Tensor, ...],
        known: dict[onnx_ir.Value, Tensor],
    ) -> Work:
        proto = onnx_ir.to_proto(node)
        by_name = {value.name: value for value in known}
        captured = tuple(self._lookup(by_name[name], known) for name in _captures(proto) if name in by_name)
        reason = self._host_reason(node, inputs, outputs)
        return Work(
            "host", node.name or "", node.op_type, origins(node), (*inputs, *captured), outputs,
            proto=proto.SerializeToString(deterministic=True), reason=reason, fused=node.domain == "ingot",
        )  # fmt: skip

    def _host_reason(self, node: onnx_ir.Node, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> str:
        if self.isa is None:
            return "the target is host"
        odd = next((t for t in (*inputs, *outputs) if t is not None and not t.native), None)
        if odd is not None:
            kind = "a tensor of unknown rank" if odd.dtype in SIZES else odd.dtype
            return f"{odd.name!r} is {kind}, native code takes numbers"
        if node.domain != "ingot":
            return node.metadata_props.get(REJECTED, "this operator has no native form")
        ports = ", ".join(f"{t.dtype}{list(t.shape or ())}" for t in inputs if t is not None)
        return f"no {self.target} kernel takes {node.op_type}({ports})"

    def _control(
        self,
        node: onnx_ir.Node,
        inputs: tuple[Tensor | None, ...],
        outputs: tuple[Tensor, ...],
        known: dict[onnx_ir.Value, Tensor],
    ) -> Work:
        keys = CONTROL[node.op_type]
        graphs = [node.attributes[key].as_graph() for key in keys]
        bodies, captures = [], []
        for graph in graphs:
            outer = _captured(graph)
            held = {value: self._lookup(value, known) for value in outer}
            inner = {v: Tensor(t.name, t.dtype, t.shape, t.constant) for v, t in held.items()}
            body = self.module(graph, inner)
            live = [v for v in outer if held[v].constant is None]
            body.inputs = (*body.inputs, *(inner[v] for v in live))
            bodies.append(body)
            captures.append(tuple(held[v] for v in live))
        settings = {k: _plain(a) for k, a in node.attributes.items() if k not in keys}
        if node.op_type in ("Loop", "Scan"):
            batched = node.op_type == "Scan" and self.opsets.get("", 9) < 9
            settings |= {"batched": 1} if batched else {}
            settings |= _scan_kinds(node, bodies[0], batched)
        return Work(
            "control", node.name or "", node.op_type, origins(node), inputs, outputs,
            bodies=tuple(bodies), captures=tuple(captures), settings=settings,
        )  # fmt: skip


def _see(view: Tensor, source: Tensor | None) -> None:
    """Make a tensor a view: of a tensor's storage, or of a constant, which makes it a constant."""
    assert source is not None and view.shape is not None
    if source.constant is None:
        view.alias = source
    else:
        view.constant = source.constant.reshape([int(extent) for extent in view.shape])


def kernel_node(node: onnx_ir.Node, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> Node:
    """What kernels see of a canonical node."""
    stated = attributes(node)
    text = next((stated.pop(key) for key in _EPILOGUE_KEYS if stated.get(key)), "")
    for key in _EPILOGUE_KEYS:
        stated.pop(key, None)
    epilogue = parse(text) if text else Expression(())
    ports = tuple(None if t is None else t.port() for t in inputs)
    return Node(
        node.op_type, ports, tuple(t.port() for t in outputs), stated, epilogue, node.name or "", origins(node)
    )  # fmt: skip


def _without_unused_tail(node: onnx_ir.Node, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Trailing outputs nobody reads are not asked of the kernel (a MaxPool's indices)."""
    count = len(outputs)
    while count > 1 and not node.outputs[count - 1].uses() and not node.outputs[count - 1].is_graph_output():
        count -= 1
    return outputs[:count]


def _captures(proto: Any) -> tuple[str, ...]:
    from ingot.ir.oracle import captures

    return captures(proto)


def _captured(graph: onnx_ir.Graph) -> list[onnx_ir.Value]:
    """Values of enclosing graphs that a subgraph reads, nested subgraphs included, in order of first use."""
    own = set(graph.inputs) | set(graph.initializers.values())
    found: dict[onnx_ir.Value, None] = {}
    for node in onnx_ir.traversal.RecursiveGraphIterator(graph):
        own.update(node.outputs)
        for attribute in node.attributes.values():
            if attribute.type == onnx_ir.AttributeType.GRAPH:
                inner = attribute.as_graph()
                own.update(inner.inputs, inner.initializers.values())
    for node in onnx_ir.traversal.RecursiveGraphIterator(graph):
        found.update({v: None for v in node.inputs if v is not None and v not in own})
        for attribute in node.attributes.values():
            if attribute.type == onnx_ir.AttributeType.GRAPH:
                found.update({v: None for v in attribute.as_graph().outputs if v not in own})
    found.update({v: None for v in graph.outputs if v not in own})
    return list(found)


def _scan_kinds(node: onnx_ir.Node, body: Module, batched: bool) -> dict[str, Any]:
    """dtype and element shape of each scan output, for loops that run zero times."""
    carried = (
        len(node.inputs) - 2
        if node.op_type == "Loop"
        else len(node.inputs) - node.attributes["num_scan_inputs"].as_int() - batched
    )
    skip = carried + 1 if node.op_type == "Loop" else carried
    scans = body.outputs[skip:]
    shapes = [[d if isinstance(d, int) else 0 for d in t.shape or ()] for t in scans]
    return {"scan_shapes": shapes, "scan_dtypes": [t.dtype for t in scans]}


def _plain(attribute: Any) -> Any:
    value = attribute.value
    return list(value) if isinstance(value, tuple | list) else value


def host_node(work: Work) -> str:
    """The node of a host work as base64 text."""
    return base64.b64encode(work.proto).decode()
