#!/usr/bin/env python3
"""How much of an all_reduce hides behind computing: `hfreduce run -n 2 overlap.py`, or under any launcher.

Three loops are timed in turn: computing alone, an all_reduce alone (async_op=True and wait at once), and both: the
all_reduce is started, the computing done, then the all_reduce waited for. Computing is made to last as long as the
all_reduce, so that at best both together take as long as one of them:

    hidden = (computing + communicating - both) / min(computing, communicating)

Two kinds of computing: `device` leaves the CPU idle, as when a GPU computes; `matmul` keeps one core a rank busy with
NumPy. hfreduce reduces on the CPU, so behind `matmul` only so much can hide as cores are free (or as the network, not the
CPU, is what takes the time).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

for _name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # one core a rank; to be set before numpy is imported

import numpy as np

import hfreduce


def matmul(seconds: float) -> Callable[[], None]:
    """Make a computation of about so many seconds that keeps one core busy."""
    a = np.full((128, 128), 1 / 128, np.float32)
    b = np.empty_like(a)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < 0.2:
        np.matmul(a, a, out=b)
        count += 1
    times = max(1, round(seconds * count / (time.perf_counter() - begin)))

    def compute() -> None:
        for _ in range(times):
            np.matmul(a, a, out=b)

    return compute


def device(seconds: float) -> Callable[[], None]:
    """Make a wait of so many seconds."""
    return lambda: time.sleep(seconds)


def median(comm: hfreduce.Communicator, call: Callable[[], object], repeats: int) -> float:
    """Median of the seconds that a call takes, averaged over the ranks."""
    call()
    times = []
    for _ in range(repeats):
        comm.barrier()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    mean = np.array([np.median(times)])
    comm.all_reduce(mean, op="avg")
    return float(mean[0])


def main() -> int:
    """Print a line for each kind of computing; the exit status is 1 if a sum was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", type=float, default=16, metavar="MIB", help="bytes to reduce")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    with hfreduce.init() as comm:
        x = hfreduce.zeros(int(args.size * 2**18), np.float32)
        y = hfreduce.empty(x.size, np.float32)
        x[:] = comm.rank + 1

        def start() -> hfreduce.Work:
            work: hfreduce.Work = comm.all_reduce(x, out=y, async_op=True)
            return work

        def communicate() -> None:
            start().wait()

        alone = median(comm, communicate, args.repeats)
        if comm.rank == 0:
            cores = len(os.sched_getaffinity(0))
            print(
                f"# {comm.nranks} ranks on {comm.nodes} nodes, {cores} cores here, transports "
                f"{','.join(comm.transports) or 'none'}; all_reduce of {args.size:g} MiB of float32; times in ms"
            )
            print(f"# {'computing':<10} {'alone':>8} {'all_reduce':>10} {'both':>8} {'hidden':>7}", flush=True)
        for kind in (device, matmul):
            compute = kind(alone)

            def both(compute: Callable[[], None] = compute) -> None:
                work = start()
                compute()
                work.wait()

            t_compute = median(comm, compute, args.repeats)
            t_comm = median(comm, communicate, args.repeats)
            t_both = median(comm, both, args.repeats)
            hidden = (t_compute + t_comm - t_both) / min(t_compute, t_comm)
            if comm.rank == 0:
                times = f"{1e3 * t_compute:>8.2f} {1e3 * t_comm:>10.2f} {1e3 * t_both:>8.2f}"
                print(f"  {kind.__name__:<10} {times} {100 * hidden:>5.0f} %", flush=True)
        right = bool((y == comm.nranks * (comm.nranks + 1) / 2).all())
    if not right:
        print("overlap: WRONG sum", file=sys.stderr)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
