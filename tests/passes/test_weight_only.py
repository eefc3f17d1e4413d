"""Weights that a DequantizeLinear restores stay integers: what becomes QuantizedLinear, and what does not."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper

import ingot
from ingot.ir.graph import constant_of
from tests.passes.support import Net, Rewritten, assert_same, model_of, rewritten

Array = np.ndarray[Any, Any]
X = {"x": ("float32", ["N", 64])}
WIDE = {"x": ("float32", ["N", "S", 64])}
TYPES = {"int8": np.int8, "uint8": np.uint8, "int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4}
BITS = {"int8": 8, "uint8": 8, "int4": 4, "uint4": 4}


def integers(net: Net, shape: tuple[int, ...], dtype: str) -> Array:
    bits, signed = BITS[dtype], dtype[0] == "i"
    low = -(1 << (bits - 1)) if signed else 0
    return net.random.integers(low, low + (1 << bits), shape).astype(TYPES[dtype])


def restored(net: Net, shape: tuple[int, int], dtype: str, axis: int, block: int = 0, zeros: bool = False) -> str:
    """DequantizeLinear of a constant matrix with a scale per slice of `axis`, or per `block` along it; axis 2: one."""
    sizes = () if axis == 2 else (shape[axis],)
    if block:
        sizes = tuple(-(-size // block) if i == axis else size for i, size in enumerate(shape))
    inputs = [net.weight("weight", integers(net, shape, dtype))]
    inputs.append(net.weight("scale", net.random.uniform(0.01, 0.1, sizes).astype(np.float32)))
    if zeros:
        inputs.append(net.weight("zero", integers(net, sizes, dtype)))
    placed = {} if axis == 2 else {"axis": axis, **({"block_size": block} if block else {})}
    return net.node("DequantizeLinear", *inputs, **placed)


def kept(net: Net, *outputs: str, inputs: dict[str, Any] = X) -> Rewritten:
    """After the passes as a CPU's build runs them."""
    return rewritten(model_of(net, inputs, *outputs, opset=21), quantized_weights=True)


def multiplied(result: Rewritten, **sizes: int) -> None:
    """Both models compute the same."""
    assert_same(result, 1e-4, 1e-4, **sizes)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("axis", "block"), [(1, 0), (0, 16), (0, 32), (2, 0)])
@pytest.mark.parametrize("zeros", [False, True])
def test_matmul(dtype: str, axis: int, block: int, zeros: bool) -> None:
    net = Net()
    result = kept(net, net.node("MatMul", "x", restored(net, (64, 24), dtype, axis, block, zeros)))
    assert result.operators == {"QuantizedLinear": 1}
    weight = constant_of(result.only("QuantizedLinear").inputs[1])
    assert weight is not None and weight.dtype == np.dtype("uint8" if dtype[0] == "u" else "int8")
    multiplied(result, N=3)


def test_more_axes_and_an_epilogue() -> None:
    net = Net()
    y = net.node("MatMul", "x", restored(net, (64, 24), "int4", 0, 32))
    y = net.node("Relu", net.node("Add", y, net.draw(24)))
    result = kept(net, y, inputs=WIDE)
    assert result.operators == {"QuantizedLinear": 1}
    multiplied(result, N=2, S=3)


@pytest.mark.parametrize("above", [False, True])
def test_transposed(above: bool) -> None:
    """A Transpose of the integers or of what is restored: scales lie along the other axis."""
    net = Net()
    if above:
        weight = net.node("Transpose", restored(net, (24, 64), "int8", 1, 32), perm=[1, 0])
    else:
        stored = net.node("Transpose", net.weight("w", integers(net, (24, 64), "int8")), perm=[1, 0])
        weight = net.node("DequantizeLinear", stored, net.weight("s", np.full(24, 0.5, np.float32)), axis=1)
    result = kept(net, net.node("MatMul", "x", weight))
    assert result.operators == {"QuantizedLinear": 1}
    multiplied(result, N=5)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
def test_gemm(transposed: int, beta: float) -> None:
    net = Net()
    weight = restored(net, (24, 64) if transposed else (64, 24), "uint8", transposed, 32, zeros=True)
    given = {"transB": transposed, "alpha": 0.5, "beta": beta}
    result = kept(net, net.node("Gemm", "x", weight, net.draw(24), **given))
    assert result.operators == {"QuantizedLinear": 1}
    multiplied(result, N=3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("depth", [64, 50])
def test_matmul_nbits(bits: int, zeros: bool, depth: int) -> None:
    net, columns, block = Net(), 24, 16
    blocks = -(-depth // block)
    inputs = [net.weight("w", net.random.integers(0, 256, (columns, blocks, block * bits // 8)).astype(np.uint8))]
    inputs.append(net.weight("s", net.random.uniform(0.01, 0.1, columns * blocks).astype(np.float32)))
    if zeros:
        inputs.append(net.weight("z", net.random.integers(0, 256, columns * -(-blocks * bits // 8)).astype(np.uint8)))
    given = {"K": depth, "N": columns, "bits": bits, "block_size": block, "domain": "com.microsoft"}
    y = net.node("MatMulNBits", "x", *inputs, **given)
    model = model_of_microsoft(net, {"x": ("float32", ["N", depth])}, y, columns)
    result = rewritten(model, quantized_weights=True)
    assert result.operators == {"QuantizedLinear": 1}
    multiplied(result, N=3)


def model_of_microsoft(net: Net, inputs: dict[str, Any], output: str, columns: int) -> onnx.ModelProto:
    """A model whose operators onnx knows no types of."""
    values = [helper.make_tensor_value_info(name, 1, shape) for name, (_, shape) in inputs.items()]
    result = helper.make_tensor_value_info(output, 1, ["N", columns])
    graph = helper.make_graph(net.nodes, "test", values, [result], net.weights)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10)


def test_used_elsewhere() -> None:
    """Weights that something else reads restored are restored for it alone."""
    net = Net()
    weight = restored(net, (64, 24), "int8", 1)
    result = kept(net, net.node("MatMul", "x", weight), net.node("ReduceSum", weight, keepdims=0))
    assert result.operators["QuantizedLinear"] == 1
    multiplied(result, N=3)


def test_what_does_not_stay() -> None:
    """Scales along K without a block, blocks that no kernel has, weights that vary: as they were."""
    for axis, block in ((0, 0), (1, 8), (0, 4)):
        net = Net()
        result = kept(net, net.node("MatMul", "x", restored(net, (64, 24), "int8", axis, block)))
        assert result.operators["QuantizedLinear"] == 0, (axis, block)
        multiplied(result, N=3)


def test_products_of_integers_are_left_to_others() -> None:
    """x was dequantized too: both become one product of integers."""
    net = Net()
    scale, zero = net.constant(0.05), net.constant(7, "uint8")
    x = net.node("DequantizeLinear", net.node("QuantizeLinear", "x", scale, zero), scale, zero)
    result = kept(net, net.node("MatMul", x, restored(net, (64, 24), "int8", 1)))
    assert result.operators["QuantizedLinear"] == 0 and result.operators["Linear"] == 1


def test_other_targets_restore_weights() -> None:
    net = Net()
    model = model_of(net, X, net.node("MatMul", "x", restored(net, (64, 24), "int4", 0, 32)), opset=21)
    assert rewritten(model).operators == {"Linear": 1}


def test_an_engine_keeps_them_in_four_bits() -> None:
    net = Net()
    y = net.node("MatMul", "x", restored(net, (64, 512), "int4", 0, 32))
    model = model_of(net, X, y, opset=21)
    engine = ingot.build(model, ingot.BuildConfig(profiles=[ingot.Profile(x=((1, 64), (4, 64), (20, 64)))], level=0))
    with ingot.Session(engine) as session:
        for rows in (1, 4, 20):
            x = np.random.default_rng(rows).standard_normal((rows, 64)).astype(np.float32)
            (mine,) = session.run({"x": x}).values()
            step = session.profile({"x": x})[0]
            assert "weight_only" in step.kernel and step.bytes < 64 * 512 + rows * 4 * 512, step
            np.testing.assert_allclose(mine, expected(model, x), rtol=1e-4, atol=3e-3)


def expected(model: onnx.ModelProto, x: Array) -> Array:
    """x by the restored weights."""
    held = {w.name: onnx.numpy_helper.to_array(w) for w in model.graph.initializer}
    weight = held["weight"].astype(np.float32) * np.repeat(held["scale"], 32, axis=0)
    return np.asarray(x @ weight)
