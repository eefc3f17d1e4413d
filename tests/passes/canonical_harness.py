"""One ONNX node at a time: its canonical form must be legal and give what the oracle gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from ingot.dtypes import numpy_dtype
from ingot.importers.onnx import load
from ingot.ir import oracle, shapes
from ingot.ir.verify import verify
from ingot.passes.canonical import Report, canonicalise
from ingot.passes.fold import fold

Array = np.ndarray[Any, Any]
NEWEST = 28


def values(shape: Sequence[int], dtype: str = "float32", seed: int = 0, low: float = -2.0, high: float = 2.0) -> Array:
    """Random numbers of a type, the same for the same seed."""
    random = np.random.default_rng(seed)
    if dtype == "bool":
        return random.integers(0, 2, shape).astype(bool)
    if dtype.startswith(("int", "uint")):
        return random.integers(0 if dtype.startswith("u") else -9, 10, shape).astype(numpy_dtype(dtype))
    return random.uniform(low, high, shape).astype(numpy_dtype(dtype))


def node_model(op: str, inputs: Sequence[Array | None], version: int = NEWEST, constants: Sequence[int] = (),
               outputs: int = 1, domain: str = "", dims: Mapping[int, Sequence[int | str]] | None = None,
               **attributes: Any) -> onnx.ModelProto:  # fmt: skip
    """A model of one node; inputs in `constants` are initializers, `dims` gives symbolic shapes of the others."""
    names = [f"x{i}" if array is not None else "" for i, array in enumerate(inputs)]
    node = helper.make_node(op, names, [f"y{i}" for i in range(outputs)], name=f"the_{op}", domain=domain, **attributes)
    opsets = {"": version if not domain else 21, **({domain: 1} if domain else {})}
    expected = oracle.evaluate_node(node, list(inputs), opsets)
    given = [i for i, array in enumerate(inputs) if array is not None]
    graph = helper.make_graph(
        [node],
        "graph",
        [_info(names[i], inputs[i], (dims or {}).get(i)) for i in given if i not in constants],
        [_info(f"y{i}", y, [None] * y.ndim) for i, y in enumerate(expected[:outputs])],
        [numpy_helper.from_array(inputs[i], names[i]) for i in given if i in constants],
    )
    imports = [helper.make_opsetid(name, number) for name, number in opsets.items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def _info(name: str, array: Any, dims: Sequence[Any] | None) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor_value_info(name, kind, list(array.shape) if dims is None else list(dims))


def canonical_model(proto: onnx.ModelProto) -> tuple[ir.Model, Report]:
    """Imported, inferred, folded, canonicalised and verified."""
    model = load(proto)
    shapes.infer(model)
    fold(model)
    report = canonicalise(model)
    verify(model)
    return model, report


def check(op: str, inputs: Sequence[Array | None], *, version: int = NEWEST, constants: Sequence[int] = (),
          outputs: int = 1, domain: str = "", rtol: float = 1e-5, atol: float = 1e-6, only: set[str] | None = None,
          ties: float = 0.0, **attributes: Any) -> ir.Model:  # fmt: skip
    """The canonical form is complete (of the operators `only`, if given) and equals the oracle on the original; a share
    `ties` of integers may be one off, where scales multiplied in another order fall on the other side of a half."""
    proto = node_model(op, inputs, version, constants, outputs, domain, **attributes)
    model, report = canonical_model(proto)
    assert not report.remaining, report.remaining
    kinds = {node.op_type for node in model.graph}
    assert only is None or kinds <= only, kinds
    feeds = {f"x{i}": array for i, array in enumerate(inputs) if array is not None and i not in constants}
    same(oracle.evaluate_model(model, feeds), oracle.evaluate_model(proto, feeds), rtol, atol, ties)
    return model


def check_symbolic(op: str, inputs: Sequence[Array | None], dims: Mapping[int, Sequence[int | str]], *,
                   version: int = NEWEST, constants: Sequence[int] = (), outputs: int = 1, domain: str = "",
                   **attributes: Any) -> ir.Model:  # fmt: skip
    """As `check`, but canonicalised for symbolic shapes and then run at the sizes of the inputs."""
    proto = node_model(op, inputs, version, constants, outputs, domain, dims, **attributes)
    model, report = canonical_model(proto)
    assert not report.remaining, report.remaining
    feeds = {f"x{i}": array for i, array in enumerate(inputs) if array is not None and i not in constants}
    bound = shapes.specialize(model, {name: array.shape for name, array in feeds.items()})
    same(oracle.evaluate_model(bound, feeds), oracle.evaluate_model(proto, feeds), 1e-5, 1e-6)
    return model


def rejection(op: str, inputs: Sequence[Array | None], **settings: Any) -> str:
    """Why the node stays, with the remedy."""
    _, report = canonical_model(node_model(op, inputs, **settings))
    assert len(report.remaining) == 1, report
    entry = report.remaining[0]
    assert entry.node == f"the_{op}" and entry.origins == (f"the_{op}",)
    return f"{entry.reason}: {entry.remedy}"


def same(actual: Mapping[str, Any], expected: Mapping[str, Any], rtol: float, atol: float, ties: float = 0.0) -> None:
    """Equal names, dtypes, shapes and, within the tolerance, elements."""
    assert actual.keys() == expected.keys()
    for name, one in actual.items():
        other = expected[name]
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        if ties:
            gap = np.abs(one.astype(np.int64) - other.astype(np.int64))
            assert gap.max() <= 1 and gap.mean() <= ties, name
        elif one.dtype.kind in "biu":
            np.testing.assert_array_equal(one, other, err_msg=name)
        else:
            np.testing.assert_allclose(one.astype(np.float64), other.astype(np.float64), rtol, atol, err_msg=name)
