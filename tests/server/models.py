"""Small ONNX models and repositories of them, for the server's tests."""

from pathlib import Path

import onnx
from onnx import TensorProto, helper

SUM_CONFIG = """
max_batch_size: 8
input [ { name: "INPUT0" data_type: TYPE_INT32 dims: [ 16 ] }, { name: "INPUT1" data_type: TYPE_INT32 dims: [ 16 ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_INT32 dims: [ 16 ] label_filename: "labels.txt" },
         { name: "OUTPUT1" data_type: TYPE_INT32 dims: [ 16 ] } ]
"""


def add_sub() -> onnx.ModelProto:
    """OUTPUT0 = INPUT0 + INPUT1, OUTPUT1 = INPUT0 - INPUT1; int32 [N, 16]."""
    tensors = [helper.make_tensor_value_info(name, TensorProto.INT32, ["N", 16]) for name in ("INPUT0", "INPUT1")]
    results = [helper.make_tensor_value_info(name, TensorProto.INT32, ["N", 16]) for name in ("OUTPUT0", "OUTPUT1")]
    nodes = [
        helper.make_node("Add", ["INPUT0", "INPUT1"], ["OUTPUT0"]),
        helper.make_node("Sub", ["INPUT0", "INPUT1"], ["OUTPUT1"]),
    ]
    return model(nodes, tensors, results)


def identity(element: int, shape: list[int | str]) -> onnx.ModelProto:
    """OUTPUT = INPUT."""
    return model(
        [helper.make_node("Identity", ["INPUT"], ["OUTPUT"])],
        [helper.make_tensor_value_info("INPUT", element, shape)],
        [helper.make_tensor_value_info("OUTPUT", element, shape)],
    )


def scale(factor: float) -> onnx.ModelProto:
    """y = x * factor; float32 [N, 4]. Different factors tell versions apart."""
    constant = helper.make_tensor("factor", TensorProto.FLOAT, [], [factor])
    return model(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [constant],
    )


def accumulator() -> onnx.ModelProto:
    """y = new_total = total + x; float32 [N, 1]. `first` (int32 [N, 1]) is the START control, added a thousandfold."""
    names = ("x", "total", "y", "new_total")
    x, total, y, new_total = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 1]) for n in names)
    first = helper.make_tensor_value_info("first", TensorProto.INT32, ["N", 1])
    nodes = [
        helper.make_node("Add", ["x", "total"], ["new_total"]),
        helper.make_node("Cast", ["first"], ["flag"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["flag", "thousand"], ["bonus"]),
        helper.make_node("Add", ["new_total", "bonus"], ["y"]),
    ]
    thousand = helper.make_tensor("thousand", TensorProto.FLOAT, [], [1000.0])
    return model(nodes, [x, total, first], [y, new_total], [thousand])


ACCUMULATOR_CONFIG = """
max_batch_size: 4
sequence_batching {
  max_sequence_idle_microseconds: 60000000
  oldest { max_candidate_sequences: 2 }
  control_input { name: "first" control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } }
  state { input_name: "total" output_name: "new_total" data_type: TYPE_FP32 dims: [ 1 ] }
}
"""

CHAIN_CONFIG = """
platform: "ensemble"
max_batch_size: 8
input [ { name: "in" data_type: TYPE_FP32 dims: [ 4 ] } ]
output [ { name: "out" data_type: TYPE_FP32 dims: [ 4 ] }, { name: "middle" data_type: TYPE_FP32 dims: [ 4 ] } ]
ensemble_scheduling {
  step { model_name: "scale" model_version: 3
         input_map { key: "x" value: "middle" } output_map { key: "y" value: "out" } }
  step { model_name: "scale" model_version: 1
         input_map { key: "x" value: "in" } output_map { key: "y" value: "middle" } }
}
"""


REPEAT_CONFIG = """
backend: "python"
model_transaction_policy { decoupled: true }
input [ { name: "IN" data_type: TYPE_INT32 dims: [ -1 ] } ]
output [ { name: "OUT" data_type: TYPE_INT32 dims: [ 1 ] } ]
"""
REPEAT = """
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    '''Answers with each element of its input.'''

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            for element in request.inputs()[0].as_numpy():
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", element.reshape(1))]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


def model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: list[onnx.TensorProto] | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "graph", inputs, outputs, weights or [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def add_version(root: Path, name: str, version: int, proto: onnx.ModelProto, config: str = "") -> Path:
    """Write root/name/version/model.onnx, and config.pbtxt if there is one."""
    folder = root / name / str(version)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, folder / "model.onnx")
    if config:
        (folder.parent / "config.pbtxt").write_text(config)
    return folder.parent


def write_repository(root: Path) -> Path:
    """The models the protocol tests talk to."""
    folder = add_version(root, "simple", 1, add_sub(), SUM_CONFIG)
    (folder / "labels.txt").write_text("\n".join(f"label{number}" for number in range(16)))
    add_version(root, "texts", 1, identity(TensorProto.STRING, ["N", "M"]))
    add_version(root, "scale", 1, scale(2.0))
    add_version(root, "scale", 3, scale(3.0))
    (root / "scale" / "config.pbtxt").write_text("version_policy { all {} }")
    add_version(root, "accumulator", 1, accumulator(), ACCUMULATOR_CONFIG)
    add_version(root, "cached", 1, scale(5.0), "response_cache { enable: true }")
    (root / "chain").mkdir()
    (root / "chain" / "config.pbtxt").write_text(CHAIN_CONFIG)
    add_version(root, "plain", 1, identity(TensorProto.FLOAT, [2, 3]))
    (root / "repeat" / "1").mkdir(parents=True)
    (root / "repeat" / "config.pbtxt").write_text(REPEAT_CONFIG)
    (root / "repeat" / "1" / "model.py").write_text(REPEAT)
    return root
