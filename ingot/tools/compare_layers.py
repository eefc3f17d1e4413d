"""`ingot compare --layers`, `--bisect`: tensors inside, of the engine and of the reference, in order.

An engine is built that has them as further outputs. Reading a tensor keeps it from being fused away, so a difference
that only fusion makes shows at the next output.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

import ingot
from ingot.errors import ConfigError
from ingot.importers import onnx as importer
from ingot.ir import shapes
from ingot.ir.oracle import compile_model
from ingot.tools import files
from ingot.tools.compare import Row, row_of
from ingot.tools.compare_html import Histogram, Layer, page

_BINS = 48


@dataclass(frozen=True, eq=False)
class Inside:
    """What is compared: the model, the form of it that the engine is built from, the inputs."""

    model: onnx_ir.Model
    engine_model: onnx_ir.Model
    feeds: Mapping[str, Any]
    arguments: argparse.Namespace

    def layers(self, names: Sequence[str]) -> list[Layer]:
        """The named tensors of the engine beside the reference's."""
        engine = ingot.build(_probed(self.engine_model, names), level=self.arguments.level, verify=False)
        wanted = compile_model(_probed(self.model, names))(self.feeds)
        with ingot.Session(engine) as session:
            results = {"engine": session.run(self.feeds), "reference": wanted}
        makers = {v.name: n for n in self.model.graph for v in n.outputs}
        found = []
        for name in names:
            row, node = row_of(name, "engine", "reference", results, self.arguments), makers[name]
            found.append(Layer(row, node.name or "", node.op_type, _histogram(results, name)))
        return found

    def differ(self, names: Sequence[str]) -> bool:
        """Whether any of the named tensors differs by more than the tolerance."""
        return not all(layer.row.passed for layer in self.layers(names))


def run(model: onnx_ir.Model, feeds: Mapping[str, Any], arguments: argparse.Namespace) -> int:
    """Compare inside and print; 1 if a tensor differs."""
    if arguments.engine:
        raise ConfigError("--layers and --bisect build engines that show what is inside, they cannot look into a file")
    inside = Inside(model, _other(arguments.against) if arguments.against else model, feeds, arguments)
    present = {v.name for node in inside.engine_model.graph for v in node.outputs}
    names = [v.name for n in model.graph for v in n.outputs if _is_tensor(v) and v.name and v.name in present]
    if not names or {v.name for v in inside.engine_model.graph.inputs} != {v.name for v in model.graph.inputs}:
        raise ConfigError(f"{arguments.against} is not a form of this model: its inputs or tensors have other names")
    return _print_layers(inside.layers(names), arguments) if arguments.layers else _bisect(inside, names)


def _other(path: str) -> onnx_ir.Model:
    model = importer.load(path)
    shapes.infer(model)
    return model


def _is_tensor(value: onnx_ir.Value) -> bool:
    return isinstance(value.type, onnx_ir.TensorType) and value.dtype is not None and value.shape is not None


def _probed(model: onnx_ir.Model, names: Sequence[str]) -> onnx_ir.Model:
    probed = model.clone()
    probed.ir_version = max(probed.ir_version or 0, 10)  # older ones want weights among the inputs
    known = {v.name: v for node in probed.graph for v in node.outputs}
    probed.graph.outputs.extend(known[n] for n in names if n in known and not known[n].is_graph_output())
    return probed


def _bisect(inside: Inside, names: Sequence[str]) -> int:
    outputs = [v.name for v in inside.model.graph.outputs if v.name and v.name in names]
    first = _first_difference(inside, names) if inside.differ(outputs) else None
    node = next((n for n in inside.model.graph if any(v.name == first for v in n.outputs)), None)
    if inside.arguments.json:
        print(files.json_text(None if node is None else {"output": first, "node": node.name, "operator": node.op_type}))
    elif node is None:
        print("no output differs")
    else:
        print(f"first difference: output {first!r} of node {node.name!r} ({node.op_type})")
    return 0 if node is None else 1


def _first_difference(inside: Inside, names: Sequence[str]) -> str:
    """The first name that differs; one of them does."""
    low, high = 0, len(names) - 1
    while low < high:
        middle = (low + high) // 2
        if inside.differ(names[low : middle + 1]):
            high = middle
        else:
            low = middle + 1
    return names[low]


def _histogram(results: Mapping[str, Mapping[str, Any]], name: str) -> Histogram | None:
    """Counts of values and of differences, over the reference's range and the largest difference."""
    mine, wanted = (np.asarray(results[runner][name]) for runner in ("engine", "reference"))
    if mine.shape != wanted.shape or not wanted.size or wanted.dtype.kind not in "fiu":
        return None
    a, b = mine.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = a[finite], b[finite]
    if not b.size:
        return None
    span, gap = (float(b.min()), float(b.max())), a - b
    reach = float(np.abs(gap).max(initial=0.0))
    return Histogram(*span, _counts(a, *span), _counts(b, *span), reach, _counts(gap, -reach, reach))


def _counts(values: np.ndarray[Any, Any], low: float, high: float) -> tuple[int, ...]:
    """In equal bins; what lies outside is left out."""
    within = values[(values >= low) & (values <= high)]
    share = (within - low) / (high - low) if high > low else np.full(within.shape, 0.5)
    places = (share * _BINS).astype(np.int64)  # np.histogram refuses narrow spans
    return tuple(np.bincount(np.minimum(places, _BINS - 1), minlength=_BINS).tolist())


def _print_layers(layers: Sequence[Layer], arguments: argparse.Namespace) -> int:
    rows = [layer.row for layer in layers]
    if arguments.html:
        files.write(arguments.html, page(Path(arguments.model).name, layers))
    if arguments.json:
        print(files.json_text({"rows": [asdict(row) for row in rows]}))
    else:
        print("\n".join([*map(_line, rows), *([f"page written to {arguments.html}"] if arguments.html else [])]))
    return 0 if all(row.passed for row in rows) else 1


def _line(row: Row) -> str:
    s = row.statistics
    return (
        f"{'PASSED' if row.passed else 'FAILED'} {row.output}: largest {s.largest:.3e}, cosine {s.cosine:.7f}, "
        f"SNR {s.signal_to_noise:.1f} dB"
    )
