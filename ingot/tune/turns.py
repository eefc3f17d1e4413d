"""Builds that time candidates on one GPU at the same time take turns: what another one runs would be in the times."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ingot.runtime.cuda import Device


@contextmanager
def alone_on(device: Device) -> Iterator[None]:
    """No other build of this user times anything on the device meanwhile."""
    path = Path(tempfile.gettempdir()) / f"ingot-{os.getuid()}-{device.uuid}.lock"
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
