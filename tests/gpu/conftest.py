"""These tests run where a GPU is, and nowhere else."""

from __future__ import annotations

import pytest

from ingot.errors import IngotError
from ingot.runtime import cuda


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    try:
        cuda.select("cuda")
    except IngotError as error:
        for item in items:
            if "tests/gpu" in str(item.path):
                item.add_marker(pytest.mark.skip(reason=str(error)))
