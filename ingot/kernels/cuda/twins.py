"""What libraries' tactics share: the generated kernel that takes their place elsewhere, constants of columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.kernels import Kernel, Ports, registered, tactics
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.attention import flash_attention
from ingot.kernels.cuda.build import CudaBuilder, Handle
from ingot.kernels.cuda.conv import conv
from ingot.kernels.cuda.linear import linear, parallel_linear
from ingot.kernels.node import Node

_GENERATED: dict[str, Callable[..., None]] = {
    "Linear": linear, "ParallelLinear": parallel_linear, "Conv": conv, "Attention": flash_attention,
}  # fmt: skip


def _twin(node: Node) -> Kernel:
    return registered(node.op, "cuda", _GENERATED[node.op].__name__)


def has_twin(node: Node, target: Architecture) -> bool:
    """Whether a generated kernel does the same."""
    twin = _twin(node)
    return twin.when(node, target) and any(True for _ in tactics(twin, node, target))


def twin_layouts(node: Node, target: Architecture) -> Sequence[Ports]:
    """Those of the generated kernel."""
    return _twin(node).layouts(node, target)


def launch_twin(build: CudaBuilder, node: Node) -> None:
    """The launches of the generated kernel at the point that the estimate prefers."""
    twin = _twin(node)
    assert twin.cost is not None
    points = list(tactics(twin, node, build.target))
    estimates = [twin.cost(node, build.target, **point) for point in points]
    twin.generate(build, node, **points[int(np.argmin(estimates))])


def is_vector(node: Node, index: int, columns: int) -> bool:
    """Whether an input is a constant for each column, or one for all."""
    port = node.input(index)
    return port.constant is not None and port.elements in (1, columns)


def pack_vector(build: CudaBuilder, inputs: Sequence[int], together: np.ufunc, columns: int, dtype: str) -> Handle:
    """Inputs that are constants of the columns as one."""
    arrays: list[Any] = [np.asarray(build.node.input(k).constant, np.float32).reshape(-1) for k in inputs]
    whole = arrays[0]
    for array in arrays[1:]:
        whole = together(whole, array)
    return build.pack(np.ascontiguousarray(np.broadcast_to(whole, columns).astype(numpy_dtype(dtype))))
