"""Nodes with their symbols bound to sizes: what is priced, timed and checked stands for a typical run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ingot.ir.ops import OPS
from ingot.kernels.node import Node, Port
from ingot.plan.extent import Extent, evaluate, symbols_of

DEFAULT_EXTENT = 64


def bind(node: Node, symbols: Mapping[str, int]) -> Node:
    """The node with every symbolic extent replaced by its size; symbols nobody bound count DEFAULT_EXTENT."""

    kinds = OPS[node.op].attributes if node.op in OPS else {}

    def size(extent: Extent) -> int:
        free = {s: DEFAULT_EXTENT for s in symbols_of(extent) if s not in symbols}
        return evaluate(extent, {**symbols, **free})

    def port(p: Port | None) -> Port | None:
        return p if p is None or p.static else replace(p, shape=tuple(size(d) for d in p.shape))

    def setting(name: str, value: Any) -> Any:
        kind = kinds[name].kind if name in kinds else None
        return size(value) if kind == "extent" else tuple(map(size, value)) if kind == "extents" else value

    return replace(
        node,
        inputs=tuple(port(p) for p in node.inputs),
        outputs=tuple(p for p in map(port, node.outputs) if p is not None),
        attributes={name: setting(name, value) for name, value in node.attributes.items()},
    )
