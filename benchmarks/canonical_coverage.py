"""How much of the ONNX backend suite is canonical: python -m benchmarks.canonical_coverage [--filter regex] [--check]

A test counts when no ONNX operator is left after canonicalisation. The operators that are left are listed with the
number of tests they hold back, most first, and with --reasons why. With --check the canonical graphs are also run in
numpy and compared with the suite's expected outputs. With --constants the integer inputs that only say what to do
(axes, shapes, pads, …) are made constants first, as an engine built for them would have them.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from benchmarks.conformance import Case, differences, load_cases
from ingot.errors import IngotError
from ingot.importers.onnx import load
from ingot.ir import oracle, shapes
from ingot.passes.canonical import Remaining, canonicalise
from ingot.passes.fold import fold


@dataclass
class Coverage:
    """What became of one test."""

    name: str
    remaining: tuple[Remaining, ...] = ()
    error: str = ""
    differs: str = ""
    operators: list[str] = field(default_factory=list)

    @property
    def canonical(self) -> bool:
        """Whether nothing is left for the host."""
        return not self.error and not self.remaining


def examine(case: Case, check: bool, constants: bool) -> Coverage:
    """Import, infer, fold and canonicalise one test's model."""
    coverage = Coverage(case.name)
    try:
        data = next(case.data_sets()) if check or constants else ([], [])
        source = with_constants(case.model, data[0]) if constants else case.model
        model = load(source)
        shapes.infer(model)
        fold(model)
        report = canonicalise(model)
    except IngotError as error:
        coverage.error = str(error)
        return coverage
    coverage.remaining = report.remaining
    coverage.operators = sorted({entry.op for entry in report.remaining})
    if check:
        weights = {tensor.name for tensor in case.model.graph.initializer}
        names = [value.name for value in case.model.graph.input if value.name not in weights]
        given = dict(zip(names, data[0], strict=False))
        feeds = {str(value.name): given.get(str(value.name)) for value in model.graph.inputs}
        coverage.differs = _difference(case, model, feeds, data[1])
    return coverage


def _difference(case: Case, model: Any, feeds: dict[str, Any], expected: list[Any]) -> str:
    try:
        results = oracle.evaluate_model(model, feeds)
        differences(list(results.values()), expected, case.rtol, case.atol)
    except AssertionError as error:
        return " ".join(str(error).split())[:200]
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is this test's result
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def with_constants(model: onnx.ModelProto, inputs: list[Any]) -> onnx.ModelProto:
    """The model with the inputs that say what to do, rather than what to do it to, turned into constants."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value, array in zip(list(copy.graph.input), inputs, strict=False):
        if _is_setting(copy, value.name) and isinstance(array, np.ndarray):
            copy.graph.initializer.append(numpy_helper.from_array(array, value.name))
            copy.graph.input.remove(value)
    return copy


_SETTINGS = {
    "Reshape": (1,), "Expand": (1,), "Tile": (1,), "Slice": (1, 2, 3, 4), "Pad": (1, 2, 3), "Squeeze": (1,),
    "Unsqueeze": (1,), "Split": (1,), "TopK": (1,), "CumSum": (1,), "CumProd": (1,), "OneHot": (1,), "Trilu": (1,),
    "Resize": (1, 2, 3), "Upsample": (1,), "ConstantOfShape": (0,), "Range": (0, 1, 2), "CenterCropPad": (1,),
    "Col2Im": (1, 2), "AffineGrid": (1,), "DFT": (1, 2), "STFT": (1, 3), "Dropout": (1, 2), "MaxUnpool": (2,),
    "ReduceSum": (1,), "ReduceMean": (1,), "ReduceMax": (1,), "ReduceMin": (1,), "ReduceProd": (1,), "ReduceL1": (1,),
    "ReduceL2": (1,), "ReduceLogSum": (1,), "ReduceLogSumExp": (1,), "ReduceSumSquare": (1,),
}  # fmt: skip


def _is_setting(model: onnx.ModelProto, name: str) -> bool:
    uses = [(node.op_type, index) for node in model.graph.node for index, used in enumerate(node.input) if used == name]
    return bool(uses) and all(index in _SETTINGS.get(op, ()) for op, index in uses)


def report(results: list[Coverage], reasons: bool, check: bool) -> None:
    """The table, and the line that a script may read."""
    held = Counter(op for result in results if not result.canonical for op in result.operators)
    alone = Counter(result.operators[0] for result in results if len(result.operators) == 1)
    for op, count in held.most_common():
        print(f"{count:5} tests ({alone[op]:4} alone)  {op}")
        if reasons:
            why = Counter(e.reason for r in results for e in r.remaining if e.op == op)
            print("".join(f"                          {n:4} x {reason}\n" for reason, n in why.most_common(6)), end="")
    errors = [result for result in results if result.error]
    for result in errors:
        print(f"not imported: {result.name}: {result.error}")
    differing = [result for result in results if result.differs]
    for result in differing:
        print(f"DIFFERS: {result.name}{' (canonical)' if result.canonical else ''}: {result.differs}")
    done = sum(result.canonical for result in results)
    checked = f", {len(differing)} differ" if check else ""
    print(f"canonical: {done} of {len(results)}{checked}, {len(errors)} not imported")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; the exit code says whether a canonical graph gave a wrong result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--constants", action="store_true")
    parser.add_argument("--reasons", action="store_true")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    results = [examine(case, options.check, options.constants) for case in load_cases(options.filter)]
    report(results, options.reasons, options.check)
    return int(any(result.differs and result.canonical for result in results))


if __name__ == "__main__":
    sys.exit(main())
