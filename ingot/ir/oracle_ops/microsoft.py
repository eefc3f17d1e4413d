"""com.microsoft operators that ONNX Runtime's optimisers and quantisers write: activations, norms, integer arithmetic.

Reference: onnxruntime/docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ingot.ir.oracle_ops.convolution import conv
from ingot.ir.oracle_ops.elementwise import erf
from ingot.ir.oracle_ops.pool import average_pool
from ingot.ir.oracle_ops.quantize import dequantize_linear, matmul_integer, quantize_linear
from ingot.ir.oracle_ops.table import MICROSOFT, meaning

Array = np.ndarray


def _wide(x: Array) -> Array:
    """float32 for the shorter floats."""
    return x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)


@meaning("FusedMatMul", "TransposeMatMul", domain=MICROSOFT)
def fused_matmul(a: Array, b: Array, *, alpha: float = 1.0, transA: int = 0, transB: int = 0, transBatchA: int = 0,
                 transBatchB: int = 0) -> Array:  # fmt: skip
    left, right = _transposed(a, transA, transBatchA), _transposed(b, transB, transBatchB)
    return (np.matmul(_wide(left), _wide(right)) * alpha).astype(a.dtype)


def _transposed(x: Array, matrix: int, batch: int) -> Array:
    if batch:
        x = x.transpose(*range(1, x.ndim - 1), 0, x.ndim - 1)
    return x.swapaxes(-1, -2) if matrix and x.ndim > 1 else x


def gelu_erf(x: Array) -> Array:
    """x/2 * (1 + erf(x/√2))"""
    return (_wide(x) * 0.5 * (1 + erf(_wide(x) / np.sqrt(2)))).astype(x.dtype)


@meaning("Gelu", domain=MICROSOFT)
def gelu(x: Array) -> Array:
    return gelu_erf(x)


@meaning("BiasGelu", domain=MICROSOFT)
def bias_gelu(x: Array, bias: Array) -> Array:
    return gelu_erf(x + bias)


@meaning("FastGelu", domain=MICROSOFT)
def fast_gelu(x: Array, bias: Array | None = None) -> Array:
    total = _wide(x if bias is None else x + bias)
    inner = 0.7978845608028654 * (total + 0.044715 * total**3)
    return (0.5 * total * (1 + np.tanh(inner))).astype(x.dtype)


@meaning("QuickGelu", domain=MICROSOFT)
def quick_gelu(x: Array, *, alpha: float = 1.702) -> Array:
    return (_wide(x) * _sigmoid(alpha * _wide(x))).astype(x.dtype)


def _sigmoid(x: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


_ACTIVATIONS: dict[str, Callable[..., Array]] = {
    "": lambda x: x,
    "Relu": lambda x: np.maximum(x, 0),
    "Tanh": np.tanh,
    "Sigmoid": _sigmoid,
    "LeakyRelu": lambda x, alpha=0.01: np.where(x < 0, alpha * x, x),
    "Clip": lambda x, low=-np.inf, high=np.inf: np.clip(x, low, high),
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: np.clip(alpha * x + beta, 0, 1),
}


@meaning("FusedConv", domain=MICROSOFT)
def fused_conv(x: Array, weight: Array, bias: Array | None = None, residual: Array | None = None, *,
               activation: str = "", activation_params: list[float] | None = None,
               **attributes: Any) -> Array:  # fmt: skip
    y = conv(x, weight, bias, **attributes)
    return _ACTIVATIONS[activation](y if residual is None else y + residual, *(activation_params or ())).astype(x.dtype)


@meaning("FusedGemm", domain=MICROSOFT)
def fused_gemm(a: Array, b: Array, c: Array | None = None, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0,
               transB: int = 0, activation: str = "", activation_alpha: float | None = None,
               activation_beta: float | None = None, activation_gamma: float | None = None) -> Array:  # fmt: skip
    y = alpha * np.matmul(_transposed(a, transA, 0), _transposed(b, transB, 0))
    settings = [v for v in (activation_alpha, activation_beta) if v is not None]
    return _ACTIVATIONS[activation](y if c is None else y + beta * c, *settings).astype(a.dtype)


def _normalised(x: Array, epsilon: float, centre: bool) -> tuple[Array, Array, Array]:
    """(x normalised over its last axis, mean, 1 / standard deviation)"""
    mean = x.mean(axis=-1, keepdims=True) if centre else np.zeros((*x.shape[:-1], 1), x.dtype)
    inverse = 1 / np.sqrt(np.square(x - mean).mean(axis=-1, keepdims=True) + epsilon)
    return (x - mean) * inverse, mean, inverse


@meaning("SkipLayerNormalization", domain=MICROSOFT)
def skip_layer_normalization(x: Array, skip: Array, gamma: Array, beta: Array | None = None, bias: Array | None = None,
                             *, epsilon: float = 1e-12) -> tuple[Array, ...]:  # fmt: skip
    """Layer norm of x + skip + bias; also the mean, the inverse deviation and that sum."""
    total = _wide(x) + _wide(skip) + (0 if bias is None else _wide(bias))
    y, mean, inverse = _normalised(total, epsilon, centre=True)
    y = y * _wide(gamma) + (0 if beta is None else _wide(beta))
    return y.astype(x.dtype), mean, inverse, total.astype(x.dtype)


@meaning("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_rms_normalization(x: Array, skip: Array, gamma: Array, bias: Array | None = None, *,
                           epsilon: float = 1e-12) -> tuple[Array, ...]:  # fmt: skip
    """RMS norm of x + skip + bias; also (unused), the inverse root mean square and that sum."""
    total = _wide(x) + _wide(skip) + (0 if bias is None else _wide(bias))
    y, mean, inverse = _normalised(total, epsilon, centre=False)
    return (y * _wide(gamma)).astype(x.dtype), mean, inverse, total.astype(x.dtype)


@meaning("SimplifiedLayerNormalization", domain=MICROSOFT)
def rms_normalization(x: Array, scale: Array, *, axis: int = -1, epsilon: float = 1e-5,
                      stash_type: int = 1) -> tuple[Array, Array]:  # fmt: skip
    axes = tuple(range(axis % x.ndim, x.ndim))
    inverse = 1 / np.sqrt(np.square(_wide(x)).mean(axis=axes, keepdims=True) + epsilon)
    return (_wide(x) * inverse * _wide(scale)).astype(x.dtype), inverse


@meaning("EmbedLayerNormalization", domain=MICROSOFT)
def embed_layer_normalization(input_ids: Array, segment_ids: Array | None, words: Array, positions: Array,
                              segments: Array | None, gamma: Array, beta: Array, mask: Array | None = None,
                              position_ids: Array | None = None, *, epsilon: float = 1e-12,
                              mask_index_type: int = 1) -> tuple[Array, ...]:  # fmt: skip
    """Layer norm of word + position + segment embeddings; also the mask's row sums and the sum of embeddings."""
    places = np.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
    total = _wide(words)[input_ids] + _wide(positions)[places]
    if segments is not None and segment_ids is not None:
        total = total + _wide(segments)[segment_ids]
    y = _normalised(total, epsilon, centre=True)[0] * _wide(gamma) + _wide(beta)
    counts = np.zeros(input_ids.shape[0], np.int32) if mask is None else mask.sum(axis=1).astype(np.int32)
    return y.astype(words.dtype), counts, total.astype(words.dtype)


# quantised element-wise operators: dequantise, compute in float32, quantise


def _binary(op_type: str, function: Callable[[Array, Array], Array]) -> None:
    def run(a: Array, a_scale: Array, a_zero: Array | None, b: Array, b_scale: Array, b_zero: Array | None,
            y_scale: Array, y_zero: Array | None = None) -> Array:  # fmt: skip
        real = function(dequantize_linear(a, a_scale, a_zero), dequantize_linear(b, b_scale, b_zero))
        return quantize_linear(real, y_scale, _zero(y_zero, a))

    meaning(op_type, domain=MICROSOFT)(run)


def _unary(op_type: str, function: Callable[..., Array]) -> None:
    def run(x: Array, x_scale: Array, x_zero: Array | None, y_scale: Array, y_zero: Array | None = None,
            **attributes: Any) -> Array:  # fmt: skip
        return quantize_linear(function(dequantize_linear(x, x_scale, x_zero), **attributes), y_scale, _zero(y_zero, x))

    meaning(op_type, domain=MICROSOFT)(run)


def _zero(zero: Array | None, like: Array) -> Array:
    return np.zeros((), like.dtype) if zero is None else zero


def _softmax(x: Array, *, axis: int = -1, opset: int = 13) -> Array:
    shifted = x if opset >= 13 else x.reshape(int(np.prod(x.shape[: axis % x.ndim])), -1)
    powers = np.exp(shifted - shifted.max(axis=axis if opset >= 13 else 1, keepdims=True))
    return (powers / powers.sum(axis=axis if opset >= 13 else 1, keepdims=True)).reshape(x.shape)


def _average(x: Array, *, channels_last: int = 0, **attributes: Any) -> Array:
    if not channels_last:
        return average_pool(x, **attributes)
    return np.moveaxis(average_pool(np.moveaxis(x, -1, 1), **attributes), 1, -1)


def _global_average(x: Array, *, channels_last: int = 0) -> Array:
    axes = tuple(range(1, x.ndim - 1)) if channels_last else tuple(range(2, x.ndim))
    return np.asarray(x.mean(axis=axes, keepdims=True))


def _mean(x: Array, *, axes: list[int] | None = None, keepdims: int = 1) -> Array:
    mean: Array = np.mean(x, axis=None if axes is None else tuple(axes), keepdims=True)
    return mean if keepdims else np.squeeze(mean, None if axes is None else tuple(axes))


_binary("QLinearAdd", np.add)
_binary("QLinearMul", np.multiply)
_unary("QLinearSigmoid", _sigmoid)
_unary("QLinearLeakyRelu", lambda x, *, alpha=0.01: np.where(x < 0, alpha * x, x))
_unary("QLinearSoftmax", _softmax)
_unary("QLinearAveragePool", _average)
_unary("QLinearGlobalAveragePool", _global_average)
_unary("QLinearReduceMean", _mean)


@meaning("QLinearConcat", domain=MICROSOFT)
def qlinear_concat(y_scale: Array, y_zero: Array, *operands: Array, axis: int) -> Array:
    triples = zip(operands[::3], operands[1::3], operands[2::3], strict=True)
    return quantize_linear(np.concatenate([dequantize_linear(*triple) for triple in triples], axis), y_scale, y_zero)


@meaning("QLinearWhere", domain=MICROSOFT)
def qlinear_where(condition: Array, x: Array, x_scale: Array, x_zero: Array, y: Array, y_scale: Array, y_zero: Array,
                  z_scale: Array, z_zero: Array) -> Array:  # fmt: skip
    chosen = np.where(condition, dequantize_linear(x, x_scale, x_zero), dequantize_linear(y, y_scale, y_zero))
    return quantize_linear(chosen, z_scale, z_zero)


@meaning("QGemm", domain=MICROSOFT)
def qgemm(a: Array, a_scale: Array, a_zero: Array, b: Array, b_scale: Array, b_zero: Array, c: Array | None = None,
          y_scale: Array | None = None, y_zero: Array | None = None, *, alpha: float = 1.0, transA: int = 0,
          transB: int = 0) -> Array:  # fmt: skip
    """Integer product plus int32 bias, scaled; float32 where no output scale is given."""
    total = matmul_integer(_transposed(a, transA, 0), _transposed(b, transB, 0), a_zero, b_zero).astype(np.float64)
    real = (total + (0 if c is None else c)) * (alpha * a_scale.astype(np.float64) * b_scale)
    return real.astype(np.float32) if y_scale is None else quantize_linear(real, y_scale, _zero(y_zero, a))


@meaning("MatMulIntegerToFloat", domain=MICROSOFT)
def matmul_integer_to_float(a: Array, b: Array, a_scale: Array, b_scale: Array, a_zero: Array | None = None,
                            b_zero: Array | None = None, bias: Array | None = None) -> Array:  # fmt: skip
    product = matmul_integer(a, b, a_zero, b_zero) * (a_scale * b_scale)
    return (product + (0 if bias is None else bias)).astype(a_scale.dtype)


@meaning("DynamicQuantizeMatMul", domain=MICROSOFT)
def dynamic_quantize_matmul(a: Array, b: Array, b_scale: Array, b_zero: Array | None = None,
                            bias: Array | None = None) -> Array:  # fmt: skip
    """a is quantised to uint8 over its own range, then multiplied in integers."""
    low, high = min(float(a.min()), 0.0), max(float(a.max()), 0.0)
    scale = np.float32((high - low) / 255) or np.float32(1)
    zero = np.array(np.clip(np.rint(-low / scale), 0, 255), np.uint8)
    return matmul_integer_to_float(quantize_linear(a, scale, zero), b, scale, b_scale, zero, b_zero, bias)


@meaning("MatMulNBits", domain=MICROSOFT)
def matmul_nbits(a: Array, b: Array, scales: Array, zeros: Array | None = None, groups: Array | None = None,
                 bias: Array | None = None, *, K: int, N: int, bits: int = 4, block_size: int,
                 accuracy_level: int = 0, weight_prepacked: int = 0) -> Array:  # fmt: skip
    """a[…,K] @ w[N,K]ᵀ, w stored in blocks of `bits`-bit integers with a scale (and zero point) each."""
    blocks = -(-K // block_size)
    values = unpacked(b.reshape(N, blocks, -1), bits).astype(np.float32)
    middle = np.full((N, blocks), 1 << (bits - 1), np.float32)
    if zeros is not None:
        packed = zeros.dtype == np.uint8
        middle = (unpacked(zeros.reshape(N, -1), bits)[:, :blocks] if packed else zeros).astype(np.float32)
        middle = middle.reshape(N, blocks)
    place = np.arange(blocks * block_size) // block_size if groups is None else groups
    flat = values.reshape(N, -1)
    weight = (flat - middle[:, place[: flat.shape[1]]]) * scales.astype(np.float32).reshape(N, blocks)[:, place]
    product = _wide(a) @ weight[:, :K].T
    return (product + (0 if bias is None else bias)).astype(a.dtype)


def unpacked(packed: Array, bits: int) -> Array:
    """Little-endian `bits`-bit integers along the last axis."""
    if bits == 8:
        return packed
    digits = np.unpackbits(packed, axis=-1, bitorder="little")
    digits = digits[..., : digits.shape[-1] // bits * bits].reshape(*packed.shape[:-1], -1, bits)
    return digits @ (1 << np.arange(bits)).astype(np.uint8)
