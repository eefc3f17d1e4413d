"""Share of digits recognised: a metric for `ingot build --metric`, `ingot gate --metric`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def metric(outputs: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]) -> float:
    """Of the samples, those whose largest score is at their label."""
    right = [np.mean(y["scores"].argmax(1) == x["label"]) for y, x in zip(outputs, samples, strict=True)]
    return float(np.mean(right))
