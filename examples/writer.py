"""Writes an ONNX model node by node: what an exporter would hand the compiler, without a framework."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

OPSET = 17
Shape = list[int | str] | tuple[int | str, ...]


@dataclass
class Writer:
    """Nodes and weights collected so far; each method returns the name of the value it adds."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)

    def weight(self, name: str, array: np.ndarray) -> str:
        """A constant of the model."""
        self.weights.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def constant(self, values: object, dtype: str = "float32") -> str:
        """An unnamed small constant (a shape, a bound, a scale)."""
        return self.weight(f"constant_{len(self.weights)}", np.array(values, dtype))

    def node(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """op(*inputs), its single output named after the node."""
        name = name or f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [f"{name}:0"], name=name, **attributes))
        return f"{name}:0"

    def model(
        self, name: str, inputs: dict[str, tuple[str, Shape]], outputs: dict[str, tuple[str, str, Shape]]
    ) -> onnx.ModelProto:
        """The checked model: inputs as {name: (dtype, shape)}, outputs as {name: (value, dtype, shape)}."""
        renames = [helper.make_node("Identity", [value], [output]) for output, (value, _, _) in outputs.items()]
        graph = helper.make_graph(
            self.nodes + renames,
            name,
            [value_info(key, dtype, shape) for key, (dtype, shape) in inputs.items()],
            [value_info(key, dtype, shape) for key, (_, dtype, shape) in outputs.items()],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="ingot-examples")
        model.ir_version = 10
        onnx.checker.check_model(model)
        return model


def value_info(name: str, dtype: str, shape: Shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape))
