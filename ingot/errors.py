"""One exception tree. Every message names the user's node or file, the reason and the remedy."""

from __future__ import annotations


class IngotError(Exception):
    """Base of everything Ingot raises on purpose; `str()` is a complete sentence for the user."""


class ImportFailure(IngotError):
    """The model file cannot be read, is malformed, or contradicts itself."""


class UnsupportedOperator(ImportFailure):
    """The model uses an operator that neither ONNX, Ingot nor a registered plugin defines."""


class ConfigError(IngotError):
    """A build or run option is unknown, contradictory or out of range."""


class GraphError(IngotError):
    """A graph breaks one of the rules in `ir/verify.py`; names the rule and the node."""


class BuildError(IngotError):
    """The compiler cannot produce an engine from a legal graph."""


class VerificationFailed(BuildError):
    """The built engine differs from the reference by more than the tolerance; nothing was written. `kernels`: labels of
    those known to be wrong."""

    def __init__(self, message: str, kernels: frozenset[str] = frozenset()) -> None:
        super().__init__(message)
        self.kernels = kernels


class EngineError(IngotError):
    """An engine file is damaged, of another format, or not for this machine."""


class InputError(IngotError):
    """A run was given a wrong name, dtype, rank or extent."""


class DeviceError(IngotError):
    """The machine lacks what the engine needs, or the device failed."""


class LibraryUnusable(DeviceError):
    """A library is not here, or does not take what was chosen for it; the generated kernels do the same work."""
