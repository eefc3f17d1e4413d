"""cuDNN for convolutions and attention in 16 bits, and convolutions in int8: its plans beside the generated kernel,
their twin.

With a residual cuDNN had nothing to offer for convolutions of one tap on an H200: such a plan takes 0.4 s to build, and
175 µs where the generated kernel takes 115.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ingot.errors import LibraryUnusable
from ingot.kernels import kernel
from ingot.kernels.cuda.affine import affine
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.axes import strides_of
from ingot.kernels.cuda.build import CudaBuilder, Handle, LibraryUse
from ingot.kernels.cuda.conv import conv_layouts, is_depthwise, window_of
from ingot.kernels.cuda.twins import has_twin, is_vector, launch_twin, pack_vector, twin_layouts
from ingot.kernels.node import Node, Port
from ingot.runtime import cuda, cudnn
from ingot.runtime.cudnn_graphs import Attention, Convolution, Wanted, recipe_of

_NAME = "cudnn"
_MOST, _MOST_FUSED = 12, 2  # plans that are tried; of those that cuDNN compiles, half a second each
_RESULTS = {"float16": ("float16",), "bfloat16": ("bfloat16",), "int8": ("int8", "float16")}  # by type of the factors
_ALIGNED = {"float16": 8, "bfloat16": 8, "int8": 16}  # channels are multiples of it, for its fast kernels
_ACTIVATIONS = ("", "Relu", "Silu")
_HALVES = ("float16", "bfloat16")
_DEPTHS, _DEEPEST = 8, 128  # of attention: what they are multiples of, and at most
_EFFICIENCY, _LATER = 0.8, 0.01  # of the tensor units; microseconds of estimate for each plan that is liked better


@dataclass(frozen=True)
class Use:
    """A convolution, and inputs of the node: those that scale and that shift its channels and are known, the vector
    that a run gives, the residual."""

    wanted: Convolution
    scales: tuple[int, ...]
    biases: tuple[int, ...]
    given: tuple[int, ...]


def use_of(node: Node) -> Use | None:
    """None where cuDNN has none for it."""
    found, weight, aligned = affine(node.epilogue), node.input(1), _ALIGNED.get(node.dtype, 0)
    if found is None or not aligned or len(weight.shape) != 4 or not (node.input(0).static and node.output.static):
        return None
    channels, inputs = int(weight.shape[0]), tuple(k + 1 for k in found.terms if k)
    if found.constant or found.step != 1.0 or 0 not in found.terms or found.activation not in _ACTIVATIONS:
        return None
    if node.output.dtype not in _RESULTS[node.dtype] or any(factor != 1.0 for factor in found.terms.values()):
        return None
    scales, biases = tuple(k + 1 for k in found.scales), tuple(k for k in inputs if is_vector(node, k, channels))
    given = _given(node, [k for k in inputs if k not in biases])
    if given is None or not all(is_vector(node, k, channels) for k in scales):
        return None
    shape, filter = tuple(map(int, node.input(0).shape)), tuple(map(int, weight.shape))
    if shape[1] % aligned or filter[0] % aligned or filter[1] % aligned:
        return None
    window, residual = window_of(node), bool(given) and node.input(given[-1]).shape == node.output.shape
    kind = "float32" if node.dtype == "int8" else node.output.dtype
    made = Convolution(node.dtype, kind, node.output.dtype, shape, filter, window.strides, window.dilations,
                       window.pads, bool(scales), bool(biases), found.activation, len(given) > residual,
                       residual)  # fmt: skip
    return Use(made, scales, biases, given)


def _given(node: Node, inputs: Sequence[int]) -> tuple[int, ...] | None:
    """What a run gives to be added: a number for each channel at most, then a residual at most, of the results' type.
    None where it is something else."""
    channels, output = node.output.shape[1], node.output
    ports = [node.input(k) for k in inputs]
    vectors = [k for k, p in zip(inputs, ports, strict=True) if _by_channel(p, channels)]
    residuals = [k for k, p in zip(inputs, ports, strict=True) if p.shape == output.shape and k not in vectors]
    known = len(vectors) + len(residuals) == len(inputs) and len(vectors) <= 1 and len(residuals) <= 1
    worth = not residuals or window_of(node).taps > 1
    same = all(p.dtype == output.dtype and p.constant is None for p in ports) and node.dtype != "int8"
    return (*vectors, *residuals) if not inputs or (known and worth and same) else None


def _by_channel(port: Port, channels: Any) -> bool:
    shape = [n for n in port.shape if n != 1]
    return shape == [channels] and len(port.shape) >= 3 and port.shape[-3] == channels


@lru_cache(maxsize=256)
def _plans(wanted: Wanted) -> tuple[str, ...]:
    """cuDNN's plans on the GPU that is here, as "91900-3": its version and a number; none without the library."""
    context = cuda.context_of(cuda.select("cuda"))
    try:
        version = cudnn.version(context)
    except LibraryUnusable:
        return ()
    most = _MOST_FUSED if wanted.compiled else _MOST
    return tuple(f"{version}-{index}" for index in range(min(cudnn.plans(context, wanted), most)))


def _choices(node: Node, target: Architecture) -> tuple[str, ...]:
    use = use_of(node)
    return () if use is None else _plans(use.wanted)


def _applies(node: Node, target: Architecture) -> bool:
    use = use_of(node)
    if use is None or _NAME not in target.libraries:
        return False
    return not is_depthwise(node) and has_twin(node, target)


def _price(node: Node, target: Architecture, plan: str) -> float:
    """The slower of tensor units and memory; cuDNN's own order."""
    weight = node.input(1)
    depth = int(weight.elements) // int(weight.shape[0])
    return _estimate(node, target, 2 * int(node.output.elements) * depth, plan)


def _estimate(node: Node, target: Architecture, operations: int, plan: str) -> float:
    moved = sum(int(p.bytes) for p in (*node.inputs, *node.outputs) if p is not None)
    compute = operations / (target.half_flops * (1 + (node.dtype == "int8")) * _EFFICIENCY)
    return max(compute, moved / (target.bandwidth * 800)) + target.pace.step + _LATER * int(plan.split("-")[1])


@kernel("Conv", on="cuda", when=_applies, cost=_price, space={"plan": _choices}, library=_NAME,
        layouts=lambda node, target: conv_layouts(node, few=False))  # fmt: skip
def cudnn_conv(build: CudaBuilder, node: Node, plan: str) -> None:
    """epilogue(x * w); the weights are stored [O, taps, C]"""
    use, weight = use_of(node), node.input(1).constant
    assert use is not None and weight is not None
    launch_twin(build, node)
    handles = [build.input(0), build.pack(np.ascontiguousarray(np.moveaxis(weight, 1, -1)))]
    for inputs, together in ((use.scales, np.multiply), (use.biases, np.add)):
        if inputs:
            handles.append(pack_vector(build, inputs, together, use.wanted.filter[0], use.wanted.vectors))
    _call(build, use.wanted, plan, [*handles, *(build.input(k) for k in use.given)])


def _call(build: CudaBuilder, wanted: Wanted, plan: str, handles: Sequence[Handle]) -> None:
    """The plan in the place of the launches; `handles` are what it reads."""
    version, index = map(int, plan.split("-"))
    built = cudnn.build(cuda.context_of(cuda.select("cuda")), wanted, index)
    workspace = build.temporary(max(built.workspace, 1), "int8")
    build.libraries.append(LibraryUse(_NAME, recipe_of(wanted, version), (*handles, workspace, build.output()),
                                      built.code))  # fmt: skip


# attention


def attention_of(node: Node) -> Attention | None:
    """None where cuDNN has none for it."""
    a, ports = node.attributes, [*node.inputs[:3], node.output]
    query, key, value = (node.input(k) for k in range(3))
    masked, mask = node.has_input(3), node.inputs[3] if len(node.inputs) > 3 else None
    if not all(p is not None and p.static and p.dtype in _HALVES for p in ports) or a["softcap"]:
        return None
    if any(int(p.shape[3]) % _DEPTHS or int(p.shape[3]) > _DEEPEST for p in (query, value)):
        return None
    if a["causal"] and query.shape[2] != key.shape[2]:  # it counts from the first key, cuDNN's too, ours from the last
        return None
    scores = (*query.shape[:3], key.shape[2])
    if masked and (mask is None or mask.dtype != node.dtype or not mask.static or len(mask.shape) != len(scores)):
        return None
    return Attention(
        node.dtype, _shape(query), _shape(key), _shape(value), _shape(node.output), _strides(query), _strides(key),
        _strides(value), _strides(node.output), float(a["scale"]), bool(a["causal"]),
        _shape(mask) if mask is not None else (), _strides(mask) if mask is not None else (),
    )  # fmt: skip


def _shape(port: Port) -> tuple[int, ...]:
    return tuple(map(int, port.shape))


def _strides(port: Port) -> tuple[int, ...]:
    return tuple(map(int, strides_of(port.shape, port.layout)))


def _attention_applies(node: Node, target: Architecture) -> bool:
    return _NAME in target.libraries and attention_of(node) is not None and has_twin(node, target)


def _attention_plans(node: Node, target: Architecture) -> tuple[str, ...]:
    wanted = attention_of(node)
    return () if wanted is None else _plans(wanted)


def _attention_price(node: Node, target: Architecture, plan: str) -> float:
    query, key, value = (node.input(k) for k in range(3))
    operations = 2 * int(query.elements) // int(query.shape[3]) * int(key.shape[2])
    return _estimate(node, target, operations * (int(query.shape[3]) + int(value.shape[3])), plan)


@kernel("Attention", on="cuda", when=_attention_applies, cost=_attention_price, space={"plan": _attention_plans},
        library=_NAME, layouts=twin_layouts)  # fmt: skip
def cudnn_attention(build: CudaBuilder, node: Node, plan: str) -> None:
    """softmax(scale · query keyᵀ + mask) value"""
    wanted = attention_of(node)
    assert wanted is not None
    launch_twin(build, node)
    _call(build, wanted, plan, [build.input(k) for k in range(len(wanted.tensors))])
