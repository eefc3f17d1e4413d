"""GPUs through cuda-bindings alone: the driver, devices by number or UUID, one context per device, memory, kernels."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ingot.errors import ConfigError, DeviceError
from ingot.runtime.buffers import Array
from ingot.runtime.cubins import Code

OLDEST_DRIVER = 12000  # cuDriverGetVersion's number: cubins of Triton's ptxas load from there on
_OUT_OF_MEMORY = 2
# Errors after which every call of the context fails (cuda.h's descriptions): the process must end.
_FATAL = frozenset({214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999})
_PROCESSORS, _COMPUTE_MAJOR, _COMPUTE_MINOR, _SHARED_SIZE = 16, 75, 76, 8  # of CUdevice_attribute, CUfunction_attribute
_SHARED_SHARE, _ALL = 9, 100  # per cent of the first level of cache that is shared memory
_SHARED_ALLOWED = 48 << 10  # bytes a block may have without asking
_OVERLAPPING_DRIVER = 12030  # from there on a graph keeps the attribute
_OVERLAP = 6  # of CUlaunchAttributeID: programmatic stream serialization
_RELAXED_CAPTURE, _NON_BLOCKING, _EXTERNAL_EVENT = 2, 1, 1
_CAPTURING, _INSTEAD = 1, 1  # of CUstreamCaptureStatus; of the flags with which a capture's last nodes are set
_REMEDY = "engines for GPUs run where there is one; build with --target cpu for this machine, cuda:sm_90 for others"


def _bindings() -> Any:
    """The module of cuda-bindings; tests put their own in its place."""
    try:
        from cuda.bindings import driver
    except ImportError:
        raise DeviceError("running on a GPU needs the package cuda-bindings: pip install 'ingot[cuda]'") from None
    return driver


class Driver:
    """Calls by name that return their results, or raise DeviceError with the driver's words."""

    def __init__(self, module: Any) -> None:
        self._module = module
        try:
            self.call("cuInit", 0)
        except (RuntimeError, DeviceError) as error:
            raise DeviceError(f"there is no usable NVIDIA driver here ({error}); {_REMEDY}") from None
        self.version = self.call("cuDriverGetVersion")
        if self.version < OLDEST_DRIVER:
            raise DeviceError(
                f"the NVIDIA driver here is for CUDA {_version(self.version)}, "
                f"CUDA {_version(OLDEST_DRIVER)} is the oldest that the kernels load with; update the driver"
            )

    def call(self, name: str, *arguments: Any) -> Any:
        """The function's results: nothing, one, or a tuple."""
        error, *results = getattr(self._module, name)(*arguments)
        if int(error):
            raise _DriverError(int(error), f"{name}: {self._words(error)}")
        return results[0] if len(results) == 1 else tuple(results) or None

    def raw(self, name: str) -> Callable[..., Any]:
        """The function itself, for paths where every microsecond counts."""
        return getattr(self._module, name)

    def enum(self, kind: str, value: int) -> Any:
        """A value of one of the driver's enumerations."""
        return getattr(self._module, kind)(value)

    def structure(self, name: str) -> Any:
        """An empty one of the driver's."""
        return getattr(self._module, name)()

    def overlapping(self, sizes: Sequence[int], shared: int, stream: Any) -> Any:
        """The configuration of a launch that may begin before the one before it on the stream has ended."""
        config, attribute = self._module.CUlaunchConfig(), self._module.CUlaunchAttribute()
        config.gridDimX, config.gridDimY, config.gridDimZ, config.blockDimX = sizes
        config.blockDimY = config.blockDimZ = 1
        config.sharedMemBytes, config.hStream = shared, stream
        attribute.id = self.enum("CUlaunchAttributeID", _OVERLAP)
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
        return config

    def _words(self, error: Any) -> str:
        _, name = self._module.cuGetErrorName(error)
        return name.decode() if isinstance(name, bytes) else str(error)


class _DriverError(DeviceError):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


_DRIVERS: list[Driver] = []
_LOCK = threading.RLock()


def driver() -> Driver:
    """The process's driver, initialised."""
    with _LOCK:
        if not _DRIVERS:
            _DRIVERS.append(Driver(_bindings()))
        return _DRIVERS[0]


# devices


@dataclass(frozen=True)
class Device:
    """A GPU or a MIG instance as the driver lists it; `capability` 90 for sm_90."""

    ordinal: int
    name: str
    uuid: str
    capability: int
    memory: int

    @property
    def features(self) -> frozenset[str]:
        """Variants it can run: cubins are good for later chips of the same major number, except from 9.0 on."""
        major = self.capability // 10 * 10
        runs = range(major, self.capability + 1) if major == 80 else (self.capability,)
        return frozenset(f"sm_{number}" for number in runs)

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.capability}, {self.uuid})"


def devices() -> list[Device]:
    """What the driver lists, in its order."""
    cuda = driver()
    return [_device(cuda, ordinal) for ordinal in range(cuda.call("cuDeviceGetCount"))]


def _device(cuda: Driver, ordinal: int) -> Device:
    handle = cuda.call("cuDeviceGet", ordinal)
    major, minor = (
        cuda.call("cuDeviceGetAttribute", cuda.enum("CUdevice_attribute", number), handle)
        for number in (_COMPUTE_MAJOR, _COMPUTE_MINOR)
    )
    name = cuda.call("cuDeviceGetName", 96, handle).split(b"\0")[0].decode()
    raw = bytes(cuda.call("cuDeviceGetUuid", handle).bytes).hex()
    uuid = "-".join((raw[:8], raw[8:12], raw[12:16], raw[16:20], raw[20:]))
    prefix = "MIG" if " MIG " in f"{name} " else "GPU"
    memory = cuda.call("cuDeviceTotalMem", handle)
    return Device(ordinal, name, f"{prefix}-{uuid}", 10 * major + minor, memory)


def select(wanted: str) -> Device:
    """The device of "cuda" (the first), "cuda:1", "cuda:GPU-3f2a…" or "cuda:MIG-…" (a beginning of the UUID will do).

    DeviceError when there is none; it lists those there are.
    """
    found, (_, _, which) = devices(), wanted.partition(":")
    if not found:
        raise DeviceError(f"the NVIDIA driver lists no GPU (CUDA_VISIBLE_DEVICES may hide it); {_REMEDY}")
    if not which or which.isdecimal():
        matching = [d for d in found if d.ordinal == int(which or 0)]
    else:
        bare = which.upper().removeprefix("GPU-").removeprefix("MIG-")
        matching = [d for d in found if d.uuid[4:].upper().startswith(bare)]
    if len(matching) == 1:
        return matching[0]
    listed = ", ".join(f"cuda:{d.ordinal} {d}" for d in found)
    hint = "; a MIG instance is visible when the process starts with CUDA_VISIBLE_DEVICES=MIG-…" * ("MIG" in which)
    problem = "is not there" if not matching else "fits several"
    raise ConfigError(f"the device {wanted!r} {problem}: this machine has {listed}{hint}")


def first_architecture() -> str:
    """What `target="cuda"` builds for."""
    return f"sm_{select('cuda').capability}"


# a device in use


class Allocation:
    """Bytes on a device, freed when nobody refers to them any more."""

    def __init__(self, context: Context, size: int) -> None:
        self.size = size
        self.address = int(context.driver.call("cuMemAlloc", max(size, 256)))
        self._finalizer = weakref.finalize(self, context.free, self.address)

    def release(self) -> None:
        """Free them now."""
        self._finalizer()


class Context:
    """A device's primary context, shared by all sessions of the process on it. After a fault it says so for ever."""

    def __init__(self, device: Device) -> None:
        self.device, self.driver, self.fault = device, driver(), ""
        self._number = self.driver.call("cuDeviceGet", device.ordinal)
        self._handle = self.driver.call("cuDevicePrimaryCtxRetain", self._number)
        self._turn, self._alone = threading.Lock(), list[Any]()  # the last stream of `alone`, the event of its end
        self._set = self.driver.raw("cuCtxSetCurrent")
        self._synchronize = self.driver.raw("cuStreamSynchronize")

    def activate(self) -> None:
        """Make it the calling thread's."""
        if self.fault:
            raise DeviceError(self.fault)
        self._set(self._handle)

    def call(self, name: str, *arguments: Any) -> Any:
        """A driver's function; a fault that it reports is an earlier kernel's, and ends the context."""
        try:
            return self.driver.call(name, *arguments)
        except _DriverError as error:
            if error.code in _FATAL:
                self.fail(error.code, "earlier work")
            raise

    def allocate(self, size: int, purpose: str) -> Allocation:
        """Device memory. DeviceError, before anything is taken, when it is more than is free."""
        self.activate()
        free, total = self.driver.call("cuMemGetInfo")
        if size > free:
            raise DeviceError(
                f"{purpose} needs {size / 2**20:.1f} MiB, of the {total / 2**20:.0f} MiB of {self.device} only "
                f"{free / 2**20:.1f} MiB are free: use smaller shapes, another device, or end what else runs there"
            )
        try:
            return Allocation(self, size)
        except _DriverError as error:
            if error.code != _OUT_OF_MEMORY:
                raise
            raise DeviceError(
                f"{purpose} needs {size / 2**20:.1f} MiB in one piece, which {self.device} does not have ({error})"
            ) from None

    def free(self, address: int) -> None:
        """Give device memory back; after a fault there is nothing to give back to."""
        if not self.fault:
            self._set(self._handle)
            self.driver.raw("cuMemFree")(address)

    def stream(self) -> Any:
        """A stream of its own."""
        self.activate()
        return self.call("cuStreamCreate", _NON_BLOCKING)

    @cached_property
    def processors(self) -> int:
        """Of the device."""
        return int(self.call("cuDeviceGetAttribute", self.driver.enum("CUdevice_attribute", _PROCESSORS), self._number))

    @contextmanager
    def alone(self, stream: Any) -> Iterator[None]:
        """What is put on the stream inside begins when what was put so on other streams has ended: kernels whose blocks
        wait for each other would take processors from each other, and wait for ever."""
        with self._turn:
            last, ended = self._alone or (stream, self.event())
            if last is not stream:
                self.call("cuStreamWaitEvent", stream, ended, 0)
            self._alone = [stream, ended]
            try:
                yield
            finally:  # what was put before an error runs too
                if not self.fault:
                    self.call("cuEventRecord", ended, stream)

    def wait(self, stream: Any, what: str) -> None:
        """Until the stream's work is done. A fault of a kernel ends the context: DeviceError, now and ever after."""
        (error, *_) = self._synchronize(stream)
        if int(error):
            self.fail(int(error), what)

    def fail(self, code: int, what: str) -> None:
        """Raise for an error of the driver during `what`."""
        name = self.driver._words(self.driver.enum("CUresult", code))
        if code in _FATAL:
            self.fault = (
                f"a kernel failed on {self.device} during {what} ({name}). The process's CUDA context is gone, start "
                "the process anew. INGOT_CUDA_SYNC=1 names the step"
            )
            raise DeviceError(self.fault)
        raise DeviceError(f"{what} failed on {self.device}: {name}")

    def clear(self, memory: Allocation, stream: Any) -> None:
        """Zeros, ordered on the stream."""
        self.call("cuMemsetD8Async", memory.address, 0, max(memory.size, 1), stream)

    def upload(self, address: int, array: Array, stream: Any) -> None:
        """Copy an array's bytes to the device, ordered on the stream."""
        if array.nbytes:
            self.call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, stream)

    def download(self, array: Array, address: int, stream: Any) -> None:
        """Copy bytes from the device into an array, ordered on the stream."""
        if array.nbytes:
            self.call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, stream)

    def pinned(self, size: int) -> Array:
        """Host memory that the device reads and writes at full speed, as bytes."""
        self.activate()
        address = int(self.call("cuMemHostAlloc", max(size, 64), 0))
        memory = (ctypes.c_uint8 * max(size, 64)).from_address(address)
        array: Array = np.ctypeslib.as_array(memory)
        weakref.finalize(memory, _free_host, self, address)
        return array

    def separate(self, stream: Any, spare: int) -> None:
        """What is put on the stream next begins when all before it has ended, even where a kernel before it and it
        itself allow more: in a capture by an empty node between them, else by writing the byte at `spare`."""
        status, _, graph, nodes, _, count = self.call("cuStreamGetCaptureInfo", stream)
        if int(status) != _CAPTURING:
            self.call("cuMemsetD8Async", spare, 0, 1, stream)
            return
        node = self.call("cuGraphAddEmptyNode", graph, nodes, count)
        self.call("cuStreamUpdateCaptureDependencies", stream, [node], None, 1, _INSTEAD)

    def capture(self, stream: Any, record: Callable[[], None]) -> Any:
        """What `record` puts on the stream as an executable graph."""
        mode = self.driver.enum("CUstreamCaptureMode", _RELAXED_CAPTURE)
        self.call("cuStreamBeginCapture", stream, mode)
        try:
            record()
        finally:
            graph = self.call("cuStreamEndCapture", stream)
        made = self.call("cuGraphInstantiate", graph, 0)
        self.call("cuGraphDestroy", graph)
        return made

    def event(self) -> Any:
        """An event that takes times."""
        return self.call("cuEventCreate", 0)

    def record(self, event: Any, stream: Any) -> None:
        """Record the event, in a capture as a node of its own."""
        self.call("cuEventRecordWithFlags", event, stream, _EXTERNAL_EVENT)


def _free_host(context: Context, address: int) -> None:
    if not context.fault:
        context.driver.raw("cuMemFreeHost")(address)


_CONTEXTS: dict[int, Context] = {}


def context_of(device: Device) -> Context:
    """The context of a device, retained on first use."""
    with _LOCK:
        if device.ordinal not in _CONTEXTS:
            _CONTEXTS[device.ordinal] = Context(device)
        return _CONTEXTS[device.ordinal]


class Kernels:
    """A variant's kernels on one device: cubins are loaded when they are first asked for."""

    def __init__(self, context: Context, codes: Mapping[str, Code]) -> None:
        self._context, self._codes = context, dict(codes)
        self._functions: dict[str, Any] = {}
        self._lock = threading.Lock()
        self.together = any(code.together for code in self._codes.values())

    def code(self, name: str) -> bytes:
        """What a library keeps under a name."""
        return bytes(self._codes[name].cubin) if name else b""

    def begin(self, name: str, early: bool) -> None:
        """Whether the kernel is begun before what is before it has ended, in launches from now on."""
        self._codes[name] = replace(self._codes[name], overlaps=early)

    def function(self, name: str) -> Any:
        """The kernel's handle."""
        with self._lock:
            if name not in self._functions:
                self._functions[name] = self._load(self._codes[name])
            return self._functions[name]

    def _load(self, code: Code) -> Any:
        cuda = self._context
        module = cuda.call("cuModuleLoadData", bytes(code.cubin))
        function = cuda.call("cuModuleGetFunction", module, code.function.encode())
        if code.shared > _SHARED_ALLOWED:
            kind = cuda.driver.enum("CUfunction_attribute", _SHARED_SIZE)
            cuda.call("cuFuncSetAttribute", function, kind, code.shared)
        if code.beside:
            kind = cuda.driver.enum("CUfunction_attribute", _SHARED_SHARE)
            cuda.call("cuFuncSetAttribute", function, kind, _ALL)
        return function

    def launch(
        self, name: str, grid: Sequence[int], arguments: tuple[Any, Any], stream: Any, late: bool = False
    ) -> None:
        """Put the kernel on a stream; `late`: it does not begin early here."""
        code = self._codes[name]
        if code.together:
            grid = (min(grid[0], self._context.processors), *grid[1:])
        if code.overlaps and not late and self._context.driver.version >= _OVERLAPPING_DRIVER:
            config = self._context.driver.overlapping((*grid, code.threads), code.shared, stream)
            self._context.call("cuLaunchKernelEx", config, self.function(name), arguments, 0)
            return
        self._context.call(
            "cuLaunchKernel", self.function(name), *grid, code.threads, 1, 1, code.shared, stream, arguments, 0
        )
