"""cuDNN for convolutions without residual, in fp16, bf16 and int8: its plans beside the generated product, their twin.

With a residual cuDNN had nothing to offer on an H200: such a plan takes 0.4 s to build, and 175 µs where the generated
kernel takes 115.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ingot.errors import LibraryUnusable
from ingot.kernels import kernel
from ingot.kernels.cuda.affine import affine
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.build import CudaBuilder, LibraryUse
from ingot.kernels.cuda.conv import conv_layouts, is_depthwise, window_of
from ingot.kernels.cuda.twins import has_twin, is_vector, launch_twin, pack_vector
from ingot.kernels.node import Node
from ingot.runtime import cuda, cudnn

_NAME = "cudnn"
_MOST = 12  # plans that are tried
_RESULTS = {"float16": ("float16",), "bfloat16": ("bfloat16",), "int8": ("int8", "float16")}  # by type of the factors
_ALIGNED = {"float16": 8, "bfloat16": 8, "int8": 16}  # channels are multiples of it, for its fast kernels
_EFFICIENCY, _LATER = 0.8, 0.01  # of the tensor units; microseconds of estimate for each plan that is liked better


def use_of(node: Node) -> tuple[cudnn.Convolution, tuple[int, ...], tuple[int, ...]] | None:
    """The convolution, and the inputs that scale and that shift its channels; None where cuDNN has none for it."""
    found, weight, aligned = affine(node.epilogue), node.input(1), _ALIGNED.get(node.dtype, 0)
    if found is None or not aligned or len(weight.shape) != 4 or not (node.input(0).static and node.output.static):
        return None
    inputs = [k for k in found.terms if k]
    vectors = (*inputs, *found.scales)
    if found.constant or found.step != 1.0 or 0 not in found.terms or found.activation not in ("", "Relu"):
        return None
    if node.output.dtype not in _RESULTS[node.dtype] or any(found.terms[k] != 1.0 for k in inputs):
        return None
    if found.terms[0] != 1.0 or not all(is_vector(node, k + 1, int(weight.shape[0])) for k in vectors):
        return None
    shape, filter = tuple(map(int, node.input(0).shape)), tuple(map(int, weight.shape))
    if shape[1] % aligned or filter[0] % aligned or filter[1] % aligned:
        return None
    window = window_of(node)
    kind = "float32" if node.dtype == "int8" else node.output.dtype
    made = cudnn.Convolution(node.dtype, kind, node.output.dtype, shape, filter, window.strides, window.dilations,
                             window.pads, bool(found.scales), bool(inputs), found.activation == "Relu")  # fmt: skip
    return made, tuple(k + 1 for k in found.scales), tuple(k + 1 for k in inputs)


@lru_cache(maxsize=256)
def _plans(made: cudnn.Convolution) -> tuple[str, ...]:
    """cuDNN's plans on the GPU that is here, as "91900-3": its version and a number; none without the library."""
    context = cuda.context_of(cuda.select("cuda"))
    try:
        version = cudnn.version(context)
    except LibraryUnusable:
        return ()
    return tuple(f"{version}-{index}" for index in range(min(cudnn.plans(context, made), _MOST)))


def _choices(node: Node, target: Architecture) -> tuple[str, ...]:
    use = use_of(node)
    return () if use is None else _plans(use[0])


def _applies(node: Node, target: Architecture) -> bool:
    if _NAME not in target.libraries or use_of(node) is None:
        return False
    return not is_depthwise(node) and has_twin(node, target)


def _price(node: Node, target: Architecture, plan: str) -> float:
    """The slower of tensor units and memory; cuDNN's own order."""
    weight, moved = node.input(1), [*node.inputs, *node.outputs]
    depth = int(weight.elements) // int(weight.shape[0])
    compute = 2 * int(node.output.elements) * depth / (target.half_flops * (1 + (node.dtype == "int8")) * _EFFICIENCY)
    traffic = sum(int(p.bytes) for p in moved if p is not None) / (target.bandwidth * 800)
    return max(compute, traffic) + target.pace.step + _LATER * int(plan.split("-")[1])


@kernel("Conv", on="cuda", when=_applies, cost=_price, space={"plan": _choices}, library=_NAME,
        layouts=lambda node, target: conv_layouts(node, few=False))  # fmt: skip
def cudnn_conv(build: CudaBuilder, node: Node, plan: str) -> None:
    """epilogue(x * w); the weights are stored [O, taps, C]"""
    use, weight = use_of(node), node.input(1).constant
    assert use is not None and weight is not None
    made, scales, biases = use
    launch_twin(build, node)
    version, index = map(int, plan.split("-"))
    built = cudnn.build(cuda.context_of(cuda.select("cuda")), made, index)
    handles = [build.input(0), build.pack(np.ascontiguousarray(np.moveaxis(weight, 1, -1)))]
    for inputs, together in ((scales, np.multiply), (biases, np.add)):
        if inputs:
            handles.append(pack_vector(build, inputs, together, made.filter[0], made.vectors))
    handles += [build.temporary(max(built.workspace, 1), "int8"), build.output()]
    build.libraries.append(LibraryUse(_NAME, cudnn.recipe_of(made, version), tuple(handles), built.code))
