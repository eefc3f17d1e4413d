"""`ingot explain model.onnx`: which rewrite fired where, which held back and why, what stays on the host."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir

from ingot import passes
from ingot.importers import onnx as importer
from ingot.ir import shapes
from ingot.ir.graph import is_canonical

_SHOWN = 3  # places listed per rewrite or reason unless all are asked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("model", help="an ONNX file")
    parser.add_argument("--all", action="store_true", help="list every place, not the first few of each rewrite")
    parser.add_argument("--json", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Print the explanation."""
    content = explain(arguments.model, as_json=True)
    print(json.dumps(content, indent=1) if arguments.json else as_text(content, None if arguments.all else _SHOWN))
    return 0


def explain(model: importer.Source, as_json: bool = False) -> Any:
    """What the passes do to a model: a text, or with `as_json` a dictionary with every place."""
    content = _content(model)
    return content if as_json else as_text(content, _SHOWN)


def _content(source: importer.Source) -> dict[str, Any]:
    model = importer.load(source)
    shapes.infer(model)
    before = _count(model)
    report = passes.run(model)
    algebra = passes.summaries()
    return {
        "model": Path(source).name if isinstance(source, str | Path) else model.graph.name,
        "nodes_before": before,
        "nodes_after": _count(model),
        "operators": dict(Counter(map(_label, _nodes(model))).most_common()),
        "fired": [
            {"rewrite": name, "algebra": algebra[name], "count": count,
             "places": [list(entry.origins) for entry in report.fired if entry.rewrite == name]}
            for name, count in report.counts.most_common()
        ],
        "held_back": [
            {"rewrite": entry.rewrite, "node": entry.node, "origins": list(entry.origins), "reason": entry.reason}
            for entry in report.rejections
        ],
        "host": [
            {"node": entry.node, "operator": entry.op, "reason": entry.reason, "remedy": entry.remedy}
            for entry in report.remaining
        ],
        "milliseconds": {entry.name: round(entry.seconds * 1e3, 1) for entry in _summed(report.times)},
    }  # fmt: skip


def _summed(times: Iterable[passes.PassTime]) -> list[passes.PassTime]:
    """Passes that run more than once, added up."""
    total: dict[str, passes.PassTime] = {}
    for entry in times:
        known = total.get(entry.name, passes.PassTime(entry.name, 0, 0.0))
        total[entry.name] = passes.PassTime(entry.name, known.changes + entry.changes, known.seconds + entry.seconds)
    return list(total.values())


def _nodes(model: onnx_ir.Model) -> Iterable[onnx_ir.Node]:
    return onnx_ir.traversal.RecursiveGraphIterator(model.graph)


def _count(model: onnx_ir.Model) -> int:
    return sum(1 for _ in _nodes(model))


def _label(node: onnx_ir.Node) -> str:
    """The operator, marked where it is not canonical."""
    return node.op_type if is_canonical(node) else f"{node.domain or 'onnx'}::{node.op_type}"


# text


def as_text(content: dict[str, Any], shown: int | None) -> str:
    """The explanation for a person; `shown` limits the places of each rewrite."""
    operators = ", ".join(f"{name} {count}" for name, count in content["operators"].items())
    lines = [f"{content['model']}: {content['nodes_before']} nodes become {content['nodes_after']}: {operators}"]
    lines += ["", "fired:"] if content["fired"] else []
    for entry in content["fired"]:
        lines.append(f"  {entry['count']:4} × {entry['rewrite']}: {entry['algebra']}")
        lines += _places([", ".join(place) for place in entry["places"]], shown)
    lines += _held_back(content["held_back"], shown)
    lines += ["", "on the host:"] if content["host"] else []
    for reason, places in _by_reason(content["host"]).items():
        lines.append(f"  {len(places):4} × {reason}")
        lines += _places(places, shown)
    return "\n".join(lines)


def _by_reason(entries: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Nodes on the host by the reason and remedy they share."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        reason = entry["reason"] + (f" ({entry['remedy']})" if entry["remedy"] else "")
        found.setdefault(f"{entry['operator']}: {reason}", []).append(entry["node"])
    return found


def _held_back(entries: Sequence[dict[str, Any]], shown: int | None) -> list[str]:
    """Refusals, one heading for each rewrite."""
    by_rewrite: dict[str, list[str]] = {}
    for entry in entries:
        place = ", ".join(entry["origins"]) or entry["node"]
        by_rewrite.setdefault(entry["rewrite"], []).append(f"{place}: {entry['reason']}")
    lines = ["", "held back:"] if by_rewrite else []
    for rewrite, places in by_rewrite.items():
        lines.append(f"  {len(places):4} × {rewrite}")
        lines += _places(places, shown)
    return lines


def _places(places: Sequence[str], shown: int | None) -> list[str]:
    visible = [f"           {place}" for place in places[:shown]]
    hidden = len(places) - len(visible)
    return [*visible, f"           … and {hidden} more (--all)"] if hidden else visible
