"""An all_reduce through ctypes, bound by name as vLLM's pynccl binds it; run as ranks under `hfreduce exec`."""

from __future__ import annotations

import ctypes
import os


class UniqueId(ctypes.Structure):
    """128 bytes, passed by value."""

    _fields_ = [("internal", ctypes.c_byte * 128)]


def main() -> None:
    """Sum over the ranks; the id comes from NCCL_COMM_ID, so every rank can make it."""
    os.environ["NCCL_COMM_ID"] = os.environ["HFREDUCE_ADDR"]
    rank, nranks = int(os.environ["HFREDUCE_RANK"]), int(os.environ["HFREDUCE_NRANKS"])
    nccl = ctypes.CDLL("libnccl.so.2")  # by its name alone: what is preloaded has it
    pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    nccl.ncclGetErrorString.restype = nccl.ncclGetLastError.restype = ctypes.c_char_p
    nccl.ncclCommInitRank.argtypes = [ctypes.POINTER(pointer), integer, UniqueId, integer]
    nccl.ncclAllReduce.argtypes = [pointer, pointer, size, integer, integer, pointer, pointer]
    nccl.ncclCommDestroy.argtypes = [pointer]
    for (
        name
    ) in "Reduce AllGather ReduceScatter Send Recv Broadcast GroupStart GroupEnd CommWindowRegister CommWindowDeregister".split():
        assert getattr(nccl, f"nccl{name}")

    def check(result: int) -> None:
        if result:
            raise RuntimeError(f"{nccl.ncclGetErrorString(result)}: {nccl.ncclGetLastError(None)}")

    version, unique_id, comm = ctypes.c_int(), UniqueId(), pointer()
    check(nccl.ncclGetVersion(ctypes.byref(version)))
    check(nccl.ncclGetUniqueId(ctypes.byref(unique_id)))
    check(nccl.ncclCommInitRank(ctypes.byref(comm), nranks, unique_id, rank))
    data = (ctypes.c_float * 1000)(*[rank + 1] * 1000)
    check(nccl.ncclAllReduce(data, data, 1000, 7, 0, comm, None))
    check(nccl.ncclCommDestroy(comm))
    os.write(1, b"rank %d of %d, version %d, sum %g\n" % (rank, nranks, version.value, data[999]))  # one write: ranks do not mix


main()
