"""Device memory of the caller's arrays, and the stream on which a call on it runs.

Arrays are known by __cuda_array_interface__ or DLPack, torch tensors by their own methods. Nothing here imports an array library
or calls CUDA: whether there is a driver, and whether an address is what the array says, the core finds out.
"""

from __future__ import annotations

import ctypes
import math
import operator
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hfreduce._ffi import ffi
from hfreduce.errors import InvalidArgumentError
from hfreduce.types import dtype_code

#: The legacy default stream as a handle (CU_STREAM_LEGACY). The libraries' 0 means the same, but to the core NULL beside host
#: memory means "no stream".
LEGACY_STREAM = 1


class DeviceMemory(NamedTuple):
    """Contiguous device memory.

    Address, elements, hfreduceDataType_t, the stream on which the array is used unless the caller names one, and what must live
    while it is used.
    """

    address: int
    elements: int
    dtype: int
    stream: int
    keep: Any


# --- streams ---


def stream_handle(stream: Any) -> int:
    """The CUstream of `stream` as an integer; never 0.

    stream: an integer (0 and 1 are the legacy default stream, 2 the per-thread one), or an object with __cuda_stream__ (CUDA's
    protocol for Python), .cuda_stream (PyTorch), .ptr (CuPy) or .handle (Numba, cuda.core). InvalidArgumentError for others.
    """
    value = stream
    if not _is_integer(value):
        value = _of_object(stream)
    if value is None:
        raise InvalidArgumentError(
            f"stream: {type(stream).__name__} is no stream. Give an integer (a CUstream), or an object with __cuda_stream__, "
            f".cuda_stream, .ptr or .handle"
        )
    handle = operator.index(value)
    if not 0 <= handle < 1 << 64:
        raise InvalidArgumentError(f"stream: {handle} is not the address of a CUstream")
    return handle or LEGACY_STREAM


def _is_integer(value: Any) -> bool:
    return hasattr(type(value), "__index__") and not isinstance(value, bool)


def _of_object(stream: Any) -> Any:
    """What its library calls the handle, or None."""
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        pair = protocol() if callable(protocol) else protocol
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InvalidArgumentError(f"stream: its __cuda_stream__ gives {pair!r} instead of (version, handle)")
        return _plain(pair[1])
    for name in ("cuda_stream", "ptr", "handle"):
        value = getattr(stream, name, None)
        if value is not None:
            return _plain(value)
    return None


def _plain(handle: Any) -> Any:
    """A handle as an integer: ctypes pointers have a value (None for 0), CUDA's own bindings an int()."""
    if isinstance(handle, ctypes.c_void_p):
        return handle.value or 0
    if _is_integer(handle):
        return handle
    return int(handle) if hasattr(type(handle), "__int__") and not isinstance(handle, (bool, float)) else None


def common_stream(stream: Any, first: int | None, second: int | None) -> Any:
    """The stream of a call on two buffers as cdata: the caller's, else the arrays' own; None for host memory without one.

    first, second: the streams of the buffers (None: host memory, or no such buffer). InvalidArgumentError if they differ.
    """
    if stream is not None:
        return ffi.cast("void *", stream_handle(stream))
    if first is None and second is None:
        return None
    if first is not None and second is not None and first != second:
        raise InvalidArgumentError(
            f"stream: x is used on stream {first:#x} and out on stream {second:#x}; say with stream= on which the call is to run, "
            f"and see to it that both are ready there"
        )
    return ffi.cast("void *", second if first is None else first)


def library_stream(x: Any) -> int | None:
    """The current stream of the library that made x, where the library keeps one."""
    library = type(x).__module__.partition(".")[0]
    if library == "cupy":
        return stream_handle(sys.modules["cupy"].cuda.get_current_stream())
    if library == "torch":
        return stream_handle(sys.modules["torch"].cuda.current_stream(x.device))
    return None


# --- arrays ---


def from_torch(tensor: Any, name: str) -> DeviceMemory:
    """A contiguous CUDA tensor, which is argument `name` in messages; used on torch's current stream of its device."""
    dtype = dtype_code(tensor.dtype, name)
    stream = stream_handle(sys.modules["torch"].cuda.current_stream(tensor.device))
    return DeviceMemory(int(tensor.data_ptr()), int(tensor.numel()), dtype, stream, tensor)


def _check_mutable(x: Any, name: str, writable: bool, read_only: bool) -> None:
    """JAX's arrays never change, whatever their interface says: their memory may be another array's too."""
    if not writable:
        return
    if type(x).__module__.partition(".")[0] in ("jax", "jaxlib"):
        raise InvalidArgumentError(
            f"{name}: it is a JAX array, which is immutable, and the result is written there; pass an out= of another kind (CuPy, PyTorch)"
        )
    if read_only:
        raise InvalidArgumentError(f"{name}: it is read-only, and the result is written there; pass out=, or a copy")


def from_interface(x: Any, name: str, *, writable: bool) -> DeviceMemory:
    """An array with __cuda_array_interface__, version 2 or 3, which is argument `name` in messages.

    InvalidArgumentError if it is masked, not C-contiguous, of an unsupported dtype, read-only (`writable`), or says of itself what
    the protocol does not allow.
    """
    said = x.__cuda_array_interface__
    try:
        shape = tuple(operator.index(extent) for extent in said["shape"])
        address, read_only = said["data"]
        typestr, strides = said["typestr"], said.get("strides")
        address = operator.index(address or 0)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidArgumentError(
            f"{name}: its __cuda_array_interface__ cannot be read ({type(error).__name__}: {error})"
        ) from None
    if said.get("mask") is not None:
        raise InvalidArgumentError(f"{name}: it is a masked array; pass its data")
    dtype, itemsize = _interface_dtype(x, typestr, name)
    if strides is not None and not is_contiguous(shape, tuple(strides), itemsize):
        raise InvalidArgumentError(
            f"{name}: a device array of shape {shape} with strides {tuple(strides)} is not C-contiguous; make a contiguous copy of it"
        )
    _check_mutable(x, name, writable, bool(read_only))
    elements = math.prod(shape)
    if elements and not address:
        raise InvalidArgumentError(f"{name}: its __cuda_array_interface__ gives address 0 for {elements} elements")
    return DeviceMemory(address, elements, dtype, _interface_stream(x, said, name), x)


def _interface_dtype(x: Any, typestr: Any, name: str) -> tuple[int, int]:
    """(hfreduceDataType_t, bytes). For bfloat16 and fp8 the protocol has no letters: there the array's own dtype tells."""
    try:
        dtype: Any = np.dtype(typestr)
    except TypeError:
        dtype = None
    if (dtype is None or dtype.kind == "V") and getattr(x, "dtype", None) is not None:
        return dtype_code(x.dtype, name), int(x.dtype.itemsize)
    if dtype is None:
        raise InvalidArgumentError(f"{name}: its __cuda_array_interface__ has typestr {typestr!r}, which is no dtype")
    return dtype_code(dtype, name), int(dtype.itemsize)


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Whether the elements lie one after the other in C order; strides are in the unit of itemsize."""
    if math.prod(shape) == 0:
        return True
    step = itemsize
    for extent, stride in zip(reversed(shape), reversed(strides)):
        if extent != 1 and stride != step:
            return False
        step *= extent
    return len(shape) == len(strides)


def _interface_stream(x: Any, said: Mapping[str, Any], name: str) -> int:
    current = library_stream(x)
    if current is not None:
        return current
    stream = said.get("stream")  # from version 3 on
    if stream is None:
        return LEGACY_STREAM
    if not _is_integer(stream) or stream <= 0:
        raise InvalidArgumentError(
            f"{name}: its __cuda_array_interface__ gives stream {stream!r}; the protocol has None, 1, 2 or a handle"
        )
    return operator.index(stream)


# --- DLPack ---

CPU, CUDA, CUDA_HOST, ROCM_HOST, CUDA_MANAGED = 1, 2, 3, 11, 13


class _Tensor(ctypes.Structure):
    """DLTensor: what a capsule of either kind carries."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _VersionedHead(ctypes.Structure):
    """DLManagedTensorVersioned up to its DLTensor."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
    )


_READ_ONLY = 1
_PLAIN, _VERSIONED = b"dltensor", b"dltensor_versioned"
# (DLDataTypeCode, bits) -> name
_DLPACK_TYPES = {
    **{(0, bits): f"int{bits}" for bits in (8, 16, 32, 64)},
    **{(1, bits): f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{(2, bits): f"float{bits}" for bits in (16, 32, 64)},
    (4, 16): "bfloat16",
    (5, 64): "complex64",
    (5, 128): "complex128",
    (6, 8): "bool",
    (10, 8): "float8_e4m3fn",
    (12, 8): "float8_e5m2",
}

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.restype, _capsule_is.argtypes = ctypes.c_int, (ctypes.py_object, ctypes.c_char_p)


def from_dlpack(x: Any, name: str, stream: Any, *, writable: bool) -> DeviceMemory:
    """An array on device kDLCUDA or kDLCUDAManaged, which is argument `name` in messages.

    stream: the caller's, or None. The array is asked to be ready on it, or on the library's current, or the legacy default one:
    that is the handshake of the protocol.
    """
    handle = (library_stream(x) or LEGACY_STREAM) if stream is None else stream_handle(stream)
    try:
        try:
            capsule = x.__dlpack__(stream=handle, max_version=(1, 0))
        except TypeError:  # from before version 1
            capsule = x.__dlpack__(stream=handle)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{name}: {type(x).__name__} does not give its memory through DLPack: {error}") from None
    tensor, read_only = _opened(capsule, name)
    _check_mutable(x, name, writable, read_only)
    if tensor.device_type not in (CUDA, CUDA_MANAGED):
        raise InvalidArgumentError(f"{name}: its DLPack capsule is of device type {tensor.device_type}, not of a CUDA device")
    kind = _DLPACK_TYPES.get((tensor.code, tensor.bits))
    if kind is None or tensor.lanes != 1:
        raise InvalidArgumentError(
            f"{name}: DLPack type code {tensor.code} of {tensor.bits} bits and {tensor.lanes} lanes is not supported; convert it first"
        )
    dtype = dtype_code(kind, name)
    shape = tuple(tensor.shape[: tensor.ndim])
    if tensor.strides and not is_contiguous(shape, tuple(tensor.strides[: tensor.ndim]), 1):  # counted in elements
        raise InvalidArgumentError(f"{name}: a device array of shape {shape} is not C-contiguous; make a contiguous copy of it")
    # The capsule is kept and not taken over: when it goes, it gives the memory back itself.
    return DeviceMemory((tensor.data or 0) + tensor.byte_offset, math.prod(shape), dtype, handle, (x, capsule))


def _opened(capsule: Any, name: str) -> tuple[_Tensor, bool]:
    """The DLTensor in a capsule, and whether it is marked read-only."""
    if _capsule_is(capsule, _VERSIONED):
        place = _capsule_pointer(capsule, _VERSIONED)
        head = _VersionedHead.from_address(place)
        if head.major != 1:
            raise InvalidArgumentError(f"{name}: its DLPack capsule is of version {head.major}.{head.minor}; 1.x was asked for")
        return _Tensor.from_address(place + ctypes.sizeof(_VersionedHead)), bool(head.flags & _READ_ONLY)
    if _capsule_is(capsule, _PLAIN):
        return _Tensor.from_address(_capsule_pointer(capsule, _PLAIN)), False
    raise InvalidArgumentError(f"{name}: its __dlpack__ gives {capsule!r}, which is no DLPack capsule")
