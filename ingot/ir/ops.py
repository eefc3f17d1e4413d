"""The canonical operators, domain "ingot": what they take, what shape comes out, what they mean in numpy.

`infer(name, types, attributes)` types their outputs, `meaning(name)` runs them, `OPS` lists them. A kernel is tested
against the meaning; a host step runs it. Inputs of 16-bit floats are accumulated in float32; 8-bit integers in int32.
An epilogue's `%0` is the accumulator, not yet rounded to the inputs' type.
"""

from ingot.ir import (
    ops_attention,
    ops_control,
    ops_convolution,
    ops_experts,
    ops_group,
    ops_likely,
    ops_linear,
    ops_move,
    ops_narrow,
    ops_paged,
    ops_parallel,
    ops_projection,
    ops_reduce,
    ops_resize,
    ops_rnn,
    ops_sample,
    ops_search,
)
from ingot.ir.ops_table import (
    OPS,
    Attribute,
    Op,
    TensorType,
    bound,
    broadcast,
    complete,
    definition,
    infer,
    meaning,
    normal_extent,
)

DOMAIN = "ingot"
FAMILIES = (
    ops_attention, ops_control, ops_convolution, ops_experts, ops_group, ops_likely, ops_linear, ops_move, ops_narrow,
    ops_paged, ops_parallel, ops_projection, ops_reduce, ops_resize, ops_rnn, ops_sample, ops_search,
)  # fmt: skip

__all__ = [
    "DOMAIN",
    "FAMILIES",
    "OPS",
    "Attribute",
    "Op",
    "TensorType",
    "bound",
    "broadcast",
    "complete",
    "definition",
    "infer",
    "meaning",
    "normal_extent",
]
