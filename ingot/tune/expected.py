"""What a node's results must be: its numpy meaning, on some of its items where every item is computed by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.dtypes import LARGEST_HALF
from ingot.ir import expression as expressions
from ingot.ir.ops import OPS, meaning
from ingot.kernels.node import Node

Array = np.ndarray[Any, Any]
ALIKE = 3e-2  # of the largest magnitude: what a kernel's results may differ by
_ALIKE_IN_FLOAT8 = 0.13  # where a result may be rounded to either side: a step of the largest is 1/8 of it at most
_COMPARED = 1 << 19  # elements of a result; of larger ones some items
# Operators whose results' item i along axis 0 needs item i of the inputs alone (a Norm or Softmax along axis 0 does
# not).
_BY_ITEM = frozenset({
    "Conv", "ConvTranspose", "Pool", "Linear", "QuantizedLinear", "Attention", "NarrowAttention", "PackedAttention",
    "Pointwise", "Norm", "NarrowNorm", "Softmax",
})  # fmt: skip


def alike(node: Node) -> float:
    """How far, of the largest magnitude, a kernel's results may be from the node's."""
    return _ALIKE_IN_FLOAT8 if any(p.dtype == "float8_e4m3fn" for p in node.outputs) else ALIKE


@dataclass(frozen=True, eq=False)
class Expected:
    """The meaning's results; of `items` along axis 0, or all where there are none."""

    results: tuple[Array, ...]
    items: Array | None

    def gap(self, found: Sequence[Array]) -> float:
        """The largest difference of any result, whole or cut to the items already, relative to the largest finite
        magnitude of that result."""
        pairs = zip(found, self.results, strict=False)
        return max(difference(y if self._cut(y) else y[self.items], wanted) for y, wanted in pairs)

    def _cut(self, found: Array) -> bool:
        return self.items is None or len(found) == len(self.items)


def expected(node: Node, feeds: Sequence[Array | None]) -> Expected:
    """Of a node with static shapes; constant inputs are the node's own."""
    whole = [p.constant if p is not None and p.constant is not None else x
             for p, x in zip(node.inputs, feeds, strict=True)]  # fmt: skip
    if node.op not in OPS:  # Reorder and Copy change nothing
        return Expected((np.asarray(whole[0]),), None)
    items = _items(node)
    given = whole if items is None else [_cut(node, k, x, items) for k, x in enumerate(whole)]
    stated = dict(node.attributes)
    for key in {"epilogue", "expression"} & OPS[node.op].attributes.keys():
        stated[key] = expressions.format(node.epilogue)
    with np.errstate(all="ignore"):
        return Expected(tuple(map(np.asarray, meaning(node.op)(*given, **stated))), items)


def difference(mine: Array, theirs: Array) -> float:
    """The largest difference relative to the largest finite magnitude; what is infinite must be as large as its type
    allows, with the same sign, on the other side; what is no number must be none there."""
    if mine.shape != theirs.shape:
        return float("inf")
    a, b = mine.astype(np.float64), theirs.astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    if not _same_beyond(a[~finite], b[~finite], _huge(mine.dtype)):
        return float("inf")
    scale = float(np.abs(b[finite]).max(initial=0.0)) or 1.0
    return float(np.abs(a[finite] - b[finite]).max(initial=0.0)) / scale


def _huge(dtype: np.dtype[Any]) -> float:
    """From here on a number of the type may as well have become infinite."""
    return 0.9 * {"float16": LARGEST_HALF}.get(dtype.name, 3.4e38)


def _same_beyond(mine: Array, theirs: Array, huge: float) -> bool:
    """Of pairs of which one is not finite at least."""
    unknown = np.isnan(theirs)
    far = (np.abs(mine) >= huge) & (np.abs(theirs) >= huge) & (np.sign(mine) == np.sign(theirs))
    return bool((np.isnan(mine) == unknown).all() and (unknown | far).all())


def _items(node: Node) -> Array | None:
    """Items to compare: evenly spaced, the first and the last among them."""
    shape = node.output.shape
    axis = node.attributes.get("axis") if node.op in ("Norm", "NarrowNorm", "Softmax") else 1
    if node.op not in _BY_ITEM or len(shape) < 2 or axis in (0, -len(shape)):
        return None
    count, size = int(shape[0]), int(np.prod([int(d) for d in shape[1:]], dtype=np.int64))
    wanted = max(_COMPARED // max(size, 1), 2)
    return None if wanted >= count else np.unique(np.linspace(0, count - 1, wanted).astype(np.int64))


_WEIGHTS = {"Conv": (1,), "ConvTranspose": (1,), "Linear": (1,), "QuantizedLinear": (1, 2, 3)}


def _cut(node: Node, index: int, x: Array | None, items: Array) -> Array | None:
    """An input's items; what all items share stays as it is."""
    shape = node.output.shape
    by_item = len(shape) - (node.op == "PackedAttention" and index == 0)  # heads are an axis of the result alone
    shared = x is None or x.ndim != by_item or x.shape[0] != shape[0]
    weights = index in _WEIGHTS.get(node.op, ())
    return x if x is None or shared or weights else x[items]
