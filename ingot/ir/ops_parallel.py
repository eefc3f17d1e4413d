"""ParallelLinear and ParallelConv: one product, its columns or channels divided among several outputs. GatedLinear: one
whose halves become one result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ingot.errors import GraphError
from ingot.ir import expression as expressions
from ingot.ir.elementwise import Array, wide
from ingot.ir.ops_table import Attribute, TensorType, infer, meaning, narrowed, op


def _parallel_type(x: TensorType, weight: TensorType, bias: TensorType, *, sizes: Sequence[int], dtype: str,
                   **_: Any) -> tuple[TensorType, ...]:  # fmt: skip
    depth, width = weight.shape
    if bias.shape != (width,) or sum(sizes) != width or (isinstance(x.shape[-1], int) and x.shape[-1] != depth):
        raise GraphError(f"ParallelLinear: x {x.shape}, weight {weight.shape}, bias {bias.shape} do not make {sizes}")
    return tuple(TensorType(dtype or x.dtype, (*x.shape[:-1], size)) for size in sizes)


def with_bias(scale: float, dtype: str) -> str:
    """The epilogue of such a product where it is one output: scale * sums + bias in float32, as `dtype`."""
    if scale == 1.0:
        return f"Cast %0 -> float32; Cast %1 -> float32; Add $0 $1 -> float32; Cast $2 -> {dtype}"
    return (f"Cast %0 -> float32; Cast %1 -> float32; Mul $0 {scale!r} -> float32; Add $2 $1 -> float32; "
            f"Cast $3 -> {dtype}")  # fmt: skip


@op("ParallelLinear", "x weight bias", _parallel_type, sizes=Attribute("ints"), scale=Attribute("float", 1.0),
    dtype=Attribute("text", ""))  # fmt: skip
def parallel_linear(x: Array, weight_KN: Array, bias_N: Array, *, sizes: Sequence[int], scale: float,
                    dtype: str) -> tuple[Array, ...]:  # fmt: skip
    """scale * (x[..., K] @ weight[K, N]) + bias[N], its columns divided into outputs of these sizes and this dtype"""
    whole = np.matmul(wide(x), wide(weight_KN)) * np.float32(scale) + wide(bias_N)
    whole = narrowed(whole, dtype) if dtype else whole
    return tuple(np.split(whole, np.cumsum(sizes)[:-1], axis=-1))


def _gated_type(x: TensorType, weight: TensorType, bias: TensorType, *, after: str) -> tuple[TensorType, ...]:
    depth, width = weight.shape
    if not isinstance(width, int) or width % 2 or bias.shape != (width,) or x.shape[-1] != depth:
        raise GraphError(f"GatedLinear: x {x.shape}, weight {weight.shape}, bias {bias.shape} do not make two halves")
    return (TensorType(expressions.parse(after).dtype or x.dtype, (*x.shape[:-1], width // 2)),)


@op("GatedLinear", "x weight bias", _gated_type, after=Attribute("text"))
def gated_linear(x: Array, weight_KN: Array, bias_N: Array, *, after: str) -> tuple[Array, ...]:
    """after(first, second), the halves of the columns of x @ weight + bias in float32"""
    whole = np.matmul(wide(x), wide(weight_KN)) + wide(bias_N)
    return (np.asarray(expressions.evaluate(expressions.parse(after), np.split(whole, 2, axis=-1))),)


def _conv_type(x: TensorType, weight: TensorType, *extras: TensorType, sizes: Sequence[int], after: str,
               **settings: Any) -> tuple[TensorType, ...]:  # fmt: skip
    (whole,) = infer("Conv", [x, weight, *extras], {**settings, "epilogue": after})
    if sum(sizes) != whole.shape[1]:
        raise GraphError(f"ParallelConv: its {whole.shape[1]} channels are not divided by {sizes}")
    return tuple(TensorType(whole.dtype, (whole.shape[0], size, *whole.shape[2:])) for size in sizes)


@op("ParallelConv", "x weight *extras", _conv_type, strides=Attribute("ints"), pads=Attribute("ints"),
    dilations=Attribute("ints"), group=Attribute("int", 1), sizes=Attribute("ints"), after=Attribute("text", ""))
def parallel_conv(x: Array, weight: Array, *extras: Array, sizes: Sequence[int], after: str,
                  **settings: Any) -> tuple[Array, ...]:  # fmt: skip
    """A Conv with the epilogue `after`, its channels divided into outputs of these sizes"""
    (whole,) = meaning("Conv")(x, weight, *extras, **settings, epilogue=after)
    return tuple(np.split(whole, np.cumsum(sizes)[:-1], axis=1))
