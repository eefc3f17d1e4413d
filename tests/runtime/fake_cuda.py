"""A driver of no GPU: device memory is host memory, kernels are carried out by Triton's interpreter.

`FakeDriver` has the functions of cuda.bindings.driver that Ingot calls. What was asked of it is in `calls`; `failures`
names functions that are to fail, and with which code; `broken` a kernel's entry at whose launch the context dies.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from ingot.kernels.cuda.build import Unit
from ingot.kernels.cuda.compile import Cubin

_PROCESSORS, _MAJOR, _MINOR = 16, 75, 76


@dataclass(frozen=True)
class FakeDevice:
    """What the driver says of a device."""

    name: str = "NVIDIA H200"
    uuid: str = "11112222-3333-4444-5555-666677778888"
    capability: tuple[int, int] = (9, 0)
    memory: int = 1 << 30
    processors: int = 132


def stand_in(unit: Unit, name: str) -> Cubin:
    """In the place of a cubin: the unit itself."""
    text = json.dumps(asdict(unit)).encode()
    return Cubin(text, 1 << 16, 32 * unit.warps, 32, 0)


@dataclass
class Future:
    """A job that is done."""

    value: Any

    def result(self) -> Any:
        return self.value


class Pool:
    """Compiles nothing, at once."""

    def __init__(self, size: int) -> None:
        pass

    def submit(self, function: str, *arguments: Any, limit: float | None = None) -> Future:
        return Future(stand_in(*arguments))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


@dataclass
class FakeDriver:
    """The functions, each giving (error, *results)."""

    devices: tuple[FakeDevice, ...] = (FakeDevice(),)
    version: int = 13000
    failures: dict[str, int] = field(default_factory=lambda: {"cuIpcGetMemHandle": 801})  # nothing is shared here
    broken: str = ""
    calls: Counter[str] = field(default_factory=Counter)
    taken: dict[int, Any] = field(default_factory=dict)
    fault: int = 0
    recordings: dict[int, list[Callable[[], None]]] = field(default_factory=dict)  # by thread
    turn: Any = field(default_factory=threading.Lock)  # of threads that have kernels interpreted
    CUdevice_attribute = CUfunction_attribute = CUstreamCaptureMode = CUresult = CUlaunchAttributeID = staticmethod(int)
    CUlaunchConfig = SimpleNamespace

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls[name] += 1
            if name in self.failures or (self.fault and name not in ("cuGetErrorName",)):
                return (self.failures.get(name, self.fault), *[None] * 2)
            results = getattr(self, f"_{name}")(*arguments)
            return (0, *(results if isinstance(results, tuple) else () if results is None else (results,)))

        return call

    @property
    def recording(self) -> list[Callable[[], None]] | None:
        """What this thread captures."""
        return self.recordings.get(threading.get_ident())

    @property
    def used(self) -> int:
        """Bytes of device memory taken."""
        return sum(len(memory) for memory in self.taken.values())

    def _cuGetErrorName(self, error: int) -> bytes:
        return {2: b"CUDA_ERROR_OUT_OF_MEMORY", 700: b"CUDA_ERROR_ILLEGAL_ADDRESS"}.get(error, b"CUDA_ERROR_UNKNOWN")

    def _cuInit(self, flags: int) -> None:
        pass

    def _cuDriverGetVersion(self) -> int:
        return self.version

    def _cuDeviceGetCount(self) -> int:
        return len(self.devices)

    def _cuDeviceGet(self, ordinal: int) -> int:
        return ordinal

    def _cuDeviceGetAttribute(self, attribute: int, device: int) -> int:
        known = self.devices[device]
        return {_PROCESSORS: known.processors, _MAJOR: known.capability[0], _MINOR: known.capability[1]}[attribute]

    def _cuDeviceGetName(self, length: int, device: int) -> bytes:
        return self.devices[device].name.encode().ljust(length, b"\0")

    def _cuDeviceGetUuid(self, device: int) -> Any:
        return SimpleNamespace(bytes=bytes.fromhex(self.devices[device].uuid.replace("-", "")))

    def _cuDeviceTotalMem(self, device: int) -> int:
        return self.devices[device].memory

    def _cuDevicePrimaryCtxRetain(self, device: int) -> str:
        return f"context {device}"

    def _cuCtxSetCurrent(self, context: str) -> None:
        pass

    def _cuMemGetInfo(self) -> tuple[int, int]:
        return self.devices[0].memory - self.used, self.devices[0].memory

    def _cuMemAlloc(self, size: int) -> int:
        memory = np.full(size + 256, 0x7B, np.uint8)
        address = -(-memory.ctypes.data // 256) * 256
        self.taken[address] = memory
        return address

    def _cuMemFree(self, address: int) -> None:
        del self.taken[address]

    def _cuMemHostAlloc(self, size: int, flags: int) -> int:
        return self._cuMemAlloc(size)

    def _cuMemFreeHost(self, address: int) -> None:
        self._cuMemFree(address)

    def _cuMemcpyHtoD(self, target: int, source: int, size: int) -> None:
        ctypes.memmove(target, source, size)

    def _cuMemsetD8Async(self, target: int, value: int, size: int, stream: int) -> None:
        ctypes.memset(target, value, size)

    def _cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> None:
        ctypes.memmove(target, source, size)

    def _cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> None:
        ctypes.memmove(target, source, size)

    def _cuMemcpyDtoDAsync(self, target: int, source: int, size: int, stream: int) -> None:
        ctypes.memmove(target, source, size)

    def _cuMemcpyDtoH(self, target: int, source: int, size: int) -> None:
        ctypes.memmove(target, source, size)

    def _cuStreamCreate(self, flags: int) -> int:
        return 7

    def _cuStreamSynchronize(self, stream: int) -> None:
        pass

    def _cuStreamDestroy(self, stream: int) -> None:
        pass

    def _cuStreamBeginCapture(self, stream: int, mode: int) -> None:
        self.recordings[threading.get_ident()] = []

    def _cuStreamEndCapture(self, stream: int) -> list[Callable[[], None]]:
        return self.recordings.pop(threading.get_ident())

    def _cuStreamGetCaptureInfo(self, stream: int) -> tuple[Any, ...]:
        return int(self.recording is not None), 0, "graph", ["the last node"], None, 1

    def _cuGraphAddEmptyNode(self, graph: str, nodes: list[str], count: int) -> str:
        assert self.recording is not None and (graph, nodes, count) == ("graph", ["the last node"], 1)
        return "an empty node"

    def _cuStreamUpdateCaptureDependencies(
        self, stream: int, nodes: list[str], edges: None, count: int, how: int
    ) -> None:
        assert self.recording is not None and (nodes, count, how) == (["an empty node"], 1, 1)

    def _cuGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any]:
        return (graph,)

    def _cuGraphDestroy(self, graph: Any) -> None:
        pass

    def _cuGraphExecDestroy(self, graph: Any) -> None:
        pass

    def _cuGraphLaunch(self, graph: list[Callable[[], None]], stream: int) -> None:
        for action in graph:
            action()

    def _cuEventCreate(self, flags: int) -> str:
        return "event"

    def _cuEventDestroy(self, event: str) -> None:
        pass

    def _cuEventRecord(self, event: str, stream: int) -> None:
        pass

    def _cuStreamWaitEvent(self, stream: int, event: str, flags: int) -> None:
        pass

    def _cuEventRecordWithFlags(self, event: str, stream: int, flags: int) -> None:
        pass

    def _cuEventElapsedTime(self, start: str, end: str) -> float:
        return 0.002

    def _cuModuleLoadData(self, code: bytes) -> Unit:
        assert self.recording is None, "modules cannot be loaded while a stream is captured"
        known = json.loads(code)
        signature = tuple((name, kind) for name, kind in known.pop("signature"))
        return Unit(signature=signature, aligned=tuple(known.pop("aligned")), **known)

    def _cuModuleGetFunction(self, module: Unit, name: bytes) -> Unit:
        return module

    def _cuFuncSetAttribute(self, function: Unit, attribute: int, value: int) -> None:
        pass

    @staticmethod
    def CUlaunchAttribute() -> Any:
        """An attribute to fill in."""
        return SimpleNamespace(id=0, value=SimpleNamespace())

    def _cuLaunchKernelEx(self, config: Any, function: Unit, arguments: Any, extra: int) -> None:
        self._cuLaunchKernel(function, config.gridDimX, config.gridDimY, config.gridDimZ, *[0] * 5, arguments)

    def _cuLaunchKernel(self, function: Unit, *rest: Any) -> None:
        grid, arguments = rest[:3], rest[8]
        values, kinds = arguments
        assert len(values) == len(kinds) == len(function.signature) + 2 and values[-2:] == (0, 0)
        if self.recording is not None:
            self.recording.append(lambda: self._carry_out(function, grid, values))
        else:
            self._carry_out(function, grid, values)

    def _carry_out(self, function: Unit, grid: Any, values: Any) -> None:
        from tests.kernels.cuda import interpret

        if self.broken and self.broken in function.text:
            self.fault = 700
            return
        with self.turn:
            interpret.run(function, grid, values[:-2])
