"""cupyx.distributed's process group over hfreduce: `from hfreduce.distributed import init_process_group` is the only change.

Arrays are NumPy's, torch's, or what has __cuda_array_interface__ or DLPack (CuPy); C- or Fortran-contiguous, and sent in the order
in which they lie in memory. Complex ones are sent as twice as many real numbers. Sparse matrices are not taken.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import numpy as np

from hfreduce import device, nccl
from hfreduce._ffi import ffi, lib
from hfreduce.buffer import Buffer, resolve
from hfreduce.errors import HfreduceError, InvalidArgumentError
from hfreduce.nccl import NcclError
from hfreduce.types import dtype_code
from hfreduce.unique_id import UniqueId

__all__ = ["NCCLBackend", "init_process_group"]

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 13333

_OPS = {
    "sum": nccl.NCCL_SUM,
    "prod": nccl.NCCL_PROD,
    "max": nccl.NCCL_MAX,
    "min": nccl.NCCL_MIN,
    "avg": nccl.NCCL_AVG,  # CuPy has the first four
}
_NOTHING = Buffer(ffi.NULL, 0, 0, None)


def init_process_group(
    n_devices: int, rank: int, *, backend: str = "nccl", host: str | None = None, port: int | None = None, use_mpi: bool = False
) -> NCCLBackend:
    """Join the group of n_devices ranks as rank `rank`. Collective; each rank is a process (or a thread).

    host, port: where rank 0 listens while the group forms (None: CUPYX_DISTRIBUTED_HOST and CUPYX_DISTRIBUTED_PORT, else
    127.0.0.1 and 13333). Unless that is loopback, HFREDUCE_SECRET must be in the environment of all ranks. use_mpi: the ranks find
    each other through mpi4py's COMM_WORLD, and `barrier` is MPI's. ValueError for a wrong size, rank or backend; NcclError if the
    ranks do not find each other within HFREDUCE_JOIN_TIMEOUT seconds (300).
    """
    if n_devices <= 0:
        raise ValueError(f"n_devices: {n_devices} is less than 1")
    if not 0 <= rank < n_devices:
        raise ValueError(f"rank: {rank} is not from 0 to {n_devices - 1} (n_devices is {n_devices})")
    if backend != "nccl":
        raise ValueError(f'backend: {backend!r} is not "nccl", the only one there is')
    if host is None:
        host = os.environ.get("CUPYX_DISTRIBUTED_HOST", DEFAULT_HOST)
    if port is None:
        port = int(os.environ.get("CUPYX_DISTRIBUTED_PORT", DEFAULT_PORT))
    return NCCLBackend(n_devices, rank, host, port, use_mpi)


# --- how ranks find each other ---

# Groups that a rank has made at an address so far: the n-th of each rank belongs together. One that failed does not count, so that
# it can be tried again.
_made: dict[tuple[str, int, int], int] = {}


def _join_by_address(n_devices: int, rank: int, host: str, port: int) -> nccl.NcclCommunicator:
    """Join by an id that all ranks make by themselves."""
    place = (host, port, rank)
    tag = _made.get(place, 0)
    address = f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
    try:
        unique_id = UniqueId.from_address(address, os.environ.get("HFREDUCE_SECRET", ""), tag)
    except HfreduceError as error:
        raise NcclError(lib.hfreduceInvalidArgument, str(error)) from None
    comm = nccl.NcclCommunicator(n_devices, unique_id, rank)
    _made[place] = tag + 1
    return comm


def _join_by_mpi(n_devices: int, rank: int, world: Any) -> nccl.NcclCommunicator:
    unique_id = bytes(nccl.get_unique_id()) if world.Get_rank() == 0 else None
    return nccl.NcclCommunicator(n_devices, world.bcast(unique_id, root=0), rank)


def _mpi() -> Any:
    """mpi4py's COMM_WORLD; None, with a warning, where there is no mpi4py."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        warnings.warn(f"use_mpi: mpi4py cannot be imported ({error}); host and port are used instead", stacklevel=4)
        return None
    return MPI.COMM_WORLD


# --- arrays ---


class _Flat:
    """A device array of either order as its elements in the order of memory, complex ones as their parts."""

    def __init__(self, array: Any, name: str) -> None:
        said = device.interface_of(array, name)
        shape, strides, typestr = tuple(said["shape"]), said.get("strides"), said["typestr"]
        itemsize = int(typestr[2:])
        if strides is not None and device.is_contiguous(shape[::-1], tuple(strides)[::-1], itemsize):
            shape, strides = shape[::-1], None
        if typestr[1] == "c":
            shape, typestr = (*shape, 2), f"{typestr[0]}f{itemsize // 2}"
            strides = None if strides is None else (*strides, itemsize // 2)
        stream = device.library_stream(array)
        self.array = array
        self.__cuda_array_interface__ = {**said, "shape": shape, "strides": strides, "typestr": typestr}
        if stream is not None:
            self.__cuda_array_interface__["stream"] = stream
        self.dtype = np.dtype(typestr) if typestr[1] in "biuf" else array.dtype


def _plain(array: Any, name: str) -> Any:
    """The array as `resolve` takes it: flat where it is not in C order, real where it is complex. It shares the memory."""
    if type(array).__module__.partition(".")[0] == "torch":
        if not array.is_complex():
            return array
        if array.is_conj():
            raise InvalidArgumentError(
                f"{name}: the tensor's conjugate bit is set; use {name}.resolve_conj(), and read the result from that"
            )
        return sys.modules["torch"].view_as_real(array)
    if getattr(array, "__cuda_array_interface__", None) is not None:
        try:
            return _Flat(array, name)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            return array  # resolve says what is wrong with it
    if not isinstance(array, np.ndarray):
        return array
    if not array.flags.forc:
        raise InvalidArgumentError(
            f"{name}: an array of shape {array.shape} with strides {array.strides} is neither C- nor F-contiguous"
        )
    if not array.flags.c_contiguous:
        array = array.T
    if array.dtype.kind == "c":
        array = array.reshape(-1).view(array.real.dtype)
    return array


def _is_complex(array: Any) -> bool:
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        return str(getattr(array, "__cuda_array_interface__", {}).get("typestr"))[1:2] == "c"
    return bool(getattr(dtype, "is_complex", getattr(dtype, "kind", "") == "c"))  # torch's word, NumPy's


def _memory(array: Any, name: str, stream: Any, *, writable: bool) -> Buffer:
    """Find the memory of an array; complex elements count twice. TypeError for a dtype that cannot be sent."""
    if hasattr(array, "tocsr"):
        raise TypeError(f"{name}: sparse matrices are not supported; send their data, indices and indptr")
    try:
        plain = _plain(array, name)
        if getattr(plain, "dtype", None) is not None:
            try:
                dtype_code(plain.dtype, name)
            except InvalidArgumentError as error:
                raise TypeError(str(error)) from None
        return resolve(plain, name, writable=writable, stream=stream)
    except InvalidArgumentError as error:
        raise NcclError(lib.hfreduceInvalidArgument, str(error)) from None


def _need(buffer: Buffer, name: str, elements: int, why: str) -> None:
    if buffer.elements < elements:
        raise NcclError(lib.hfreduceInvalidArgument, f"{name}: has {buffer.elements} elements; it must have {elements} ({why})")


def _op(op: Any, is_complex: bool) -> int:
    if op not in _OPS:
        raise RuntimeError(f"op: {op!r} is not one of {', '.join(_OPS)}")
    if is_complex and op != "sum":
        raise ValueError(f"op: {op!r} is not for complex arrays, which can only be summed")
    return _OPS[op]


class NCCLBackend:
    """One rank of a process group.

    Each call is made by all ranks alike (send, recv and send_recv by the two of them). On host memory it returns when its result
    is there; on device memory, or with stream=, it is put on the stream (None: the current one) and returns at once. Arrays may
    be larger than a call needs; what lies behind is not touched.

    Errors: NcclError (a RuntimeError), whose status is NCCL's: NCCL_ERROR_INVALID_ARGUMENT for a wrong argument; TypeError for
    a dtype that cannot be sent; RuntimeError for an unknown op, ValueError for another than "sum" on complex arrays.
    """

    def __init__(
        self, n_devices: int, rank: int, host: str = DEFAULT_HOST, port: int = DEFAULT_PORT, use_mpi: bool = False
    ) -> None:
        """As `init_process_group`."""
        self.rank = rank
        self._n_devices = n_devices
        self._mpi = _mpi() if use_mpi else None
        if self._mpi is None:
            self._comm = _join_by_address(n_devices, rank, host, port)
        else:
            self._comm = _join_by_mpi(n_devices, rank, self._mpi)

    # --- reductions ---

    def all_reduce(self, in_array: Any, out_array: Any, op: str = "sum", stream: Any = None) -> None:
        """Reduce in_array over all ranks with op ("sum", "prod", "max", "min", "avg") into every rank's out_array."""
        source, target = self._two(in_array, out_array, stream)
        _need(target, "out_array", source.elements, "as many as in_array")
        number = _op(op, _is_complex(in_array))
        self._call(lib.hfreduceAllReduce, source, target, stream, source.elements, source.dtype, number)

    def reduce(self, in_array: Any, out_array: Any, root: int = 0, op: str = "sum", stream: Any = None) -> None:
        """Reduce in_array over all ranks with op into out_array of rank root. Elsewhere out_array is ignored."""
        if self.rank == root:
            source, target = self._two(in_array, out_array, stream)
            _need(target, "out_array", source.elements, "as many as in_array")
        else:
            source, target = _memory(in_array, "in_array", stream, writable=False), _NOTHING
        number = _op(op, _is_complex(in_array))
        self._call(lib.hfreduceReduce, source, target, stream, source.elements, source.dtype, number, root)

    def reduce_scatter(self, in_array: Any, out_array: Any, count: int, op: str = "sum", stream: Any = None) -> None:
        """Reduce the first n_devices * count elements of in_array over all ranks; part r goes to rank r's out_array."""
        source, target = self._two(in_array, out_array, stream)
        count = count * 2 if _is_complex(in_array) else count
        _need(source, "in_array", count * self._n_devices, f"n_devices * {count}")
        _need(target, "out_array", count, "count")
        number = _op(op, _is_complex(in_array))
        self._call(lib.hfreduceReduceScatter, source, target, stream, count, source.dtype, number)

    # --- copies ---

    def broadcast(self, in_out_array: Any, root: int = 0, stream: Any = None) -> None:
        """Copy in_out_array of rank root to that of all ranks."""
        both = _memory(in_out_array, "in_out_array", stream, writable=self.rank != root)
        self._call(lib.hfreduceBroadcast, both, both, stream, both.elements, both.dtype, root)

    def all_gather(self, in_array: Any, out_array: Any, count: int, stream: Any = None) -> None:
        """Put the first `count` elements of every rank's in_array, in rank order, into every rank's out_array."""
        source, target = self._two(in_array, out_array, stream)
        count = count * 2 if _is_complex(in_array) else count
        _need(source, "in_array", count, "count")
        _need(target, "out_array", count * self._n_devices, f"n_devices * {count}")
        self._call(lib.hfreduceAllGather, source, target, stream, count, source.dtype)

    def scatter(self, in_array: Any, out_array: Any, root: int = 0, stream: Any = None) -> None:
        """Put in_array[r] of rank root to out_array of rank r. Elsewhere in_array is ignored."""
        if self.rank == root:
            self._check_rows(in_array, "in_array", "scatter")
            source, target = self._two(in_array, out_array, stream)
            self._check_parts(source, "in_array", target, "out_array")
        else:
            source, target = _NOTHING, _memory(out_array, "out_array", stream, writable=True)
        self._call(lib.hfreduceScatter, source, target, stream, target.elements, target.dtype, root)

    def gather(self, in_array: Any, out_array: Any, root: int = 0, stream: Any = None) -> None:
        """Put in_array of rank r to out_array[r] of rank root. Elsewhere out_array is ignored."""
        if self.rank == root:
            self._check_rows(out_array, "out_array", "gather")
            source, target = self._two(in_array, out_array, stream)
            self._check_parts(target, "out_array", source, "in_array")
        else:
            source, target = _memory(in_array, "in_array", stream, writable=False), _NOTHING
        self._call(lib.hfreduceGather, source, target, stream, source.elements, source.dtype, root)

    def all_to_all(self, in_array: Any, out_array: Any, stream: Any = None) -> None:
        """Put in_array[r] of this rank to out_array[this rank] of rank r, for all pairs."""
        self._check_rows(in_array, "in_array", "all_to_all")
        self._check_rows(out_array, "out_array", "all_to_all")
        source, target = self._two(in_array, out_array, stream)
        if source.elements != target.elements:
            raise NcclError(
                lib.hfreduceInvalidArgument, f"out_array: has {target.elements} elements, in_array has {source.elements}"
            )
        self._call(lib.hfreduceAlltoAll, source, target, stream, source.elements // self._n_devices, source.dtype)

    # --- between two ranks ---

    def send(self, array: Any, peer: int, stream: Any = None) -> None:
        """Send array to rank peer, which receives as many elements. It may wait for that."""
        source = _memory(array, "array", stream, writable=False)
        self._call(lib.hfreduceSend, source, None, stream, source.elements, source.dtype, peer)

    def recv(self, out_array: Any, peer: int, stream: Any = None) -> None:
        """Receive into out_array what rank peer sends."""
        target = _memory(out_array, "out_array", stream, writable=True)
        self._call(lib.hfreduceRecv, target, None, stream, target.elements, target.dtype, peer)

    def send_recv(self, in_array: Any, out_array: Any, peer: int, stream: Any = None) -> None:
        """Send in_array to rank peer, this one too, and receive into out_array what it sends."""
        source = _memory(in_array, "in_array", stream, writable=False)
        target = _memory(out_array, "out_array", stream, writable=True)
        nccl.groupStart()
        try:
            self._call(lib.hfreduceSend, source, None, stream, source.elements, source.dtype, peer)
            self._call(lib.hfreduceRecv, target, None, stream, target.elements, target.dtype, peer)
        except BaseException:
            lib.hfreduceGroupCancel(
                lib.hfreduceInvalidUsage
            )  # else what was queued would be launched, and its peer not expect it
            try:
                nccl.groupEnd()
            except NcclError:
                pass  # that of the call
            raise
        nccl.groupEnd()

    # --- all together ---

    def barrier(self) -> None:
        """Wait, on the host, until all ranks have come here. What is on streams is not waited for."""
        if self._mpi is None:
            nccl.issue(self._comm, lib.hfreduceBarrier, stream=0)
        else:
            self._mpi.Barrier()

    def stop(self) -> None:
        """End what served the forming of the group, which has ended by itself: legal, at any time, and the group goes on.

        There is no server process as CuPy's to be stopped. To leave the group use `close`, or drop the object.
        """

    def close(self) -> None:
        """Leave the group and free what it holds; again is legal. Peers that still wait for this rank get an error."""
        self._comm.destroy()

    # --- parts of the calls above ---

    def _call(self, function: Any, first: Buffer, second: Buffer | None, stream: Any, *more: Any) -> None:
        try:
            where = device.common_stream(stream, first.stream, None if second is None else second.stream)
        except InvalidArgumentError as error:
            raise NcclError(lib.hfreduceInvalidArgument, str(error)) from None
        handle = 0 if where is None else int(ffi.cast("uintptr_t", where))
        pointers = (first.pointer,) if second is None else (first.pointer, second.pointer)
        nccl.issue(self._comm, function, *pointers, *more, stream=handle)

    def _two(self, in_array: Any, out_array: Any, stream: Any) -> tuple[Buffer, Buffer]:
        source = _memory(in_array, "in_array", stream, writable=False)
        target = _memory(out_array, "out_array", stream, writable=True)
        if source.dtype != target.dtype or _is_complex(in_array) != _is_complex(out_array):
            raise NcclError(lib.hfreduceInvalidArgument, "out_array: its dtype differs from in_array's")
        return source, target

    def _check_rows(self, array: Any, name: str, call: str) -> None:
        shape = tuple(getattr(array, "shape", ()))
        if not shape or shape[0] != self._n_devices:
            raise NcclError(
                lib.hfreduceInvalidArgument,
                f"{name}: {call} needs {self._n_devices} in its first dimension, one part a rank; its shape is {shape}",
            )

    def _check_parts(self, whole: Buffer, whole_name: str, part: Buffer, part_name: str) -> None:
        if whole.elements != part.elements * self._n_devices:
            raise NcclError(
                lib.hfreduceInvalidArgument,
                f"{whole_name}: has {whole.elements} elements; with {part.elements} in {part_name} it must have n_devices times "
                f"as many",
            )
