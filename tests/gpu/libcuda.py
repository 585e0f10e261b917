"""CUDA's driver by ctypes, as the parts that need no package of ours use it: the machine's, or the stand-in, which is no GPU."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

from results import Absent

WAIT_GEQ = 0
NON_BLOCKING = 1
PORTABLE_MAPPED = 3
NOT_READY = 600
#: CUdevice_attribute, by what the report calls it.
ATTRIBUTES = {
    "multiprocessors": 16,
    "copy engines": 40,
    "unified addressing": 41,
    "capability major": 75,
    "capability minor": 76,
    "managed memory": 83,
    "pageable memory access": 88,
    "host pointer for registered memory": 91,
    "stream memory operations": 92,
    "flush of remote writes": 98,
    "host register": 99,
    "memory pools": 115,
    "GPUDirect RDMA": 116,
}


class CudaError(RuntimeError):
    """The driver refused a call; `code` is its CUresult."""

    def __init__(self, function: str, code: int, name: str) -> None:
        super().__init__(f"{function}: {name} ({code})")
        self.code = code


class Cuda:
    """The driver on one device, with the device's primary context current in the thread that makes the object."""

    def __init__(self, device: int = 0, context: bool = True) -> None:
        self.library = ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
        self("cuInit", 0)
        self.device, self.context = device, ctypes.c_void_p()
        name = ctypes.create_string_buffer(128)
        self("cuDeviceGetName", name, 128, device)
        self.name = name.value.decode()
        self.stand_in = "stand-in" in self.name
        if context:
            self("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), device)
            self.make_current()

    def has(self, function: str) -> bool:
        """Whether the driver's library exports this function."""
        return hasattr(self.library, function)

    def result(self, function: str, *arguments: Any) -> int:
        """Call the function; its CUresult. Raises Absent where the driver does not have it."""
        if not self.has(function):
            raise Absent(f"needs a GPU: the stand-in has no {function}" if self.stand_in else f"this driver has no {function}")
        return int(getattr(self.library, function)(*arguments))

    def __call__(self, function: str, *arguments: Any) -> None:
        """Call the function; CudaError if it fails."""
        code = self.result(function, *arguments)
        if code:
            name = ctypes.c_char_p()
            self.library.cuGetErrorName(code, ctypes.byref(name))
            raise CudaError(function, code, (name.value or b"?").decode())

    def make_current(self) -> None:
        """Make the primary context the calling thread's."""
        self("cuCtxSetCurrent", self.context)

    def attribute(self, number: int) -> int:
        """A CUdevice_attribute of the device."""
        value = ctypes.c_int()
        self("cuDeviceGetAttribute", ctypes.byref(value), number, self.device)
        return value.value

    # ---- memory: addresses are plain numbers ----

    def alloc(self, size: int) -> int:
        """Device memory of so many bytes."""
        place = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(place), ctypes.c_size_t(size))
        return place.value

    def free(self, address: int) -> None:
        self("cuMemFree_v2", ctypes.c_uint64(address))

    def pinned(self, size: int) -> int:
        """Page-locked host memory, which the device sees at the same address."""
        place = ctypes.c_void_p()
        self("cuMemHostAlloc", ctypes.byref(place), ctypes.c_size_t(size), PORTABLE_MAPPED)
        return int(place.value or 0)

    def seen(self, host: int) -> int:
        """The device's address of host memory that the driver knows."""
        place = ctypes.c_uint64()
        self("cuMemHostGetDevicePointer_v2", ctypes.byref(place), ctypes.c_void_p(host), 0)
        return place.value

    def register(self, host: int, size: int) -> None:
        self("cuMemHostRegister_v2", ctypes.c_void_p(host), ctypes.c_size_t(size), PORTABLE_MAPPED)

    def unregister(self, host: int) -> None:
        self("cuMemHostUnregister", ctypes.c_void_p(host))

    # ---- streams ----

    def stream(self) -> int:
        handle = ctypes.c_void_p()
        self("cuStreamCreate", ctypes.byref(handle), NON_BLOCKING)
        return int(handle.value or 0)

    def destroy(self, stream: int) -> None:
        self("cuStreamDestroy_v2", ctypes.c_void_p(stream))

    def event(self) -> int:
        handle = ctypes.c_void_p()
        self("cuEventCreate", ctypes.byref(handle), 2)  # without timing
        return int(handle.value or 0)

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        self("cuMemcpyAsync", ctypes.c_uint64(to), ctypes.c_uint64(source), ctypes.c_size_t(size), ctypes.c_void_p(stream))

    def fill(self, to: int, word: int, count: int, stream: int) -> None:
        """Set count words of 32 bits."""
        self("cuMemsetD32Async", ctypes.c_uint64(to), ctypes.c_uint(word), ctypes.c_size_t(count), ctypes.c_void_p(stream))

    def write(self, stream: int, address: int, value: int) -> None:
        """The stream writes the word at the device's address."""
        self("cuStreamWriteValue32_v2", ctypes.c_void_p(stream), ctypes.c_uint64(address), ctypes.c_uint32(value), 0)

    def wait(self, stream: int, address: int, value: int) -> None:
        """The stream waits until the word at the device's address is at least value."""
        self("cuStreamWaitValue32_v2", ctypes.c_void_p(stream), ctypes.c_uint64(address), ctypes.c_uint32(value), WAIT_GEQ)

    def synchronize(self, stream: int) -> None:
        self("cuStreamSynchronize", ctypes.c_void_p(stream))

    def pending(self, stream: int) -> bool:
        """Whether the stream has work that is not done."""
        code = self.result("cuStreamQuery", ctypes.c_void_p(stream))
        if code not in (0, NOT_READY):
            raise CudaError("cuStreamQuery", code, "a stream failed")
        return code == NOT_READY


class Word:
    """A word of 32 bits in pinned memory, for CPU and streams."""

    def __init__(self, cuda: Cuda) -> None:
        self.host = cuda.pinned(4096)
        self.address, self._word = cuda.seen(self.host), ctypes.c_uint32.from_address(self.host)
        self.value = 0

    @property
    def value(self) -> int:
        return self._word.value

    @value.setter
    def value(self, value: int) -> None:
        self._word.value = value


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll until the condition holds or the time is over; whether it held."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
    return True
