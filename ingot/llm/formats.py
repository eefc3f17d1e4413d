"""How an engine keeps a checkpoint's matrices: float32, bfloat16, or integers of eight or four bits with scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.errors import ConfigError
from ingot.llm.decoder import Array, Matrix, Quantized
from ingot.llm.rounding import compensated, rounded, successors_of

Weights = Mapping[str, Array | None]
Role = Literal["plain", "keys", "head", "router"]
_LARGEST_EIGHTH = 448.0  # of float8_e4m3fn
_ROWS = 128  # that are rounded at a time: they stay in a cache
_TOGETHER = 1024  # with errors taken over: numpy is called for each column


@dataclass(frozen=True)
class Format:
    """`bits` of a weight (32: float32, 16: bfloat16); `group` weights along the input share a scale (8 and 4 bits).
    head_bits, key_bits: of the last product, and of those that make keys and values, which suffer most by rounding and
    are few; routers are not rounded to so few. within: how far logits may be from the reference, of their spread;
    grosser errors are faults. table: type of embeddings and routers, and of experts but in fp8; cache: of keys and
    values. narrow_rows: a token's activations are rounded to eight bits too, with a scale for each token and product
    but the last, and one for each column of weights."""

    name: str
    bits: int
    group: int = 0
    head_bits: int = 0
    key_bits: int = 0
    within: float = 1e-3
    table: str = "bfloat16"
    cache: str = "bfloat16"
    narrow_rows: bool = False

    @property
    def compensates(self) -> bool:
        """Whether weights are rounded by what they are multiplied with."""
        return self.bits < 8

    def narrows(self, matrix: Matrix, role: Role) -> bool:
        """Whether what the matrix is multiplied with is rounded to eight bits."""
        return self.narrow_rows and role not in ("head", "router") and not matrix.quantized

    def parts_keys(self, matrix: Matrix) -> bool:
        """Whether keys and values are made with more bits than queries."""
        return self.key_bits > self.bits and not matrix.quantized

    def linear(self, matrix: Matrix, role: Role = "plain") -> tuple[str, Weights, dict[str, Any]]:
        """(operator, operands after x by name, attributes) of a product with the matrix. Integers of the checkpoint
        stay what they are, whatever the format."""
        if matrix.quantized:
            return unpacked(matrix.quantized)
        if self.name.startswith("fp8") and role != "router":
            weight_KN, scale_N = eighths(matrix)
            return "Linear", {"weight": weight_KN, "columns": scale_N}, {}
        if self.narrows(matrix, role):
            weight_KN, scale_1N = integers(matrix, 8, _depth(matrix))
            return "Linear", {"weight": weight_KN, "columns": scale_1N[0]}, {}
        if self.bits > 8 or role == "router":
            dtype = numpy_dtype("float32" if self.bits == 32 else "bfloat16")
            return "Linear", {"weight": joined(matrix, dtype)}, {}
        bits = {"head": self.head_bits, "keys": self.key_bits}.get(role, self.bits)
        weight_KN, scale_GN = integers(matrix, bits, self.group)
        operands = {"weight": weight_KN, "scale": scale_GN, "zero": None}
        return "QuantizedLinear", operands, {"bits": bits, "group": self.group}

    def stack(self, weights: Sequence[Array]) -> tuple[Array, Array | None]:
        """Weights [out, in] of experts as [expert, in, out], and the scales [expert, out] of their columns, if any."""
        if not self.name.startswith("fp8"):
            return np.stack([np.asarray(weight, numpy_dtype(self.table)).T for weight in weights]), None
        kept, scales = zip(*(eighths(Matrix((weight,))) for weight in weights), strict=True)
        return np.stack(kept), np.stack(scales)

    def rows(self, array: Array) -> Array:
        """A table that rows are gathered from."""
        return np.asarray(array, numpy_dtype(self.table))


FORMATS = {
    "fp32": Format("fp32", 32, table="float32", cache="float32"),
    "bf16": Format("bf16", 16, within=0.1),
    "fp8": Format("fp8", 8, within=0.4),
    "fp8_cache": Format("fp8_cache", 8, within=0.5, cache="float8_e4m3fn"),
    "int8": Format("int8", 8, 128, 8, 8, 0.15),
    "w8a8": Format("w8a8", 8, 128, 8, 8, 0.2, narrow_rows=True),
    "int4": Format("int4", 4, 32, 8, 8, 0.9),
}


# keys and values -> their type, and how far logits may be for its sake
CACHES = {"fp32": ("float32", 0.0), "bf16": ("bfloat16", 0.1), "int8": ("int8", 0.15)}


def format_of(name: str) -> Format:
    """The format of a name; ConfigError for an unknown one."""
    if name not in FORMATS:
        raise ConfigError(f"precision {name!r} is not known for language models; use one of {', '.join(FORMATS)}")
    return FORMATS[name]


def unpacked(parts: Sequence[Quantized]) -> tuple[str, Weights, dict[str, Any]]:
    """A product with the checkpoint's own integers, side by side; `order`: of x before it."""
    read = [part.read() for part in parts]
    weight, scale, zero = (np.concatenate([one.T for one in kind]).T for kind in zip(*read, strict=True))
    operands = {"weight": weight, "scale": scale, "zero": zero, "order": parts[0].order}
    return "QuantizedLinear", operands, {"bits": parts[0].bits, "group": parts[0].group}


def with_cache(kept: Format, kv: str | None) -> Format:
    """The format with keys and values kept otherwise: CACHES; None: as it says."""
    if kv is None:
        return kept
    if kv not in CACHES:
        raise ConfigError(f"keys and values cannot be kept as {kv!r}; use one of {', '.join(CACHES)}")
    dtype, within = CACHES[kv]
    return replace(kept, cache=dtype, within=max(kept.within, within))


def _depth(matrix: Matrix) -> int:
    """Inputs of a matrix of floats."""
    return int(matrix.weights[0].shape[0 if matrix.transposed else 1])


def joined(matrix: Matrix, dtype: np.dtype[Any]) -> Array:
    """The weights side by side, [in, out]; a single one of the right type is not copied."""
    parts = [np.asarray(w, dtype) if matrix.transposed else np.asarray(w, dtype).T for w in matrix.weights]
    return parts[0] if len(parts) == 1 else np.concatenate([part.T for part in parts]).T


def eighths(matrix: Matrix) -> tuple[Array, Array]:
    """(weights [in, out] as float8_e4m3fn, a scale per column that bfloat16 holds exactly) of the weights side by
    side."""
    dtype, half = numpy_dtype("float8_e4m3fn"), numpy_dtype("bfloat16")
    weights, scales = list[Array](), list[Array]()
    for weight in matrix.weights:
        rows = weight.T if matrix.transposed else weight
        kept = np.empty(rows.shape, dtype)
        for start in range(0, len(rows), _ROWS):
            part = np.asarray(rows[start : start + _ROWS], np.float32)
            scale = np.abs(part).max(1) * np.float32(1.01 / _LARGEST_EIGHTH)  # rounding it may make it less by 0.4 %
            scale = np.where(scale == 0, np.float32(1), scale).astype(half).astype(np.float32)
            kept[start : start + _ROWS] = (part / scale[:, None]).astype(dtype)
            scales.append(scale)
        weights.append(kept)
    return (weights[0] if len(weights) == 1 else np.concatenate(weights)).T, np.concatenate(scales)


def integers(matrix: Matrix, bits: int, group: int) -> tuple[Array, Array]:
    """(weights [in, out] as int8, scales [groups, out]) of the weights side by side. A scale is exact in float16. With
    few bits, where the matrix has inputs, columns take over each other's errors."""
    parts = [weight.T if matrix.transposed else weight for weight in matrix.weights]
    outputs, depth = sum(len(part) for part in parts), parts[0].shape[1]
    whole, scales = np.empty((outputs, depth), np.int8), np.empty((outputs, -(-depth // group)), np.float32)
    places = np.cumsum([0, *map(len, parts)])
    successors = successors_of(np.concatenate(matrix.inputs)) if bits < 8 and matrix.inputs else None
    size = _ROWS if successors is None else _TOGETHER
    jobs = [(part, start, min(start + size, len(part)), place)
            for part, place in zip(parts, places, strict=False) for start in range(0, len(part), size)]  # fmt: skip

    def do(job: tuple[Array, int, int, int]) -> None:
        part, start, stop, place = job
        rows = np.asarray(part[start:stop], np.float32)
        found = rounded(rows, bits, group) if successors is None else compensated(rows, successors, bits, group)
        whole[place + start : place + stop], scales[place + start : place + stop] = found

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(do, jobs))
    return whole.T, scales.T
