"""Conversions that a graph in sixteen bits does not need."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from ingot.ir.expression import parse
from ingot.ir.graph import attributes
from ingot.precision import half
from tests.passes.support import Net, Rewritten, assert_same, check_graph, model_of, rewritten


def gathered(*more: str, dtype: str = "float16") -> Rewritten:
    """Rows of a table in sixteen bits, as float32 to a softmax and to what is added to it; more: who else reads the
    rows ("moved"), or the float32 ("told")."""
    net = Net()
    table = net.weight("table", net.random.standard_normal((9, 4)).astype(np.float16))
    rows = net.node("Gather", table, "ids", axis=0)
    wide = net.node("Cast", rows, to=TensorProto.FLOAT)
    outputs = [net.node("Add", net.node("Softmax", wide, axis=1), wide)]
    outputs += [net.node("Transpose", rows, perm=(1, 0))] if "moved" in more else []
    outputs += [wide] if "told" in more else []
    result = rewritten(model_of(net, {"ids": ("int64", (5,))}, *outputs))
    half.convert(result.after, dtype)
    check_graph(result.after)
    return result


def casts(result: Rewritten) -> int:
    """Nodes that do nothing else than to convert."""
    texts = [attributes(node)["expression"] for node in result.nodes if node.op_type == "Pointwise"]
    return sum({step.op for step in parse(text).instructions} == {"Cast"} for text in texts)


def test_rows_of_a_narrow_table_stay_narrow() -> None:
    result = gathered()
    assert casts(result) == 0
    assert_same(result, rtol=1e-2, atol=1e-2)


def test_rows_of_another_type_do_not() -> None:
    """float16's numbers are not bfloat16's."""
    result = gathered(dtype="bfloat16")
    assert casts(result) == 1
    assert_same(result, rtol=5e-2, atol=5e-2)


def test_rows_that_are_read_elsewhere_stay_what_they_are() -> None:
    for more in ("moved", "told"):
        result = gathered(more)
        assert casts(result) >= 1
        assert_same(result, rtol=1e-2, atol=1e-2)
