"""How near each step of a network comes to what one core can do at most.

    python -m benchmarks.cpu_roofline resnet50 [--exact | --bf16 | --int8] [--batch 1] [--json roofline.json]

The limit of a step is the longer of two times: its operations at the register-only peak of the instruction that its
kernel multiplies with (benchmarks.peaks measures it), and its bytes at the speed of reading memory. Operations are
those of the direct convolution, whatever the kernel does. The last line is the network's share of what the vector
registers can do at most (multiply-adds of float32; four bytes at a time, VNNI, where the model is int8), which tile
registers (AMX) may exceed, and of the peak of the kernels that were chosen.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ingot
from benchmarks.models import MODELS, example_inputs, model_path
from benchmarks.peaks import Peaks, describe, peaks
from benchmarks.quantized import quantized_path
from benchmarks.timing import pinned, write_json
from ingot.kernels.cpu.standalone import native_isa
from ingot.runtime.profiler import StepTime

RUNS = 15
# Kernels that do not multiply by float32 multiply-adds, by what their names hold: what they use instead, and how many
# of its products stand for one.
UNITS = (
    (("depthwise", "vnni", "pairs", "weights"), "fma", 1),
    (("split",), "tiles bfloat16", 3),
    (("rounded",), "tiles bfloat16", 1),
    (("bytes",), "tiles uint8", 1),
)


@dataclass(frozen=True)
class Row:
    """One step: its time, work, what limits it, and the share of that limit that it reaches."""

    nodes: str
    kernel: str
    microseconds: float
    operations: int
    bytes: int
    unit: str
    limit: float
    bound: str

    @property
    def share(self) -> float:
        return self.limit / self.microseconds


def unit_of(kernel: str, found: Peaks) -> tuple[str, int]:
    """What a kernel multiplies with, and how many products stand for one."""
    matches = ((unit, count) for words, unit, count in UNITS if any(word in kernel for word in words))
    return next((match for match in matches if match[0] in found.operations), ("fma", 1))


def row(step: StepTime, microseconds: float, found: Peaks) -> Row:
    kernel = step.kernel.split("(")[0]
    unit, products = unit_of(kernel, found)
    compute = step.flops * products / found.operations[unit]
    memory = step.bytes / found.bytes
    named = f"{unit} / {products}" if products > 1 else unit
    limit, bound = (compute, named) if compute >= memory else (memory, "memory")
    names = ", ".join(step.nodes) or step.name
    return Row(names, kernel, round(microseconds, 1), step.flops, step.bytes, named, round(limit, 1), bound)


def build(name: str, batch: int, precision: str) -> ingot.Engine:
    path = quantized_path(name, batch) if precision == "int8" else model_path(name, batch)
    config = ingot.BuildConfig(
        exact=precision == "exact",
        precision="bf16" if precision == "bf16" else "fp32",
        verify=False,
        timing_cache=Path("build/timing.cache"),
    )
    return ingot.build(path, config)


def measure(name: str, batch: int, precision: str, found: Peaks) -> list[Row]:
    """The median time of each step over several runs on one thread."""
    inputs = example_inputs(name, batch)
    with pinned(1), ingot.Session(build(name, batch, precision), threads=1) as session:
        session.run(inputs)
        runs = [session.profile(inputs) for _ in range(RUNS)]
    medians = [float(np.median([run[k].microseconds for run in runs])) for k in range(len(runs[0]))]
    return [row(step, time, found) for step, time in zip(runs[0], medians, strict=True)]


def table(rows: Sequence[Row]) -> Iterator[str]:
    yield f"{'µs':>9}{'GFLOP/s':>9}{'GB/s':>7}{'of limit':>9}  {'limit':<20}{'kernel':<22}nodes"
    for r in rows:
        speeds = f"{r.operations / r.microseconds / 1e3:>9.0f}{r.bytes / r.microseconds / 1e3:>7.1f}{r.share:>9.0%}"
        yield f"{r.microseconds:>9.1f}{speeds}  {r.bound:<20}{r.kernel:<22}{r.nodes[:60]}"


def totals(rows: Sequence[Row], found: Peaks, precision: str) -> dict[str, Any]:
    """Of the whole network: its time, and the shares of the peaks and of the limits."""
    time, operations = sum(r.microseconds for r in rows), sum(r.operations for r in rows)
    vectors = "vnni" if precision == "int8" and "vnni" in found.operations else "fma"
    own = sum(r.operations / found.operations[vectors] for r in rows)
    chosen = sum(r.operations * _products(r) / found.operations[r.unit.split(" / ")[0]] for r in rows)
    return {
        "milliseconds": round(time / 1e3, 3),
        "gflops": round(operations / time / 1e3, 1),
        "vector_peak": {"fma": "multiply-adds", "vnni": "VNNI"}[vectors],
        "of_vector_peak": round(own / time, 4),
        "of_chosen_peak": round(chosen / time, 4),
        "of_limits": round(sum(r.limit for r in rows) / time, 4),
    }


def _products(r: Row) -> int:
    return int(r.unit.split(" / ")[1]) if " / " in r.unit else 1


def claim(name: str, precision: str, total: dict[str, Any]) -> str:
    return (
        f"{name} {precision}: {total['milliseconds']:.2f} ms, {total['gflops']:,.0f} GFLOP/s; "
        f"{total['of_vector_peak']:.0%} of the register-only peak of vectors ({total['vector_peak']}), "
        f"{total['of_chosen_peak']:.0%} of that of the chosen kernels, {total['of_limits']:.0%} of the limits of all "
        "steps"
    )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    precision = parser.add_mutually_exclusive_group()
    for value, said in (("exact", "float32, nothing rounded"), ("bf16", "bfloat16 allowed"), ("int8", "QDQ model")):
        precision.add_argument(f"--{value}", dest="precision", action="store_const", const=value, help=said)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def main() -> int:
    chosen, isa = options(), native_isa()
    if isa is None:
        print("this machine has no instruction set Ingot generates code for")
        return 1
    found, precision = peaks(isa), chosen.precision or "fp32"
    print(describe(found))
    rows = measure(chosen.name, chosen.batch, precision, found)
    print("\n".join(table(rows)))
    total = totals(rows, found, precision)
    if chosen.json:
        figures = [asdict(r) | {"share": round(r.share, 3)} for r in rows]
        write_json(chosen.json, f"{chosen.name} b{chosen.batch} {precision}, step by step on one core", figures,
                   peaks=asdict(found), totals=total, line=claim(chosen.name, precision, total))  # fmt: skip
    print(claim(chosen.name, precision, total))
    return 0


if __name__ == "__main__":
    sys.exit(main())
