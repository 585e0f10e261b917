"""Doubles for torch.cuda, on CUDA's driver or its stand-in: tensors, streams and events as far as a process group uses them.

torch's build for CPUs has no CUDA tensors. A double is a tensor that says of itself that it lies on a device, and whose data_ptr() is
device memory; streams and events are the driver's own. With a torch for CUDA none of this is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Iterator
from typing import Any

import torch
from driver import Driver


class Event:
    def __init__(self, driver: Driver, stream: int) -> None:
        self.driver, self.handle = driver, ctypes.c_void_p()
        driver("cuEventCreate", ctypes.byref(self.handle), 2)
        driver("cuEventRecord", self.handle, ctypes.c_void_p(stream))

    def query(self) -> bool:
        return int(self.driver.cuda.cuEventQuery(self.handle)) == 0


NOT_READY = 600  # CUresult
#: Streams that torch has, of each of which any number of torch.cuda.Stream objects may stand.
POOL = 32


class Stream:
    def __init__(self, cuda: Cuda, handle: int) -> None:
        self.cuda, self.cuda_stream = cuda, handle

    def record_event(self) -> Event:
        return Event(self.cuda.driver, self.cuda_stream)

    def wait_event(self, event: Event) -> None:
        self.cuda.driver("cuStreamWaitEvent", ctypes.c_void_p(self.cuda_stream), event.handle, 0)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.cuda.driver.wait(self.cuda_stream)


class Tensor(torch.Tensor):
    """Its elements are in device memory; what torch keeps of it is its shape and dtype."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment, unused-ignore]
    cuda_: Cuda
    address: int
    is_cpu = property(lambda self: False)  # type: ignore[assignment, unused-ignore]
    is_cuda = property(lambda self: True)  # type: ignore[assignment, unused-ignore]
    device = property(lambda self: torch.device("cuda", 0))  # type: ignore[assignment, unused-ignore]

    def data_ptr(self) -> int:
        return self.address

    def record_stream(self, stream: Any) -> None:
        self.cuda_.held.append((self.address, stream))


class Cuda:
    """A device with its current stream. `install` has torch.cuda use it."""

    def __init__(self, path: str) -> None:
        self.driver = Driver(path)
        self.current = Stream(self, self.driver.stream())
        self.pool: list[int] = []
        self.given = 0
        self.held: list[tuple[int, Any]] = []

    def install(self) -> None:
        names: dict[str, Any] = {
            "current_stream": lambda device=None: self.current,
            "current_device": lambda: 0,
            "Stream": lambda device=None: self.pooled(),
            "ExternalStream": lambda handle, device=None: Stream(self, handle),
            "stream": self.stream,
            "get_device_capability": lambda device=None: (9, 0),
        }
        for name, double in names.items():
            setattr(torch.cuda, name, double)

    def pooled(self) -> Stream:
        """One of few streams, in turn."""
        if len(self.pool) < POOL:
            self.pool.append(self.driver.stream())
        self.given += 1
        return Stream(self, self.pool[(self.given - 1) % POOL])

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def copy(self, target: int, source: int, size: int) -> None:
        """On the current stream."""
        self.driver(
            "cuMemcpyAsync",
            ctypes.c_uint64(target),
            ctypes.c_uint64(source),
            ctypes.c_size_t(size),
            ctypes.c_void_p(self.current.cuda_stream),
        )

    def tensor(self, x: Any) -> Tensor:
        """A device tensor of the values of a CPU tensor."""
        place = ctypes.c_uint64()
        self.driver("cuMemAlloc_v2", ctypes.byref(place), ctypes.c_size_t(x.numel() * x.element_size()))
        y: Any = torch.Tensor._make_subclass(Tensor, torch.empty_like(x))
        y.cuda_, y.address = self, place.value
        self.copy(y.address, x.data_ptr(), x.numel() * x.element_size())
        return y

    def assign(self, to: Tensor, value: Tensor) -> None:
        """Copy one device tensor to another, in the current stream; the host does not wait."""
        self.copy(to.address, value.address, to.numel() * to.element_size())

    def get(self, x: Tensor) -> Any:
        """The values, after all that is on the current stream."""
        y = torch.empty(x.shape, dtype=x.dtype)
        self.copy(y.data_ptr(), x.address, y.numel() * y.element_size())
        self.current.synchronize()
        return y

    def finish(self, seconds: float, what: str) -> None:
        """Wait until the current stream has run dry; fail when it has not within so many seconds."""
        end = time.monotonic() + seconds
        while self.driver.cuda.cuStreamQuery(ctypes.c_void_p(self.current.cuda_stream)) == NOT_READY:
            assert time.monotonic() < end, f"after {seconds} s the stream still waits for {what}"
            time.sleep(0.001)

    def gate(self) -> Any:
        """Hold the current stream up until the word that is given gets 1."""
        host, device = ctypes.c_void_p(), ctypes.c_uint64()
        self.driver("cuMemHostAlloc", ctypes.byref(host), ctypes.c_size_t(4096), 2)
        word = ctypes.c_uint32.from_address(host.value or 0)
        word.value = 0
        self.driver("cuMemHostGetDevicePointer_v2", ctypes.byref(device), host, 0)
        self.driver("cuStreamWaitValue32_v2", ctypes.c_void_p(self.current.cuda_stream), device, 1, 0)
        return word
