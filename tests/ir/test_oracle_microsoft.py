"""com.microsoft meanings and the recurrent operators, beside ONNX Runtime."""

import numpy as np
import onnx_ir
import pytest
from onnx import helper

from ingot.importers.onnx import load
from ingot.ir import oracle, shapes

onnxruntime = pytest.importorskip("onnxruntime")
random = np.random.default_rng(7)


def f32(*shape, scale=1.0):
    return (random.standard_normal(shape) * scale).astype(np.float32)


def u8(*shape, low=0, high=256):
    return random.integers(low, high, shape).astype(np.uint8)


def i8(*shape):
    return random.integers(-127, 128, shape).astype(np.int8)


def i32(values):
    return np.array(values, np.int32)


OPSETS = {"": 17, "com.microsoft": 1}
DATA_DEPENDENT = ("GroupQueryAttention",)
S = np.float32(0.02)
Z = np.uint8(120)
MASK = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], np.int32)
ANGLES = np.outer(np.arange(16), 1 / 3 ** np.arange(8)).astype(np.float32)
COS, SIN = np.cos(ANGLES), np.sin(ANGLES)
EMBED = [random.integers(0, 9, (2, 5)).astype(np.int32), random.integers(0, 2, (2, 5)).astype(np.int32),
         f32(9, 8), f32(6, 8), f32(2, 8), f32(8), f32(8), MASK]  # fmt: skip
PAST = f32(2, 2, 2, 3, 4)

# (operator, inputs, attributes, how many outputs)
CASES = [
    ("FusedMatMul", [f32(2, 3, 4), f32(2, 5, 4)], {"alpha": 0.5, "transB": 1}, 1),
    ("FusedMatMul", [f32(4, 3), f32(4, 5)], {"transA": 1}, 1),
    ("FusedMatMul", [f32(3, 2, 4), f32(2, 4, 5)], {"transBatchA": 1, "alpha": 2.0}, 1),
    ("Gelu", [f32(3, 7)], {}, 1),
    ("BiasGelu", [f32(3, 7), f32(7)], {}, 1),
    ("FastGelu", [f32(3, 7), f32(7)], {}, 1),
    ("FastGelu", [f32(3, 7)], {}, 1),
    ("QuickGelu", [f32(3, 7)], {"alpha": 1.5}, 1),
    ("FusedConv", [f32(1, 3, 6, 6), f32(4, 3, 3, 3), f32(4)], {"activation": "Relu", "pads": [1, 1, 1, 1]}, 1),
    ("FusedConv", [f32(1, 3, 6, 6), f32(4, 3, 3, 3), f32(4)],
     {"activation": "LeakyRelu", "activation_params": [0.2], "strides": [2, 2]}, 1),
    ("FusedGemm", [f32(3, 4), f32(5, 4), f32(5)], {"activation": "Relu", "transB": 1, "alpha": 0.5}, 1),
    ("SkipLayerNormalization", [f32(2, 5, 8), f32(2, 5, 8), f32(8), f32(8), f32(8)], {"epsilon": 1e-5}, (0, 3)),
    ("SkipLayerNormalization", [f32(2, 5, 8), f32(2, 5, 8), f32(8)], {}, 1),
    ("SkipSimplifiedLayerNormalization", [f32(2, 5, 8), f32(2, 5, 8), f32(8)], {"epsilon": 1e-5}, (0, 3)),
    ("EmbedLayerNormalization", EMBED, {"epsilon": 1e-5}, 2),
    ("EmbedLayerNormalization", [EMBED[0], None, EMBED[2], EMBED[3], None, EMBED[5], EMBED[6]], {}, 2),
    ("QLinearAdd", [u8(3, 4), S, Z, u8(3, 4), np.float32(0.03), np.uint8(99), np.float32(0.05), Z], {}, 1),
    ("QLinearMul", [i8(3, 4), S, np.int8(3), i8(4), S, np.int8(-5), np.float32(0.04), np.int8(7)], {}, 1),
    ("QLinearSigmoid", [u8(30), S, Z, np.float32(1 / 256), np.uint8(0)], {}, 1),
    ("QLinearLeakyRelu", [u8(30), S, Z, S, np.uint8(50)], {"alpha": 0.1}, 1),
    ("QLinearSoftmax", [u8(3, 7), S, Z, np.float32(1 / 256), np.uint8(0)], {"axis": -1, "opset": 13}, 1),
    ("QLinearAveragePool", [u8(1, 2, 6, 6), S, Z, np.float32(0.015), np.uint8(110)],
     {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, 1),
    ("QLinearGlobalAveragePool", [u8(2, 3, 5, 5), S, Z, np.float32(0.015), np.uint8(110)], {}, 1),
    ("QLinearConcat", [np.float32(0.03), Z, u8(2, 3), S, Z, u8(2, 4), np.float32(0.04), np.uint8(9)], {"axis": 1}, 1),
    ("QGemm", [u8(3, 4), S, Z, i8(4, 5), np.float32(0.01), np.int8(0), i32([5, -9, 300, 0, 2]), np.float32(0.05), Z],
     {}, 1),
    ("QGemm", [u8(3, 4), S, Z, i8(5, 4), np.float32(0.01), np.int8(0)], {"transB": 1}, 1),
    ("MatMulIntegerToFloat", [u8(3, 4), i8(4, 5), S, np.float32(0.01), Z, np.int8(2), f32(5)], {}, 1),
    ("DynamicQuantizeMatMul", [f32(3, 4), i8(4, 5), np.float32(0.01), np.int8(1), f32(5)], {}, 1),
    ("MatMulNBits", [f32(3, 64), u8(6, 2, 16), f32(12)], {"K": 64, "N": 6, "bits": 4, "block_size": 32}, 1),
    ("MatMulNBits", [f32(3, 64), u8(6, 4, 8), f32(24), u8(12)], {"K": 64, "N": 6, "bits": 4, "block_size": 16}, 1),
    ("DequantizeLinear", [u8(3, 4), S, Z], {}, 1),
    ("QuantizeLinear", [f32(3, 4), S, Z], {}, 1),
    ("Attention", [f32(2, 5, 8), f32(8, 24), f32(24)], {"num_heads": 2}, 2),
    ("Attention", [f32(2, 5, 8), f32(8, 24), f32(24), MASK], {"num_heads": 2, "scale": 0.3}, 1),
    ("Attention", [f32(2, 5, 8), f32(8, 24), f32(24), i32([4, 3])], {"num_heads": 2}, 1),
    ("Attention", [f32(2, 5, 8), f32(8, 24), f32(24), None, PAST], {"num_heads": 2, "unidirectional": 1}, 2),
    ("MultiHeadAttention", [f32(2, 5, 8), f32(2, 6, 8), f32(2, 6, 12)], {"num_heads": 2}, 1),
    ("MultiHeadAttention", [f32(2, 5, 8), f32(2, 5, 8), f32(2, 5, 8), f32(24), MASK], {"num_heads": 2}, 1),
    ("MultiHeadAttention", [f32(2, 5, 8), f32(2, 5, 8), f32(2, 5, 8), None, None, f32(1, 2, 5, 8), PAST[0], PAST[1]],
     {"num_heads": 2}, 3),
    ("MultiHeadAttention", [f32(2, 5, 8), f32(2, 5, 8), f32(2, 5, 8)], {"num_heads": 2, "unidirectional": 1}, 1),
    ("GroupQueryAttention", [f32(2, 5, 32), f32(2, 5, 16), f32(2, 5, 16), None, None, i32([4, 4]), i32(5)],
     {"num_heads": 4, "kv_num_heads": 2}, 3),
    ("GroupQueryAttention", [f32(2, 1, 64), f32(2, 1, 32), f32(2, 1, 32), f32(2, 2, 6, 16), f32(2, 2, 6, 16),
                             i32([5, 3]), i32(6), COS, SIN],
     {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1}, 3),
    ("GroupQueryAttention", [f32(1, 5, 128), None, None, None, None, i32([4]), i32(5), COS, SIN],
     {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1, "rotary_interleaved": 1, "local_window_size": 3,
      "softcap": 5.0}, 3),
    ("RotaryEmbedding", [f32(2, 3, 64), np.array([[0, 1, 2], [4, 5, 6]]), COS, SIN], {}, 1),
    ("RotaryEmbedding", [f32(2, 4, 3, 16), np.array([2]), COS, SIN], {"interleaved": 1}, 1),
]  # fmt: skip
T, B, H = 5, 3, 6
RECURRENT = [
    ("LSTM", [f32(T, B, 4), f32(1, 4 * H, 4), f32(1, 4 * H, H), f32(1, 8 * H)], {}, 3),
    ("LSTM", [f32(T, B, 4), f32(2, 4 * H, 4), f32(2, 4 * H, H), f32(2, 8 * H), i32([5, 2, 3]), f32(2, B, H),
              f32(2, B, H), f32(2, 3 * H)], {"direction": "bidirectional", "clip": 1.5}, 3),
    ("LSTM", [f32(T, B, 4), f32(1, 4 * H, 4), f32(1, 4 * H, H)],
     {"direction": "reverse", "input_forget": 1, "activations": ["HardSigmoid", "Softsign", "Relu"],
      "activation_alpha": [0.3], "activation_beta": [0.4]}, 3),
    ("GRU", [f32(T, B, 4), f32(2, 3 * H, 4), f32(2, 3 * H, H), f32(2, 6 * H), i32([5, 2, 3]), f32(2, B, H)],
     {"direction": "bidirectional", "linear_before_reset": 1}, 2),
    ("GRU", [f32(T, B, 4), f32(1, 3 * H, 4), f32(1, 3 * H, H), f32(1, 6 * H)], {"direction": "reverse"}, 2),
    ("RNN", [f32(T, B, 4), f32(1, H, 4), f32(1, H, H), f32(1, 2 * H), i32([1, 5, 4])],
     {"activations": ["Affine"], "activation_alpha": [0.5], "activation_beta": [0.1]}, 2),
]  # fmt: skip


def model_of(op_type, domain, inputs, attributes, wanted):
    """A model of one node; its outputs have the types that the oracle gives them, but no extents."""
    wanted = tuple(range(wanted)) if isinstance(wanted, int) else wanted
    names = ["" if value is None else f"x{i}" for i, value in enumerate(inputs)]
    outputs = [f"y{i}" if i in wanted else "" for i in range(max(wanted) + 1)]
    extra = {} if domain else {"hidden_size": H}
    node = helper.make_node(op_type, names, outputs, "the_node", domain=domain, **extra, **attributes)
    infos = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
             for name, value in zip(names, inputs, strict=True) if value is not None]  # fmt: skip
    results = oracle.evaluate_node(node, inputs, OPSETS)
    typed = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(result.dtype), [None] * result.ndim)
             for name, result in zip(outputs, results, strict=False) if name]  # fmt: skip
    graph = helper.make_graph([node], "g", infos, typed)
    opsets = [helper.make_opsetid(*entry) for entry in OPSETS.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def check(op_type, domain, inputs, attributes, wanted):
    feeds = {f"x{i}": np.asarray(value) for i, value in enumerate(inputs) if value is not None}
    model = model_of(op_type, domain, [None if v is None else np.asarray(v) for v in inputs], attributes, wanted)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    expected = dict(zip(names, session.run(names, feeds), strict=True))
    actual = oracle.evaluate_model(load(model), feeds)
    imported = load(model)
    shapes.infer(imported)
    for output in imported.graph.outputs:
        reference, result = expected[output.name], actual[output.name]
        assert (reference.dtype, reference.shape) == (result.dtype, result.shape)
        inferred = shapes.shape_of(output)
        assert len(inferred) == reference.ndim
        for known, size in zip(inferred, reference.shape, strict=True):
            assert known == size or (op_type in DATA_DEPENDENT and shapes.is_data_dependent(known))
        if reference.dtype.kind in "iu":
            assert np.abs(reference.astype(int) - result.astype(int)).max() <= 1
        else:
            np.testing.assert_allclose(result, reference, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_microsoft_operators(case):
    op_type, *rest = case
    check(op_type, "com.microsoft", *rest)


@pytest.mark.parametrize("case", RECURRENT, ids=lambda case: case[0])
def test_recurrent_operators(case):
    op_type, *rest = case
    check(op_type, "", *rest)


@pytest.mark.parametrize("op_type", ["LSTM", "GRU", "RNN"])
def test_the_batch_first_layout(op_type):
    _, inputs, attributes, count = next(case for case in RECURRENT if case[0] == op_type)
    attributes = {**attributes, "hidden_size": H}
    plain = oracle.evaluate_node(helper.make_node(op_type, [f"x{i}" for i in range(len(inputs))], list("abc"[:count]),
                                                  **attributes), inputs, {"": 17})  # fmt: skip
    first = [inputs[0].swapaxes(0, 1), *inputs[1:5], *(v.swapaxes(0, 1) for v in inputs[5:7]), *inputs[7:]]
    node = helper.make_node(op_type, [f"x{i}" for i in range(len(inputs))], list("abc"[:count]), layout=1, **attributes)
    turned = oracle.evaluate_node(node, first, {"": 17})
    np.testing.assert_array_equal(turned[0], plain[0].transpose(2, 0, 1, 3))
    for last, expected in zip(turned[1:], plain[1:], strict=True):
        np.testing.assert_array_equal(last, expected.swapaxes(0, 1))


def test_an_operator_without_meaning_is_refused_by_name():
    node = helper.make_node("Sampling", ["x"], ["y"], "sampler", domain="com.microsoft")
    with pytest.raises(Exception, match=r"com\.microsoft::Sampling"):
        oracle.evaluate_node(node, [f32(2)], OPSETS)
    assert isinstance(load(model_of("Gelu", "com.microsoft", [f32(2)], {}, 1)), onnx_ir.Model)
