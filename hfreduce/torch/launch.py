"""init_process_group under any launcher: torchrun's variables as torch reads them, else mpirun's, srun's and our own."""

from __future__ import annotations

import json
import os
import socket
from datetime import timedelta
from typing import Any

import numpy as np
import torch.distributed as dist

from hfreduce import launch
from hfreduce._ffi import ffi, lib
from hfreduce.communicator import Communicator, core_of
from hfreduce.errors import HfreduceError, InvalidUsageError, check
from hfreduce.torch import job
from hfreduce.torch.backend import NAME
from hfreduce.torch.errors import as_torch


def init_process_group(backend: str = NAME, timeout: timedelta | float | None = None, **options: Any) -> None:
    """Initialise torch.distributed for the ranks that the launcher started.

    Where torch finds its way itself (torchrun's variables, or init_method=, store= given) this is
    torch.distributed.init_process_group. Else rank and size come from the launcher as for `hfreduce.init()`, a communicator
    carries the address of a new TCPStore to all ranks, with a key by which unique ids lie encrypted in it, and sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE for code
    that reads them. Without a launcher: a group of one. timeout: a timedelta or seconds.
    """
    if timeout is not None:
        options["timeout"] = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
    torch_knows = all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    if torch_knows or "store" in options or "init_method" in options:
        dist.init_process_group(backend, **options)
        return
    try:
        comm = launch.init(options["timeout"].total_seconds() if "timeout" in options else None)
    except HfreduceError as error:
        raise as_torch(error) from None
    with comm:
        shared = job.agree(comm)
        store = _common_store(comm, shared)
        os.environ.setdefault("RANK", str(comm.rank))
        os.environ.setdefault("WORLD_SIZE", str(comm.nranks))
        os.environ.setdefault("LOCAL_RANK", str(comm.local_rank))
        os.environ.setdefault("LOCAL_WORLD_SIZE", str(comm.local_nranks))
        with job.handing(shared):
            dist.init_process_group(backend, store=store, rank=comm.rank, world_size=comm.nranks, **options)
        comm.barrier()


def _common_store(comm: Communicator, shared: job.Job) -> Any:
    """A TCPStore of rank 0's that all ranks are connected to. It listens on the communicator's interface, or on loopback."""
    if comm.nranks == 1:
        return dist.HashStore()
    told = np.zeros(512, np.uint8)
    store: Any = None
    if comm.rank == 0:
        host = "127.0.0.1" if shared.is_local(()) else _address(comm)
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.bind((host, 0))
        listener.listen(socket.SOMAXCONN)
        port = listener.getsockname()[1]
        store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
        text = json.dumps([host, port]).encode()
        told[: len(text)] = np.frombuffer(text, np.uint8)
    comm.broadcast(told, root=0)
    if comm.rank == 0:
        return store
    host, port = json.loads(told.tobytes().rstrip(b"\0"))
    try:
        return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=min(comm.timeout, 30)))
    except (RuntimeError, ValueError) as error:
        raise InvalidUsageError(
            f"rank {comm.rank} on {comm.host} cannot reach rank 0's store at {host}, port {port} ({error}); let this port through, "
            "or choose another interface by HFREDUCE_SOCKET_IFNAME"
        ) from None


def _address(comm: Communicator) -> str:
    """The address of this process, without its port, at which the communicator's other ranks reach it."""
    text = ffi.new("char[]", 80)
    check(lib.hfreduceCommGetAddress(core_of(comm).pointer, text, len(text)))
    return str(ffi.string(text).decode().rpartition(":")[0].strip("[]"))
