"""Host steps: one ONNX or ingot operator on numpy arrays, through the oracle, which is imported only when a plan needs
it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ingot.errors import DeviceError, IngotError
from ingot.plan.plan import HostSegment

HostFunction = Callable[[Sequence[Any], Mapping[str, int]], list[Any]]


def prepare(segment: HostSegment) -> HostFunction:
    """The step as a function of its inputs (None where absent) and of the size symbols bound at the moment.

    DeviceError when the packages it needs are missing.
    """
    try:
        from ingot.ir.oracle import compile_fused, compile_node
    except ImportError as error:
        raise DeviceError(
            f"step {segment.step.name!r} ({segment.step.op}) runs on the host and needs the package {error.name!r}: "
            "pip install 'ingot[compile]'"
        ) from None
    node = base64.b64decode(segment.node)
    if segment.fused:
        return _guarded(segment, compile_fused(node))
    plain = compile_node(node, dict(segment.opsets))
    return _guarded(segment, lambda inputs, symbols: plain(inputs))


def _guarded(segment: HostSegment, function: Callable[..., Sequence[Any]]) -> HostFunction:
    def run(inputs: Sequence[Any], symbols: Mapping[str, int]) -> list[Any]:
        try:
            return list(function(list(inputs), symbols))
        except IngotError:
            raise
        except Exception as error:  # whatever numpy says, the user hears which node it was
            nodes = ", ".join(segment.step.nodes) or segment.step.name
            raise DeviceError(f"{segment.step.op} (node {nodes}) failed on the host: {error}") from error

    return run
