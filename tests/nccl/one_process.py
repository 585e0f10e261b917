"""One process that works on all its GPUs through NCCL's interface, as ncclCommInitAll is made for: groups of one call a GPU."""

import ctypes
import sys
from ctypes import byref, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

FLOAT32, SUM = 7, 0
COUNT = 300_001


def main(driver: Any, nccl: Any) -> None:
    def call(library: Any, function: str, *arguments: Any) -> None:
        code = getattr(library, function)(*arguments)
        assert code == 0, f"{function}: {code}"

    n = c_int()
    call(driver, "cuInit", 0)
    call(driver, "cuDeviceGetCount", byref(n))
    comms, contexts, streams, places = ((c_void_p * n.value)() for _ in range(4))
    call(nccl, "ncclCommInitAll", comms, n, None)
    for i in range(n.value):
        context, stream, place = c_void_p(), c_void_p(), c_uint64()
        call(driver, "cuDevicePrimaryCtxRetain", byref(context), i)
        call(driver, "cuCtxSetCurrent", context)
        call(driver, "cuStreamCreate", byref(stream), 1)
        call(driver, "cuMemAlloc_v2", byref(place), c_size_t(4 * COUNT))
        bits = int.from_bytes(c_float(i + 1), "little")
        call(driver, "cuMemsetD32Async", place, c_uint(bits), c_size_t(COUNT), stream)
        contexts[i], streams[i], places[i] = context.value, stream.value, place.value
    for _ in range(3):  # sums of sums
        call(nccl, "ncclGroupStart")
        for i in range(n.value):
            place = c_void_p(places[i])
            call(nccl, "ncclAllReduce", place, place, c_size_t(COUNT), FLOAT32, SUM, c_void_p(comms[i]), c_void_p(streams[i]))
        call(nccl, "ncclGroupEnd")
    expected = n.value * (n.value + 1) / 2 * n.value**2
    for i in range(n.value):
        host = (c_float * COUNT)()
        call(driver, "cuCtxSetCurrent", c_void_p(contexts[i]))
        call(driver, "cuStreamSynchronize", c_void_p(streams[i]))
        call(driver, "cuMemcpy", c_uint64(ctypes.addressof(host)), c_uint64(places[i]), c_size_t(4 * COUNT))
        assert set(host) == {expected}, f"device {i}: {sorted(set(host))[:4]}, not {expected}"
        call(nccl, "ncclCommDestroy", c_void_p(comms[i]))
    print(f"{n.value} devices: right")


main(ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL), ctypes.CDLL(sys.argv[1]))
