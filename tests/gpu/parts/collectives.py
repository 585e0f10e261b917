"""Collectives on device memory against NumPy: 12 datatypes, 2 and 4 ranks on one GPU, processes and threads; mixed ranks; abort; a killed rank."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import results
from arrays import DTYPES, Device, drains, encode, number
from libcuda import Cuda
from ranks import run_ranks
from results import Wrong

import hfreduce
from hfreduce import nccl

STAND_IN = bool(os.environ.get("FIRST_CONTACT_STAND_IN"))
COUNTS = (5, 3000) if STAND_IN else (5, 3000, 300_001)
OPS = {"SUM": lambda x: x.sum(0), "PROD": lambda x: x.prod(0), "MAX": lambda x: x.max(0), "MIN": lambda x: x.min(0)}


def differ(name: str, device: Device, want: Any) -> list[str]:
    """What to say of a result that is wrong; nothing if it is right."""
    got = device.get()
    bad = int((got != want).sum())
    return (
        [f"{name}: {bad} of {want.size} elements differ, the first at {int(np.argmax(got.ravel() != want.ravel()))}"]
        if bad
        else []
    )


def every_type(rank: int, n: int, unique_id: bytes, dtypes: list[str], counts: tuple[int, ...], spoil: bool) -> list[str]:
    """Run every collective through NCCL's interface, with work in the stream before and behind; the results that are wrong."""
    cuda = Cuda()
    comm, stream, wrong = nccl.NcclCommunicator(n, unique_id, rank), cuda.stream(), []
    arrays: list[
        Device
    ] = []  # freed at the end: a driver waits in cuMemFree for all streams, also for one that waits for this rank
    for dtype in dtypes:
        for count in counts:
            base = [(np.arange(count) + r) % 3 for r in range(n)]
            kind, zeros = number(dtype), encode(np.zeros(count), dtype)
            mine, out = Device(cuda, encode(base[rank], dtype), stream), Device(cuda, zeros, stream)
            each = np.concatenate([encode(b, dtype) for b in base])
            wide = Device(cuda, np.zeros_like(each), stream)
            label = f"{dtype} x {count}"
            for op, reduce in OPS.items():
                comm.allReduce(mine.address, out.address, count, kind, getattr(nccl, f"NCCL_{op}"), stream)
                if spoil:
                    cuda.fill(out.address, 0x7F7F7F7F, 1, stream)
                wrong += differ(f"all_reduce {op} {label}", out, encode(reduce(np.stack(base)), dtype))
            if "float" in dtype and n in (2, 4):
                comm.allReduce(mine.address, out.address, count, kind, nccl.NCCL_AVG, stream)
                wrong += differ(f"all_reduce AVG {label}", out, encode(np.stack(base).sum(0) / n, dtype))
            out.put(zeros)
            comm.reduce(mine.address, out.address, count, kind, nccl.NCCL_SUM, n - 1, stream)
            wrong += differ(f"reduce {label}", out, encode(np.stack(base).sum(0), dtype) if rank == n - 1 else zeros)
            comm.broadcast(mine.address, out.address, count, kind, 0, stream)
            wrong += differ(f"broadcast {label}", out, encode(base[0], dtype))
            comm.allGather(mine.address, wide.address, count, kind, stream)
            wrong += differ(f"all_gather {label}", wide, each)
            comm.reduceScatter(wide.address, out.address, count, kind, nccl.NCCL_SUM, stream)
            wrong += differ(f"reduce_scatter {label}", out, encode(base[rank] * n, dtype))
            nccl.groupStart()
            comm.send(mine.address, count, kind, (rank + 1) % n, stream)
            comm.recv(out.address, count, kind, (rank - 1) % n, stream)
            comm.allReduce(mine.address, wide.address, count, kind, nccl.NCCL_MAX, stream)
            nccl.groupEnd()
            wrong += differ(f"send and recv in a group {label}", out, encode(base[rank - 1], dtype))
            arrays += mine, out, wide
    comm.destroy()
    for array in arrays:
        array.free()
    return wrong


def check(n: int, threads: bool, spoil: bool = False, dtypes: list[str] = DTYPES, counts: tuple[int, ...] = COUNTS) -> str:
    start = time.monotonic()
    unique_id = bytes(nccl.get_unique_id())
    wrong = run_ranks(every_type, n, n, unique_id, dtypes, counts, spoil, comm=False, threads=threads, timeout=60)
    for text in (text for rank, texts in enumerate(wrong) for text in [f"rank {rank}: {t}" for t in texts[:20]]):
        print(text, flush=True)
    results.same([text for texts in wrong for text in texts][:3], [], "wrong results")
    return f"{len(dtypes)} datatypes x {len(counts)} sizes right, {time.monotonic() - start:.1f} s"


def two_ranks() -> str:
    return check(2, False)


def four_ranks() -> str:
    return check(4, False, dtypes=DTYPES[6:] if STAND_IN else DTYPES)


def two_threads() -> str:
    return check(2, True, dtypes=DTYPES[6:] if STAND_IN else DTYPES)


def four_threads() -> str:
    return check(4, True, dtypes=DTYPES[7:8] if STAND_IN else DTYPES)


def a_planted_error_is_found() -> str:
    """Each rank overwrites the first word of every all_reduce: the comparison has to see it."""
    try:
        check(2, False, spoil=True, dtypes=["float32"], counts=(3000,))
    except Wrong as found:
        return str(found)[:120]
    raise Wrong("four bytes of every all_reduce were overwritten, and no comparison saw it")


def mixed(rank: int) -> list[str]:
    """Even ranks bring device memory, odd ranks host memory."""
    cuda = Cuda()
    stream, wrong = cuda.stream(), []
    with hfreduce.init(20) as comm:
        n = comm.nranks
        for count in COUNTS:
            base = (np.arange(count) % 7).astype(np.float32)
            x: Any = base + rank if rank % 2 else Device(cuda, base + rank, stream)
            comm.all_reduce(x)
            got = x if rank % 2 else x.get()
            wrong += [] if (got == base * n + n * (n - 1) / 2).all() else [f"all_reduce of {count}"]
            comm.broadcast(x, n - 1)
            with comm.group():
                comm.all_reduce(x, op="max")
                comm.barrier()
    return wrong


def mixed_host_and_device_ranks() -> str:
    for n in (2, 4):
        wrong = run_ranks(mixed, n, comm=False, timeout=30)
        results.same([text for texts in wrong for text in texts], [], f"wrong results of {n} ranks")
    return "2 and 4 ranks"


def abandoned(rank: int, unique_id: bytes, how: str) -> str:
    """Rank 1 never joins the second call: rank 0's stream waits, then its communicator is aborted, or loses its peer."""
    cuda = Cuda()
    comm, stream = nccl.NcclCommunicator(2, unique_id, rank), cuda.stream()
    x = Device(cuda, np.ones(100_000, np.float32), stream)
    comm.allReduce(x.address, x.address, 100_000, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, stream)
    cuda.synchronize(stream)
    if rank == 1:
        time.sleep(1.0)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        comm.abort()
        return ""
    comm.allReduce(x.address, x.address, 100_000, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, stream)
    if not cuda.pending(stream):
        return "the stream did not wait for the rank that never came"
    start = time.monotonic()
    if how == "abort":
        time.sleep(0.3)
        comm.abort()
    if not drains(cuda, stream, 15):
        return f"the stream still waited {time.monotonic() - start:.0f} s later"
    took = time.monotonic() - start
    if how == "killed":
        comm.abort()
    y = Device(cuda, np.full(10, 3, np.float32), cuda.stream())
    return f"ok {took:.2f}" if (y.get() == 3).all() else "the device gives wrong values afterwards"


def lost(how: str) -> str:
    outcomes = run_ranks(abandoned, 2, bytes(nccl.get_unique_id()), how, comm=False, timeout=40, check=False)
    print("\n".join(map(str, outcomes)), flush=True)
    text = outcomes[0].value or str(outcomes[0])
    results.same(text[:2], "ok", f"rank 0 ({text[:300]})")
    return f"the stream ran dry {text[3:]} s after the call"


def abort_while_a_wait_is_pending() -> str:
    return lost("abort")


def a_killed_rank() -> str:
    return lost("killed")


if __name__ == "__main__":
    results.run(
        "collectives",
        two_ranks,
        a_planted_error_is_found,
        two_threads,
        four_ranks,
        four_threads,
        mixed_host_and_device_ranks,
        abort_while_a_wait_is_pending,
        a_killed_rank,
    )
