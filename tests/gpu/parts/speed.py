"""Bandwidth: device to host and back through the library beside the driver's own copies; all_reduce by size, beside Gloo and NCCL."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import results
from arrays import Device
from libcuda import Cuda
from ranks import run_ranks
from results import Absent

import hfreduce
from hfreduce import nccl

STAND_IN = bool(os.environ.get("FIRST_CONTACT_STAND_IN"))
KIB, MIB = 1 << 10, 1 << 20
LARGE = MIB if STAND_IN else 64 * MIB
SIZES = (8, 64 * KIB) if STAND_IN else (8, KIB, 8 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
OTHERS = (8, 64 * KIB, MIB, 16 * MIB, 64 * MIB)
AIM = 85


def size_of(count: int) -> str:
    return f"{count >> 20} MiB" if count >= MIB else f"{count >> 10} KiB" if count >= KIB else f"{count} B"


def seconds(call: Callable[[], Any], size: int) -> float:
    """The median time of a call; fewer rounds for large sizes."""
    took = []
    for i in range(3 + max(4, min(100 if not STAND_IN else 4, (256 * MIB) // max(size, 1)))):
        start = time.perf_counter()
        call()
        if i >= 3:
            took.append(time.perf_counter() - start)
    return statistics.median(took)


# ---------------------------------------------------------------- one way and both


def ways(rank: int) -> dict[str, float]:
    """Rank 0 has device memory, rank 1 host memory: GB/s of broadcasts, and of both at once in a group."""
    with hfreduce.init(30) as comm:
        host, more = np.zeros(LARGE, np.uint8), np.zeros(LARGE, np.uint8)
        x: Any = host
        y: Any = more
        found = {}
        if rank == 0:
            cuda = Cuda()
            stream = cuda.stream()
            x, y, pinned, other = Device(cuda, host, stream), Device(cuda, more, stream), cuda.pinned(LARGE), cuda.stream()
            both = cuda.pinned(LARGE)

            def driver(out: bool, back: bool) -> None:
                if out:
                    cuda.copy(pinned, x.address, LARGE, stream)
                if back:
                    cuda.copy(y.address, both, LARGE, other)
                cuda.synchronize(stream)
                cuda.synchronize(other)

            for name, way in {"out": (True, False), "back": (False, True), "both": (True, True)}.items():
                found[f"driver {name}"] = LARGE / seconds(lambda way=way: driver(*way), LARGE) / 1e9  # type: ignore[misc]

        def call(root: int | None) -> None:
            if root is not None:
                comm.broadcast(x, root)
            else:
                with comm.group():
                    comm.send(x, 1 - rank)
                    comm.recv(y, 1 - rank)
            if rank == 0:
                cuda.synchronize(stream)
            comm.barrier()

        for name, root in (("out", 0), ("back", 1), ("both", None)):
            found[f"library {name}"] = LARGE / seconds(lambda root=root: call(root), LARGE) / 1e9  # type: ignore[misc]
        return found


def through_the_library() -> tuple[str, dict[str, float]]:
    """Device to host, host to device and both at once; aim: 85 % of the driver's copies on pinned memory."""
    found = {name: round(rate, 2) for name, rate in run_ranks(ways, 2, comm=False, timeout=60)[0].items()}
    texts = []
    for name, words in (("out", "device to host"), ("back", "host to device"), ("both", "both at once")):
        mine, driver = found[f"library {name}"], found[f"driver {name}"]
        share = 100 * mine / driver
        texts.append(
            f"{words} {mine} of the driver's {driver} GB/s, {share:.0f} %{'' if share >= AIM else f' (below the aim of {AIM} %)'}"
        )
    return f"{size_of(LARGE)}: " + "; ".join(texts), found


# ---------------------------------------------------------------- all_reduce


def mine(rank: int, n: int, unique_id: bytes) -> dict[int, float]:
    """Seconds of an all_reduce on device memory, with its stream, until the stream is dry."""
    cuda = Cuda()
    comm, stream, found = nccl.NcclCommunicator(n, unique_id, rank), cuda.stream(), {}
    for size in SIZES:
        x = Device(cuda, np.zeros(size // 4, np.float32), stream)

        def call(x: Device = x) -> None:
            comm.allReduce(x.address, x.address, x.size // 4, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, stream)
            cuda.synchronize(stream)

        found[size] = seconds(call, size)
        x.put(np.full(size // 4, rank + 1, np.float32))
        call()
        assert (x.get() == n * (n + 1) / 2).all(), f"wrong values at {size} bytes"
        x.free()
    comm.destroy()
    return found


def table(found: dict[int, float]) -> tuple[str, dict[str, Any]]:
    """The figure: microseconds by size; and the bus bandwidth of the largest."""
    return ", ".join(f"{size_of(size)} {t * 1e6:.0f} us" for size, t in found.items()), {size_of(s): t for s, t in found.items()}


def all_reduce_of_2_ranks_on_one_GPU() -> tuple[str, dict[str, Any]]:
    return table(run_ranks(mine, 2, 2, bytes(nccl.get_unique_id()), comm=False, timeout=60)[0])


def all_reduce_of_4_ranks_on_one_GPU() -> tuple[str, dict[str, Any]]:
    return table(run_ranks(mine, 4, 4, bytes(nccl.get_unique_id()), comm=False, timeout=60)[0])


def others(rank: int, n: int, backend: str, place: str) -> dict[int, float]:
    """The same through torch.distributed's backend, on CUDA tensors."""
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(0)
    dist.init_process_group(backend, init_method=f"file://{place}", rank=rank, world_size=n)
    found = {}
    for size in OTHERS:
        x = torch.zeros(size // 4, device="cuda:0")

        def call(x: Any = x) -> None:
            dist.all_reduce(x)
            torch.cuda.synchronize()

        found[size] = seconds(call, size)
    dist.destroy_process_group()
    return found


def need_torch() -> None:
    if STAND_IN:
        raise Absent("needs a GPU: PyTorch's runtime does not run on the stand-in")
    import importlib.util

    if not importlib.util.find_spec("torch"):
        raise Absent("no PyTorch here")
    import torch

    if not torch.cuda.is_available():
        raise Absent("this PyTorch is built for CPUs, or finds no device")


def beside(n: int, backend: str) -> tuple[str, dict[str, Any]]:
    need_torch()
    with tempfile.TemporaryDirectory() as folder:
        return table(run_ranks(others, n, n, backend, str(Path(folder) / "store"), comm=False, timeout=60)[0])


def gloo_on_CUDA_tensors_of_2_ranks() -> tuple[str, dict[str, Any]]:
    return beside(2, "gloo")


def NCCL_of_1_rank() -> tuple[str, dict[str, Any]]:
    """NCCL refuses two ranks on one GPU: with one rank it copies nothing over any bus."""
    figure, data = beside(1, "nccl")
    return f"(one rank: NCCL refuses two on one GPU) {figure}", data


if __name__ == "__main__":
    results.run(
        "speed",
        through_the_library,
        all_reduce_of_2_ranks_on_one_GPU,
        all_reduce_of_4_ranks_on_one_GPU,
        gloo_on_CUDA_tensors_of_2_ranks,
        NCCL_of_1_rank,
    )
