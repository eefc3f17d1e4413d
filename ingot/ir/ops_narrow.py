"""NarrowNorm and NarrowAttention: what is quantized before it leaves the kernel that computes it."""

from __future__ import annotations

from typing import Any

from ingot.ir import expression as expressions
from ingot.ir.elementwise import Array
from ingot.ir.ops_table import EPILOGUE, Attribute, TensorType, infer, meaning, op


def _norm_type(*inputs: TensorType | None, narrow: str, **settings: Any) -> tuple[TensorType, ...]:
    (whole,) = infer("Norm", inputs, settings)
    return whole, TensorType(expressions.result_dtype(expressions.parse(narrow), [whole.dtype]), whole.shape)


@op("NarrowNorm", "x scale? bias?", _norm_type, kind=Attribute("text"), axis=Attribute("int", 1),
    groups=Attribute("int", 1), epsilon=Attribute("float", 1e-5), narrow=Attribute("text"))  # fmt: skip
def narrow_norm(x: Array, scale: Array | None, bias: Array | None, *, narrow: str,
                **settings: Any) -> tuple[Array, ...]:  # fmt: skip
    """A Norm, and the expression `narrow` of it: what is added to later, and what the next product reads"""
    (whole,) = meaning("Norm")(x, scale, bias, **settings)
    return whole, expressions.evaluate(expressions.parse(narrow), [whole])


def _attention_type(*inputs: TensorType | None, **settings: Any) -> TensorType:
    return infer("Attention", inputs, settings)[0]


@op("NarrowAttention", "query key value mask?", _attention_type, scale=Attribute("float"), causal=Attribute("int", 0),
    softcap=Attribute("float", 0.0), epilogue=EPILOGUE)  # fmt: skip
def narrow_attention(query_BHSD: Array, key_BGTD: Array, value_BGTE: Array, mask: Array | None,
                     **settings: Any) -> Array:  # fmt: skip
    """Attention with an epilogue, which has no operands but the result"""
    return meaning("Attention")(query_BHSD, key_BGTD, value_BGTE, mask, **settings)[0]
