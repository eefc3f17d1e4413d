"""cuBLASLt for Linear, ParallelLinear and convolutions of one tap: the library beside the generated product, its twin.

The twin is the generated kernel that the estimate prefers; it is in the engine too, and runs where the library is not.
Shapes are static: an algorithm is chosen for one size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.errors import LibraryUnusable
from ingot.kernels import kernel, registered, tactics
from ingot.kernels.cuda.affine import affine
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.build import CudaBuilder, Handle, LibraryUse
from ingot.kernels.cuda.conv import conv, conv_layouts, window_of
from ingot.kernels.cuda.linear import linear, parallel_linear
from ingot.kernels.node import Node, Port
from ingot.runtime import cublaslt, cuda

_NAME = "cublaslt"
_MOST = 12  # algorithms that are tried
_RESULTS = {"float16": ("float16",), "bfloat16": ("bfloat16",), "float8_e4m3fn": ("float16", "bfloat16")}  # by factors
_BY_TANH = 2.0**-11  # how far GELU by tanh is from GELU, relative to the sums it is made of
_EFFICIENCY = 0.9  # of the tensor units, for the estimate
_LATER = 0.01  # microseconds that an estimate adds for each algorithm that cuBLASLt likes better
_TWINS = {"Linear": linear, "ParallelLinear": parallel_linear, "Conv": conv}
_ACTIVATIONS = {"": "", "Relu": "Relu", "GeluTanh": "GeluTanh", "Gelu": "GeluTanh"}


@dataclass(frozen=True)
class Use:
    """A node as cuBLASLt's product: positions of the inputs that each column is multiplied by, of those that are added
    to it, and of the residual. `approximate`: its GELU is by tanh, the node's is not."""

    product: cublaslt.Product
    scales: tuple[int, ...] = ()
    biases: tuple[int, ...] = ()
    residual: int | None = None
    approximate: bool = False


def use_of(node: Node) -> Use | None:
    """None where cuBLASLt has no such product."""
    weight, results = node.input(1), {p.dtype for p in node.outputs}
    if weight.constant is None or weight.dtype != node.dtype or not all(p.static for p in node.outputs):
        return None
    if len(results) != 1 or not results <= set(_RESULTS.get(node.dtype, ())):
        return None
    return _parallel(node) if node.op == "ParallelLinear" else _single(node)


def _sizes(node: Node) -> tuple[int, int, int]:
    """Rows, columns and depth."""
    shape = [int(n) for n in node.input(1).shape]
    columns, depth = shape[:2] if node.op == "Conv" else shape[1::-1]
    return sum(int(p.elements) for p in node.outputs) // columns, columns, depth


def _parallel(node: Node) -> Use | None:
    rows, _, depth = _sizes(node)
    sizes = node.attributes["sizes"]
    if len(set(sizes)) > 1:
        return None
    made = cublaslt.Product(node.dtype, node.output.dtype, rows, sizes[0], depth, len(sizes), bias=True)
    return Use(made, biases=(2,))


def _single(node: Node) -> Use | None:
    found = affine(node.epilogue)
    rows, columns, depth = _sizes(node)
    if found is None or found.constant or 0 not in found.terms:
        return None
    added = [k + 1 for k in found.terms if k]
    scales = tuple(k + 1 for k in found.scales)
    biases = tuple(k for k in added if _per_column(node.input(k), columns))
    rest = [k for k in added if k not in biases]
    if len(rest) > 1 or any(found.terms[k - 1] != 1.0 for k in added):
        return None
    if not all(_per_column(node.input(k), columns) for k in scales) or (scales and node.dtype != "float8_e4m3fn"):
        return None
    if any((node.input(k).shape, node.input(k).dtype) != (node.output.shape, node.output.dtype) for k in rest):
        return None
    made = cublaslt.Product(node.dtype, node.output.dtype, rows, columns, depth, 1, found.terms[0],
                            _ACTIVATIONS[found.activation], bool(biases), bool(rest), bool(scales))  # fmt: skip
    return Use(made, scales, biases, rest[0] if rest else None, found.activation == "Gelu")


def _per_column(port: Port, columns: int) -> bool:
    return port.constant is not None and port.elements in (1, columns)


@lru_cache(maxsize=256)
def _algorithms(made: cublaslt.Product) -> tuple[str, ...]:
    """What cuBLASLt proposes on the GPU that is here; none without the library."""
    try:
        context = cuda.context_of(cuda.select("cuda"))
        return tuple(map(str, cublaslt.Matmul(context, made).algorithms(_MOST)))
    except LibraryUnusable:
        return ()


def _choices(node: Node, target: Architecture) -> tuple[str, ...]:
    use = use_of(node)
    return () if use is None else _algorithms(use.product)


def _price(node: Node, target: Architecture, algorithm: str) -> float:
    """The slower of tensor units and memory; cuBLASLt's own order."""
    use = use_of(node)
    assert use is not None
    made = use.product
    rows, speed = int(made.rows), target.half_flops * (1 + (node.dtype == "float8_e4m3fn"))
    compute = 2 * rows * made.columns * made.depth * made.count / (speed * _EFFICIENCY)
    moved = sum(int(p.bytes) for p in (*node.inputs, *node.outputs) if p is not None)
    known = _algorithms(made)
    order = known.index(algorithm) if algorithm in known else _MOST
    return max(compute, moved / (target.bandwidth * 800)) + target.pace.step + _LATER * order


def _applies(node: Node, target: Architecture, approximate: bool = False) -> bool:
    if _NAME not in target.libraries:
        return False
    use, twin = use_of(node), registered(node.op, "cuda", _TWINS[node.op].__name__)
    fits = use is not None and use.approximate == approximate and twin.when(node, target)
    return fits and any(True for _ in tactics(twin, node, target))


def _generate(build: CudaBuilder, node: Node, algorithm: str) -> None:
    """The twin's launches, and the library's call in their place."""
    use = use_of(node)
    assert use is not None
    entry = registered(node.op, "cuda", _TWINS[node.op].__name__)
    points = list(tactics(entry, node, build.target))
    estimates = [entry.cost(node, build.target, **point) if entry.cost else 0.0 for point in points]
    entry.generate(build, node, **points[int(np.argmin(estimates))])
    build.libraries.append(_call(build, node, use, cublaslt.Algorithm.parse(algorithm)))


def _call(build: CudaBuilder, node: Node, use: Use, algorithm: cublaslt.Algorithm) -> LibraryUse:
    weight, made = node.input(1).constant, use.product
    assert weight is not None
    flat = weight.reshape(weight.shape[0], -1) if node.op == "Conv" else weight.T
    handles = [build.input(0), build.pack(np.ascontiguousarray(flat))]
    if use.scales:
        handles += [_vector(build, node, use.scales, "float32", np.multiply),
                    build.pack(np.ones(int(made.rows), np.float32))]  # fmt: skip
    if use.biases:
        handles.append(_vector(build, node, use.biases, made.results, np.add))
    if use.residual is not None:
        handles.append(build.input(use.residual))
    handles.append(build.temporary(max(algorithm.workspace, 1), "int8"))
    outputs = [build.output(i) for i in range(len(node.outputs))]
    return LibraryUse(_NAME, cublaslt.recipe_of(made, algorithm), (*handles, *outputs))


def _vector(build: CudaBuilder, node: Node, inputs: tuple[int, ...], dtype: str, together: np.ufunc) -> Handle:
    """Constants of all columns as one."""
    columns = _sizes(node)[1]
    arrays = [np.asarray(node.input(k).constant, np.float32).reshape(-1) for k in inputs]
    whole = np.broadcast_to(reduce(together, arrays), columns)
    return build.pack(np.ascontiguousarray(whole.astype(numpy_dtype(dtype))))


_HOW: dict[str, Any] = {"on": "cuda", "space": {"algorithm": _choices}, "cost": _price, "library": _NAME}


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


def _one_tap(node: Node, target: Architecture) -> bool:
    window = window_of(node)
    return window.plain and window.group == 1 and _applies(node, target)


@kernel("Conv", when=_one_tap, layouts=lambda node, target: conv_layouts(node, few=False), **_HOW)
def cublaslt_conv(build: CudaBuilder, node: Node, algorithm: str) -> None:
    """A convolution of one tap: every position is a row"""
    _generate(build, node, algorithm)
