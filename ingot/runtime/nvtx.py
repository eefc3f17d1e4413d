"""NVTX ranges for Nsight Systems, named after the user's nodes; INGOT_NVTX=1 asks for them."""

from __future__ import annotations

import importlib
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ingot.errors import DeviceError
from ingot.plan.plan import Step

_NOTHING: AbstractContextManager[Any] = nullcontext()


class Marks:
    """Ranges when they were asked for, nothing otherwise. Within a captured graph there are none: who asks for them
    gets every kernel launched on its own."""

    def __init__(self) -> None:
        self.wanted = os.environ.get("INGOT_NVTX") == "1"
        self._annotate = _annotate() if self.wanted else None

    def range(self, name: str) -> AbstractContextManager[Any]:
        """What happens within it is shown under the name."""
        return self._annotate(name, domain="ingot") if self._annotate else _NOTHING

    def step(self, step: Step) -> AbstractContextManager[Any]:
        """A range called after the step's nodes and kernel."""
        return self.range(f"{', '.join(step.nodes) or step.name} ({step.kernel})") if self.wanted else _NOTHING


def _annotate() -> Any:
    try:
        annotate = importlib.import_module("nvtx").annotate
    except ImportError:
        raise DeviceError("INGOT_NVTX=1 needs the package nvtx: pip install nvtx, or unset the variable") from None
    return annotate
