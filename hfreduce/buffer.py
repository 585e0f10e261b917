"""Memory of the caller's arrays.

From numpy, torch, DLPack, the buffer protocol, __array_interface__ or __cuda_array_interface__ to address, count and datatype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hfreduce import device
from hfreduce._ffi import ffi
from hfreduce.errors import InvalidArgumentError
from hfreduce.types import DTYPES, dtype_code

#: The cdef type that ffi.from_buffer is given: resolved once.
CHARS: Any = ffi.typeof("char[]")

_from_buffer = ffi.from_buffer
_new = tuple.__new__  # half the cost of calling Buffer


class Buffer(NamedTuple):
    """Contiguous memory.

    Address as cdata, elements, hfreduceDataType_t, what must live while it is used, and, on a device, the stream on which the
    array is used unless the caller names one (None: host memory).
    """

    pointer: Any
    elements: int
    dtype: int
    keep: Any
    stream: int | None = None


def resolve(x: Any, name: str, *, writable: bool, stream: Any = None) -> Buffer:
    """Find the memory of array `x`, which is argument `name` in messages. No copy is made.

    stream: the caller's, on which an array on a device is to be ready. InvalidArgumentError if it is no array, on a device that is
    not CUDA's, not contiguous, of an unsupported dtype, or (`writable`) read-only.
    """
    if type(x) is np.ndarray:
        try:
            return _new(Buffer, (_from_buffer(CHARS, x, writable), x.size, DTYPES[x.dtype], x, None))
        except (ValueError, KeyError):
            pass  # what is wrong, if anything, is found out and said below
    if isinstance(x, np.ndarray):
        return _from_numpy(x, name, writable, x)
    if hasattr(x, "data_ptr") and hasattr(x, "is_contiguous"):
        return _from_torch(x, name)
    if getattr(x, "__cuda_array_interface__", None) is not None:
        return _on_device(device.from_interface(x, name, writable=writable))
    if getattr(x, "__array_interface__", None) is not None:
        return _from_numpy(np.asarray(x), name, writable, x)
    try:
        view = memoryview(x)
    except TypeError:
        pass
    else:
        return _from_numpy(np.asarray(view), name, writable, x)
    if hasattr(x, "__dlpack__"):
        return _from_dlpack(x, name, writable, stream)
    raise InvalidArgumentError(
        f"{name}: {type(x).__name__} is not an array. Give a numpy array, a torch tensor, or an object with the "
        f"buffer protocol, "
        "__array_interface__, __cuda_array_interface__ or DLPack (numpy.asarray makes an array of a list)"
    )


def _on_device(memory: device.DeviceMemory) -> Buffer:
    return Buffer(ffi.cast("void *", memory.address), memory.elements, memory.dtype, memory.keep, memory.stream)


def _from_numpy(array: np.ndarray[Any, Any], name: str, writable: bool, owner: Any) -> Buffer:
    dtype = dtype_code(array.dtype, name)
    try:
        pointer = _from_buffer(CHARS, array, writable)
    except (ValueError, BufferError) as error:
        if not array.flags.c_contiguous:
            hint = "pass x.T if the memory order does not matter, or " if array.flags.f_contiguous else ""
            raise InvalidArgumentError(
                f"{name}: an array of shape {array.shape} with strides {array.strides} is not C-contiguous; {hint}use "
                f"numpy.ascontiguousarray"
            ) from None
        if writable and not array.flags.writeable:
            raise InvalidArgumentError(
                f"{name}: it is read-only, and the result is written there; pass out=, or a copy"
            ) from None
        raise InvalidArgumentError(f"{name}: its memory cannot be reached ({error})") from None
    return Buffer(pointer, array.size, dtype, (owner, pointer))


def _from_torch(tensor: Any, name: str) -> Buffer:
    kind = tensor.device.type
    if kind not in ("cpu", "cuda"):
        raise InvalidArgumentError(
            f"{name}: the tensor is on device {tensor.device}; memory of the host and of CUDA devices can be used: take {name}.cpu() and "
            f"copy the result back"
        )
    if str(tensor.layout) != "torch.strided":
        raise InvalidArgumentError(f"{name}: the tensor's layout is {tensor.layout}; use {name}.to_dense()")
    dtype = dtype_code(tensor.dtype, name)
    if not tensor.is_contiguous():
        raise InvalidArgumentError(
            f"{name}: a tensor of shape {tuple(tensor.shape)} with strides {tuple(tensor.stride())} is not "
            f"contiguous; use {name}.contiguous()"
        )
    if kind == "cuda":
        return _on_device(device.from_torch(tensor, name))
    return Buffer(ffi.cast("void *", tensor.data_ptr()), tensor.numel(), dtype, tensor)


def _from_dlpack(x: Any, name: str, writable: bool, stream: Any) -> Buffer:
    kind = int(x.__dlpack_device__()[0])
    if kind in (device.CUDA, device.CUDA_MANAGED):
        return _on_device(device.from_dlpack(x, name, stream, writable=writable))
    if kind not in (device.CPU, device.CUDA_HOST, device.ROCM_HOST):
        raise InvalidArgumentError(
            f"{name}: it is in memory of DLPack device type {kind}; memory of the host and of CUDA devices can be used: copy "
            f"it to the host first"
        )
    try:
        array = np.from_dlpack(x)
    except (RuntimeError, BufferError, TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{name}: numpy cannot take this {type(x).__name__} through DLPack: {error}") from error
    if writable and not array.flags.writeable and not _dlpack_says_read_only(x):
        dtype = dtype_code(array.dtype, name)
        if array.flags.c_contiguous:
            return Buffer(ffi.cast("void *", array.ctypes.data), array.size, dtype, (x, array))
    return _from_numpy(array, name, writable, x)


def _dlpack_says_read_only(x: Any) -> bool:
    """numpy marks every array from an unversioned capsule read-only; only a versioned one can really say so."""
    try:
        capsule = x.__dlpack__(max_version=(1, 0))
    except TypeError:
        return False
    return '"dltensor_versioned"' in repr(capsule)
