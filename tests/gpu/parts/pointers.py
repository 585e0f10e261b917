"""What the driver tells of each kind of pointer, with and without a current context; memory in chunks, and copies across their border."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import results
from libcuda import Cuda
from results import Absent, Wrong

cuda = Cuda()
MIB = 1 << 20
CONTEXT, TYPE, BUFFER, MANAGED, ORDINAL, START, SIZE = 1, 2, 7, 8, 9, 11, 12
KINDS = {0: "nothing", 1: "host", 2: "device", 4: "unified"}
CHUNK, CHUNKS = 20 * MIB, 3


def told(address: int) -> dict[str, int]:
    """The attributes that csrc/device/cuda.c asks for, in the one call that it makes."""
    wanted = {
        "context": CONTEXT,
        "type": TYPE,
        "buffer": BUFFER,
        "managed": MANAGED,
        "ordinal": ORDINAL,
        "start": START,
        "size": SIZE,
    }
    values = {name: ctypes.c_uint64() for name in wanted}
    numbers = (ctypes.c_int * len(wanted))(*wanted.values())
    places = (ctypes.c_void_p * len(wanted))(*[ctypes.addressof(v) for v in values.values()])
    cuda("cuPointerGetAttributes", len(wanted), numbers, places, ctypes.c_uint64(address))
    return {name: value.value & (0xFFFFFFFF if name in ("type", "managed", "ordinal") else ~0) for name, value in values.items()}


def words(address: int) -> str:
    t = told(address)
    owner = "a context" if t["context"] else "no context"
    return f"{KINDS.get(t['type'], t['type'])}, {owner}, {t['size'] / MIB:g} MiB from {address - t['start'] if t['start'] else 0} before"


def both_ways(address: int) -> tuple[str, dict[str, Any]]:
    """With a current context, and without one."""
    with_context, data = words(address), told(address)
    cuda("cuCtxSetCurrent", ctypes.c_void_p())
    try:
        without = words(address)
    finally:
        cuda.make_current()
    return (with_context if with_context == without else f"{with_context}; without a current context: {without}"), data


def from_cuMemAlloc() -> tuple[str, dict[str, Any]]:
    address = cuda.alloc(4 * MIB)
    figure, data = both_ways(address + MIB)
    results.same((data["type"], data["start"], data["size"]), (2, address, 4 * MIB), "type, start and size")
    return figure, data


def freed() -> str:
    address = cuda.alloc(4 * MIB)
    cuda.free(address)
    t = told(address)
    results.same(t["type"], 0, "type of freed memory")
    return words(address)


def managed() -> tuple[str, dict[str, Any]]:
    place = ctypes.c_uint64()
    cuda("cuMemAllocManaged", ctypes.byref(place), ctypes.c_size_t(MIB), 1)
    figure, data = both_ways(place.value)
    results.same(data["managed"], 1, "managed")
    return figure, data


def registered() -> tuple[str, dict[str, Any]]:
    memory = mmap.mmap(-1, 2 * MIB)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    cuda.register(address, 2 * MIB)
    figure, data = both_ways(address)
    results.same(data["type"], 1, "type of registered memory")
    cuda.unregister(address)
    return figure, data


def host_memory_of_nobody() -> str:
    memory = ctypes.create_string_buffer(MIB)
    results.same(told(ctypes.addressof(memory))["type"], 0, "type")
    return words(ctypes.addressof(memory))


def from_cuMemAllocAsync() -> tuple[str, dict[str, Any]]:
    place, stream = ctypes.c_uint64(), cuda.stream()
    cuda("cuMemAllocAsync", ctypes.byref(place), ctypes.c_size_t(8 * MIB), ctypes.c_void_p(stream))
    cuda.synchronize(stream)
    figure, data = both_ways(place.value + MIB)
    results.same(data["type"], 2, "type")
    return figure, data


class Properties(ctypes.Structure):  # CUmemAllocationProp
    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location_type", ctypes.c_int),
        ("location", ctypes.c_int),
        ("windows", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class Access(ctypes.Structure):  # CUmemAccessDesc
    _fields_ = [("location_type", ctypes.c_int), ("location", ctypes.c_int), ("flags", ctypes.c_int)]


def in_chunks() -> int:
    """Addresses in a row over chunks of 20 MiB, as PyTorch's expandable segments have them."""
    start, handle = ctypes.c_uint64(), ctypes.c_uint64()
    size = ctypes.c_size_t
    cuda("cuMemAddressReserve", ctypes.byref(start), size(CHUNK * CHUNKS), size(0), ctypes.c_uint64(0), ctypes.c_uint64(0))
    kind = Properties(type=1, location_type=1)
    for i in range(CHUNKS):
        cuda("cuMemCreate", ctypes.byref(handle), size(CHUNK), ctypes.byref(kind), ctypes.c_uint64(0))
        cuda("cuMemMap", ctypes.c_uint64(start.value + i * CHUNK), size(CHUNK), size(0), handle, ctypes.c_uint64(0))
    cuda("cuMemSetAccess", start, size(CHUNK * CHUNKS), ctypes.byref(Access(1, 0, 3)), size(1))
    return start.value


def memory_in_chunks() -> tuple[str, dict[str, Any]]:
    """Which range the driver tells in the middle of three chunks of 20 MiB: one chunk, or all of them."""
    start = in_chunks()
    figure, data = both_ways(start + CHUNK + MIB)
    results.same(data["type"], 2, "type")
    reach = "one chunk" if data["size"] == CHUNK else "all of them" if data["size"] == CHUNK * CHUNKS else f"{data['size']} bytes"
    return f"the range told is {reach}: {figure}", data


def copies_across_the_border() -> str:
    """1D and 2D copies to the host that begin in one chunk and end in the next."""
    start, stream = in_chunks(), cuda.stream()
    half = 64 << 10
    at = start + CHUNK - half
    host = cuda.pinned(2 * half)
    cuda.fill(at, 0x01020304, half // 2, stream)
    cuda.copy(host, at, 2 * half, stream)
    cuda.synchronize(stream)
    results.same(ctypes.string_at(host, 2 * half), bytes([4, 3, 2, 1]) * (half // 2), "1D copy")
    ctypes.memset(host, 0, 2 * half)
    # CUDA_MEMCPY2D: x, y, type, host, device, array, pitch of source and target; width and height
    z = 0
    copy = (ctypes.c_uint64 * 16)(z, z, 2, z, at, z, 4096, z, z, 1, host, z, z, 4096, 4096, 2 * half // 4096)
    cuda("cuMemcpy2DAsync_v2", copy, ctypes.c_void_p(stream))
    cuda.synchronize(stream)
    results.same(ctypes.string_at(host, 2 * half), bytes([4, 3, 2, 1]) * (half // 2), "2D copy")
    return "1D and 2D copies are whole"


def cupys_pool() -> tuple[str, dict[str, Any]]:
    if cuda.stand_in:
        raise Absent("needs a GPU: CuPy's runtime does not run on the stand-in")
    try:
        import cupy
    except ImportError:
        raise Absent("no CuPy here") from None
    x = cupy.zeros(1 << 20, cupy.float32)
    cuda.make_current()
    return both_ways(int(x.data.ptr))


def pytorchs_allocator() -> tuple[str, dict[str, Any]]:
    if cuda.stand_in:
        raise Absent("needs a GPU: PyTorch's runtime does not run on the stand-in")
    try:
        import torch
    except ImportError:
        raise Absent("no PyTorch here") from None
    if not torch.cuda.is_available():
        raise Absent("this PyTorch is built for CPUs, or finds no device")
    x = torch.zeros(16 << 20, dtype=torch.float32, device="cuda:0")
    cuda.make_current()
    figure, data = both_ways(x.data_ptr())
    if not data["type"]:
        raise Wrong("the driver knows nothing of PyTorch's memory")
    return figure, data


if __name__ == "__main__":
    results.run(
        "pointers",
        memory_in_chunks,
        copies_across_the_border,
        from_cuMemAlloc,
        freed,
        managed,
        registered,
        host_memory_of_nobody,
        from_cuMemAllocAsync,
        pytorchs_allocator,
        cupys_pool,
    )
