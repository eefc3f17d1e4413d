"""The benchmark models are the architectures they are named after, with outputs of order one."""

import numpy as np
import onnx
import pytest

from benchmarks.models import MODELS, example_inputs


def operators(model: onnx.ModelProto) -> dict[str, int]:
    names = [node.op_type for node in model.graph.node]
    return {name: names.count(name) for name in set(names)}


def parameters(model: onnx.ModelProto) -> int:
    return sum(int(np.prod(weight.dims)) for weight in model.graph.initializer)


@pytest.mark.parametrize(
    ("name", "convolutions", "millions"), [("resnet50", 53, 25.6), ("mobilenet_v2", 52, 3.5), ("mnist", 2, 0.006)]
)
def test_architecture(name: str, convolutions: int, millions: float) -> None:
    model = MODELS[name].make("N")
    assert operators(model)["Conv"] == convolutions
    assert parameters(model) / 1e6 == pytest.approx(millions, rel=0.02)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"


def test_the_same_weights_every_time() -> None:
    first, second = (MODELS["mobilenet_v2"].make(1).SerializeToString() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "mnist"])
def test_outputs_are_of_order_one(name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(
        MODELS[name].make("N").SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (output,) = session.run(None, example_inputs(name, batch=2))
    assert 0.1 < output.std() < 10
    assert np.abs(output[0] - output[1]).max() > 0.01
