"""ParallelLinear."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ingot.errors import GraphError
from ingot.ir.elementwise import Array, wide
from ingot.ir.ops_table import Attribute, TensorType, op


def _parallel_type(x: TensorType, weight: TensorType, bias: TensorType, *,
                   sizes: Sequence[int]) -> tuple[TensorType, ...]:  # fmt: skip
    depth, width = weight.shape
    if bias.shape != (width,) or sum(sizes) != width or (isinstance(x.shape[-1], int) and x.shape[-1] != depth):
        raise GraphError(f"ParallelLinear: x {x.shape}, weight {weight.shape}, bias {bias.shape} do not make {sizes}")
    return tuple(TensorType(x.dtype, (*x.shape[:-1], size)) for size in sizes)


@op("ParallelLinear", "x weight bias", _parallel_type, sizes=Attribute("ints"))
def parallel_linear(x: Array, weight_KN: Array, bias_N: Array, *, sizes: Sequence[int]) -> tuple[Array, ...]:
    """x[..., K] @ weight[K, N] + bias[N], its columns divided into outputs of these sizes"""
    whole = np.matmul(wide(x), wide(weight_KN)) + wide(bias_N)
    return tuple(np.split(whole, np.cumsum(sizes)[:-1], axis=-1))
