"""GatherElements, where onnx.reference wants indices as large as the data in every other axis."""

from __future__ import annotations

import numpy as np

from ingot.ir.oracle_ops.table import meaning


@meaning("GatherElements")
def gather_elements(data: np.ndarray, indices: np.ndarray, *, axis: int = 0) -> np.ndarray:
    """data at the indices along the axis and at the index's own place along all others."""
    axis %= data.ndim
    corner = tuple(slice(None) if i == axis else slice(size) for i, size in enumerate(indices.shape))
    return np.take_along_axis(data[corner], np.where(indices < 0, indices + data.shape[axis], indices), axis)
