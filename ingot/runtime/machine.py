"""What this machine is: processor features as the kernel reports them."""

from __future__ import annotations

import ctypes
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
    known = frozenset(words) - frozenset(os.environ.get("INGOT_CPU_FEATURES_WITHOUT", "").split(","))
    return known if "amx_tile" in known and _may_use_tiles() else known - _TILES


_TILES = frozenset({"amx_tile", "amx_int8", "amx_bf16", "amx_fp16"})
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def _may_use_tiles() -> bool:
    """Ask Linux for the tile registers (Documentation/arch/x86/xstate.rst): once granted, every thread may use them."""
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0


_NOTABLE = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd")


def describe() -> str:
    """One phrase for messages: architecture, system and the vector features that matter."""
    notable = [f for f in _NOTABLE if f in cpu_features()]
    return f"{platform.machine()} {platform.system()} with {', '.join(notable) or 'no known vector features'}"
