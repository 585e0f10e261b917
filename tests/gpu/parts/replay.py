"""A captured all_reduce, replayed many times, with the values of every replay checked."""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

import numpy as np
import results
from arrays import Device
from libcuda import Cuda
from ranks import run_ranks

from hfreduce import nccl

STAND_IN = bool(os.environ.get("FIRST_CONTACT_STAND_IN"))
REPLAYS = 30 if STAND_IN else 1000


def replays(rank: int, unique_id: bytes, count: int) -> tuple[list[str], float]:
    """Capture one all_reduce and replay it; before each the source is set anew. What was wrong, and seconds a replay."""
    cuda = Cuda()
    comm, stream = nccl.NcclCommunicator(2, unique_id, rank), cuda.stream()
    x, y = (Device(cuda, np.zeros(count, np.int32), stream) for _ in "xy")
    graph, made = ctypes.c_void_p(), ctypes.c_void_p()
    cuda("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), 2)  # relaxed
    comm.allReduce(x.address, y.address, count, nccl.NCCL_INT32, nccl.NCCL_SUM, stream)
    cuda("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
    cuda("cuGraphInstantiateWithFlags", ctypes.byref(made), graph, ctypes.c_uint64(0))
    wrong: list[str] = []
    start = time.perf_counter()
    for i in range(REPLAYS):
        cuda.fill(x.address, i + rank, count, stream)
        cuda("cuGraphLaunch", made, ctypes.c_void_p(stream))
        if i % 10 == 0 or count < 10_000:
            bad = int((y.get() != 2 * i + 1).sum())
            wrong += [f"rank {rank}, replay {i}: {bad} of {count} elements differ"] if bad else []
    cuda.synchronize(stream)
    took = (time.perf_counter() - start) / REPLAYS
    cuda("cuGraphExecDestroy", made)
    cuda("cuGraphDestroy", graph)
    comm.destroy()
    return wrong, took


def replayed(count: int) -> str:
    found: list[Any] = run_ranks(replays, 2, bytes(nccl.get_unique_id()), count, comm=False, timeout=60)
    results.same([text for wrong, _ in found for text in wrong][:3], [], "wrong replays")
    return f"{REPLAYS} replays right, {found[0][1] * 1e6:.0f} us each with the checks"


def one_segment() -> str:
    return replayed(1000)


def many_segments() -> str:
    return replayed(300_000 if STAND_IN else 8_000_000)


if __name__ == "__main__":
    results.run("replay", one_segment, many_segments)
