"""The Python faces on device memory and streams: on CUDA's driver where there is one, else on the stand-in of tests/c/fake/cuda.

The stand-in is a test double, no GPU: its device memory cannot be touched by the CPU, and its streams run on threads.
"""

from __future__ import annotations

import ctypes
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from driver import Driver, find_driver

import hfreduce
from hfreduce import nccl
from hfreduce._ffi import BINARY_DIRECTORY
from hfreduce.distributed import init_process_group


@pytest.fixture(scope="module")
def driver() -> str:
    """What to load as CUDA's driver."""
    return find_driver()


class Device:
    """An array in device memory, used on one stream (None: the legacy default one)."""

    def __init__(self, driver: Driver, x: np.ndarray[Any, Any], stream: int | None) -> None:
        self.driver, self.shape, self.dtype, self.stream, self.size = driver, x.shape, x.dtype, stream, x.nbytes
        place = ctypes.c_uint64()
        driver("cuMemAlloc_v2", ctypes.byref(place), ctypes.c_size_t(self.size))
        self.address = place.value
        self._copy(self.address, x.ctypes.data)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        face = {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "version": 3,
            "stream": self.stream,
        }
        return face

    def _copy(self, target: int, source: int) -> None:
        self.driver(
            "cuMemcpyAsync",
            ctypes.c_uint64(target),
            ctypes.c_uint64(source),
            ctypes.c_size_t(self.size),
            ctypes.c_void_p(self.stream),
        )
        self.driver.wait(self.stream)

    def get(self) -> np.ndarray[Any, Any]:
        x = np.empty(self.shape, self.dtype)
        self._copy(x.ctypes.data, self.address)
        return x


def every_call(rank: int, path: str, count: int, on_a_stream: bool) -> None:
    driver = Driver(path)
    stream = driver.stream() if on_a_stream else None
    with hfreduce.init(10) as comm:
        n = comm.nranks
        base = (np.arange(count) % 7).astype(np.float32)

        def put(x: np.ndarray[Any, Any]) -> Device:
            return Device(driver, x, stream)

        x, out, wide = put(base + rank), put(np.zeros_like(base)), put(np.zeros((n, count), np.float32))
        total = base * n + n * (n - 1) / 2
        each = np.stack([base + r for r in range(n)])
        assert comm.all_reduce(x) is x
        assert (x.get() == total).all()
        comm.all_reduce(put(base + rank), out, "max")
        assert (out.get() == base + n - 1).all()
        work = comm.all_reduce(x, op="avg", async_op=True)
        assert work.wait() is x
        assert (x.get() == total).all()
        comm.all_gather(put(base + rank), wide)
        assert (wide.get() == each).all()
        comm.reduce_scatter(wide, out)
        assert (out.get() == (base + rank) * n).all()
        comm.broadcast(out, n - 1)
        assert (out.get() == (base + n - 1) * n).all()
        comm.reduce(put(base), out, root=0)
        assert rank or (out.get() == base * n).all()
        comm.all_to_all(put(each), wide)
        assert (wide.get() == base + rank).all()
        with comm.group():
            comm.send(put(base + rank), (rank + 1) % n)
            comm.recv(out, (rank - 1) % n)
        assert (out.get() == base + (rank - 1) % n).all()
        if rank == 0:
            comm.send(x, n - 1, tag=3)
        if rank == n - 1:
            assert comm.recv_any(out, tag=3) == 0
            assert (out.get() == total).all()
        comm.barrier(stream=stream)


@pytest.mark.parametrize("on_a_stream", [False, True])
@pytest.mark.parametrize("count", [5, 100_000, 1_500_000])
def test_communicator(run_ranks: Any, driver: str, count: int, on_a_stream: bool) -> None:
    run_ranks(every_call, 2, driver, count, on_a_stream, comm=False)


def streams_and_errors(rank: int, path: str) -> None:
    driver = Driver(path)
    stream = driver.stream()
    with hfreduce.init(10) as comm:
        host = np.ones(1000, np.float32)
        comm.all_reduce(host, stream=types.SimpleNamespace(ptr=stream))
        driver.wait(stream)
        assert (host == 2).all()
        x = Device(driver, np.ones(1000, np.float32), stream)
        comm.all_reduce(x, stream=types.SimpleNamespace(__cuda_stream__=lambda: (0, stream)))
        assert (x.get() == 2).all()
        said = x.__cuda_array_interface__
        for data, shape in (((0x10, False), (3,)), (said["data"], (10_000_000,))):  # foreign, and too large for its allocation
            bad = types.SimpleNamespace(__cuda_array_interface__={**said, "data": data, "shape": shape})
            with pytest.raises(hfreduce.InvalidArgumentError, match=rf"hfreduceAllReduce: .*\(on stream {stream:#x}"):
                comm.all_reduce(bad)
        comm.all_reduce(x)
        assert (x.get() == 4).all()


def test_streams_and_errors(run_ranks: Any, driver: str) -> None:
    run_ranks(streams_and_errors, 2, driver, comm=False)


def nccl_face(rank: int, path: str, unique_id: bytes) -> None:
    driver = Driver(path)
    stream = driver.stream()
    comm = nccl.NcclCommunicator(2, unique_id, rank)
    a, b = (Device(driver, np.full(1000, value, np.float32), stream) for value in (rank + 1, 0))
    comm.allReduce(a.address, b.address, 1000, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, stream)
    assert (b.get() == 3).all() and comm.device_id() == 0
    nccl.groupStart()
    comm.send(a.address, 1000, nccl.NCCL_FLOAT32, 1 - rank, stream)
    comm.recv(b.address, 1000, nccl.NCCL_FLOAT32, 1 - rank, stream)
    nccl.groupEnd()
    assert (b.get() == 2 - rank).all()
    comm.check_async_error()
    comm.destroy()


def test_nccl_face(run_ranks: Any, driver: str) -> None:
    run_ranks(nccl_face, 2, driver, bytes(nccl.get_unique_id()), comm=False)


def distributed_face(rank: int, path: str, port: int) -> None:
    driver = Driver(path)
    stream = driver.stream()
    group = init_process_group(2, rank, port=port)
    x, out = (Device(driver, np.full((4, 3), value, np.complex64), stream) for value in (1 + 1j * rank, 0))
    group.all_reduce(x, out)
    assert (out.get() == 2 + 1j).all()
    rows = Device(driver, np.zeros((2, 4, 3), np.complex64), stream)
    group.all_gather(x, rows, 12)
    assert (rows.get()[0] == 1).all() and (rows.get()[1] == 1 + 1j).all()
    group.barrier()
    group.close()


def test_distributed_face(run_ranks: Any, driver: str, unused_tcp_port: int) -> None:
    run_ranks(distributed_face, 2, driver, unused_tcp_port, comm=False)


@pytest.fixture
def unused_tcp_port() -> Iterator[int]:
    from ranks import reserved_address

    with reserved_address() as address:
        yield int(address.rpartition(":")[2])


def nccls_memory(rank: int, path: str) -> None:
    driver = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(Path(BINARY_DIRECTORY) / "lib" / "libnccl.so.2"))
    place, kind, freed = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_void_p(8)
    driver.cuInit(0)
    assert library.ncclMemAlloc(ctypes.byref(place), ctypes.c_size_t(1 << 20)) == 0  # no context was made current
    attribute, data = (ctypes.c_int * 1)(2), (ctypes.c_void_p * 1)(ctypes.addressof(kind))
    assert driver.cuPointerGetAttributes(1, attribute, data, ctypes.c_uint64(place.value or 0)) == 0
    assert kind.value == 2, "CU_MEMORYTYPE_DEVICE"
    assert library.ncclMemFree(place) == 0
    assert library.ncclMemFree(freed) == 4


def test_memory_of_nccls_allocator_is_the_devices(run_ranks: Any, driver: str) -> None:
    run_ranks(nccls_memory, 1, driver, comm=False)


def nccls_device(rank: int, path: str, unique_id: bytes) -> None:
    driver = Driver(path)
    library = ctypes.CDLL(str(Path(BINARY_DIRECTORY) / "lib" / "libnccl.so.2"))
    context, count, said = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int(-2)
    driver("cuDeviceGetCount", ctypes.byref(count))
    driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), count.value - 1)
    driver("cuCtxSetCurrent", context)
    comm, state, id_ = ctypes.c_void_p(), ctypes.c_int(7), (ctypes.c_char * 128).from_buffer_copy(unique_id)

    class UniqueId(ctypes.Structure):
        _fields_ = (("internal", ctypes.c_char * 128),)

    started = library.ncclCommInitRank(ctypes.byref(comm), 2, UniqueId.from_buffer(id_), rank)
    assert started == 7, "ncclInProgress: it is made by a thread of the library's"
    while state.value == 7:
        assert library.ncclCommGetAsyncError(comm, ctypes.byref(state)) == 0
    assert state.value == 0
    assert library.ncclCommCuDevice(comm, ctypes.byref(said)) == 0
    assert said.value == count.value - 1  # of the thread that called, before any call on device memory
    assert library.ncclCommDestroy(comm) == 0


def test_a_communicator_of_nccls_knows_the_device_of_who_made_it(run_ranks: Any, driver: str) -> None:
    unique_id = bytes(nccl.get_unique_id())
    run_ranks(nccls_device, 2, driver, unique_id, comm=False, env={"NCCL_COMM_BLOCKING": "0"})
