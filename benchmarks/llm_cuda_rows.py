"""Forms of products of one row by float8 weights, in a chain as a layer of Llama-3.1-8B has them, on a GPU.

    python -m benchmarks.llm_cuda_rows --out build/rows.json [--forms row ring free free-larger]

`row` are the engine's launches; `ring` streams through shared memory with barriers of the block, `free` without
(`llm_cuda_rings`), each with room for two launches a processor (98 KB) or, `-larger`, where no two blocks of output and
down fit one. Each form is compared with numpy, then timed as a graph of layers with weights of their own, once with a
pause of about 4 us where attention would be. Limit: 218 MB a layer, 46.4 us at 4.7 TB/s. Predicted for `free`: 55 us,
with the pause 58, as the same form in CUDA C++ took.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.llm_cuda_rings import Array, Ring, bricks, compiled, parted
from ingot.dtypes import numpy_dtype
from ingot.ir.expression import parse
from ingot.kernels import candidates
from ingot.kernels.cuda.architecture import architecture
from ingot.kernels.cuda.build import NAME, Unit
from ingot.kernels.cuda.compile import compile_unit
from ingot.kernels.cuda.standalone import generate
from ingot.kernels.node import Node, Port
from ingot.runtime import cuda
from ingot.runtime.cubins import Code

LAYERS = 8
PRODUCTS = (Ring(6144, 4096, normalised=True), Ring(4096, 4096, joined=True), Ring(14336, 4096, 2, True),
            Ring(4096, 14336, joined=True, slots=4))  # fmt: skip
FORMS = ("row", "ring", "free", "ring-larger", "free-larger")
_SHARED_SHARE = 9  # of CUfunction_attribute
_GATED = "Sigmoid %0 -> float32; Mul $0 %0 -> float32; Mul $1 %1 -> float32; Cast $2 -> bfloat16"
_JOINED = "Cast %1 -> float32; Add %0 $0 -> float32; Cast $1 -> bfloat16"
PAUSE = """import triton
import triton.language as tl
#overlap from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def KERNEL(x, y):
    #overlap gdc_launch_dependents()
    #overlap gdc_wait()
    tl.inline_asm_elementwise("nanosleep.u32 4000; mov.u32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1)
    at = tl.program_id(0) * 64 + tl.arange(0, 64)
    tl.store(y + at, tl.load(x + at))
"""


@dataclass(frozen=True)
class Step:
    """A launch whose weights are those of a layer."""

    kernels: cuda.Kernels
    grid: tuple[int, int, int]
    addresses: Callable[[int], Sequence[int]]

    def put(self, layer: int, stream: Any) -> None:
        """On the stream."""
        values = (*self.addresses(layer), 0, 0)
        self.kernels.launch("it", self.grid, (values, (ctypes.c_void_p,) * len(values)), stream)


class Bench:
    """A GPU with rows, and weights of all layers."""

    def __init__(self) -> None:
        self.context = cuda.context_of(cuda.select("cuda"))
        self.stream, self._held = self.context.stream(), list[cuda.Allocation]()
        self.rows = [self.upload(np.ones(28672, numpy_dtype("bfloat16"))) for _ in range(5)]
        chance = np.random.default_rng(0).integers(0, 256, 1 << 24, np.uint8) & 0x8F | 0x30
        self.weights = [[self._filled(p.parts * p.columns * p.depth, chance) for p in PRODUCTS] for _ in range(LAYERS)]

    def upload(self, array: Array) -> int:
        """Address of a copy."""
        self._held.append(self.context.allocate(array.nbytes, "a benchmark"))
        self.context.upload(self._held[-1].address, array, self.stream)
        self.context.wait(self.stream, "a copy")
        return self._held[-1].address

    def _filled(self, size: int, chance: Array) -> int:
        self._held.append(self.context.allocate(size, "weights"))
        for start in range(0, size, len(chance)):
            self.context.upload(self._held[-1].address + start, chance[: size - start], self.stream)
        self.context.wait(self.stream, "weights")
        return self._held[-1].address

    def kernels(self, code: Code) -> cuda.Kernels:
        """With one kernel called "it", which may use all shared memory."""
        made = cuda.Kernels(self.context, {"it": code})
        kind = self.context.driver.enum("CUfunction_attribute", _SHARED_SHARE)
        self.context.call("cuFuncSetAttribute", made.function("it"), kind, 100)
        return made

    def microseconds(self, steps: Sequence[Step]) -> float:
        """Of a layer; the median of some graphs."""

        def record() -> None:
            for layer in range(LAYERS):
                for step in steps:
                    step.put(layer, self.stream)

        graph, times = self.context.capture(self.stream, record), list[float]()
        begin, end = self.context.event(), self.context.event()
        for _ in range(9):
            self.context.call("cuEventRecord", begin, self.stream)
            for _ in range(4):
                self.context.call("cuGraphLaunch", graph, self.stream)
            self.context.call("cuEventRecord", end, self.stream)
            self.context.wait(self.stream, "timing")
            times.append(1e3 * self.context.call("cuEventElapsedTime", begin, end) / 4 / LAYERS)
        self.context.call("cuGraphExecDestroy", graph)
        return round(statistics.median(times[1:]), 2)


def ring_of(form: str, product: Ring) -> Ring:
    """A form's ring: those without a norm are the larger ones."""
    larger = form.endswith("-larger") and not product.normalised and product.depth <= 4096
    return replace(product, barriers=form.startswith("ring"), slots=product.slots + larger)


def ring_step(bench: Bench, ring: Ring, weights: Sequence[int], source: int, target: int) -> Step:
    """One launch of a ring."""
    made, _ = compiled(ring)
    scales = bench.upload(parted(np.ones(ring.depth, np.float32)))
    code = Code(made.code, NAME, made.threads, made.shared, True)
    places = {"x": source, "scales": scales, "stream": bench.rows[0], "y": target}

    def addresses(layer: int) -> list[int]:
        return [weights[layer] if name == "weights" else places[name] for name in ring.operands]

    return Step(bench.kernels(code), (ring.blocks, 1, 1), addresses)


def node_of(ring: Ring) -> Node:
    """The product as the engine has it."""
    weights = np.zeros((ring.parts * ring.columns, ring.depth), numpy_dtype("float8_e4m3fn")).T
    norm = np.ones(ring.depth, np.float32) if ring.normalised else None
    ports = [Port("bfloat16", (1, ring.depth)), Port("float8_e4m3fn", weights.shape, weights)]
    ports += [Port("float32", norm.shape, norm) if norm is not None else None]  # type: ignore[list-item]
    ports += [Port("bfloat16", (1, ring.columns))] if ring.joined else []
    expression = _GATED if ring.parts == 2 else _JOINED if ring.joined else "Cast %0 -> bfloat16"
    stated = {"parts": ring.parts, "epsilon": 1e-5, "expression": expression}
    outputs = (Port("bfloat16", (1, ring.columns)),)
    return Node("Projection", tuple(ports), outputs, stated, parse(expression), name="product")


def row_step(bench: Bench, ring: Ring, weights: Sequence[int], source: int, target: int) -> Step:
    """The engine's launch."""
    node, target_of = node_of(ring), architecture("sm_90")
    (chosen,) = [c for c in candidates(node, "cuda", target_of) if c.tactic["stream"] == "4x2048w4"]
    build = generate(node, chosen, target_of)
    (call,) = build.launches
    made = compile_unit(call.unit, "sm_90")
    code = Code(made.code, NAME, made.threads, made.shared, True)
    small = {k: bench.upload(array) for k, array in enumerate(build.constants) if array.nbytes < 1 << 20}

    def address(handle: Any, layer: int) -> int:
        if handle.kind == "constant":
            return small.get(handle.index) or weights[layer]
        return target if handle.kind == "output" else source if handle.index == 0 else bench.rows[0]

    grid = (int(call.grid[0]), 1, 1)
    return Step(bench.kernels(code), grid, lambda layer: [address(h, layer) for h in call.handles])


def error(bench: Bench, form: str) -> float:
    """Relative, of a small product beside numpy."""
    ring = replace(ring_of(form, Ring(528, 1152, 2, True)), blocks=20)
    rng = np.random.default_rng(1)
    weight = (rng.standard_normal((1152, 1056)) * 0.1).astype(numpy_dtype("float8_e4m3fn"))
    x = (rng.standard_normal(1152) * 30).astype(numpy_dtype("bfloat16"))
    y = np.zeros(528, numpy_dtype("bfloat16"))
    where = bench.upload(y)
    step = ring_step(bench, ring, [bench.upload(bricks(weight, 2))], bench.upload(x), where)
    step.put(0, bench.stream)
    bench.context.download(y, where, bench.stream)
    bench.context.wait(bench.stream, "a product")
    wide = x.astype(np.float64)
    sums = wide / np.sqrt((wide * wide).mean() + 1e-5) @ weight.astype(np.float64)
    wanted = sums[:528] / (1 + np.exp(-sums[:528])) * sums[528:]
    return float(np.linalg.norm(y.astype(np.float64) - wanted) / np.linalg.norm(wanted))


def timed(bench: Bench, form: str, pause: Step) -> dict[str, float]:
    """Microseconds a layer, of the four products alone too."""
    steps = list[Step]()
    for k, product in enumerate(PRODUCTS):
        weights = [layer[k] for layer in bench.weights]
        given = (weights, bench.rows[k], bench.rows[(k + 1) % 4])
        steps.append(row_step(bench, product, *given) if form == "row"
                     else ring_step(bench, ring_of(form, product), *given))  # fmt: skip
    names = ("projection", "output", "gate", "down")
    row = {name: bench.microseconds([step]) for name, step in zip(names, steps, strict=True)}
    row |= {"layer us": bench.microseconds(steps)}
    return row | {"layer with a pause us": bench.microseconds([steps[0], pause, *steps[1:]])}


def main(words: Sequence[str] | None = None) -> None:
    """As the module says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--out", type=Path, required=True, help="JSON that is written")
    given = parser.parse_args(words)
    bench, rows = Bench(), dict[str, Any]()
    unit = Unit(PAUSE, (("x", "*bf16"), ("y", "*bf16")), (), 4, 1)
    made = compile_unit(unit, "sm_90")
    kernels = bench.kernels(Code(made.code, NAME, made.threads, made.shared, True))
    pause = Step(kernels, (128, 1, 1), lambda layer: (bench.rows[1], bench.rows[4]))
    rows["pause us"] = bench.microseconds([pause])
    for form in given.forms:
        found = {} if form == "row" else {"error": error(bench, form)}
        rows[form] = found | timed(bench, form, pause)
        print(form, rows[form], flush=True)
        given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
