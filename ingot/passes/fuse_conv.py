"""Convolution and pooling: pads taken in, pooling over the whole extent as a reduction."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ingot.ir.graph import dtype_of
from ingot.passes.facts import attribute, changed, extras_of, is_float, main_inputs, maker, operands_of
from ingot.passes.rewrite import Builder, Result, Table, reject, rewrite_node


@rewrite_node("Conv")
def padded_conv(op: Builder, node: ir.Node) -> Result:
    """Conv(Pad(x), w) => Conv(x, w) with larger pads, where Pad writes what stands for zero"""
    pad = maker(node.inputs[0], "Pad")
    if pad is None:
        return None
    pads = _spatial_pads(pad)
    if pads is None:
        return reject("Pad is not constant over the spatial axes alone", pad)
    if attribute(pad, "value") != attribute(node, "x_zero_point"):
        return reject("Pad writes another value than zero", pad)
    total = [outer + own for outer, own in zip(pads, attribute(node, "pads"), strict=True)]
    _, weight = main_inputs(node)
    return op.Conv(pad.inputs[0], weight, *extras_of(node), **changed(node, pads=total))


@rewrite_node("Pool")
def padded_pool(op: Builder, node: ir.Node) -> Result:
    """Pool(Pad(x)) => Pool(x) with pads: max where Pad writes the lowest value, average where it writes zero"""
    pad = maker(node.inputs[0], "Pad")
    if pad is None:
        return None
    pads, kind = _spatial_pads(pad), attribute(node, "kind")
    if pads is None:
        return reject("Pad is not constant over the spatial axes alone", pad)
    wanted = {"max": _lowest(operands_of(node)[0]), "average": 0}.get(kind)
    if any(attribute(node, "pads")) or attribute(pad, "value") != wanted or attribute(node, "indices"):
        return reject("the pads of both do not add up", pad)
    if _passes_kernel(pads, attribute(node, "kernel"), attribute(node, "dilations")):
        return reject("a window would lie wholly in the border", pad)
    counted = 1 if kind == "average" else 0
    return op.Pool(pad.inputs[0], **changed(node, pads=pads, count_include_pad=counted))


def _spatial_pads(pad: ir.Node) -> tuple[int, ...] | None:
    """Begins then ends of the spatial axes of a constant Pad that touches no other axis."""
    pads = attribute(pad, "pads")
    rank = len(pads) // 2
    if attribute(pad, "mode") != "constant" or rank < 3 or any(pads[:2]) or any(pads[rank : rank + 2]):
        return None
    return (*pads[2:rank], *pads[rank + 2 :])


def _lowest(value: ir.Value) -> float | int:
    return -np.inf if is_float(value) else int(np.iinfo(dtype_of(value)).min)


def _passes_kernel(pads: tuple[int, ...], kernel: tuple[int, ...], dilations: tuple[int, ...]) -> bool:
    spans = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)] * 2
    return any(pad >= span for pad, span in zip(pads, spans, strict=True))


CONVOLUTION = Table("convolution", (padded_conv, padded_pool))
