"""Our GridSample beside onnx.reference's, which goes element by element."""

from typing import Any

import numpy as np
import pytest
from onnx import NodeProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from ingot.ir import oracle


def sampling(**attributes: Any) -> NodeProto:
    return helper.make_node("GridSample", ["x", "g"], ["y"], **attributes)


def ours(node: NodeProto, x: np.ndarray, grid: np.ndarray, opset: int) -> np.ndarray:
    return np.asarray(oracle.evaluate_node(node, [x, grid], {"": opset})[0])


def reference(node: NodeProto, x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xgy"]
    model = helper.make_model(helper.make_graph([node], "g", infos[:2], infos[2:]),
                              opset_imports=[helper.make_opsetid("", 22)])  # fmt: skip
    (y,) = ReferenceEvaluator(model).run(None, {"x": x, "g": grid})
    return np.asarray(y)


@pytest.mark.parametrize("corners", [0, 1])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_modes(mode: str, padding: str, corners: int) -> None:
    random = np.random.default_rng(corners)
    node = sampling(mode=mode, padding_mode=padding, align_corners=corners)
    for shape, out in (((2, 2, 4, 5), (2, 3, 2)), ((1, 1, 3, 2, 4), (2, 2, 1, 3)), ((1, 2, 7), (9, 1))):
        x = random.standard_normal(shape).astype(np.float32)
        grid = random.uniform(-2.6, 2.6, (shape[0], *out)).astype(np.float32)
        expected, found = reference(node, x, grid), ours(node, x, grid, 22)
        assert found.dtype == x.dtype and found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("old", "new"), [("bilinear", "linear"), ("bicubic", "cubic")])
def test_names_before_opset_20(old: str, new: str) -> None:
    x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    grid = np.array([[[[-0.3, 0.7], [0.1, -0.9]]]], np.float32)
    np.testing.assert_allclose(ours(sampling(mode=old), x, grid, 16), reference(sampling(mode=new), x, grid), rtol=1e-5)
