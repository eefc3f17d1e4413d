"""DLPack without any array library: tensors on a GPU taken as they lie, and given to whoever speaks the protocol."""

from __future__ import annotations

import ctypes
import functools
import struct
from dataclasses import dataclass
from typing import Any

from ingot.dtypes import SIZES
from ingot.errors import InputError

CUDA = 2  # kDLCUDA
_HEAD = struct.Struct("<QiiiBBHQQQ")  # a _Tensor's bytes
_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "bool": 6}
_UNUSED = b"dltensor"  # the capsule's name until its tensor is taken


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

# Prototypes of our own: those of ctypes.pythonapi are everybody's to change.
_API = ctypes.pythonapi
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", _API))
_raw_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _API))
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _API))
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _Destructor)(("PyCapsule_New", _API))


@dataclass(eq=False, slots=True)
class Foreign:
    """Somebody else's tensor on a GPU; `of` it becomes a view when a stream is known."""

    source: Any
    shape: tuple[int, ...]
    device: int


@dataclass(frozen=True, eq=False)
class View:
    """Row-major elements on a device; `owner` keeps them alive."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    owner: Any


def foreign(x: Any) -> Foreign | None:
    """x if it is a tensor on a GPU that speaks DLPack; None for everything else."""
    if type(x) is DeviceArray:
        return Foreign(x, x.shape, x.device)
    where = getattr(x, "__dlpack_device__", None)
    if where is None or not hasattr(x, "shape"):
        return None
    kind, number = where()
    return Foreign(x, tuple(map(int, x.shape)), int(number)) if int(kind) == CUDA else None


def view(tensor: Foreign, stream: int, name: str) -> View:
    """The tensor's memory, after its producer's work as far as `stream` is concerned. InputError names what cannot be
    taken."""
    if type(tensor.source) is DeviceArray:  # the run that made it is over
        return tensor.source.view
    capsule = tensor.source.__dlpack__(stream=stream)
    found = ctypes.string_at(_pointer_of(capsule, _UNUSED), _HEAD.size)
    data, _, _, rank, code, bits, lanes, shape_at, strides_at, offset = _HEAD.unpack(found)
    extents = ctypes.string_at(shape_at, 8 * rank)
    shape, dtype, plain = _layout(code, bits, extents, ctypes.string_at(strides_at, 8 * rank) if strides_at else b"")
    if not dtype or lanes != 1:
        raise InputError(f"{name!r} has elements of a kind that Ingot does not know (DLPack code {code}, {bits} bits, "
                         f"{lanes} lanes)")  # fmt: skip
    if not plain:
        raise InputError(f"{name!r} does not lie in row-major order; give x.contiguous()")
    return View(data + offset, shape, dtype, capsule)


def check_shape(name: str, view: View, given: tuple[int, ...]) -> None:
    """InputError unless the buffer has the shape that the run gives."""
    if view.shape != given:
        raise InputError(f"the buffer for {name!r} has shape {list(view.shape)}, this run gives {list(given)}")


@functools.lru_cache(4096)
def _layout(code: int, bits: int, extents: bytes, strides: bytes) -> tuple[tuple[int, ...], str, bool]:
    """Shape, dtype ("" if unknown) and whether elements lie in row-major order."""
    kinds = {code: kind for kind, code in _CODES.items()}
    dtype = kinds.get(code, "unknown") + (str(bits) if code != _CODES["bool"] else "")
    shape = struct.unpack(f"<{len(extents) // 8}q", extents)
    plain = not strides or _row_major(shape, struct.unpack(f"<{len(strides) // 8}q", strides))
    return shape, dtype if dtype in SIZES else "", plain


def _row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


# giving


class DeviceArray:
    """A result on a device. `torch.from_dlpack(y)`, `cupy.from_dlpack(y)` take it as it lies; `y.numpy()` copies it.
    Its memory is free again when nobody refers to it."""

    def __init__(self, held: View, device: int, download: Any) -> None:
        self.view, self.device, self._download = held, device, download
        self.shape, self.dtype = held.shape, held.dtype

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.device

    def __dlpack__(self, *, stream: int | None = None, max_version: Any = None, dl_device: Any = None,
                   copy: bool | None = None) -> Any:  # fmt: skip
        """A capsule; the run that made the array is over, so that there is nothing for `stream` to wait for."""
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError("a result on a GPU is given as it lies; use .numpy() for a copy on the host")
        return _exported(self.view, self.device)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """For libraries that know this protocol alone."""
        letter = {"float": "f", "int": "i", "uint": "u", "bool": "b"}.get(self.dtype.rstrip("0123456789"))
        if letter is None:
            raise AttributeError(f"the protocol has no {self.dtype}")
        return {"shape": self.shape, "typestr": f"<{letter}{SIZES[self.dtype]}".replace("<b1", "|b1"),
                "data": (self.view.address, False), "version": 3, "strides": None}  # fmt: skip

    def numpy(self) -> Any:
        """A copy on the host."""
        return self._download(self.view)


_ALIVE: dict[int, tuple[Any, ...]] = {}  # what exported tensors need, until their consumers delete them


def _forget(managed: Any) -> None:
    _ALIVE.pop(ctypes.addressof(managed.contents), None)


def _destroy(capsule: int) -> None:
    """Nobody took the tensor."""
    if _is_valid(capsule, _UNUSED):
        _ALIVE.pop(_raw_pointer(capsule, _UNUSED), None)


_FORGET, _DESTROY = _Deleter(_forget), _Destructor(_destroy)


def _exported(held: View, device: int) -> Any:
    kind = held.dtype.rstrip("0123456789")
    if kind not in _CODES:
        raise BufferError(f"DLPack has no {held.dtype}; use .numpy() for a copy on the host")
    shape = (ctypes.c_int64 * max(len(held.shape), 1))(*held.shape)
    tensor = _Tensor(held.address, CUDA, device, len(held.shape), _CODES[kind], 8 * SIZES[held.dtype], 1,
                     ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)), None, 0)  # fmt: skip
    managed = _Managed(tensor, None, _FORGET)
    _ALIVE[ctypes.addressof(managed)] = (managed, shape, held)
    return _new(ctypes.addressof(managed), _UNUSED, _DESTROY)
