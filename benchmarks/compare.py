#!/usr/bin/env python3
"""Compare all_reduce of hfreduce, Gloo (torch.distributed, CPU) and MPI (mpi4py) in one alternating run of the same processes.

    mpirun -np 2 --bind-to none python benchmarks/compare.py          # all three; Open MPI or MPICH
    hfreduce run -n 2 benchmarks/compare.py                           # hfreduce and Gloo

float32, sum, in place, each library in memory of its own kind and waiting as it does by default. In each round every library
makes a batch of calls, in an order that turns from round to round, so that whatever else the machine does meets all of them
alike. README.md beside this file says what the columns mean. A library that is missing is left out, with a line that says why.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import sys
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np

import hfreduce

Array = np.ndarray[Any, Any]
SIZES = [8, 1 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20]


class Library(NamedTuple):
    """prepare(bytes) -> (buffer as a numpy array, call that reduces it in place)."""

    name: str
    version: str
    prepare: Callable[[int], tuple[Array, Callable[[], object]]]
    barrier: Callable[[], object]


def open_hfreduce(comm: hfreduce.Communicator) -> Library:
    """hfreduce, in memory of hfreduce.empty."""

    def prepare(size: int) -> tuple[Array, Callable[[], object]]:
        x = hfreduce.empty(size // 4, np.float32)
        return x, lambda: comm.all_reduce(x)

    return Library("hfreduce", hfreduce.__version__, prepare, comm.barrier)


def open_numpy(comm: hfreduce.Communicator) -> Library:
    """hfreduce, in memory of numpy.empty."""

    def prepare(size: int) -> tuple[Array, Callable[[], object]]:
        x = np.empty(size // 4, np.float32)
        return x, lambda: comm.all_reduce(x)

    return Library("hfreduce (numpy)", hfreduce.__version__, prepare, comm.barrier)


def open_gloo(comm: hfreduce.Communicator) -> Library:
    """torch.distributed with its backend gloo. ImportError without torch."""
    import torch
    import torch.distributed as dist

    port = np.zeros(1, np.int32)
    if comm.rank == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port[0] = probe.getsockname()[1]
    comm.broadcast(port)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port[0]}", rank=comm.rank, world_size=comm.nranks)

    def prepare(size: int) -> tuple[Array, Callable[[], object]]:
        x = torch.empty(size // 4, dtype=torch.float32)
        return x.numpy(), lambda: dist.all_reduce(x)

    return Library("gloo", f"torch {torch.__version__}", prepare, dist.barrier)


def open_mpi(comm: hfreduce.Communicator) -> Library:
    """MPI_Allreduce through mpi4py, in memory of MPI_Alloc_mem. ImportError without an mpi4py that belongs to this mpirun."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    if world.Get_size() != comm.nranks:
        raise ImportError(f"mpi4py sees {world.Get_size()} ranks, not {comm.nranks}: it is not under its own mpirun")

    def prepare(size: int) -> tuple[Array, Callable[[], object]]:
        x = np.frombuffer(MPI.Alloc_mem(size), np.float32)
        spec = [x, MPI.FLOAT]
        return x, lambda: world.Allreduce(MPI.IN_PLACE, spec, MPI.SUM)

    return Library("mpi", MPI.Get_library_version().split("\n")[0].split(",")[0].strip(), prepare, world.Barrier)


def open_all(comm: hfreduce.Communicator, names: list[str]) -> list[Library]:
    """The libraries that all ranks have; rank 0 says of the others why not."""
    libraries = []
    for name in names:
        library, why = None, ""
        try:
            library = {"hfreduce": open_hfreduce, "numpy": open_numpy, "gloo": open_gloo, "mpi": open_mpi}[name](comm)
        except (ImportError, RuntimeError) as error:
            why = str(error).splitlines()[0]
        able = np.array([library is not None], np.int32)
        comm.all_reduce(able, op="min")
        if able[0] and library is not None:
            libraries.append(library)
        elif comm.rank == 0:
            print(f"# {name}: left out: {why or 'another rank cannot use it'}", flush=True)
    return libraries


def batch_calls(size: int) -> int:
    """Calls timed as one, so that a batch takes some milliseconds."""
    return max(1, min(500, (4 << 20) // max(size, 1)))


def measure(comm: hfreduce.Communicator, libraries: list[Library], size: int, rounds: int) -> Array:
    """Microseconds a call: an array (library, round), of the slowest rank."""
    calls = []
    for library in libraries:
        buffer, call = library.prepare(size)
        buffer[:] = comm.rank + 1
        call()
        expected = comm.nranks * (comm.nranks + 1) / 2
        if not (buffer == expected).all():
            raise SystemExit(f"compare: {library.name} gives a wrong sum at {size} bytes")
        buffer[:] = 0  # stays so: in-place sums of anything else would grow without end
        calls.append((library, call))
    count = batch_calls(size)
    times = np.empty((len(libraries), rounds))
    for turn in range(-2, rounds):  # two to warm up
        for place in range(len(calls)):
            index = (turn + place) % len(calls)
            library, call = calls[index]
            library.barrier()
            call()  # the caches hold what the library before has touched
            library.barrier()
            begin = perf_counter_ns()
            for _ in range(count):
                call()
            if turn >= 0:
                times[index, turn] = (perf_counter_ns() - begin) / 1e3 / count
    comm.all_reduce(times, op="max")
    return times


def human(size: int) -> str:
    """8 B, 64 KiB."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024 or unit == "MiB":
            return f"{size} {unit}"
        size //= 1024
    raise AssertionError


def main() -> int:
    """Measure and print; the exit status is 1 if hfreduce is slower than a peer at some size and --strict was given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="batches a library and size")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="BYTES", help="multiples of 4")
    parser.add_argument(
        "--libraries",
        nargs="+",
        default=["hfreduce", "gloo", "mpi"],
        choices=["hfreduce", "numpy", "gloo", "mpi"],
        help="numpy is hfreduce again, on arrays that NumPy allocated",
    )
    parser.add_argument("--json", metavar="FILE", help="also write every time measured")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a peer is faster at some size")
    args = parser.parse_args()
    bad = [size for size in args.sizes if size < 4 or size % 4]
    if bad or args.rounds < 1:
        parser.error(f"--sizes {bad}: not multiples of 4" if bad else f"--rounds {args.rounds}: less than 1")
    with hfreduce.init() as comm:
        libraries = open_all(comm, args.libraries)
        if comm.rank == 0:
            cores = len(os.sched_getaffinity(0))
            print(
                f"# all_reduce, float32, sum, in place; {comm.nranks} ranks on {comm.nodes} nodes, {cores} cores, {processor()}"
            )
            print(f"# {'; '.join(f'{library.name}: {library.version}' for library in libraries)}")
            print(
                f"# time of a call in us: median (p10 to p90) of {args.rounds} alternating batches; ratio: best peer / hfreduce"
            )
            print(
                f"# {'size':>8}" + "".join(f"{library.name:>28}" for library in libraries) + f"{'ratio':>8}  best peer",
                flush=True,
            )
        results = []
        for size in args.sizes:
            times = measure(comm, libraries, size, args.rounds)
            low, middle, high = np.percentile(times, [10, 50, 90], axis=1)
            medians = {library.name: float(value) for library, value in zip(libraries, middle)}
            ours = medians.get("hfreduce", medians.get("hfreduce (numpy)"))
            peers = {name: value for name, value in medians.items() if not name.startswith("hfreduce")}
            best = min(peers, key=lambda name: peers[name]) if peers else None
            ratio = peers[best] / ours if best is not None and ours else None
            results.append({"size": size, "calls": batch_calls(size), "medians": medians, "best_peer": best, "ratio": ratio})
            results[-1]["times"] = {library.name: row.tolist() for library, row in zip(libraries, times)}
            if comm.rank == 0:
                columns = "".join(
                    f"{f'{m:.2f} ({lo:.2f} to {hi:.2f})' if m < 1000 else f'{m:.0f} ({lo:.0f} to {hi:.0f})':>28}"
                    for m, lo, hi in zip(middle, low, high)
                )
                print(f"{human(size):>10}{columns}{'' if ratio is None else f'{ratio:8.2f}  {best}'}", flush=True)
        slower = [r["size"] for r in results if r["ratio"] is not None and r["ratio"] < 1]
        if comm.rank == 0:
            if any(r["ratio"] is not None for r in results):
                print(
                    f"# hfreduce is {'slower than a peer at ' + ', '.join(map(human, slower)) if slower else 'fastest at every size'}"
                )
            if args.json:
                about = {
                    "nranks": comm.nranks,
                    "nodes": comm.nodes,
                    "transports": comm.transports,
                    "machine": platform.platform(),
                }
                about |= {"processor": processor(), "cores": len(os.sched_getaffinity(0)), "rounds": args.rounds}
                versions = {library.name: library.version for library in libraries}
                with open(args.json, "w") as file:
                    json.dump({**about, "versions": versions, "results": results}, file, indent=1)
        for library in libraries:
            library.barrier()
    if any(library.name == "gloo" for library in libraries):
        import torch.distributed as dist

        dist.destroy_process_group()
    return 1 if args.strict and slower else 0


def processor() -> str:
    """The CPU's name."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
