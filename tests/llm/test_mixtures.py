"""Experts become Mixtures, with what follows them and the norm before, where nobody else reads what lies between."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from ingot.ir.graph import attributes, make_node, set_type
from ingot.ir.ops import meaning
from ingot.ir.ops_table import TensorType
from ingot.llm.projections import project

Array = np.ndarray[Any, Any]
SILU = "Sigmoid %0 -> float32; Mul %0 $0 -> float32"
JOINED = "Add %0 %1 -> float32"
TOKENS, WIDTH, INNER, EXPERTS = 5, 12, 8, 4


class Written:
    """Experts behind a norm, joined with the stream."""

    def __init__(self, kind: str = "rms", joined: str = JOINED, others: tuple[int, ...] = (TOKENS, WIDTH)) -> None:
        rng = np.random.default_rng(1)
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": 21, "ingot": 1}, name="experts")
        self.fed = {"stream": rng.standard_normal((TOKENS, WIDTH)), "other": rng.standard_normal(others)}
        self.given = {name: self._input(name, x.shape) for name, x in self.fed.items()}
        shapes = [(EXPERTS, WIDTH, INNER), (EXPERTS, WIDTH, INNER), (EXPERTS, INNER, WIDTH)]
        stacks = [self._constant(f"stack{n}", rng.standard_normal(shape)) for n, shape in enumerate(shapes)]
        scale = self._constant("scale", rng.standard_normal(WIDTH))
        router = self._constant("router", rng.standard_normal((WIDTH, EXPERTS)))
        stated = {"kind": kind, "axis": 1, "groups": 1, "epsilon": 1e-5, "epilogue": ""}
        self.normed = self.add("Norm", [self.given["stream"], scale], "norm", **stated)
        scores = self.add("Linear", [self.normed, router], "scores", epilogue="")
        self.mixed = self.add("Experts", [self.normed, scores, *stacks], "experts", chosen=2, normalised=1,
                              activation=SILU)  # fmt: skip
        self.last = self.add("Pointwise", [self.mixed, self.given["other"]], "joined", expression=joined)
        self.graph.outputs.append(self.last)

    def _input(self, name: str, shape: tuple[int, ...]) -> ir.Value:
        value = ir.Value(name=name)
        set_type(value, TensorType("float32", shape))
        self.graph.inputs.append(value)
        return value

    def _constant(self, name: str, array: Array) -> ir.Value:
        tensor = ir.tensor(array.astype(np.float32), name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def add(self, op: str, inputs: list[ir.Value], name: str, **stated: Any) -> ir.Value:
        """The output of a new node at the end."""
        node = make_node(op, inputs, stated, name=name)
        self.graph.append(node)
        node.outputs[0].name = name
        return node.outputs[0]

    def results(self) -> list[Array]:
        """What the graph gives."""
        known: dict[Any, Array] = {self.given[name]: x.astype(np.float32) for name, x in self.fed.items()}
        known |= {v: v.const_value.numpy() for v in self.graph.initializers.values() if v.const_value is not None}
        for node in self.graph:
            operands = [None if v is None else known[v] for v in node.inputs]
            known |= dict(zip(node.outputs, meaning(node.op_type)(*operands, **attributes(node)), strict=False))
        return [known[v] for v in self.graph.outputs]

    def projected(self) -> list[str]:
        """The operators behind the rewrite, which changes no result."""
        before = self.results()
        project(ir.Model(self.graph, ir_version=10))
        for mine, theirs in zip(self.results(), before, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
        return [node.op_type for node in self.graph]


def test_experts_take_in_norm_and_stream() -> None:
    written = Written()
    assert written.projected() == ["Projection", "Mixture"]
    mixture = written.graph[1]
    assert mixture.inputs[0] is written.given["stream"] and attributes(mixture)["expression"] == JOINED


@pytest.mark.parametrize("case", ["read by others", "an output"])
def test_experts_that_others_read_stay_what_they_are(case: str) -> None:
    written = Written()
    if case == "an output":
        written.graph.outputs.append(written.mixed)
    else:
        written.graph.outputs.append(written.add("Pointwise", [written.mixed], "more", expression="Neg %0 -> float32"))
    assert written.projected()[:3] == ["Projection", "Mixture", "Pointwise"]


def test_operands_of_other_shapes_stay_outside() -> None:
    assert Written(others=(TOKENS, 1)).projected() == ["Projection", "Mixture", "Pointwise"]


def test_other_norms_stay_outside() -> None:
    assert Written("layer").projected() == ["Norm", "Projection", "Mixture"]
