"""Small models for the tests of passes: write one, rewrite it, compare what it computes before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

from examples.writer import Shape, Writer, value_info
from ingot import passes
from ingot.importers import onnx as importer
from ingot.ir import ops, shapes
from ingot.ir.graph import attributes, is_canonical, type_of
from ingot.ir.oracle import evaluate_model
from ingot.ir.provenance import origins

Array = np.ndarray[Any, Any]
OPSET = 20


@dataclass
class Net(Writer):
    """A writer whose outputs are inferred, with seeded weights."""

    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def draw(self, *shape: int, scale: float = 1.0) -> str:
        """A random float32 weight."""
        return self.weight(f"w{len(self.weights)}", (self.random.standard_normal(shape) * scale).astype(np.float32))

    def nodes_of(self, op: str, *inputs: str, outputs: int, **given: Any) -> list[str]:
        """The outputs of a node that has several."""
        names = [f"{op.lower()}_{len(self.nodes)}:{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=f"{op.lower()}_{len(self.nodes)}", **given))
        return names


def model_of(net: Net, inputs: Mapping[str, tuple[str, Shape]], *outputs: str, opset: int = OPSET) -> onnx.ModelProto:
    """A checked model; the types of its outputs are left to inference."""
    graph = helper.make_graph(
        net.nodes, "test", [value_info(name, *given) for name, given in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs], net.weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 10
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)  # noqa: TID251 - it fills in the outputs' types


@dataclass(frozen=True)
class Rewritten:
    """A model before and after the passes."""

    before: ir.Model
    after: ir.Model
    report: passes.PassReport

    @property
    def operators(self) -> Counter[str]:
        """How many nodes of each operator there are, canonical ones by their plain name."""
        return Counter(n.op_type if is_canonical(n) else f"onnx::{n.op_type}" for n in self.nodes)

    @property
    def nodes(self) -> list[ir.Node]:
        return list(ir.traversal.RecursiveGraphIterator(self.after.graph))

    def only(self, op: str) -> ir.Node:
        """The one node of an operator."""
        (node,) = [node for node in self.nodes if node.op_type == op]
        return node

    def fired(self, name: str) -> int:
        """How often a rewrite fired."""
        return self.report.counts[name]

    def reasons(self, name: str) -> list[str]:
        """Why a rewrite held back."""
        return [entry.reason for entry in self.report.rejections if entry.rewrite == name]


def rewritten(model: onnx.ModelProto, **options: Any) -> Rewritten:
    """The model through the whole pipeline, checked after every pass."""
    before = importer.load(model)
    shapes.infer(before)
    after = before.clone()
    return Rewritten(before, after, passes.run(after, check=check_graph, **options))


def through(model: onnx.ModelProto, *tables: passes.Table) -> Rewritten:
    """The canonical model through some tables only."""
    before = importer.load(model)
    shapes.infer(before)
    after = before.clone()
    journal = passes.Journal()
    passes.canonical.canonicalise(after)
    for table in tables:
        for graph in passes.graphs_of(after):
            table.apply(graph, journal)
        check_graph(after)
    report = passes.PassReport(tuple(journal.fired), journal.latest_refusals(after), (), ())
    return Rewritten(before, after, report)


def check_graph(model: ir.Model) -> None:
    """Nodes in order, canonical nodes with the types of their definitions and with origins."""
    for graph in [model.graph, *model.graph.subgraphs()]:
        made = {value for node in graph for value in node.outputs}
        seen: set[ir.Value] = set()
        for node in graph:
            assert all(value is None or value not in made or value in seen for value in node.inputs), node.name
            seen.update(node.outputs)
            if is_canonical(node):
                check_types(node)
                assert origins(node), f"{node.name} has lost its origins"


def check_types(node: ir.Node) -> None:
    types = [None if value is None else type_of(value) for value in node.inputs]
    given = attributes(node)
    for value, expected in zip(node.outputs, ops.infer(node.op_type, types, given), strict=False):
        found = type_of(value)
        assert found is not None, f"{node.name} has an untyped output"
        assert found.dtype == expected.dtype, f"{node.name} is {found.dtype}, its definition says {expected.dtype}"
        static = [(a, b) for a, b in zip(found.shape, expected.shape, strict=True) if isinstance(a, int)]
        assert all(a == b for a, b in static if isinstance(b, int)), f"{node.name}: {found.shape} {expected.shape}"


def feeds_of(model: ir.Model, sizes: Mapping[str, int], seed: int = 1) -> dict[str, Array]:
    """Random inputs; symbols have the given sizes."""
    random = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for value in model.graph.inputs:
        shape = [size if isinstance(size, int) else sizes[size] for size in shapes.shape_of(value) or ()]
        known = type_of(value)
        assert known is not None and value.name is not None
        kind = np.dtype(known.dtype)
        drawn = random.standard_normal(shape) if kind.kind == "f" else random.integers(0, _TOP.get(kind.name, 2), shape)
        feeds[value.name] = drawn.astype(kind)
    return feeds


_TOP = {"uint8": 256, "int8": 128}


def assert_same(result: Rewritten, rtol: float = 1e-4, atol: float = 1e-5, seed: int = 1, **sizes: int) -> None:
    """Both models compute the same, in the same types; quantised results may differ by one step."""
    feeds = feeds_of(result.before, sizes, seed)
    expected = evaluate_model(result.before, feeds)
    bound = shapes.specialize(result.after, sizes) if sizes else result.after
    found = evaluate_model(bound, feeds)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert array.dtype == found[name].dtype and array.shape == found[name].shape, name
        if array.dtype.name in ("int8", "uint8"):
            assert np.abs(array.astype(int) - found[name].astype(int)).max() <= 1, name
        else:
            np.testing.assert_allclose(found[name], array, rtol=rtol, atol=atol, err_msg=name)


def rewritten_same(
    net: Net, inputs: Mapping[str, tuple[str, Shape]], *outputs: str, rtol: float = 1e-4, **sizes: int
) -> Rewritten:
    """The model through the pipeline, after comparing what it computes."""
    result = rewritten(model_of(net, inputs, *outputs))
    assert_same(result, rtol, rtol / 10, **sizes)
    return result
