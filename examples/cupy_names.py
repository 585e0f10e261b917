#!/usr/bin/env python3
"""A program for cupy.cuda.nccl with one line changed: `hfreduce run -n 4 cupy_names.py`, or under any launcher; alone too.

With CuPy the first import would be `from cupy.cuda import nccl`, the arrays CuPy's and their addresses `x.data.ptr`.
Two ways to drive ranks are shown: one a process, and several in one thread.
"""

import numpy as np

import hfreduce
from hfreduce import nccl


def one_rank_a_process() -> None:
    """The id travels as it does with NCCL: over whatever the processes have (here another communicator)."""
    with hfreduce.init() as world:
        unique_id = np.frombuffer(nccl.get_unique_id() if world.rank == 0 else bytes(128), np.uint8).copy()
        world.broadcast(unique_id)
        comm = nccl.NcclCommunicator(world.nranks, unique_id.tobytes(), world.rank)
        x = np.full(1000, comm.rank_id() + 1, np.float32)
        total = np.empty_like(x)
        comm.allReduce(x.ctypes.data, total.ctypes.data, x.size, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, 0)
        print(f"rank {comm.rank_id()} of {comm.size()}: the sum is {total[0]:g}", flush=True)

        half = comm.commSplit(comm.rank_id() % 2, comm.rank_id())
        half.bcast(x.ctypes.data, x.size, nccl.NCCL_FLOAT32, 0, 0)
        print(f"rank {comm.rank_id()} of {comm.size()}: the first of its half is {x[0] - 1:g}", flush=True)
        half.destroy()
        comm.destroy()


def all_ranks_in_one_thread(ndev: int) -> None:
    """Calls of one thread for several ranks are grouped, so that none waits for the next."""
    comms = nccl.NcclCommunicator.initAll(ndev)
    given = [np.full(10, rank, np.int64) for rank in range(ndev)]
    taken = [np.empty_like(x) for x in given]
    nccl.groupStart()
    for rank, comm in enumerate(comms):
        comm.send(given[rank].ctypes.data, 10, nccl.NCCL_INT64, (rank + 1) % ndev, 0)
        comm.recv(taken[rank].ctypes.data, 10, nccl.NCCL_INT64, (rank - 1) % ndev, 0)
    nccl.groupEnd()
    print(f"{ndev} ranks in one thread: each has from its left {[int(x[0]) for x in taken]}", flush=True)
    for comm in comms:
        comm.destroy()


one_rank_a_process()
all_ranks_in_one_thread(3)
