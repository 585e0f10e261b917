"""The libraries that are compared, behind one face: memory of its own kind, a collective on it as a call, a barrier.

Each call of `open_all` is collective over an hfreduce communicator, through which the ranks agree on what all of them can do.
"""

from __future__ import annotations

import os
import socket
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

import hfreduce

Array = np.ndarray[Any, Any]
Call = Callable[[], object]

NAMES = ["hfreduce", "numpy", "gloo", "mpi"]
#: These are hfreduce itself, on memory of two kinds; all others are peers.
OURS = ("hfreduce", "numpy")
ROOT = 0
#: MPIX_BFLOAT16 of MPICH 5's mpi.h, which mpi4py does not know by name.
_MPICH_BFLOAT16 = 0x4C00024C


class CannotError(Exception):
    """A library has no such collective or datatype; the message says so in a few words."""


class Library(ABC):
    """A library on all ranks. `name` is its column; everything but `memory` is collective."""

    name: str
    version: str

    @abstractmethod
    def memory(self, size: int) -> tuple[Any, Array]:
        """So many bytes in memory that suits the library: its own handle, and the same bytes as a NumPy array of uint8."""

    @abstractmethod
    def bind(self, collective: str, dtype: str, send: Any, recv: Any) -> Call:
        """A call of the collective (sum, root 0) on handles from `memory`, whole; in place where send is recv.

        CannotError where the library has none.
        """

    @abstractmethod
    def start(self, dtype: str, buffer: Any) -> Callable[[], Call]:
        """A call that starts an all_reduce in place and returns the call that waits for it. CannotError as for `bind`."""

    @abstractmethod
    def barrier(self) -> object:
        """Wait for all ranks, in the library's own way."""

    def close(self) -> None:
        """Leave, where the library does not do so by itself."""
        return


class Hfreduce(Library):
    """hfreduce, in memory of hfreduce.empty or of NumPy."""

    def __init__(self, comm: hfreduce.Communicator, plain: bool) -> None:
        self.comm, self.plain = comm, plain
        self.name, self.version = "numpy" if plain else "hfreduce", hfreduce.__version__

    def memory(self, size: int) -> tuple[Any, Array]:
        array = np.empty(size, np.uint8) if self.plain else hfreduce.empty(size, np.uint8)
        return array, array

    def bind(self, collective: str, dtype: str, send: Any, recv: Any) -> Call:
        kind, comm = numpy_dtype(dtype), self.comm
        if collective == "barrier":
            return comm.barrier
        x, y = send.view(kind), recv.view(kind)
        if collective in ("all_reduce", "broadcast", "reduce"):
            return partial(getattr(comm, collective), y)
        return partial(getattr(comm, collective), x, y)

    def start(self, dtype: str, buffer: Any) -> Callable[[], Call]:
        x = buffer.view(numpy_dtype(dtype))
        return lambda: self.comm.all_reduce(x, async_op=True).wait

    def barrier(self) -> object:
        return self.comm.barrier()


class Gloo(Library):
    """torch.distributed with its backend gloo. ImportError without torch."""

    name = "gloo"

    def __init__(self, comm: hfreduce.Communicator, address: str) -> None:
        import torch
        import torch.distributed as dist

        self.torch, self.dist = torch, dist
        self.version = f"torch {torch.__version__}"
        port = np.zeros(1, np.int32)
        if comm.rank == 0:
            with socket.socket() as probe:
                probe.bind((address, 0))
                port[0] = probe.getsockname()[1]
        comm.broadcast(port)
        if address.startswith("127."):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"tcp://{address}:{port[0]}", rank=comm.rank, world_size=comm.nranks)

    def memory(self, size: int) -> tuple[Any, Array]:
        tensor = self.torch.empty(size, dtype=self.torch.uint8)
        return tensor, tensor.numpy()

    def bind(self, collective: str, dtype: str, send: Any, recv: Any) -> Call:
        dist, kind = self.dist, getattr(self.torch, dtype)
        if collective == "barrier":
            return partial(dist.barrier)
        x, y = send.view(kind), recv.view(kind)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        calls: dict[str, Call] = {
            "all_reduce": partial(dist.all_reduce, y),
            "broadcast": partial(dist.broadcast, y, ROOT),
            "reduce": partial(dist.reduce, y, ROOT),
            "all_gather": partial(gather, y, x),
            "reduce_scatter": partial(scatter, y, x),
            "all_to_all": partial(dist.all_to_all_single, y, x),
        }
        return calls[collective]

    def start(self, dtype: str, buffer: Any) -> Callable[[], Call]:
        x, dist = buffer.view(getattr(self.torch, dtype)), self.dist
        return lambda: dist.all_reduce(x, async_op=True).wait

    def barrier(self) -> object:
        return self.dist.barrier()

    def close(self) -> None:
        self.dist.destroy_process_group()


class Mpi(Library):
    """MPI through mpi4py, in memory of MPI_Alloc_mem. ImportError without an mpi4py that belongs to this mpirun."""

    def __init__(self, comm: hfreduce.Communicator) -> None:
        from mpi4py import MPI

        self.mpi, self.world = MPI, MPI.COMM_WORLD
        if self.world.Get_size() != comm.nranks:
            raise ImportError(f"mpi4py sees {self.world.Get_size()} ranks, not {comm.nranks}: it is not under its own mpirun")
        text = " ".join(MPI.Get_library_version().replace("MPICH Version:", "MPICH").split("\n")[0].split(",")[0].split())
        self.name = "openmpi" if text.startswith("Open MPI") else "mpich" if text.startswith("MPICH") else "mpi"
        self.version = text

    def memory(self, size: int) -> tuple[Any, Array]:
        memory: Any = self.mpi.Alloc_mem(max(size, 1))
        array = np.frombuffer(memory, np.uint8, count=size)
        weakref.finalize(array, self.mpi.Free_mem, memory).atexit = False  # by then MPI has ended
        return array, array

    def _datatype(self, dtype: str, reduces: bool) -> Any:
        mpi = self.mpi
        if dtype == "float32":
            return mpi.FLOAT
        if not reduces:
            return mpi.UINT16_T  # only moved: any type of two bytes
        found = getattr(mpi, {"float16": "FLOAT16_T", "bfloat16": "BFLOAT16_T"}[dtype], mpi.DATATYPE_NULL)
        try:
            if found == mpi.DATATYPE_NULL and self.name == "mpich" and dtype == "bfloat16":
                found = mpi.Datatype.fromhandle(_MPICH_BFLOAT16)
            if found != mpi.DATATYPE_NULL and found.Get_size() == 2:
                return found
        except mpi.Exception:
            pass
        raise CannotError(f"has no {dtype} to add")

    def bind(self, collective: str, dtype: str, send: Any, recv: Any) -> Call:
        mpi, world = self.mpi, self.world
        if collective == "barrier":
            return partial(world.Barrier)
        datatype = self._datatype(dtype, "reduce" in collective)
        x, y = [send, datatype], [recv, datatype]
        calls: dict[str, Call] = {
            "all_reduce": partial(world.Allreduce, mpi.IN_PLACE, y, mpi.SUM),
            "broadcast": partial(world.Bcast, y, ROOT),
            "all_gather": partial(world.Allgather, x, y),
            "reduce_scatter": partial(world.Reduce_scatter_block, x, y, mpi.SUM),
            "all_to_all": partial(world.Alltoall, x, y),
        }
        if world.Get_rank() == ROOT:
            calls["reduce"] = partial(world.Reduce, mpi.IN_PLACE, y, mpi.SUM, ROOT)
        else:
            calls["reduce"] = partial(world.Reduce, y, None, mpi.SUM, ROOT)
        return calls[collective]

    def start(self, dtype: str, buffer: Any) -> Callable[[], Call]:
        mpi, world, spec = self.mpi, self.world, [buffer, self._datatype(dtype, True)]
        return lambda: world.Iallreduce(mpi.IN_PLACE, spec, mpi.SUM).Wait

    def barrier(self) -> object:
        self.world.Barrier()
        return None


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of that name; bfloat16 from ml_dtypes, ImportError without."""
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    found: np.dtype[Any] = np.dtype(name)
    return found


def agreed(comm: hfreduce.Communicator, able: bool) -> bool:
    """Whether all ranks say yes."""
    word = np.array([able], np.int32)
    comm.all_reduce(word, op="min")
    return bool(word[0])


def note(comm: hfreduce.Communicator, text: str) -> None:
    """Rank 0 prints a line beside the tables."""
    if comm.rank == 0:
        print(f"# {text}", flush=True)


def open_all(comm: hfreduce.Communicator, names: Sequence[str], address: str = "127.0.0.1") -> list[Library]:
    """The libraries of NAMES that all ranks have; rank 0 says of the others why not. address: rank 0's, for Gloo to meet at."""
    makers: dict[str, Callable[[], Library]] = {
        "hfreduce": lambda: Hfreduce(comm, False),
        "numpy": lambda: Hfreduce(comm, True),
        "gloo": lambda: Gloo(comm, address),
        "mpi": lambda: Mpi(comm),
    }
    libraries = []
    for name in names:
        library, why = None, "another rank cannot use it"
        try:
            library = makers[name]()
        except (ImportError, RuntimeError) as error:
            why = str(error).splitlines()[0]
        if agreed(comm, library is not None) and library is not None:
            libraries.append(library)
        else:
            note(comm, f"{name}: left out: {why}")
    return libraries
