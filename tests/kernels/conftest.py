"""Kernels of the same text are compiled once: many tests differ in numbers alone."""

from collections.abc import Iterator
from functools import lru_cache

import pytest

from ingot.kernels.cpu import standalone


@pytest.fixture(scope="session", autouse=True)
def known_objects() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standalone, "compile_object", lru_cache(512)(standalone.compile_object))
        yield
