"""Running engines: numpy is all it needs (host steps of a plan import the oracle when they are met)."""

from ingot.engine import Engine
from ingot.runtime.profiler import StepTime
from ingot.runtime.session import Session

__all__ = ["Engine", "Session", "StepTime"]
