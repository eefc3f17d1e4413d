"""How exact sums of float8 are on a GPU: products whose sums stay in the tensor units, and those that leave them.

    python -m benchmarks.cuda_sums [--out benchmarks/results/h200-sums.json] [--depths 256 768 3072 4096 16384]

A Hopper unit adds 32 products and the sum so far as fixed-point numbers: shifted to the largest exponent among them,
and cut off 13 bits below it (DeepSeek-V3, arXiv:2412.19437, section 3.5.2; SageAttention2, arXiv:2411.10958), which
`modelled` does in numpy. Measured are the largest and the mean error relative to the magnitudes multiplied, of
cuBLASLt's fast and other way and of the generated kernel; how many of the fast way's results are the model's, bit by
bit; and the largest share of what ingot.kernels.cuda.cublaslt.fast_error allows, which must not exceed 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.timing import RESULTS, write_json
from ingot.compiler import toolchain
from ingot.ir.expression import parse
from ingot.kernels import Candidate, candidates
from ingot.kernels.cuda.architecture import Architecture, architecture
from ingot.kernels.cuda.cublaslt import fast_error
from ingot.kernels.cuda.standalone import Standalone
from ingot.kernels.node import Node, Port
from ingot.runtime import cuda, library
from ingot.tune.price import estimate

Array = np.ndarray[Any, Any]
FLOAT8 = ml_dtypes.float8_e4m3fn
WAYS = {"fast": "cublaslt_swift", "other": "cublaslt_linear", "generated": "linear"}
BITS, STEP = 13, 32  # kept below the largest exponent; products that are added at once
ROWS, COLUMNS = 32, 64  # that are compared; the product has as many of them over and over as fill the GPU
COPIES = (64, 8)
EPILOGUE = "Cast %0 -> float32; Mul $0 0.0625 -> float32; Cast $1 -> float16"
SCALE, ALGORITHMS, LIMIT = 0.0625, 3, 2.0**-10


def draw(kind: str, depth: int) -> tuple[Array, Array]:
    """Inputs and weights, numbers that float8 has."""
    random = np.random.default_rng(depth)
    x, weight = random.standard_normal((ROWS, depth)), random.standard_normal((depth, COLUMNS))
    if kind != "both signs":
        x = np.abs(x)
    if kind == "at the limit":
        weight = _leaning(weight - weight.mean(0))
    if kind == "one sign":
        weight = np.abs(weight)
    return x.astype(FLOAT8), weight.astype(FLOAT8)


def _leaning(weight: Array) -> Array:
    """Moved to one side until no more of it would be allowed."""
    low, high = 0.0, 4.0
    for _ in range(30):
        middle = (low + high) / 2
        within = fast_error(_node(np.zeros((1, len(weight)), FLOAT8), (weight + middle).astype(FLOAT8))) <= LIMIT
        low, high = (middle, high) if within else (low, middle)
    return weight + low


def modelled(x: Array, weight: Array) -> Array:
    """Sums as the unit makes them."""
    sums = np.zeros((len(x), weight.shape[1]))
    for begin in range(0, x.shape[1], STEP):
        a, b = x[:, begin : begin + STEP, None], weight[None, begin : begin + STEP]
        products = a * b
        largest = np.where(products != 0, _exponent(a) + _exponent(b), -1000).max(1)
        unit = 2.0 ** (np.maximum(largest, _exponent(sums)) - BITS)
        sums = (np.trunc(products / unit[:, None]).sum(1) + np.trunc(sums / unit)) * unit
        kept = 2.0 ** (_exponent(sums) - BITS)
        sums = np.trunc(sums / kept) * kept
    return sums


def _exponent(numbers: Array) -> Array:
    return np.where(numbers != 0, np.frexp(numbers)[1] - 1, -1000).astype(np.float64)


def _node(x: Array, weight: Array) -> Node:
    ports = Port("float8_e4m3fn", x.shape), Port("float8_e4m3fn", weight.shape, weight)
    output = Port("float16", (x.shape[0], weight.shape[1]))
    return Node("Linear", ports, (output,), {}, epilogue=parse(EPILOGUE))


def run(x: Array, weight: Array, target: Architecture, context: cuda.Context) -> dict[str, list[Array]]:
    """Sums by way, of a few algorithms each."""
    whole_x, whole_weight = np.tile(x, (COPIES[0], 1)), np.tile(weight, (1, COPIES[1]))
    node = _node(whole_x, whole_weight)
    offered = list(candidates(node, "cuda", target))
    found: dict[str, list[Array]] = {}
    for way, name in WAYS.items():
        mine = sorted((c for c in offered if c.kernel.name == name), key=lambda c: estimate(node, c, target))
        for candidate in mine[: ALGORITHMS if way != "generated" else 1]:
            found.setdefault(way, []).append(_sums(node, candidate, whole_x, target, context))
    return found


def _sums(node: Node, candidate: Candidate, x: Array, target: Architecture, context: cuda.Context) -> Array:
    (y,) = Standalone(node, candidate, target, context)(x, None)
    return np.asarray(y[:ROWS, :COLUMNS].astype(np.float64) / SCALE)


def compared(kind: str, depth: int, ways: Callable[[Array, Array], Mapping[str, list[Array]]]) -> dict[str, Any]:
    """A row of the table: errors relative to the magnitudes multiplied."""
    x8, weight8 = draw(kind, depth)
    x, weight = x8.astype(np.float64), weight8.astype(np.float64)
    exact, magnitudes = x @ weight, np.abs(x) @ np.abs(weight)
    model = (modelled(x, weight) * SCALE).astype(np.float16).astype(np.float64) / SCALE
    allowed = fast_error(_node(x8, weight8))
    found = {"modelled": [model], **ways(x8, weight8)}
    worst = {way: _error(sums, exact, magnitudes) for way, sums in found.items()}
    same = [float(np.mean(y == model)) for y in found.get("fast", [])]
    return {"depth": depth, "signs": kind, "allowed": allowed, **worst, "as modelled": same,
            "share of allowed": max(worst[way]["largest"] for way in ("modelled", "fast") if way in worst) / allowed}


def _error(found: list[Array], exact: Array, magnitudes: Array) -> dict[str, float]:
    """Without what rounding the results to float16 adds at most."""
    gaps = [np.maximum(np.abs(y - exact) - np.abs(exact) * 2.0**-11, 0) / magnitudes for y in found]
    return {"largest": float(max(gap.max() for gap in gaps)), "mean": float(max(gap.mean() for gap in gaps))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "h200-sums.json")
    parser.add_argument("--depths", type=int, nargs="+", default=[256, 768, 3072, 4096, 16384])
    options = parser.parse_args()
    device = cuda.select("cuda")
    target = architecture(f"sm_{device.capability}", "fp16", library.installed(("cublaslt",)))
    context, rows = cuda.context_of(device), []
    for depth in options.depths:
        for kind in ("both signs", "inputs of one sign", "at the limit", "one sign"):
            rows.append(compared(kind, depth, lambda x, weight: run(x, weight, target, context)))
            print(json.dumps(rows[-1]), flush=True)
    claim = "errors of float8's sums relative to the magnitudes multiplied; at most what fast_error allows"
    right = all(row["share of allowed"] <= 1 for row in rows)
    versions = toolchain(("triton", "cuda-bindings"))
    write_json(options.out, claim, rows, passed=right, device=str(device), toolchain=versions)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
