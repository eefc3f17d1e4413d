"""Projection, QuantizedProjection: a product with the norm before it and whatever is made of its columns behind it, as
one operator. ProjectionChain: several of them, each of the one before.

Few rows wait for memory at every launch: norm, product, gate and residual in one go is what a decoded token is fast by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.errors import GraphError
from ingot.ir import expression as expressions
from ingot.ir.elementwise import Array, wide
from ingot.ir.ops_table import Attribute, TensorType, op


def _type(x: TensorType, weight: TensorType, norm: TensorType | None, *operands: TensorType, parts: int, epsilon: float,
          expression: str, early: int = 0) -> TensorType:  # fmt: skip
    depth, width = weight.shape
    if x.shape[-1] != depth or not isinstance(width, int) or width % parts:
        raise GraphError(f"Projection: x {x.shape} and {parts} parts do not fit weight {weight.shape}")
    dtypes = ["float32"] * parts + [operand.dtype for operand in operands]
    dtype = expressions.result_dtype(expressions.parse(expression), dtypes)
    return TensorType(dtype, (*x.shape[:-1], width // parts))


@op("Projection", "x weight norm? *operands", _type, parts=Attribute("int", 1), epsilon=Attribute("float", 1e-6),
    expression=Attribute("expression", ""), early=Attribute("int", 0))  # fmt: skip
def projection(x: Array, weight_KN: Array, norm_K: Array | None = None, *operands: Array, parts: int, epsilon: float,
               expression: str, early: int = 0) -> Array:  # fmt: skip
    """expression(y[..., :N/parts], y[..., N/parts:2N/parts], …, operands) with y = x' @ weight in float32, where x' is
    x / rms(x) * norm if there is a norm, else x. Where weights have eight bits, x' may be rounded to them too, row by
    row with a scale. early: the launches of a step let those behind begin at once, for which blocks that stay pay"""
    rows = normalised(x, norm_K, epsilon)
    return finished(np.matmul(rows, weight_KN.astype(rows.dtype)), operands, parts, expression)


def normalised(x: Array, norm_K: Array | None, epsilon: float) -> Array:
    """x / rms(x) * norm if there is a norm, else x, in the type that it is computed in"""
    rows = wide(x)
    if norm_K is None:
        return rows
    square = np.mean(rows * rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.sqrt(square + rows.dtype.type(epsilon)) * wide(norm_K))


def finished(product: Array, operands: Sequence[Array], parts: int, expression: str) -> Array:
    """expression(the product's columns in `parts`, operands)"""
    columns, text = np.split(product, parts, axis=-1), expressions.parse(expression)
    return np.asarray(expressions.evaluate(text, [*columns, *operands]) if text else columns[0])


def _quantized_type(x: TensorType, weight: TensorType, norm: TensorType | None, scale: TensorType,
                    zero: TensorType | None, *operands: TensorType, parts: int, epsilon: float, expression: str,
                    bits: int, group: int) -> TensorType:  # fmt: skip
    depth, width = weight.shape
    groups = (-(-int(depth) // group), width)
    if scale.shape != groups or (zero is not None and zero.shape != groups):
        raise GraphError(f"QuantizedProjection: scales {scale.shape} are not {groups}, a row per {group} of {depth}")
    return _type(x, weight, norm, *operands, parts=parts, epsilon=epsilon, expression=expression)


@op("QuantizedProjection", "x weight norm? scale zero? *operands", _quantized_type, parts=Attribute("int", 1),
    epsilon=Attribute("float", 1e-6), expression=Attribute("expression", ""), bits=Attribute("int"),
    group=Attribute("int"))  # fmt: skip
def quantized_projection(x: Array, weight_KN: Array, norm_K: Array | None, scale_GN: Array,
                         zero_GN: Array | None = None, *operands: Array, parts: int, epsilon: float, expression: str,
                         bits: int, group: int) -> Array:  # fmt: skip
    """A Projection with the weights (weight[K, N] - zero[K / group, N]) * scale[K / group, N], integers of `bits` bits
    kept as int8 or uint8"""
    of_depth = np.arange(len(weight_KN)) // group
    zeros = np.float32(0) if zero_GN is None else zero_GN.astype(np.float32)[of_depth]
    floats = (weight_KN.astype(np.float32) - zeros) * scale_GN.astype(np.float32)[of_depth]
    rows = normalised(x, norm_K, epsilon)
    return finished(np.matmul(rows, floats.astype(rows.dtype)), operands, parts, expression)


@dataclass(frozen=True)
class Chained:
    """A Projection of a chain: which inputs of the chain are its weight, norm and what its expression reads; numbers
    below zero there are results of the chain, the first is ~0."""

    weight: int
    norm: int | None
    operands: tuple[int, ...]
    parts: int
    epsilon: float
    expression: str


def chained(attributes: Mapping[str, Any]) -> Iterator[Chained]:
    """The Projections of a ProjectionChain, in their order."""
    at, sources = 1, iter(attributes["sources"])
    for k, parts in enumerate(attributes["parts"]):
        weight, norm = at, at + 1 if attributes["norms"][k] else None
        at += 1 + bool(norm)
        operands = list[int]()
        for _ in range(attributes["reads"][k]):
            source = next(sources)
            operands.append(at if source < 0 else ~source)
            at += source < 0
        yield Chained(weight, norm, tuple(operands), parts, attributes["epsilons"][k], attributes["expressions"][k])


def _chain_type(x: TensorType, *given: TensorType, results: Sequence[int], early: int = 0,
                **attributes: Any) -> tuple[TensorType, ...]:  # fmt: skip
    types, made = [x, *given], list[TensorType]()
    links = _whole(attributes, len(given))
    for number, link in enumerate(links):
        operands = [made[~k] if k < 0 else types[k] for k in link.operands]
        norm = types[link.norm] if link.norm is not None else None
        try:
            made.append(_type(made[-1] if made else x, types[link.weight], norm, *operands, parts=link.parts,
                              epsilon=link.epsilon, expression=link.expression))  # fmt: skip
        except GraphError as error:
            raise GraphError(f"ProjectionChain, product {number} of {len(links)}: {error}") from None
    return tuple(made[k] for k in results)


def _whole(attributes: Mapping[str, Any], given: int) -> list[Chained]:
    """The Projections of a ProjectionChain with so many inputs behind x, which must be those that they read."""
    normed, sources = sum(map(bool, attributes["norms"])), attributes["sources"]
    wanted = len(attributes["parts"]) + normed + sum(source < 0 for source in sources)
    if len(sources) != (read := sum(attributes["reads"])):
        raise GraphError(f"ProjectionChain: {read} operands are read, of {len(sources)} it says where")
    if given != wanted:
        raise GraphError(f"ProjectionChain: its products read {wanted} inputs beside x, not {given}")
    links = list(chained(attributes))
    if any(~k >= number for number, link in enumerate(links) for k in link.operands):
        raise GraphError("ProjectionChain: a product reads the result of one that is not before it")
    return links


@op("ProjectionChain", "x *given", _chain_type, parts=Attribute("ints"), norms=Attribute("ints"),
    epsilons=Attribute("floats"), expressions=Attribute("texts"), reads=Attribute("ints"), sources=Attribute("ints"),
    results=Attribute("ints"), early=Attribute("int", 0))  # fmt: skip
def projection_chain(x: Array, *given: Array, results: Sequence[int], early: int = 0,
                     **attributes: Any) -> tuple[Array, ...]:  # fmt: skip
    """Projections, each of the one before, the first of x; of those in `results` the result. Inputs behind x are, of
    each, its weight, its norm if it has one (norms), and as many operands as its expression reads (reads) but for those
    that are results of the chain: `sources` has -1 for an input, else which one. early: as of Projection"""
    arrays, made = [x, *given], list[Array]()
    for link in chained(attributes):
        operands = [made[~k] if k < 0 else arrays[k] for k in link.operands]
        norm = arrays[link.norm] if link.norm is not None else None
        made.append(projection(made[-1] if made else x, arrays[link.weight], norm, *operands, parts=link.parts,
                               epsilon=link.epsilon, expression=link.expression))  # fmt: skip
    return tuple(made[k] for k in results)
