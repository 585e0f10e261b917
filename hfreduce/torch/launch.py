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
from hfreduce.communicator import Communicator
from hfreduce.errors import HfreduceError, InvalidUsageError
from hfreduce.torch.backend import NAME
from hfreduce.torch.errors import as_torch


def init_process_group(backend: str = NAME, timeout: timedelta | float | None = None, **options: Any) -> None:
    """Initialise torch.distributed for the ranks that the launcher started.

    Where torch finds its way itself (torchrun's variables, or init_method=, store= given) this is
    torch.distributed.init_process_group. Else rank and size come from the launcher as for `hfreduce.init()`, a communicator
    carries the address of a new TCPStore to all ranks, and sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE for code
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
        store = _common_store(comm)
        os.environ.setdefault("RANK", str(comm.rank))
        os.environ.setdefault("WORLD_SIZE", str(comm.nranks))
        os.environ.setdefault("LOCAL_RANK", str(comm.local_rank))
        os.environ.setdefault("LOCAL_WORLD_SIZE", str(comm.local_nranks))
        dist.init_process_group(backend, store=store, rank=comm.rank, world_size=comm.nranks, **options)
        comm.barrier()


def _common_store(comm: Communicator) -> Any:
    """A TCPStore of rank 0's that all ranks are connected to."""
    if comm.nranks == 1:
        return dist.HashStore()
    told = np.zeros(512, np.uint8)
    store: Any = None
    if comm.rank == 0:
        hosts = _addresses(comm)
        # Listens on all interfaces: torch's store takes an address to connect to, not one to listen on.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        text = json.dumps([hosts, store.port]).encode()
        told[: len(text)] = np.frombuffer(text, np.uint8)
    comm.broadcast(told, root=0)
    if comm.rank == 0:
        return store
    hosts, port = json.loads(told.tobytes().rstrip(b"\0"))
    failures = []
    for host in hosts:
        try:
            return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=min(comm.timeout, 10)))
        except (RuntimeError, ValueError) as error:
            failures.append(f"{host}: {error}")
    raise InvalidUsageError(
        f"rank {comm.rank} on {comm.host} cannot reach rank 0's store at port {port} ({'; '.join(failures)}); "
        "set MASTER_ADDR to rank 0's address, or open the port"
    )


def _addresses(comm: Communicator) -> list[str]:
    """Where the others may reach rank 0, likeliest first."""
    if comm.nodes == 1 or comm.local_nranks == comm.nranks:
        return ["127.0.0.1"]
    given = [os.environ.get("MASTER_ADDR", ""), os.environ.get("HFREDUCE_ADDR", "").rpartition(":")[0].strip("[]")]
    return [host for host in dict.fromkeys([*given, socket.getfqdn(), socket.gethostname()]) if host]
