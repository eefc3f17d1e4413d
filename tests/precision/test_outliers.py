"""One channel far larger than the others: what covers it all leaves nothing for the rest."""

from typing import Any

import numpy as np
import pytest

import ingot
from ingot.ir import oracle
from ingot.precision import formats
from ingot.precision.calibrate import calibrate
from tests.precision.networks import imported, perceptron, rows


def decibels(proto: Any, format: str, calibrator: str) -> float:
    """Signal to noise at the output of the engine with both products in the format."""
    model = imported(proto)
    ranges = calibrate(model, rows(64), calibrator)
    narrow = formats.apply(model, dict.fromkeys(formats.quantizable(model), format), ranges)
    x = next(rows(1, seed=9, batch=64))
    with ingot.Session(ingot.build(narrow, level=0)) as session:
        found = session.run(x)["y"]
    wanted = oracle.evaluate_model(proto, x)["y"]
    return float(10 * np.log10(np.square(wanted).sum() / np.square(found - wanted).sum()))


def test_minmax_collapses_and_auto_holds() -> None:
    """The channel says little: the values beyond the range are no loss."""
    proto = perceptron(outlier=500, weight=0.1)
    collapsed, held = (decibels(proto, "int8", name) for name in ("minmax", "auto"))
    assert collapsed < 10 < 30 < held


def test_smoothing_holds_where_the_channel_counts() -> None:
    """What may not be cut off can be moved into the weights."""
    proto = perceptron(outlier=500)
    collapsed, held = (decibels(proto, name, "minmax") for name in ("int8", "int8_smooth"))
    assert collapsed < 10 < 30 < held


@pytest.mark.parametrize("calibrator", ["minmax", "entropy", "percentile", "mse", "auto"])
def test_without_outliers_every_calibrator_holds(calibrator: str) -> None:
    assert decibels(perceptron(), "int8", calibrator) > 25
