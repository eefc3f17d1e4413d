"""Operators of your own: `@ingot.plugin("domain::Operator", shape=…)` above the operator's meaning in numpy.

    @ingot.plugin("acme::Softcap")
    def softcap(x, *, cap=30.0):
        return np.tanh(x / cap) * cap

From then on models with that operator import, build, verify and run (as host steps, until a kernel is registered for
it: `@ingot.kernels.kernel("acme::Softcap", on="cpu")`). See docs/plugins.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir
from onnx_shape_inference import registry

from ingot.dtypes import numpy_dtype
from ingot.errors import ConfigError, ImportFailure
from ingot.ir import oracle_ops, shapes
from ingot.ir.ops_table import TensorType

__all__ = ["Plugin", "TensorType", "like_first", "plugin", "registered"]

ShapeFunction = Callable[..., "TensorType | Sequence[TensorType] | None"]


@dataclass(frozen=True)
class Plugin:
    """A registered operator; calling it runs its meaning."""

    domain: str
    op_type: str
    shape: ShapeFunction
    meaning: Callable[..., Any]

    def __call__(self, *inputs: Any, **attributes: Any) -> Any:
        return self.meaning(*inputs, **attributes)


_PLUGINS: dict[tuple[str, str], Plugin] = {}


def like_first(first: TensorType, *_others: TensorType | None, **_attributes: Any) -> TensorType:
    """The default shape function: one output of the first input's type."""
    return first


def plugin(name: str, shape: ShapeFunction = like_first) -> Callable[[Callable[..., Any]], Plugin]:
    """Register an operator "domain::Operator" by its meaning: arrays in, attributes as keywords, array or tuple out.

    `shape(*types, **attributes)` maps the inputs' `TensorType(dtype, shape)` (None for an absent input or an unknown
    rank) to the outputs' types, or to None where it cannot tell.
    """
    domain, separator, op_type = name.rpartition("::")
    if not separator or not domain or not op_type or domain in ("ai.onnx", "ingot"):
        raise ConfigError(f'a plugin is named "domain::Operator" with a domain of its own, not {name!r}')

    def register(function: Callable[..., Any]) -> Plugin:
        if (domain, op_type) in _PLUGINS:
            raise ConfigError(f"a plugin for {name} is registered already: {_PLUGINS[domain, op_type].meaning}")
        entry = Plugin(domain, op_type, shape, function)
        _PLUGINS[domain, op_type] = entry
        oracle_ops.meaning(op_type, domain=domain)(function)
        registry.register(domain, op_type)(lambda _context, node: _infer(entry, node))
        return entry

    return register


def registered() -> Mapping[tuple[str, str], Plugin]:
    """All plugins by (domain, operator)."""
    return dict(_PLUGINS)


def _infer(entry: Plugin, node: onnx_ir.Node) -> None:
    attributes = {name: _plain(attribute) for name, attribute in node.attributes.items()}
    try:
        result = entry.shape(*(_type_of(value) for value in node.inputs), **attributes)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        name = f"{entry.domain}::{entry.op_type}"
        raise ImportFailure(f"node {node.name!r}: the shape function of plugin {name} failed: {error!r}") from error
    results = [result] if isinstance(result, TensorType) else list(result or ())
    for output, known in zip(node.outputs, results, strict=False):
        output.dtype = onnx_ir.DataType.from_numpy(numpy_dtype(known.dtype))
        output.shape = onnx_ir.Shape(known.shape)


def _plain(attribute: onnx_ir.Attr) -> Any:
    value = attribute.value
    return list(value) if isinstance(value, tuple) else value


def _type_of(value: onnx_ir.Value | None) -> TensorType | None:
    if value is None or value.dtype is None or (shape := shapes.shape_of(value)) is None:
        return None
    return TensorType(value.dtype.numpy().name, shape)
