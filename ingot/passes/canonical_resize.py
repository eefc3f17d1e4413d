"""Resize and Upsample of every opset, with sizes and scales made static."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ingot.ir.graph import shape
from ingot.passes.canonical_table import Builder, Reject, Result, canonical, known, reject, undetermined
from ingot.plan.extent import Extent

_UPSAMPLE = {"nearest": {"nearest": "floor"}, "linear": {}, "bilinear": {}}


@canonical("Upsample")
def upsample(op: Builder) -> Result:
    """Resize with asymmetric coordinates"""
    scales = op.attribute("scales") if op.version < 9 else op.constant_input(1)
    mode = op.attribute("mode", "nearest")
    if scales is None:
        return reject("its scales vary at run time", "make the input 'scales' a constant")
    factors = [float(scale) for scale in np.asarray(scales).reshape(-1)]
    return resized(op, factors, mode=mode.removeprefix("bi"), coordinate="asymmetric", **_UPSAMPLE[mode])


@canonical("Resize")
def resize(op: Builder) -> Result:
    """Resize by constant scales or to known sizes"""
    if op.version < 11:
        scales = op.constant_input(1)
        if scales is None:
            return reject("its scales vary at run time", "make the input 'scales' a constant")
        factors = [float(scale) for scale in scales.reshape(-1)]
        return resized(op, factors, mode=op.attribute("mode", "nearest"), coordinate="asymmetric", nearest="floor")
    settings = {
        "mode": op.attribute("mode", "nearest"),
        "coordinate": op.attribute("coordinate_transformation_mode", "half_pixel"),
        "nearest": op.attribute("nearest_mode", "round_prefer_floor"),
        "cubic_a": op.attribute("cubic_coeff_a", -0.75),
        "exclude_outside": op.attribute("exclude_outside", 0),
        "antialias": op.attribute("antialias", 0),
        "extrapolation": op.attribute("extrapolation_value", 0.0),
    }
    factors_or_problem = _factors(op)
    if isinstance(factors_or_problem, Reject):
        return factors_or_problem
    roi = _region(op, settings["coordinate"])
    return roi if isinstance(roi, Reject) else resized(op, factors_or_problem, roi=roi, **settings)


def _axes(op: Builder) -> list[int]:
    rank = len(shape(op.x()))
    return [axis % rank for axis in op.attribute("axes") or range(rank)]


def _factors(op: Builder) -> list[float] | Reject:
    """A scale for every axis; none where the sizes say it all."""
    axes, source = _axes(op), shape(op.x())
    scales = op.constant_input(2)
    if op.varies(2):
        return reject("its scales vary at run time", "make the input 'scales' a constant")
    if scales is not None and scales.size:
        given = dict(zip(axes, (float(scale) for scale in scales.reshape(-1)), strict=True))
        return [given.get(axis, 1.0) for axis in range(len(source))]
    policy = op.attribute("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return []
    target, sizes = op.ints(3), known(source)
    if target is None or sizes is None:
        return reject("its aspect ratio depends on a symbolic size", "build for static shapes")
    ratios = [size / sizes[axis] for axis, size in zip(axes, target, strict=True)]
    ratio = min(ratios) if policy == "not_larger" else max(ratios)
    return [ratio if axis in axes else 1.0 for axis in range(len(source))]


def _region(op: Builder, coordinate: str) -> list[float] | Reject:
    """Starts, then ends, of the part that tf_crop_and_resize cuts out."""
    if coordinate != "tf_crop_and_resize":
        return []
    region = op.constant_input(1)
    if region is None:
        return reject("its region of interest varies at run time", "make the input 'roi' a constant")
    axes, rank, values = _axes(op), len(shape(op.x())), region.reshape(-1)
    starts, ends = [0.0] * rank, [1.0] * rank
    for place, axis in enumerate(axes):
        starts[axis], ends[axis] = float(values[place]), float(values[len(axes) + place])
    return [*starts, *ends]


def resized(op: Builder, factors: Sequence[float], **settings: object) -> Result:
    """Resize to the inferred output shape."""
    source, target = shape(op.x()), shape(op.y)
    problem = undetermined(target)
    if problem is not None:
        return problem
    if source == target and all(factor == 1 for factor in factors) and not settings.get("roi"):
        return op.x()
    return op.Resize(op.x(), sizes=list(target), scales=_needed(factors, source, target), **settings)


def _needed(factors: Sequence[float], source: Sequence[Extent], target: Sequence[Extent]) -> list[float]:
    """No scales where they are the ratios of the sizes anyway: those are exact."""
    before, after = known(source), known(target)
    if before is None or after is None:
        return list(factors)
    exact = all(factor * size == goal for factor, size, goal in zip(factors, before, after, strict=False))
    return [] if exact else list(factors)
