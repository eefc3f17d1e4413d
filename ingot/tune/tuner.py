"""Where prices come from: estimates at level 0, measurements above it."""

from __future__ import annotations

from collections.abc import Mapping

from ingot.config import BuildConfig
from ingot.kernels.cpu.isa import Isa
from ingot.plan.lower import Module
from ingot.report import BuildLog
from ingot.tune.choose import Price
from ingot.tune.price import Estimates


def prices(module: Module, isa: Isa, symbols: Mapping[str, int], config: BuildConfig, log: BuildLog) -> Price:
    """The price function of a build."""
    return Estimates(isa, symbols)
