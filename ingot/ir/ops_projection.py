"""Projection: a product with the norm before it and whatever is made of its columns behind it, as one operator.

Few rows wait for memory at every launch: norm, product, gate and residual in one go is what a decoded token is fast by.
"""

from __future__ import annotations

import numpy as np

from ingot.errors import GraphError
from ingot.ir import expression as expressions
from ingot.ir.elementwise import Array, wide
from ingot.ir.ops_table import Attribute, TensorType, op


def _type(x: TensorType, weight: TensorType, norm: TensorType | None, *operands: TensorType, parts: int, epsilon: float,
          expression: str) -> TensorType:  # fmt: skip
    depth, width = weight.shape
    if x.shape[-1] != depth or not isinstance(width, int) or width % parts:
        raise GraphError(f"Projection: x {x.shape} and {parts} parts do not fit weight {weight.shape}")
    dtypes = ["float32"] * parts + [operand.dtype for operand in operands]
    dtype = expressions.result_dtype(expressions.parse(expression), dtypes)
    return TensorType(dtype, (*x.shape[:-1], width // parts))


@op("Projection", "x weight norm? *operands", _type, parts=Attribute("int", 1), epsilon=Attribute("float", 1e-6),
    expression=Attribute("expression", ""))  # fmt: skip
def projection(x: Array, weight_KN: Array, norm_K: Array | None = None, *operands: Array, parts: int, epsilon: float,
               expression: str) -> Array:  # fmt: skip
    """expression(y[..., :N/parts], y[..., N/parts:2N/parts], …, operands) with y = x' @ weight in float32, where x' is
    x / rms(x) * norm if there is a norm, else x. Where weights have eight bits, x' may be rounded to them too, row by
    row with a scale"""
    rows = wide(x)
    if norm_K is not None:
        square = np.mean(rows * rows, axis=-1, keepdims=True)
        rows = rows / np.sqrt(square + rows.dtype.type(epsilon)) * wide(norm_K)
    columns = np.split(np.matmul(rows, weight_KN.astype(rows.dtype)), parts, axis=-1)
    text = expressions.parse(expression)
    return np.asarray(expressions.evaluate(text, [*columns, *operands]) if text else columns[0])
