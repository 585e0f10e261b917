"""Device memory of the caller's arrays, and the stream on which a call on it runs.

Arrays are known by __cuda_array_interface__ or DLPack (dlpack.py), torch tensors by their own methods. Nothing here imports an array library
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


def is_jax(x: Any) -> bool:
    """Whether JAX made x."""
    return type(x).__module__.partition(".")[0] in ("jax", "jaxlib")


def check_mutable(x: Any, name: str, *, writable: bool, read_only: bool) -> None:
    """Raise if the result is to be written to memory that must not change. JAX's arrays never do, whatever their interface says."""
    if not writable:
        return
    if is_jax(x):
        raise InvalidArgumentError(
            f"{name}: it is a JAX array, which is immutable, and the result is written there; pass an out= of another kind (NumPy on "
            f"the host, CuPy or PyTorch on a device)"
        )
    if read_only:
        raise InvalidArgumentError(f"{name}: it is read-only, and the result is written there; pass out=, or a copy")


def interface_of(x: Any, name: str) -> Mapping[str, Any]:
    """What x's __cuda_array_interface__ says. InvalidArgumentError if it names other memory each time it is read."""
    said: Mapping[str, Any] = x.__cuda_array_interface__
    again = x.__cuda_array_interface__
    if isinstance(said, Mapping) and isinstance(again, Mapping) and said.get("data") != again.get("data"):
        raise InvalidArgumentError(
            f"{name}: {type(x).__name__} makes a new copy of its memory each time its __cuda_array_interface__ is read; pass an array "
            f"whose memory is its own"
        )
    return said


def from_interface(x: Any, name: str, *, writable: bool) -> DeviceMemory:
    """An array with __cuda_array_interface__, version 2 or 3, which is argument `name` in messages.

    InvalidArgumentError if it is masked, not C-contiguous, of an unsupported dtype, read-only (`writable`), or says of itself what
    the protocol does not allow.
    """
    said = interface_of(x, name)
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
    check_mutable(x, name, writable=writable, read_only=bool(read_only))
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
