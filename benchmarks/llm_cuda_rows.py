"""Forms of products of one row by float8 weights, in a chain as a layer of Llama-3.1-8B has them, on a GPU.

    python -m benchmarks.llm_cuda_rows --out build/rows.json [--forms long ring row]

`row` are launches with a block for each group of columns, `ring` those that stay and are the engine's
(`ingot/kernels/cuda/projection_ring.py`), with forms of it: `eight` warps, fewer or more slots. Each form is compared
with numpy, then timed as a graph of layers with weights of their own, once with a pause of about 4 us where attention
would be, once with one of 8, once with one of 8 that has the shared memory of attention. Limit: 218 MB a layer, 46.4 us
at 4.7 TB/s. Predicted for `ring`: 55 us, with the pause of 4 us 58, as the same form in CUDA C++ took. `long` is the
product of the logits, 525 MB, once with tiles in turn and once with tiles that blocks draw, as the engine has it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.llm_cuda_engine import _unbricked, _unstored
from ingot.dtypes import numpy_dtype
from ingot.errors import IngotError
from ingot.ir.expression import parse
from ingot.kernels import candidates
from ingot.kernels.cuda import projection
from ingot.kernels.cuda.architecture import architecture
from ingot.kernels.cuda.build import NAME, CudaBuilder, Handle, Unit
from ingot.kernels.cuda.compile import compile_unit
from ingot.kernels.cuda.standalone import generate
from ingot.kernels.node import Node, Port
from ingot.runtime import cuda
from ingot.runtime.cubins import Code

LAYERS = 8
ATTENTION = 38912  # bytes of shared memory that a block of one token's has
LARGE = 1 << 20  # bytes of a constant from which on it is weights
Array = np.ndarray[Any, Any]
_BFLOAT, _FLOAT8 = numpy_dtype("bfloat16"), numpy_dtype("float8_e4m3fn")
# Streams of projection, output, gate and down.
STREAMS = {
    "ring": ("ring16x5", "ring16x6", "ring16x5", "ring16x4"),
    "row": ("4x2048w4",) * 4,
    "wide": ("ring16x4", "ring16x7", "ring16x4", "ring16x4"),
    "as-cpp": ("ring16x5", "ring16x5", "ring16x5", "ring16x3"),
    "eight": ("ring8x10", "ring8x12", "ring8x10", "ring8x8"),
    "four": ("ring16x4", "ring16x4", "ring16x4", "ring16x3"),
}
NAMES = ("projection", "output", "gate", "down")
LONG = ("ring16x5", "ring16x5drawn")
_GATED = "Sigmoid %0 -> float32; Mul $0 %0 -> float32; Mul $1 %1 -> float32; Cast $2 -> bfloat16"
_JOINED = "Cast %1 -> float32; Add %0 $0 -> float32; Cast $1 -> bfloat16"
PAUSE = """import triton
import triton.language as tl
#overlap from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def KERNEL(x, y):
    #overlap gdc_launch_dependents()
    #overlap gdc_wait()
    tl.inline_asm_elementwise(
        "{ .reg .pred on; .reg .b64 a, b; mov.u64 a, %clock64; add.s64 a, a, CLOCKS; "
        "AGAIN: mov.u64 b, %clock64; setp.lt.s64 on, b, a; @on bra AGAIN; mov.u32 $0, 0; }",
        "=r", [], tl.int32, is_pure=False, pack=1)
    at = tl.program_id(0) * 64 + tl.arange(0, 64)
    tl.store(y + at, tl.load(x + at))
"""


@dataclass(frozen=True)
class Product:
    """[1, depth] by [depth, parts * columns]. joined: a residual is added."""

    columns: int
    depth: int
    parts: int = 1
    normalised: bool = False
    joined: bool = False


PRODUCTS = (Product(6144, 4096, normalised=True), Product(4096, 4096, joined=True), Product(14336, 4096, 2, True),
            Product(4096, 14336, joined=True))  # fmt: skip
LOGITS = Product(128256, 4096, normalised=True)
GATED, TALL = Product(528, 1152, 2, True), Product(8208, 4096, normalised=True)  # small, compared with numpy


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
        self.rows = [self.upload(np.ones(28672, _BFLOAT)) for _ in range(5)]
        self._chance = np.random.default_rng(0).integers(0, 256, 1 << 24, np.uint8) & 0x8F | 0x30
        self.weights = [[self.filled(p) for p in PRODUCTS] for _ in range(LAYERS)]

    def upload(self, array: Array) -> int:
        """Address of a copy."""
        self._held.append(self.context.allocate(array.nbytes, "a benchmark"))
        self.context.upload(self._held[-1].address, array, self.stream)
        self.context.wait(self.stream, "a copy")
        return self._held[-1].address

    def filled(self, product: Product) -> int:
        """Address of random weights, none of them tiny."""
        size = product.parts * product.columns * product.depth
        self._held.append(self.context.allocate(size, "weights"))
        for start in range(0, size, len(self._chance)):
            self.context.upload(self._held[-1].address + start, self._chance[: size - start], self.stream)
        self.context.wait(self.stream, "weights")
        return self._held[-1].address

    def kernels(self, code: Code) -> cuda.Kernels:
        """With one kernel called "it", which may use all shared memory."""
        return cuda.Kernels(self.context, {"it": replace(code, beside=True)})

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


def node_of(ring: Product, weights: Array | None = None) -> Node:
    """The product as the engine has it."""
    if weights is None:
        weights = np.zeros((ring.parts * ring.columns, ring.depth), _FLOAT8).T
    norm = np.ones(ring.depth, np.float32) if ring.normalised else None
    ports = [Port("bfloat16", (1, ring.depth)), Port("float8_e4m3fn", weights.shape, weights)]
    ports += [Port("float32", norm.shape, norm) if norm is not None else None]  # type: ignore[list-item]
    ports += [Port("bfloat16", (1, ring.columns))] if ring.joined else []
    expression = _GATED if ring.parts == 2 else _JOINED if ring.joined else "Cast %0 -> bfloat16"
    stated = {"parts": ring.parts, "epsilon": 1e-5, "expression": expression, "early": 1}
    outputs = (Port("bfloat16", (1, ring.columns)),)
    return Node("Projection", tuple(ports), outputs, stated, parse(expression), name="product")


def step_of(bench: Bench, build: CudaBuilder, elsewhere: Callable[[Handle, int], int], large: float = LARGE) -> Step:
    """The one launch of a build. Each layer has counters of its own, as launches overlap; `elsewhere` tells where in a
    layer the rest is, constants of `large` bytes too."""
    (call,) = build.launches
    made = compile_unit(call.unit, "sm_90")
    code = Code(made.code, NAME, made.threads, made.shared, True, together=call.unit.together)
    small = {k: bench.upload(array) for k, array in enumerate(build.constants) if array.nbytes < large}
    counters = [[bench.upload(np.zeros(size, np.uint8)) for size in build.counters] for _ in range(LAYERS)]

    def address(handle: Handle, layer: int) -> int:
        if handle.kind == "counter":
            return counters[layer][handle.index]
        held = small.get(handle.index) if handle.kind == "constant" else None
        return held or elsewhere(handle, layer)

    grid = (int(call.grid[0]), 1, 1)
    return Step(bench.kernels(code), grid, lambda layer: [address(h, layer) for h in call.handles])


def engine_step(bench: Bench, node: Node, stream: str, weights: Sequence[int], source: int, target: int,
                added: int = 0) -> Step:  # fmt: skip
    """The engine's launch; without weights of layers the node's own. added: where the residual is, else ones."""
    with mock.patch.multiple(projection, stored=_unstored, bricks=_unbricked) if weights else nullcontext():
        build = launches(node, stream)

    def elsewhere(handle: Handle, layer: int) -> int:
        if handle.kind == "constant":
            return weights[layer]
        return target if handle.kind == "output" else source if handle.index == 0 else added or bench.rows[0]

    return step_of(bench, build, elsewhere, LARGE if weights else math.inf)


def launches(node: Node, stream: str) -> CudaBuilder:
    """The engine's launch of a form."""
    target = architecture("sm_90")
    chosen = next(c for c in candidates(node, "cuda", target) if c.kernel.name == "projection")
    return generate(node, replace(chosen, tactic={"stream": stream}), target)


def error(bench: Bench, product: Product, stream: str) -> float:
    """Relative, of a small product with a norm beside numpy, when it was launched before."""
    rng = np.random.default_rng(1)
    weight = (rng.standard_normal((product.depth, product.parts * product.columns)) * 0.1).astype(_FLOAT8)
    x = (rng.standard_normal(product.depth) * 30).astype(_BFLOAT)
    y = np.full(product.columns, np.nan, _BFLOAT)
    where, given = bench.upload(y), bench.upload(x)
    step = engine_step(bench, node_of(product, weight), stream, (), given, where)
    for _ in range(2):
        step.put(0, bench.stream)
        bench.context.download(y, where, bench.stream)
        bench.context.wait(bench.stream, "a product")
    wanted = meaning(x, weight, product.parts)
    return float(np.linalg.norm(y.astype(np.float64) - wanted) / np.linalg.norm(wanted))


def meaning(x: Array, weight: Array, parts: int) -> Array:
    """norm(x) @ weight, gated by the first of two parts."""
    wide = x.astype(np.float64)
    sums = wide / np.sqrt((wide * wide).mean() + 1e-5) @ weight.astype(np.float64)
    gate, *others = np.split(sums, parts)
    return gate / (1 + np.exp(-gate)) * others[0] if others else gate


def timed(bench: Bench, form: str, pauses: dict[str, Step], each: bool) -> dict[str, float]:
    """Microseconds a layer with pauses and without, and of each product."""
    steps = list[Step]()
    for k, product in enumerate(PRODUCTS):
        weights = [layer[k] for layer in bench.weights]
        given = (weights, bench.rows[k], bench.rows[(k + 1) % 4])
        steps.append(engine_step(bench, node_of(product), STREAMS[form][k], *given))
    row = {"layer us": bench.microseconds(steps)}
    for name, pause in pauses.items():
        row[f"layer with {name} us"] = bench.microseconds([steps[0], pause, *steps[1:]])
    return row | {name: bench.microseconds([step]) for name, step in zip(NAMES, steps, strict=True) if each}


def long_of(bench: Bench) -> dict[str, Any]:
    """Of forms of the logits' product."""
    weights, found = [bench.filled(LOGITS) for _ in range(LAYERS)], dict[str, Any]()
    target = bench.upload(np.zeros(LOGITS.columns, _BFLOAT))
    for stream in LONG:
        us = bench.microseconds([engine_step(bench, node_of(LOGITS), stream, weights, bench.rows[1], target)])
        found[stream] = {"error": error(bench, TALL, stream), "us": us, "B/s": LOGITS.columns * LOGITS.depth / us * 1e6}
    return found


def pause_of(bench: Bench, microseconds: int, shared: int = 0) -> Step:
    """A launch of 128 blocks that takes about so long, as the clock of C++ counted, and bytes of shared memory."""
    text = PAUSE.replace("CLOCKS", str(microseconds * 1700))
    made = compile_unit(Unit(text, (("x", "*bf16"), ("y", "*bf16")), (), 4, 1), "sm_90")
    kernels = bench.kernels(Code(made.code, NAME, made.threads, max(made.shared, shared), True))
    return Step(kernels, (128, 1, 1), lambda layer: (bench.rows[1], bench.rows[4]))


def measured(bench: Bench, form: str, pauses: dict[str, Step]) -> dict[str, Any]:
    """Of a form; why there is none."""
    try:
        found = {"error": error(bench, GATED, STREAMS[form][2])}
        return found | timed(bench, form, pauses, form in ("ring", "row"))
    except IngotError as failed:
        return {"failed": str(failed)}


def main(words: Sequence[str] | None = None) -> None:
    """As the module says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", default=["long", *STREAMS], choices=["long", *STREAMS])
    parser.add_argument("--out", type=Path, required=True, help="JSON that is written")
    given = parser.parse_args(words)
    bench, rows = Bench(), dict[str, Any]()
    pauses = {f"{size} us": pause_of(bench, size) for size in (4, 8)}
    pauses["8 us of 38 KB"] = pause_of(bench, 8, ATTENTION)
    rows["pauses us"] = {name: bench.microseconds([pause]) for name, pause in pauses.items()}
    for form in given.forms:
        rows[form] = long_of(bench) if form == "long" else measured(bench, form, pauses)
        print(form, rows[form], flush=True)
        given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
