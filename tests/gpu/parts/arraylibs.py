"""CuPy, JAX and Numba: cupy.cuda.nccl and cupyx.distributed on the preloaded library, hfreduce.nccl on CuPy arrays, arrays by their interfaces."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import results
from ranks import reserved_address, run_ranks
from results import Absent, Wrong

import hfreduce
from hfreduce import nccl

STAND_IN = bool(os.environ.get("FIRST_CONTACT_STAND_IN"))


def need(module: str) -> None:
    if not importlib.util.find_spec(module):
        raise Absent(f"no {module} here")
    if STAND_IN:
        raise Absent(f"needs a GPU: {module} does not run on the stand-in")


def preloaded(name: str) -> str:
    """Run this file's rank function under `hfreduce exec`, as two ranks."""
    with reserved_address() as address:
        hfr = [sys.executable, "-m", "hfreduce"]
        command = [*hfr, "exec", *hfr, "run", "-n", "2", sys.executable, __file__, name, address.rpartition(":")[2]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=40)
    print(done.stdout, done.stderr, flush=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line] or [f"ended with {done.returncode}"]
        raise Wrong(lines[0])
    results.same(done.stdout.count("right"), 2, "ranks that are right")
    return done.stdout.splitlines()[0]


def by_names(port: str) -> str:
    """cupy.cuda.nccl; its id is made from an address, so that both ranks can make it."""
    import cupy
    from cupy.cuda import nccl as names

    os.environ["NCCL_COMM_ID"] = f"127.0.0.1:{port}"
    rank = int(os.environ["HFREDUCE_RANK"])
    comm = names.NcclCommunicator(2, names.get_unique_id(), rank)
    x, y = cupy.full(100_000, rank + 1, cupy.float32), cupy.zeros(100_000, cupy.float32)
    stream = cupy.cuda.get_current_stream().ptr
    comm.allReduce(x.data.ptr, y.data.ptr, x.size, names.NCCL_FLOAT32, names.NCCL_SUM, stream)
    assert bool((y == 3).all())
    names.groupStart()
    comm.send(x.data.ptr, x.size, names.NCCL_FLOAT32, 1 - rank, stream)
    comm.recv(y.data.ptr, x.size, names.NCCL_FLOAT32, 1 - rank, stream)
    names.groupEnd()
    assert bool((y == 2 - rank).all())
    comm.destroy()
    return f"CuPy {cupy.__version__}, NCCL {names.get_version()}"


def by_group(port: str) -> str:
    """cupyx.distributed, with its own store."""
    import cupy
    import cupyx.distributed

    rank = int(os.environ["HFREDUCE_RANK"])
    comm = cupyx.distributed.init_process_group(2, rank, port=int(port))
    x, y = cupy.full(1000, rank + 1, cupy.float32), cupy.zeros(1000, cupy.float32)
    comm.all_reduce(x, y)
    assert bool((y == 3).all())
    comm.broadcast(x, 1)
    assert bool((x == 2).all())
    return f"CuPy {cupy.__version__}"


def cupy_cuda_nccl_preloaded() -> str:
    need("cupy")
    return preloaded("by_names")


def cupyx_distributed_preloaded() -> str:
    need("cupy")
    return preloaded("by_group")


def own_names(rank: int, unique_id: bytes) -> None:
    import cupy

    comm = nccl.NcclCommunicator(2, unique_id, rank)
    x = cupy.full(100_000, rank + 1, cupy.float32)
    comm.allReduce(x.data.ptr, x.data.ptr, x.size, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, cupy.cuda.get_current_stream().ptr)
    assert bool((x == 3).all())
    comm.destroy()


def hfreduce_nccl_on_CuPy_arrays() -> None:
    need("cupy")
    run_ranks(own_names, 2, bytes(nccl.get_unique_id()), comm=False, timeout=40)


def by_interface(rank: int, library: str) -> None:
    """An array that a library made, given to Communicator as it is."""
    import numpy as np

    with hfreduce.init(20) as comm:
        x: Any
        host = np.full(10_000, rank + 1, np.float32)
        if library == "cupy":
            import cupy

            x = cupy.asarray(host)
        elif library == "numba":
            from numba import cuda

            x = cuda.to_device(host)
        else:
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
            import jax

            x = jax.numpy.asarray(host).block_until_ready()
        out = x
        if library == "jax":  # its arrays cannot be written
            import cupy

            out = cupy.zeros(10_000, cupy.float32)
            comm.all_reduce(x, out)
        else:
            comm.all_reduce(x)
        got = out.copy_to_host() if library == "numba" else out.get()
        assert (got == 3).all(), got[:4]


def interface(library: str, *modules: str) -> None:
    for module in (library, *modules):
        need(module)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    run_ranks(by_interface, 2, library, comm=False, timeout=50)


def CuPy_arrays() -> None:
    interface("cupy")


def JAX_arrays() -> None:
    interface("jax", "cupy")


def Numba_arrays() -> None:
    interface("numba")


if __name__ == "__main__":
    if sys.argv[1:2] in (["by_names"], ["by_group"]):
        print(f"right: {globals()[sys.argv[1]](sys.argv[2])}", flush=True)
        os._exit(0)
    results.run(
        "arraylibs",
        cupy_cuda_nccl_preloaded,
        hfreduce_nccl_on_CuPy_arrays,
        CuPy_arrays,
        cupyx_distributed_preloaded,
        JAX_arrays,
        Numba_arrays,
    )
