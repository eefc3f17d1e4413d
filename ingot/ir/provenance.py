"""Which of the user's nodes a node stands for: kept in `metadata_props`, so that it survives rewriting."""

from __future__ import annotations

import json
from collections.abc import Iterable

import onnx_ir

KEY = "ingot.nodes"


def origins(node: onnx_ir.Node) -> tuple[str, ...]:
    """Names of the user's nodes that `node` computes, in graph order; its own name before any were recorded."""
    recorded = node.metadata_props.get(KEY)
    if recorded is None:
        return (node.name,) if node.name else ()
    return tuple(json.loads(recorded))


def set_origins(node: onnx_ir.Node, names: Iterable[str]) -> None:
    """Record the user's nodes; repeated names are kept once."""
    node.metadata_props[KEY] = json.dumps(list(dict.fromkeys(names)))


def merged_origins(nodes: Iterable[onnx_ir.Node]) -> tuple[str, ...]:
    """The origins of several nodes, each once."""
    return tuple(dict.fromkeys(name for node in nodes for name in origins(node)))
