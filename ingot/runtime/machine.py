"""What this machine is: processor features as the kernel reports them."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def cpu_features() -> frozenset[str]:
    """Feature names of /proc/cpuinfo (empty where there is none). INGOT_CPU_FEATURES_WITHOUT removes some, for
    tests."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    words = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return frozenset(words) - frozenset(os.environ.get("INGOT_CPU_FEATURES_WITHOUT", "").split(","))


def describe() -> str:
    """One phrase for messages: architecture, system and the vector features that matter."""
    notable = [f for f in ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "asimd") if f in cpu_features()]
    return f"{platform.machine()} {platform.system()} with {', '.join(notable) or 'no known vector features'}"
