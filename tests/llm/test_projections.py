"""Products with integers become QuantizedProjections: gate and up in one where they are alike and nobody else reads."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from ingot.errors import BuildError
from ingot.ir.graph import attributes, constant_of, make_node, set_type
from ingot.ir.ops_table import TensorType
from ingot.llm.projections import project

GATE = "Sigmoid %0 -> float32; Mul $0 %0 -> float32; Mul $1 %1 -> float32"
DEPTH, WIDTH = 64, 8


class Drawn:
    """gate(x @ g, x @ u), with integers of `bits` and groups of `group` for up."""

    def __init__(self, bits: int = 4, group: int = 32, up_bits: int | None = None, read: bool = False) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": 21, "ingot": 1})
        self.x = ir.Value(name="x", shape=ir.Shape(("T", DEPTH)), type=ir.TensorType(ir.DataType.FLOAT))
        self.graph.inputs.append(self.x)
        up = self.product("up", up_bits or bits, group, "")
        gate = self.product("gate", bits, group, GATE, up)
        self.graph.outputs.extend([gate, up] if read else [gate])
        project(ir.Model(self.graph, ir_version=10))
        self.made = [node for node in self.graph if node.op_type == "QuantizedProjection"]

    def product(self, name: str, bits: int, group: int, epilogue: str, *extras: ir.Value) -> ir.Value:
        whole = np.random.default_rng(bits).integers(-8, 8, (DEPTH, WIDTH)).astype(np.int8)
        scale = np.full((DEPTH // group, WIDTH), 0.5 if name == "up" else 0.25, np.float32)
        operands = [self.x, *(self.constant(array, f"{name}.{part}") for array, part in ((whole, "w"), (scale, "s")))]
        stated = {"bits": bits, "group": group, "epilogue": epilogue}
        node = make_node("QuantizedLinear", [*operands, None, *extras], stated, name=name)
        self.graph.append(node)
        set_type(node.outputs[0], TensorType("float32", ("T", WIDTH)))
        return node.outputs[0]

    def constant(self, array: np.ndarray, name: str) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value


def test_gate_and_up_are_one_product() -> None:
    (made,) = Drawn().made
    weight, scale = constant_of(made.inputs[1]), constant_of(made.inputs[3])
    assert weight is not None and weight.shape == (DEPTH, 2 * WIDTH)
    assert scale is not None and scale[0].tolist() == [0.25] * WIDTH + [0.5] * WIDTH
    stated = attributes(made)
    assert (stated["parts"], stated["bits"], stated["group"]) == (2, 4, 32) and len(made.inputs) == 5


@pytest.mark.parametrize("drawn", [{"up_bits": 8}, {"read": True}])
def test_what_is_not_alike_or_read_elsewhere_stays(drawn: dict[str, int]) -> None:
    assert [attributes(node)["parts"] for node in Drawn(**drawn).made] == [1, 1]  # type: ignore[arg-type]


def test_groups_that_threads_cannot_load_are_refused() -> None:
    with pytest.raises(BuildError, match="up: groups of 16 numbers of 4 bits"):
        Drawn(group=16)
