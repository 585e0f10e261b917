"""Memory of the caller's arrays.

From numpy, torch, DLPack, the buffer protocol, __array_interface__ or __cuda_array_interface__ to address, count and datatype.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

from hfreduce import device, dlpack, exporters
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
    not CUDA's, not contiguous, of an unsupported dtype, not the memory that the caller sees (a copy, a value), or (`writable`)
    read-only.
    """
    if type(x) is np.ndarray:
        try:
            return _new(Buffer, (_from_buffer(CHARS, x, writable), x.size, DTYPES[x.dtype], x, None))
        except (ValueError, KeyError):
            pass  # what is wrong, if anything, is found out and said below
    if isinstance(x, np.ndarray):
        return _from_numpy(exporters.check_unmasked(x, name), name, writable, x)
    if is_tensor(x):
        return _from_torch(x, name, writable)
    if not isinstance(x, (type, *_VALUES)):
        if getattr(x, "__cuda_array_interface__", None) is not None:
            return _on_device(device.from_interface(x, name, writable=writable))
        if device.is_jax(x):
            return _from_jax(x, name, writable, stream)
    array = _exported(x, name)
    if array is not None:
        return _from_numpy(array, name, writable, x)
    if hasattr(x, "__dlpack__"):
        return _from_dlpack(x, name, writable, stream)
    return _from_numpy(_by_method(x, name), name, writable, x)


def host_array(x: Any, name: str) -> np.ndarray[Any, Any]:
    """The NumPy array over the memory of x, which is on the host and argument `name` in messages; of any dtype and layout.

    It is read-only where x is: as JAX's arrays are. InvalidArgumentError if x is no array, or makes a copy of its memory.
    """
    if isinstance(x, np.ndarray):
        return exporters.check_unmasked(x, name)
    if is_tensor(x):
        try:
            shared: np.ndarray[Any, Any] = x.numpy()
        except (RuntimeError, TypeError) as error:
            raise InvalidArgumentError(f"{name}: {error}") from None
        return shared
    if device.is_jax(x):
        return exporters.from_immutable(x, name)
    array = _exported(x, name)
    return _by_method(x, name) if array is None else array


_READ_THERE = ", and read the result from that"

# Values: they have no memory that outlives a call.
_VALUES = (np.generic, bool, int, float, complex)


def _exported(x: Any, name: str) -> np.ndarray[Any, Any] | None:
    """The array over an object with __array_interface__ or a buffer. None if it has neither."""
    if isinstance(x, _VALUES):
        raise exporters.refuse_value(x, name)
    if isinstance(x, type):
        raise InvalidArgumentError(f"{name}: {x.__name__} is a class, not an array")
    said = getattr(x, "__array_interface__", None)
    if said is not None:
        return exporters.from_interface(x, said, name)
    try:
        view = memoryview(x)
    except (TypeError, BufferError):
        return None
    except ValueError as error:
        raise InvalidArgumentError(f"{name}: its memory cannot be reached ({error})") from None
    return exporters.from_buffer(x, view, name)


def _by_method(x: Any, name: str) -> np.ndarray[Any, Any]:
    if hasattr(x, "__array__"):
        return exporters.from_method(x, name)
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
                f"numpy.ascontiguousarray{_READ_THERE if writable else ''}"
            ) from None
        if writable and not array.flags.writeable:
            raise InvalidArgumentError(
                f"{name}: it is read-only, and the result is written there; pass out=, or a copy"
            ) from None
        raise InvalidArgumentError(f"{name}: its memory cannot be reached ({error})") from None
    return Buffer(pointer, array.size, dtype, (owner, pointer))


def is_tensor(x: Any) -> bool:
    """Whether x is a torch tensor, without importing torch."""
    return hasattr(x, "data_ptr") and hasattr(x, "is_contiguous") and not isinstance(x, type)


def tensor_address(tensor: Any, name: str) -> int:
    """The address of a torch tensor's memory.

    InvalidArgumentError if it has none, as those that stand for others (DTensor, FakeTensor, inside vmap) and those whose memory was given
    back, or if its elements are not what lies there (negative bit, nested tensors; complex tensors are the caller's to check).
    """
    if tensor.is_neg():
        raise InvalidArgumentError(
            f"{name}: the tensor's negative bit is set, so that its memory holds other numbers; use {name}.resolve_neg(), and read "
            f"the result from that"
        )
    if tensor.is_nested:
        raise InvalidArgumentError(f"{name}: it is a nested tensor; pass {name}.values()")
    try:
        address = int(tensor.data_ptr())
    except RuntimeError:
        address = 0
    if not address and tensor.numel():
        if hasattr(tensor, "to_local"):
            remedy = f"use {name}.to_local(), which shares this rank's memory"
        else:
            remedy = (
                "pass the plain torch.Tensor behind it (what has no storage stands for others, or its storage was given back)"
            )
        raise InvalidArgumentError(f"{name}: this {type(tensor).__name__} has no memory of its own; {remedy}")
    return address


def _from_torch(tensor: Any, name: str, writable: bool) -> Buffer:
    kind = tensor.device.type
    if kind not in ("cpu", "cuda"):
        raise InvalidArgumentError(
            f"{name}: the tensor is on device {tensor.device}; memory of the host and of CUDA devices can be used: take {name}.cpu() and "
            f"copy the result back"
        )
    if str(tensor.layout) not in ("torch.strided", "torch.jagged"):  # the latter is nested
        raise InvalidArgumentError(f"{name}: the tensor's layout is {tensor.layout}; use {name}.to_dense()")
    dtype = dtype_code(tensor.dtype, name)
    address = tensor_address(tensor, name)
    if not tensor.is_contiguous():
        raise InvalidArgumentError(
            f"{name}: a tensor of shape {tuple(tensor.shape)} with strides {tuple(tensor.stride())} is not "
            f"contiguous; use {name}.contiguous(){_READ_THERE if writable else ''}"
        )
    if writable:  # autograd must learn of it, as of its own operations in place, lest it use what it has saved
        sys.modules["torch"].autograd.graph.increment_version(tensor)
    if kind == "cuda":
        return _on_device(device.from_torch(tensor, name))
    return Buffer(ffi.cast("void *", address), tensor.numel(), dtype, tensor)


def _from_jax(x: Any, name: str, writable: bool, stream: Any) -> Buffer:
    """A JAX array, to be read; on the host by way of NumPy, which knows its bfloat16 and fp8 (DLPack and buffers do not)."""
    device.check_mutable(x, name, writable=writable, read_only=True)
    try:
        on_device = dlpack.device_type(x) in (dlpack.CUDA, dlpack.CUDA_MANAGED)
    except Exception:  # it lies on several devices, say
        on_device = False
    if on_device:
        return _on_device(dlpack.on_device(x, name, stream, writable=writable))
    return _from_numpy(exporters.from_immutable(x, name), name, writable, x)


def _from_dlpack(x: Any, name: str, writable: bool, stream: Any) -> Buffer:
    kind = dlpack.device_type(x)
    if kind in (dlpack.CUDA, dlpack.CUDA_MANAGED):
        return _on_device(dlpack.on_device(x, name, stream, writable=writable))
    if kind not in dlpack.HOST:
        raise InvalidArgumentError(
            f"{name}: it is in memory of DLPack device type {kind}; memory of the host and of CUDA devices can be used: copy "
            f"it to the host first"
        )
    address, elements, dtype, keep = dlpack.on_host(x, name, writable=writable)
    return Buffer(ffi.cast("void *", address), elements, dtype, keep)
