"""What may go wrong without being a fault of Ingot, as a sentence."""

from __future__ import annotations

from ingot.errors import IngotError

EXPECTED = (IngotError, OSError, MemoryError)


def sentence(error: BaseException) -> str:
    """One line for the user."""
    if isinstance(error, MemoryError):
        return f"out of memory ({error or 'no detail'}); use smaller shapes, or a machine with more memory"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
