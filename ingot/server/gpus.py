"""What NVIDIA's driver tells of its GPUs, through its management library (NVML), where there is one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


@dataclass(frozen=True)
class Gauge:
    """A metric by Triton's name, and how a device tells it; None where it does not."""

    name: str
    kind: str
    help: str
    read: Callable[[Any, Any], float | None]


def _number(function: str, scale: float, kind: type[Any] = ctypes.c_uint) -> Callable[[Any, Any], float | None]:
    def read(library: Any, device: Any) -> float | None:
        value = kind()
        return None if getattr(library, function)(device, ctypes.byref(value)) else value.value * scale

    return read


def _memory(field: str) -> Callable[[Any, Any], float | None]:
    def read(library: Any, device: Any) -> float | None:
        memory = _Memory()
        return None if library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) else float(getattr(memory, field))

    return read


def _utilization(library: Any, device: Any) -> float | None:
    rates = _Utilization()
    return None if library.nvmlDeviceGetUtilizationRates(device, ctypes.byref(rates)) else rates.gpu / 100


GAUGES = (
    Gauge("nv_gpu_utilization", "gauge", "GPU utilisation, 0 to 1", _utilization),
    Gauge("nv_gpu_memory_total_bytes", "gauge", "Memory of the GPU", _memory("total")),
    Gauge("nv_gpu_memory_used_bytes", "gauge", "Memory of the GPU in use", _memory("used")),
    Gauge("nv_gpu_power_usage", "gauge", "Watts", _number("nvmlDeviceGetPowerUsage", 1e-3)),
    Gauge("nv_gpu_power_limit", "gauge", "Watts allowed", _number("nvmlDeviceGetEnforcedPowerLimit", 1e-3)),
    Gauge("nv_energy_consumption", "counter", "Joules since the driver was loaded",
          _number("nvmlDeviceGetTotalEnergyConsumption", 1e-3, ctypes.c_ulonglong)),
)  # fmt: skip


@cache
def devices() -> tuple[Any, tuple[tuple[str, Any], ...]]:
    """(library, (UUID, handle) of each GPU); no library and none where there is no driver."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None, ()
    if library.nvmlInit_v2():
        return None, ()
    count = ctypes.c_uint()
    library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    return library, tuple(_device(library, number) for number in range(count.value))


def _device(library: Any, number: int) -> tuple[str, Any]:
    handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
    library.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(handle))
    library.nvmlDeviceGetUUID(handle, name, len(name))
    return name.value.decode(), handle


def samples(gauge: Gauge) -> Iterator[tuple[str, float]]:
    """(UUID, value) of each GPU that tells it."""
    library, known = devices()
    for uuid, handle in known:
        value = gauge.read(library, handle)
        if value is not None:
            yield uuid, value
