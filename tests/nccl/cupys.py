"""CuPy's own compiled NCCL module, on host memory; run as ranks under `hfreduce exec`. `import cupy` is not needed for it."""

from __future__ import annotations

import os

import numpy as np
from cupy_backends.cuda.libs import nccl


def main() -> None:
    """What cupy.cuda.nccl has, each with its result checked; the id comes from NCCL_COMM_ID, so every rank can make it."""
    os.environ["NCCL_COMM_ID"] = os.environ["HFREDUCE_ADDR"]
    rank, n = int(os.environ["HFREDUCE_RANK"]), int(os.environ["HFREDUCE_NRANKS"])
    comm = nccl.NcclCommunicator(n, nccl.get_unique_id(), rank)
    assert (comm.size(), comm.rank_id()) == (n, rank)
    base = np.arange(1000, dtype=np.float32)
    x, y, wide, r = base + rank, np.empty(1000, np.float32), np.empty((n, 1000), np.float32), nccl.NCCL_FLOAT32
    mine, other, all_ = x.ctypes.data, y.ctypes.data, wide.ctypes.data

    comm.allReduce(mine, other, 1000, r, nccl.NCCL_SUM, 0)
    assert (y == n * base + n * (n - 1) / 2).all()
    comm.allReduce(mine, other, 1000, r, nccl.NCCL_MAX, 0)
    assert (y == base + n - 1).all()
    comm.reduce(mine, other, 1000, r, nccl.NCCL_MIN, n - 1, 0)
    assert rank < n - 1 or (y == base).all()
    comm.broadcast(mine, other, 1000, r, 1, 0)
    assert (y == base + 1).all()
    comm.bcast(other, 1000, r, 0, 0)
    comm.allGather(mine, all_, 1000, r, 0)
    assert all((wide[i] == base + i).all() for i in range(n))
    comm.reduceScatter(all_, other, 1000, r, nccl.NCCL_SUM, 0)
    assert (y == n * (base + rank)).all()
    nccl.groupStart()
    comm.send(mine, 1000, r, (rank + 1) % n, 0)
    comm.recv(other, 1000, r, (rank - 1) % n, 0)
    nccl.groupEnd()
    assert (y == base + (rank - 1) % n).all()

    status = 0
    try:
        comm.allReduce(mine, other, 1000, 99, nccl.NCCL_SUM, 0)
    except nccl.NcclError as error:
        status = error.status
    assert status == 4, f"datatype 99: status {status}"
    comm.check_async_error()
    part = comm.commSplit(rank % 2, -rank)
    assert part.size() == (n + 1 - rank % 2) // 2
    part.destroy()
    comm.destroy()
    both = nccl.NcclCommunicator.initAll([0, 0])  # two ranks in this process
    assert [c.rank_id() for c in both] == [0, 1]
    z = [np.full(10, i + 1.0) for i in range(2)]
    nccl.groupStart()
    for c, a in zip(both, z):
        c.allReduce(a.ctypes.data, a.ctypes.data, 10, nccl.NCCL_FLOAT64, nccl.NCCL_SUM, 0)
    nccl.groupEnd()
    assert all((a == 3).all() for a in z)
    os.write(1, b"rank %d of %d, version %d\n" % (rank, n, nccl.get_version()))  # one write: ranks do not mix


main()
