"""A norm whose squares leave float16: cast naively it is infinite, by Ingot it holds, and what was kept is named.

    python -m benchmarks.precision_overflow [--json benchmarks/results/precision_overflow.json]

A product, a norm written out as exporters do, a product; inputs twice and a hundred times the usual. Both float16 forms
are computed by the numpy meaning of their operators, so no GPU is needed. Exits 1 if a row fails.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
from onnx import TensorProto, helper, numpy_helper

from benchmarks import timing
from ingot.compiler import optimise
from ingot.config import BuildConfig
from ingot.importers import onnx as importer
from ingot.ir import shapes
from ingot.ir.oracle import compile_model, trace_model
from ingot.precision import metric, overflow
from ingot.report import BuildLog

NODES = [
    ("MatMul", ["x", "w"], "h"), ("ReduceMean", ["h", "last"], "mean"), ("Sub", ["h", "mean"], "centred"),
    ("Pow", ["centred", "two"], "squares"), ("ReduceMean", ["squares", "last"], "variance"),
    ("Add", ["variance", "epsilon"], "sum"), ("Sqrt", ["sum"], "deviation"), ("Div", ["centred", "deviation"], "norm"),
    ("MatMul", ["norm", "v"], "y"),
]  # fmt: skip
LEAST_DECIBELS = 40.0
SCALES = (2.0, 100.0)


@dataclass(frozen=True)
class Row:
    """A size of inputs: what naive casting makes of it, and Ingot's float16 beside float32."""

    scale: float
    naive_infinite: tuple[str, ...]
    decibels: float
    inside: tuple[str, ...]
    kept: tuple[str, ...]
    passed: bool


def layer_norm() -> onnx.ModelProto:
    """Every node is called after what it makes."""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.standard_normal((64, 64)) * 40, "v": rng.standard_normal((64, 8)) / 8, "two": 2.0, "epsilon": 1e-5,
    }  # fmt: skip
    weights = [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in constants.items()]
    weights.append(numpy_helper.from_array(np.array([-1]), "last"))
    nodes = [helper.make_node(op, inputs, [output], f"the_{output}") for op, inputs, output in NODES]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8])
    graph = helper.make_graph(nodes, "layer_norm", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def naively_cast(model: onnx.ModelProto) -> onnx.ModelProto:
    """Everything in float16, as converters do."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return model


def samples(scale: float) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": (rng.standard_normal((4, 64)) * scale).astype(np.float32)} for _ in range(3)]


def imported() -> onnx_ir.Model:
    model = importer.load(layer_norm())
    shapes.infer(model)
    return model


def halved(model: onnx_ir.Model, overflows: Mapping[str, overflow.Range], log: BuildLog) -> onnx_ir.Model:
    """The model as a GPU computes it in float16."""
    rewritten = optimise(model, BuildConfig(target="cuda:sm_90", precision="fp16", overflows=overflows), log)
    assert rewritten is not None
    return rewritten


def measure(scale: float) -> Row:
    model, data = imported(), samples(scale)
    with np.errstate(over="ignore", invalid="ignore"):
        naive = trace_model(naively_cast(layer_norm()), {"x": data[0]["x"].astype(np.float16)})
    infinite = tuple(n for n, v in naive.items() if isinstance(v, np.ndarray) and not np.isfinite(v).all())
    found = overflow.find(model, overflow.observe(model, data))
    mine = compile_model(halved(model, overflow.kept(found), BuildLog()))
    decibels = metric.decibels([mine(sample) for sample in data], [compile_model(model)(sample) for sample in data])
    inside, kept = (tuple(str(o) for o in found if o.inside is kind) for kind in (True, False))
    named = {o.value for o in found} >= {name for name in ("h", "squares") if name in infinite}
    return Row(
        scale, infinite, round(decibels, 1), inside, kept, bool(infinite) and decibels > LEAST_DECIBELS and named
    )


def describe(row: Row) -> str:
    naive = f"naive float16 is infinite or NaN in {', '.join(row.naive_infinite) or 'nothing'}"
    verdict = "PASS" if row.passed else "FAIL"
    lines = [f"inputs x{row.scale:g}: {naive}; Ingot's {row.decibels} dB beside float32  {verdict}"]
    lines += [f"  {said}" for said in (*row.kept, *row.inside)]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows = [measure(scale) for scale in SCALES]
    print("\n".join(map(describe, rows)))
    if options.json:
        timing.write_json(options.json, "float16 that does not overflow", [asdict(row) for row in rows])
    print(f"precision_overflow: {sum(row.passed for row in rows)} of {len(rows)} passed")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
