"""Softmaxes, batch and local response normalisation, which onnx.reference has wrong for older opsets or some shapes."""

from __future__ import annotations

import numpy as np

from ingot.ir.oracle_ops.convolution import working_dtype
from ingot.ir.oracle_ops.table import meaning


def _softmax(x: np.ndarray, axes: int | tuple[int, ...], log: bool) -> np.ndarray:
    work = x.astype(working_dtype(x.dtype), copy=False)
    shifted = work - work.max(axis=axes, keepdims=True)
    sums = np.exp(shifted).sum(axis=axes, keepdims=True)
    result = shifted - np.log(sums) if log else np.exp(shifted) / sums
    return np.asarray(result).astype(x.dtype)


def _hardmax(x: np.ndarray, axis: int) -> np.ndarray:
    result = np.zeros_like(x)
    np.put_along_axis(result, x.argmax(axis=axis, keepdims=True), 1, axis=axis)
    return result


def _flat_axes(x: np.ndarray, axis: int) -> tuple[int, ...]:
    """All axes from `axis` on: before opset 13 they count as one."""
    return tuple(range(axis % max(x.ndim, 1), x.ndim))


@meaning("Softmax")
def softmax(x: np.ndarray, *, axis: int = 1) -> np.ndarray:
    return _softmax(x, _flat_axes(x, axis), log=False)


@meaning("Softmax", since=13)
def softmax_13(x: np.ndarray, *, axis: int = -1) -> np.ndarray:
    return _softmax(x, axis, log=False)


@meaning("LogSoftmax")
def log_softmax(x: np.ndarray, *, axis: int = 1) -> np.ndarray:
    return _softmax(x, _flat_axes(x, axis), log=True)


@meaning("LogSoftmax", since=13)
def log_softmax_13(x: np.ndarray, *, axis: int = -1) -> np.ndarray:
    return _softmax(x, axis, log=True)


@meaning("Hardmax")
def hardmax(x: np.ndarray, *, axis: int = 1) -> np.ndarray:
    """1 at the first largest element of the flattened axes."""
    kept = x.shape[: axis % max(x.ndim, 1)]
    return _hardmax(x.reshape(*kept, -1), -1).reshape(x.shape)


@meaning("Hardmax", since=13)
def hardmax_13(x: np.ndarray, *, axis: int = -1) -> np.ndarray:
    return _hardmax(x, axis)


@meaning("BatchNormalization")
def batch_normalization(
    x: np.ndarray, scale: np.ndarray, bias: np.ndarray, mean: np.ndarray, variance: np.ndarray, *,
    epsilon: float = 1e-5, momentum: float = 0.9, is_test: int = 1, spatial: int = 1,
) -> np.ndarray:  # fmt: skip
    """Before opset 14 as in inference, whatever the unused momentum says."""
    shape = (-1, *[1] * (x.ndim - 2)) if spatial else x.shape[1:]
    scale, bias, mean, variance = (v.reshape(shape) for v in (scale, bias, mean, variance))
    return (scale * (x - mean) / np.sqrt(variance + epsilon) + bias).astype(x.dtype)


@meaning("BatchNormalization", since=14)
def batch_normalization_14(
    x: np.ndarray, scale: np.ndarray, bias: np.ndarray, mean: np.ndarray, variance: np.ndarray, *,
    epsilon: float = 1e-5, momentum: float = 0.9, training_mode: int = 0,
) -> object:  # fmt: skip
    """In training the statistics are the batch's, and the running ones follow them."""
    if not training_mode:
        return batch_normalization(x, scale, bias, mean, variance, epsilon=epsilon)
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    work = x.astype(working_dtype(x.dtype), copy=False)
    seen_mean, seen_variance = work.mean(axis=axes), work.var(axis=axes)
    y = batch_normalization(x, scale, bias, seen_mean, seen_variance, epsilon=epsilon)
    running = [(old * momentum + new * (1 - momentum)).astype(old.dtype)
               for old, new in ((mean, seen_mean), (variance, seen_variance))]  # fmt: skip
    return (y, *running)


@meaning("LRN")
def local_response_normalization(x: np.ndarray, *, size: int, alpha: float = 1e-4, beta: float = 0.75,
                                 bias: float = 1.0) -> np.ndarray:  # fmt: skip
    """x / (bias + alpha / size * sum of squares over neighbouring channels) ** beta"""
    work = x.astype(working_dtype(x.dtype), copy=False)
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    squares = np.pad(work * work, [(0, 0), (before, after), *[(0, 0)] * (x.ndim - 2)])
    sums = sum(squares[:, start : start + x.shape[1]] for start in range(size))
    return (work / (bias + alpha / size * sums) ** beta).astype(x.dtype)
