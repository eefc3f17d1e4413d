"""`ingot inspect`: what a model holds, what an engine holds, what would run natively before anything is built."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir

import ingot
from ingot.compiler import host_works
from ingot.importers import onnx as importer
from ingot.ir import shapes
from ingot.plan.plan import Plan, Step
from ingot.plan.plan import steps_of as steps_of_segment
from ingot.tools.files import json_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument(
        "what", choices=list(_VIEWS), help="model: an ONNX file; engine: an engine file; capability: what runs natively"
    )
    parser.add_argument("file")
    parser.add_argument("--steps", action="store_true", help="list every node or step")
    parser.add_argument("--json", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Print the view; capability exits with 0 whatever it finds."""
    content = _VIEWS[arguments.what](arguments.file, arguments.steps)
    print(json_text(content) if arguments.json else "\n".join(_lines(content)))
    return 0


def _model(path: str, steps: bool) -> dict[str, Any]:
    model = importer.load(path)
    shapes.infer(model)
    nodes = list(onnx_ir.traversal.RecursiveGraphIterator(model.graph))
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    content: dict[str, Any] = {
        "name": model.graph.name, "opsets": dict(model.opset_imports),
        "inputs": [_value(v) for v in model.graph.inputs], "outputs": [_value(v) for v in model.graph.outputs],
        "nodes": len(nodes), "operators": dict(Counter(n.op_type for n in nodes).most_common()),
        "initializers": len(weights), "weight_bytes": sum(w.nbytes for w in weights),
    }  # fmt: skip
    if steps:
        content["list"] = [f"{n.name}: {n.op_type} -> {', '.join(_value(v) for v in n.outputs)}" for n in nodes]
    return content


def _value(value: onnx_ir.Value) -> str:
    shape = shapes.shape_of(value)
    return f"{value.name}: {value.dtype or value.type}{list(shape) if shape is not None else '[?]'}"


def _engine(path: str, steps: bool) -> dict[str, Any]:
    engine = ingot.Engine.load(path).verified()
    details = engine.details
    return {
        "inputs": [
            f"{s.name}: {s.dtype}{list(s.shape)}" + (f" {s.min}..{s.max}" if s.min else "") for s in engine.inputs
        ],
        "outputs": [f"{s.name}: {s.dtype}{list(s.shape)}" for s in engine.outputs],
        "model": details.get("model"), "toolchain": details.get("toolchain"), "config": details.get("config"),
        "evidence": details.get("evidence"), "notices": details.get("notices"),
        "variants": [
            {
                "target": v.target, "isa": v.isa, "requires": list(v.requires), "code_bytes": len(v.code),
                "weight_bytes": len(v.weights), "activation_bytes": [m.bytes for m in v.plan.memory],
                "lower_bound": [m.lower_bound for m in v.plan.memory], "host_steps": len(v.plan.host_steps),
                "kernels": dict(Counter(s.kernel for s in steps_of(v.plan)).most_common()),
                **({"steps": [step_line(s) for s in steps_of(v.plan)]} if steps else {}),
            }
            for v in engine.variants
        ],
    }  # fmt: skip


def steps_of(plan: Plan) -> list[Step]:
    """Steps of a plan in order; a control step counts as one."""
    return [step for segment in plan.segments for step in steps_of_segment(segment)]


def step_line(step: Step) -> str:
    """A step in a line."""
    tactic = ", ".join(f"{k}={v}" for k, v in step.tactic.items())
    return f"{step.op} {step.kernel}({tactic}) <- {', '.join(step.nodes) or step.name}"


def _capability(path: str, steps: bool) -> dict[str, Any]:
    native, hosts = host_works(importer.load(path))
    content: dict[str, Any] = {
        "native_steps": native, "host_steps": len(hosts),
        "host": [f"{', '.join(w.origins) or w.name}: {w.op}: {w.reason}" for w in hosts],
    }  # fmt: skip
    content["verdict"] = "everything runs natively" if not hosts else "the named nodes run on the host, slowly"
    return content


_VIEWS: Mapping[str, Callable[[str, bool], dict[str, Any]]] = {
    "model": _model,
    "engine": _engine,
    "capability": _capability,
}


def _lines(content: Any, indent: str = "") -> list[str]:
    lines: list[str] = []
    items = content.items() if isinstance(content, Mapping) else enumerate(content)
    for key, value in items:
        label = f"{indent}{str(key).replace('_', ' ')}: " if isinstance(content, Mapping) else f"{indent}- "
        if isinstance(value, Mapping | list) and value:
            lines += [label.rstrip(), *_lines(value, indent + "  ")]
        elif value not in (None, [], {}):
            lines.append(f"{label}{value}")
    return lines
