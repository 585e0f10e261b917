"""Memory of arrays that are known by DLPack, on the host or a device: what a capsule says, read without taking it over."""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

from hfreduce.device import LEGACY_STREAM, DeviceMemory, check_mutable, is_contiguous, library_stream, stream_handle
from hfreduce.errors import InvalidArgumentError
from hfreduce.types import dtype_code

#: DLDeviceType.
CPU, CUDA, CUDA_HOST, ROCM_HOST, CUDA_MANAGED = 1, 2, 3, 11, 13
#: The device types of memory that the host reaches.
HOST = (CPU, CUDA_HOST, ROCM_HOST)


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


_READ_ONLY, _IS_COPIED = 1, 2
_PLAIN, _VERSIONED = b"dltensor", b"dltensor_versioned"
# (DLDataTypeCode, bits) -> name
_TYPES = {
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

_REFUSALS = (BufferError, RuntimeError, TypeError, ValueError)


class _Content(NamedTuple):
    """Contiguous memory as a capsule describes it: address, elements, hfreduceDataType_t."""

    address: int
    elements: int
    dtype: int


def device_type(x: Any) -> int:
    """The DLDeviceType of x's memory."""
    return int(x.__dlpack_device__()[0])


def on_host(x: Any, name: str, *, writable: bool) -> tuple[int, int, int, Any]:
    """An array in memory of the host, which is argument `name` in messages: address, elements, hfreduceDataType_t, what must live.

    InvalidArgumentError if it is not contiguous, of an unsupported dtype, read-only (`writable`), or a copy: one to which the
    result is to be written, or one whose exporter does not say so.
    """
    capsule, copied = _asked(x, name, writable)
    tensor, flags = _opened(capsule, name)
    if tensor.device_type not in HOST:
        raise InvalidArgumentError(f"{name}: its DLPack capsule is of device type {tensor.device_type}, not of the host")
    check_mutable(x, name, writable=writable, read_only=bool(flags & _READ_ONLY))
    content = _content(tensor, name, "an array")
    copied = copied or bool(flags & _IS_COPIED)
    if copied and writable:
        raise InvalidArgumentError(
            f"{name}: what {type(x).__name__} gives through DLPack is a copy of its memory, in which nobody would see the result; pass an "
            f"out= whose memory is its own, such as a NumPy array"
        )
    again = capsule if copied or not content.elements else _asked(x, name, writable)[0]
    if _opened(again, name)[0].data != tensor.data:  # while both live
        raise InvalidArgumentError(
            f"{name}: {type(x).__name__} makes a new copy of its memory each time it is asked through DLPack, and does not say so; pass "
            f"a NumPy array (numpy.from_dlpack makes one), and read the result from that"
        )
    return (*content, (x, capsule))


def _asked(x: Any, name: str, writable: bool) -> tuple[Any, bool]:
    """x's capsule, asked for without a copy in the newest words that it understands; and whether it refused those for its copy."""
    try:
        refusal: Exception | None = None
        try:
            return x.__dlpack__(max_version=(1, 0), copy=False), False
        except TypeError:  # from before version 1 of the protocol, or its first days
            pass
        except (BufferError, ValueError) as error:
            refusal = error
            if writable:
                raise
        try:
            return x.__dlpack__(max_version=(1, 0)), refusal is not None
        except TypeError:
            return x.__dlpack__(), False
    except _REFUSALS as error:
        raise InvalidArgumentError(f"{name}: {type(x).__name__} does not give its memory through DLPack: {error}") from None


def on_device(x: Any, name: str, stream: Any, *, writable: bool) -> DeviceMemory:
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
    except _REFUSALS as error:
        raise InvalidArgumentError(f"{name}: {type(x).__name__} does not give its memory through DLPack: {error}") from None
    tensor, flags = _opened(capsule, name)
    check_mutable(x, name, writable=writable, read_only=bool(flags & _READ_ONLY))
    if tensor.device_type not in (CUDA, CUDA_MANAGED):
        raise InvalidArgumentError(f"{name}: its DLPack capsule is of device type {tensor.device_type}, not of a CUDA device")
    content = _content(tensor, name, "a device array")
    if writable and flags & _IS_COPIED:
        raise InvalidArgumentError(
            f"{name}: what {type(x).__name__} gives through DLPack is a copy of its memory, in which nobody would see the result; pass an "
            f"out= whose memory is its own"
        )
    # The capsule is kept and not taken over: when it goes, it gives the memory back itself.
    return DeviceMemory(content.address, content.elements, content.dtype, handle, (x, capsule))


def _opened(capsule: Any, name: str) -> tuple[_Tensor, int]:
    """The DLTensor in a capsule, and its flags (0 where it has none)."""
    if _capsule_is(capsule, _VERSIONED):
        place = _capsule_pointer(capsule, _VERSIONED)
        head = _VersionedHead.from_address(place)
        if head.major != 1:
            raise InvalidArgumentError(f"{name}: its DLPack capsule is of version {head.major}.{head.minor}; 1.x was asked for")
        return _Tensor.from_address(place + ctypes.sizeof(_VersionedHead)), int(head.flags)
    if _capsule_is(capsule, _PLAIN):
        return _Tensor.from_address(_capsule_pointer(capsule, _PLAIN)), 0
    raise InvalidArgumentError(f"{name}: its __dlpack__ gives {capsule!r}, which is no DLPack capsule")


def _content(tensor: _Tensor, name: str, what: str) -> _Content:
    """The memory of a DLTensor; `what` names it in messages."""
    kind = _TYPES.get((tensor.code, tensor.bits))
    if kind is None or tensor.lanes != 1:
        raise InvalidArgumentError(
            f"{name}: DLPack type code {tensor.code} of {tensor.bits} bits and {tensor.lanes} lanes is not supported; convert it first"
        )
    dtype = dtype_code(kind, name)
    shape = tuple(tensor.shape[: tensor.ndim])
    if tensor.strides and not is_contiguous(shape, tuple(tensor.strides[: tensor.ndim]), 1):  # counted in elements
        raise InvalidArgumentError(
            f"{name}: {what} of shape {shape} with strides {tuple(tensor.strides[: tensor.ndim])} (in elements) is not C-contiguous; "
            f"make a contiguous copy of it"
        )
    return _Content((tensor.data or 0) + tensor.byte_offset, math.prod(shape), dtype)
