"""Matrices that a checkpoint keeps in integers already: AWQ's and GPTQ's. They stay the integers that they are.

Both are (whole - zero) * scale, with a zero and a scale for each group of inputs and each output, in words of 32 bits.
AWQ (version gemm, four bits): words [in, out / 8], of outputs in the order 0 2 4 6 1 3 5 7 from the lowest bits on; its
zeros likewise. GPTQ: words [in / n, out] of n = 32 / bits inputs, lowest first; zeros [groups, out / n], lowest first
and one too small, except in the form gptq_v2. g_idx [in] names each input's group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ingot.errors import ImportFailure
from ingot.llm.decoder import Array, Quantized
from ingot.llm.weights import Checkpoint

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_KERNEL_STEP = 8  # inputs that share a word in kernels share a scale
_READ = "read are awq (version gemm, 4 bits) and gptq (4 and 8 bits)"


@dataclass(frozen=True)
class Scheme:
    """What quantization_config says. group None: all inputs share a scale; early: zeros may be one too small."""

    method: str
    bits: int
    group: int | None
    symmetric: bool = False
    early: bool = False


def scheme_of(checkpoint: Checkpoint) -> Scheme | None:
    """The checkpoint's scheme, None for floats. ImportFailure names a method, form or key that is not read."""
    settings = checkpoint.quantization
    if not settings:
        packed = next((name for name in checkpoint.tensors if name.endswith(".qweight")), None)
        if packed is not None:
            raise ImportFailure(f"{checkpoint.folder}: {packed!r} is quantized, but config.json has no "
                                "quantization_config that says how; copy it from the checkpoint's origin")  # fmt: skip
        return None
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in _SCHEMES:
        raise _refusal(checkpoint, f"quant_method {method!r} is not read")
    return _SCHEMES[method](checkpoint, settings)


def _refusal(checkpoint: Checkpoint, reason: str) -> ImportFailure:
    return ImportFailure(f"{checkpoint.folder}: quantization_config: {reason}; {_READ}. Take the checkpoint that was "
                         "not quantized, and --precision int8 or int4")  # fmt: skip


def _group(checkpoint: Checkpoint, settings: Mapping[str, Any], default: int) -> int | None:
    group = settings.get("group_size", settings.get("q_group_size", default))
    if group == -1:
        return None
    if not isinstance(group, int) or group < 1 or group % _KERNEL_STEP:
        raise _refusal(checkpoint, f"group_size {group!r} is neither -1 nor a multiple of {_KERNEL_STEP}")
    return group


def _awq(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Scheme:
    version, bits = str(settings.get("version") or "gemm").lower(), settings.get("bits", settings.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        raise _refusal(checkpoint, f"awq of version {version!r} with {bits!r} bits is not read")
    return Scheme("awq", 4, _group(checkpoint, settings, 128))


def _gptq(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Scheme:
    form, bits = settings.get("checkpoint_format") or settings.get("format") or "gptq", settings.get("bits", 4)
    if form not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
        raise _refusal(checkpoint, f"gptq in the form {'marlin' if settings.get('is_marlin_format') else form!r} "
                       "is not read")  # fmt: skip
    if bits not in (4, 8) or settings.get("pack_dtype", "int32") != "int32":
        raise _refusal(checkpoint, f"gptq of {bits!r} bits in {settings.get('pack_dtype', 'int32')} is not read")
    if settings.get("dynamic"):
        raise _refusal(checkpoint, "'dynamic', other bits for some modules, is not read")
    group = _group(checkpoint, settings, -1)
    return Scheme("gptq", bits, group, bool(settings.get("sym", True)), form == "gptq")


_SCHEMES = {"awq": _awq, "gptq": _gptq}


def matrices(checkpoint: Checkpoint, width: int, parts: Sequence[tuple[str, int]]) -> tuple[Quantized, ...]:
    """The parts (name, outputs), that read the same input; () where they are floats."""
    packed = [checkpoint.has(f"{name}.qweight") for name, _ in parts]
    if not any(packed):
        return ()
    names = ", ".join(name for name, _ in parts)
    if not all(packed):
        raise ImportFailure(f"{checkpoint.folder}: of {names} only some are quantized; this is not read")
    found = tuple(_matrix(checkpoint, name, width, outputs) for name, outputs in parts)
    if any(not _same(found[0].order, other.order) for other in found):
        raise ImportFailure(f"{checkpoint.folder}: {names} read the same input, but their g_idx differ; this is not "
                            "read. Take a checkpoint made with desc_act false")  # fmt: skip
    return found


def _same(first: Array | None, second: Array | None) -> bool:
    return first is second or (first is not None and second is not None and np.array_equal(first, second))


def _matrix(checkpoint: Checkpoint, name: str, depth: int, outputs: int) -> Quantized:
    scheme = scheme_of(checkpoint)
    assert scheme is not None
    group, count = scheme.group or depth, 32 // scheme.bits
    groups, words = -(-depth // group), outputs // count
    if outputs % count or (scheme.method == "gptq" and depth % count):
        raise ImportFailure(f"{checkpoint.folder}: {name} [{outputs}, {depth}] does not fill words of {count} numbers")
    packed = (depth, words) if scheme.method == "awq" else (depth // count, outputs)
    whole = _words(checkpoint, f"{name}.qweight", *packed)
    zeros = _words(checkpoint, f"{name}.qzeros", groups, words)
    scales = checkpoint.take(f"{name}.scales", groups, outputs)
    order = _order(checkpoint, f"{name}.g_idx", depth, group) if scheme.method == "gptq" else None
    zero = _zeros(checkpoint, name, scheme, zeros)
    return Quantized(outputs, depth, scheme.bits, group, partial(_read, scheme, whole, scales, zero, order), order)


def _words(checkpoint: Checkpoint, name: str, *shape: int) -> Array:
    found = checkpoint.take(name, *shape)
    if found.dtype != np.int32:
        raise ImportFailure(f"{checkpoint.folder}: tensor {name!r} is {found.dtype}, packed integers are int32")
    return found


def _order(checkpoint: Checkpoint, name: str, depth: int, group: int) -> Array | None:
    """The inputs by their groups; None where they lie so already."""
    groups = checkpoint.take_if(name, depth)
    straight = np.arange(depth) // group
    if groups is None or np.array_equal(groups, straight):
        return None
    order = np.argsort(groups, kind="stable").astype(np.int32)
    if not np.array_equal(groups[order], straight):
        raise ImportFailure(f"{checkpoint.folder}: {name!r} does not part {depth} inputs into groups of {group}")
    return order


def _zeros(checkpoint: Checkpoint, name: str, scheme: Scheme, words: Array) -> Array:
    """Zeros [groups, outputs]. Of symmetric matrices they are the middle, whichever form they were written in: tools
    have mixed these up. A zero is no more than the highest integer, so that one too small may have wrapped around."""
    if scheme.method == "awq":
        return _by_outputs(words, 4, _AWQ_ORDER)
    found, highest = _by_outputs(words, scheme.bits, range(32 // scheme.bits)), (1 << scheme.bits) - 1
    middle = np.uint8(1 << (scheme.bits - 1))
    if scheme.symmetric and not ((found == middle).all() or (found == middle - 1).all()):
        raise ImportFailure(f"{checkpoint.folder}: '{name}.qzeros' are not all {middle}, or all {middle - 1}, but "
                            "quantization_config says sym")  # fmt: skip
    if scheme.symmetric:
        return np.full_like(found, middle)
    return (found + np.uint8(1)) & np.uint8(highest) if scheme.early else found


def _read(scheme: Scheme, words: Array, scales: Array, zeros: Array, order: Array | None) -> tuple[Array, Array, Array]:
    """(integers [in, out], scales, zeros), the inputs in their order."""
    if scheme.method == "awq":
        whole = _by_outputs(words, scheme.bits, _AWQ_ORDER)
    else:
        whole = _by_outputs(words.T, scheme.bits, range(32 // scheme.bits)).T
    return whole if order is None else whole[order], np.asarray(scales, np.float32), zeros


def _by_outputs(words: Array, bits: int, order: Sequence[int]) -> Array:
    """int32 [rows, words] → uint8 [rows, words * n]: number k of a word, from the lowest bits on, is column order[k]"""
    unsigned, count = words.view(np.uint32) if words.flags.c_contiguous else words.astype(np.uint32), 32 // bits
    numbers = np.empty((*words.shape, count), np.uint8)
    for k, place in enumerate(order):
        numbers[..., place] = (unsigned >> np.uint32(bits * k)) & np.uint32((1 << bits) - 1)
    return numbers.reshape(len(words), -1)
