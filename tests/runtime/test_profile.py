"""Times per step add up to the time of a run, whichever thread did the work."""

import time

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import ingot


def layers(count: int, width: int) -> onnx.ModelProto:
    weight = np.random.default_rng(0).standard_normal((width, width)).astype(np.float32) / width
    nodes = [helper.make_node("MatMul", [f"x{i}", "w"], [f"x{i + 1}"], f"layer{i}") for i in range(count)]
    ends = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [128, width]) for i in (0, count)]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_steps_add_up_to_a_run() -> None:
    x = {"x0": np.ones((128, 256), np.float32)}
    engine = ingot.build(layers(12, 256), level=0, verify=False)
    for threads in (1, 2, 5):
        with ingot.Session(engine, threads=threads) as session:
            seconds, sums = [], []
            for _ in range(20):
                start = time.perf_counter()
                session.run(x)
                seconds.append(time.perf_counter() - start)
                sums.append(sum(step.microseconds for step in session.profile(x)))
            assert min(sums) > 0.5e6 * min(seconds), (threads, min(sums), min(seconds))
            assert all(step.nodes[0].startswith("layer") for step in session.profile(x))
