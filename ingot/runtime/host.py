"""Host steps: one ONNX or ingot operator on numpy arrays, through the oracle, which is imported only when a plan needs
it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

from ingot.errors import DeviceError, IngotError
from ingot.plan.plan import HostSegment

HostFunction = Callable[[Sequence[Any]], list[Any]]


def prepare(segment: HostSegment) -> HostFunction:
    """The step as a function of its inputs (None where absent). DeviceError when the packages it needs are missing."""
    try:
        from ingot.ir.oracle import compile_node
    except ImportError as error:
        raise DeviceError(
            f"step {segment.step.name!r} ({segment.step.op}) runs on the host and needs the package {error.name!r}: "
            "pip install 'ingot[compile]'"
        ) from None
    function = compile_node(base64.b64decode(segment.node), dict(segment.opsets))

    def run(inputs: Sequence[Any]) -> list[Any]:
        try:
            return list(function(list(inputs)))
        except IngotError:
            raise
        except Exception as error:
            nodes = ", ".join(segment.step.nodes) or segment.step.name
            raise DeviceError(f"{segment.step.op} (node {nodes}) failed on the host: {error}") from error

    return run
