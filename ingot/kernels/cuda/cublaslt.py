"""cuBLASLt for Linear, ParallelLinear and convolutions of one tap: the library beside the generated product, its twin.

The twin is the generated kernel that the estimate prefers; it is in the engine too, and runs where the library is not.
Shapes are static: an algorithm is chosen for one size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.errors import LibraryUnusable
from ingot.kernels import kernel
from ingot.kernels.cuda.affine import affine
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.build import CudaBuilder, LibraryUse
from ingot.kernels.cuda.conv import conv_layouts, window_of
from ingot.kernels.cuda.twins import has_twin, is_vector, launch_twin, pack_vector
from ingot.kernels.node import Node
from ingot.runtime import cublaslt, cuda

_NAME = "cublaslt"
_MOST, _FEW = 8, 2  # algorithms that are tried with and without a workspace; where a faster way is tried too
_FLOAT8 = "float8_e4m3fn"
_RESULTS = {"float16": ("float16",), "bfloat16": ("bfloat16",), _FLOAT8: ("float16", "bfloat16", _FLOAT8)}  # by factors
_ALIGNED = 16  # what columns and depth of float8 are multiples of
_BY_TANH = 2.0**-11  # how far GELU by tanh is from GELU, relative to the sums it is made of
# Of fast_error: the least with which it holds for every sum of benchmarks/cuda_sums.py.
_BY_CHANCE, _BY_SIGN = 3.5e-4, 1.85e-5
_SLOW = 1.25  # times as long as those take sums that the tensor units hand over step by step
_EFFICIENCY = 0.9  # of the tensor units, for the estimate
_LATER = 0.01  # microseconds that an estimate adds for each algorithm that cuBLASLt likes better
_FLOATS = np.arange(256, dtype=np.uint8).view(numpy_dtype(_FLOAT8)).astype(np.float32)  # every float8 by its bits
_ACTIVATIONS = {"": "", "Relu": "Relu", "GeluTanh": "GeluTanh", "Gelu": "GeluTanh"}


@dataclass(frozen=True)
class Use:
    """A node as cuBLASLt's product: positions of the inputs that are added to columns, and of the residual. `step`: of
    quantized results. `approximate`: its GELU is by tanh, the node's is not."""

    product: cublaslt.Product
    biases: tuple[int, ...] = ()
    residual: int | None = None
    step: float = 1.0
    approximate: bool = False


def use_of(node: Node, fast: bool = False) -> Use | None:
    """None where cuBLASLt has no such product; `fast`: sums of float8 stay in the tensor units."""
    weight, results = node.input(1), {p.dtype for p in node.outputs}
    if weight.constant is None or weight.dtype != node.dtype or not all(p.static for p in node.outputs):
        return None
    if len(results) != 1 or not results <= set(_RESULTS.get(node.dtype, ())):
        return None
    if node.dtype == _FLOAT8 and (node.op == "Conv" or any(n % _ALIGNED for n in _sizes(node)[1:])):
        return None  # one of these failed in an engine, after it had been timed by itself
    use = _parallel(node) if node.op == "ParallelLinear" else _single(node)
    if not fast or use is None:
        return use
    return replace(use, product=replace(use.product, fast=True)) if node.dtype == _FLOAT8 else None


def _sizes(node: Node) -> tuple[int, int, int]:
    """Rows, columns and depth."""
    shape = [int(n) for n in node.input(1).shape]
    columns, depth = shape[:2] if node.op == "Conv" else shape[1::-1]
    return sum(int(p.elements) for p in node.outputs) // columns, columns, depth


def _parallel(node: Node) -> Use | None:
    rows, _, depth = _sizes(node)
    sizes, scale = node.attributes["sizes"], float(node.attributes.get("scale", 1.0))
    if len(set(sizes)) > 1:
        return None
    dtype = node.output.dtype
    return Use(cublaslt.Product(node.dtype, dtype, dtype, rows, sizes[0], depth, len(sizes), scale, bias=True), (2,))


def _single(node: Node) -> Use | None:
    found = affine(node.epilogue)
    rows, columns, depth = _sizes(node)
    if found is None or found.constant or found.scales or 0 not in found.terms or found.activation not in _ACTIVATIONS:
        return None
    if found.step != 1.0 and node.output.dtype != _FLOAT8:
        return None
    added = [k + 1 for k in found.terms if k]
    biases = tuple(k for k in added if is_vector(node, k, columns))
    rest = [k for k in added if k not in biases]
    if len(rest) > 1 or any(found.terms[k - 1] != 1.0 for k in added):
        return None
    results = node.output.dtype
    others = next((node.input(k).dtype for k in rest), "float16" if results == _FLOAT8 else results)
    if any(node.input(k).shape != node.output.shape for k in rest) or others not in (results, "float16", "bfloat16"):
        return None
    made = cublaslt.Product(node.dtype, results, others, rows, columns, depth, 1, found.terms[0],
                            _ACTIVATIONS[found.activation], bool(biases), bool(rest), results == _FLOAT8)  # fmt: skip
    return Use(made, biases, rest[0] if rest else None, found.step, found.activation == "Gelu")


@lru_cache(maxsize=256)
def _algorithms(made: cublaslt.Product) -> tuple[str, ...]:
    """What cuBLASLt proposes on the GPU that is here; none without the library."""
    most = _FEW if made.factors == _FLOAT8 and not made.fast else _MOST
    try:
        context = cuda.context_of(cuda.select("cuda"))
        return tuple(map(str, cublaslt.Matmul(context, made).algorithms(most)))
    except LibraryUnusable:
        return ()


def _choices(node: Node, target: Architecture, fast: bool = False) -> tuple[str, ...]:
    use = use_of(node, fast)
    return () if use is None else _algorithms(use.product)


def _price(node: Node, target: Architecture, algorithm: str, fast: bool = False) -> float:
    """The slower of tensor units and memory; cuBLASLt's own order."""
    use = use_of(node, fast)
    assert use is not None
    made, narrow = use.product, node.dtype == _FLOAT8
    rows, speed = int(made.rows), target.half_flops * (1 + narrow) / (_SLOW if narrow and not fast else 1)
    compute = 2 * rows * made.columns * made.depth * made.count / (speed * _EFFICIENCY)
    moved = sum(int(p.bytes) for p in (*node.inputs, *node.outputs) if p is not None)
    known = _algorithms(made)
    order = known.index(algorithm) if algorithm in known else _MOST
    return max(compute, moved / (target.bandwidth * 800)) + target.pace.step + _LATER * order


def _applies(node: Node, target: Architecture, approximate: bool = False, fast: bool = False) -> bool:
    if _NAME not in target.libraries:
        return False
    use = use_of(node, fast)
    return use is not None and (fast or use.approximate == approximate) and has_twin(node, target)


def _generate(build: CudaBuilder, node: Node, algorithm: str, fast: bool = False) -> None:
    """The twin's launches, and the library's call in their place."""
    use = use_of(node, fast)
    assert use is not None
    launch_twin(build, node)
    build.libraries.append(_call(build, node, use, cublaslt.Algorithm.parse(algorithm)))


def _call(build: CudaBuilder, node: Node, use: Use, algorithm: cublaslt.Algorithm) -> LibraryUse:
    weight, made = node.input(1).constant, use.product
    assert weight is not None
    columns = made.columns * made.count
    flat = weight.reshape(weight.shape[0], -1) if node.op == "Conv" else weight.T
    handles = [build.input(0), build.pack(np.ascontiguousarray(flat))]
    if made.rescaled:
        handles.append(build.pack(np.array([1 / use.step], np.float32)))
    if use.biases:
        handles.append(pack_vector(build, use.biases, np.add, columns, made.others))
    if use.residual is not None:
        handles.append(build.input(use.residual))
    handles.append(build.temporary(max(algorithm.workspace, 1), "int8"))
    outputs = [build.output(i) for i in range(len(node.outputs))]
    return LibraryUse(_NAME, cublaslt.recipe_of(made, algorithm), (*handles, *outputs))


_KNOWN_ERRORS: WeakKeyDictionary[Node, float] = WeakKeyDictionary()  # a choice asks for them, and the report again


def fast_error(node: Node) -> float:
    """How far sums that stay in the tensor units may be from those in float32, relative to the magnitudes multiplied,
    if inputs are of one sign. A step cuts 32 products off at a unit of up to 2^-13 of the sum so far. What is cut off
    cancels where products have both signs, but for chance; what is left grows with the depth and with the square of
    how far a column's weights are of one sign: f K / 32 steps, each 16 f units of f K / 2 products, on average."""
    if node not in _KNOWN_ERRORS:
        _KNOWN_ERRORS[node] = _fast_error(node)
    return _KNOWN_ERRORS[node]


def _fast_error(node: Node) -> float:
    weight = node.input(1).constant
    assert weight is not None
    values = _FLOATS[weight.view(np.uint8)]
    share = np.abs(values.sum(0)) / np.maximum(np.abs(values).sum(0), 1e-30)
    return float(_BY_CHANCE + _BY_SIGN * len(weight) * (share**2).max(initial=0.0))


_HOW: dict[str, Any] = {"on": "cuda", "space": {"algorithm": _choices}, "cost": _price, "library": _NAME}
_SWIFTLY: dict[str, Any] = {
    **_HOW, "when": partial(_applies, fast=True), "space": {"algorithm": partial(_choices, fast=True)},
    "cost": partial(_price, fast=True), "tolerance": fast_error,
}  # fmt: skip


@kernel("Linear", when=_applies, **_HOW)
def cublaslt_linear(build: CudaBuilder, node: Node, algorithm: str) -> None:
    """epilogue(x[M, K] @ w[K, N]); the weights are stored [N, K]"""
    _generate(build, node, algorithm)


@kernel("Linear", when=lambda node, target: _applies(node, target, True), tolerance=_BY_TANH, **_HOW)
def cublaslt_gelu(build: CudaBuilder, node: Node, algorithm: str) -> None:
    """The same, with GELU by tanh"""
    _generate(build, node, algorithm)


@kernel("ParallelLinear", when=_applies, **_HOW)
def cublaslt_parallel(build: CudaBuilder, node: Node, algorithm: str) -> None:
    """x[M, K] @ w[K, N] + bias[N], one product for each output"""
    _generate(build, node, algorithm)


@kernel("Linear", **_SWIFTLY)
def cublaslt_swift(build: CudaBuilder, node: Node, algorithm: str) -> None:
    """Of float8, its sums kept where they are made; GELU by tanh"""
    _generate(build, node, algorithm, fast=True)


@kernel("ParallelLinear", **_SWIFTLY)
def cublaslt_parallel_swift(build: CudaBuilder, node: Node, algorithm: str) -> None:
    """Several products of float8, their sums kept where they are made"""
    _generate(build, node, algorithm, fast=True)


def _one_tap(node: Node, target: Architecture) -> bool:
    window = window_of(node)
    return window.plain and window.group == 1 and _applies(node, target)


@kernel("Conv", when=_one_tap, layouts=lambda node, target: conv_layouts(node, few=False), **_HOW)
def cublaslt_conv(build: CudaBuilder, node: Node, algorithm: str) -> None:
    """A convolution of one tap: every position is a row"""
    _generate(build, node, algorithm)
