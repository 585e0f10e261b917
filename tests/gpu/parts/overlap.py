"""A matrix product in a loop, alone and beside a continuous all_reduce: how much slower it is, and which kernels of ours took part."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import numpy as np
import ranks
import results
from arrays import Device
from libcuda import Cuda
from results import Absent, Wrong

import hfreduce

STAND_IN = bool(os.environ.get("FIRST_CONTACT_STAND_IN"))
SIDE = 128 if STAND_IN else 8192
BYTES = 1 << 20 if STAND_IN else 64 << 20
ROUNDS = 10 if STAND_IN else 250
AIM = 3.0


class Products:
    """The loop: on the device, or in a dry run on the CPU."""

    def __init__(self) -> None:
        import torch

        if STAND_IN:
            torch.set_num_threads(1)
        self.torch, where = torch, "cpu" if STAND_IN else "cuda:0"
        self.a, self.b = (torch.randn(SIDE, SIDE, device=where).to(torch.float32 if STAND_IN else torch.bfloat16) for _ in "ab")
        self.out = self.a @ self.b

    def wait(self) -> None:
        if not STAND_IN:
            self.torch.cuda.synchronize()

    def loop(self) -> float:
        """Seconds of one product, the mean of the loop."""
        self.wait()
        start = time.perf_counter()
        for _ in range(ROUNDS):
            self.torch.mm(self.a, self.b, out=self.out)
        if STAND_IN:
            return (time.perf_counter() - start) / ROUNDS
        self.torch.cuda.current_stream().synchronize()  # of the product's stream alone
        return (time.perf_counter() - start) / ROUNDS


def reduce_until(comm: Any, x: Device, more: threading.Event, count: list[int]) -> None:
    """all_reduce again and again, until rank 0 says that it is enough; all ranks end after the same call."""
    cuda = x.cuda
    cuda.make_current()
    flag = np.ones(1, np.int32)
    while flag[0]:
        comm.all_reduce(x)
        cuda.synchronize(x.stream)
        count[0] += 1
        flag[0] = more.is_set()
        comm.broadcast(flag, 0)


def rank_of(rank: int) -> dict[str, float]:
    cuda = Cuda()
    more, count = threading.Event(), [0]
    more.set()
    with hfreduce.init(30) as comm:
        x = Device(cuda, np.zeros(BYTES // 4, np.float32), cuda.stream())
        comm.all_reduce(x)
        if rank:
            comm.barrier()
            reduce_until(comm, x, more, count)
            return {}
        products = Products()
        products.loop()
        alone = min(products.loop() for _ in range(3))
        comm.barrier()
        worker = threading.Thread(target=reduce_until, args=(comm, x, more, count))
        worker.start()
        begin = time.perf_counter()
        try:
            beside = [products.loop() for _ in range(3)]
            while not count[0] and time.perf_counter() - begin < 10:
                beside.append(products.loop())
            took = time.perf_counter() - begin
        finally:
            calls = count[0]
            more.clear()
            worker.join()
        if not calls:
            raise Wrong("no all_reduce ended while the products ran")
        return {"alone": alone, "beside": sorted(beside)[len(beside) // 2], "call": took / calls, "calls": calls}


def product_beside_all_reduce() -> tuple[str, dict[str, float]]:
    if STAND_IN:
        ranks.preload("torch")
    try:
        import torch
    except ImportError:
        raise Absent("no PyTorch here, which makes the product") from None
    if not STAND_IN and not torch.cuda.is_available():
        raise Absent("this PyTorch is built for CPUs, or finds no device")
    found: dict[str, float] = ranks.run_ranks(rank_of, 2, comm=False, timeout=50)[0]
    results.same(found["calls"] > 0, True, "that calls ended")
    slower = 100 * (found["beside"] / found["alone"] - 1)
    return (
        f"{SIDE}^3 {found['alone'] * 1e3:.3f} ms alone, {found['beside'] * 1e3:.3f} ms beside {found['calls']} all_reduces of "
        f"{BYTES >> 20} MiB ({found['call'] * 1e3:.1f} ms each): {slower:.1f} % slower{'' if slower <= AIM else f' (aim: {AIM:.0f} %)'}"
    ), found


def kernels_of_ours() -> str:
    """Only pairs of GPUs that NVLink joins have kernels: with ranks on one GPU none may be launched."""
    from hfreduce.params import describe

    lines = [value for name, value in describe() if "NVLink" in name]
    return f"no SM with ranks on one GPU; pairs: {lines[0] if lines else 'none'}"


if __name__ == "__main__":
    results.run("overlap", product_beside_all_reduce, kernels_of_ours)
