"""cupy.cuda.nccl's names over hfreduce: `from hfreduce import nccl` is the only change in a program.

Pointers and streams are integers, as there. Pointers are addresses of host or device memory; a call on host memory with stream 0
returns when its result is there, or, inside a group, when the group has ended.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from hfreduce import grouping
from hfreduce._ffi import ffi, lib
from hfreduce._handle import NULL, Handle, call_or_abort
from hfreduce.errors import AbortedError, HfreduceError, InvalidUsageError, last_error, text
from hfreduce.types import TYPES
from hfreduce.unique_id import UniqueId
from hfreduce.unique_id import get_unique_id as _new_unique_id

__all__ = [
    "NCCL_AVG",
    "NCCL_BFLOAT16",
    "NCCL_CHAR",
    "NCCL_DOUBLE",
    "NCCL_FLOAT",
    "NCCL_FLOAT8E4M3",
    "NCCL_FLOAT8E5M2",
    "NCCL_FLOAT16",
    "NCCL_FLOAT32",
    "NCCL_FLOAT64",
    "NCCL_HALF",
    "NCCL_INT",
    "NCCL_INT8",
    "NCCL_INT32",
    "NCCL_INT64",
    "NCCL_MAX",
    "NCCL_MIN",
    "NCCL_PROD",
    "NCCL_SUM",
    "NCCL_UINT8",
    "NCCL_UINT32",
    "NCCL_UINT64",
    "NcclCommunicator",
    "NcclConfig",
    "NcclError",
    "available",
    "check_status",
    "get_build_version",
    "get_unique_id",
    "get_version",
    "groupEnd",
    "groupStart",
]

#: Always: nothing else has to be installed.
available = True

NCCL_SUM: int = lib.hfreduceSum
NCCL_PROD: int = lib.hfreduceProd
NCCL_MAX: int = lib.hfreduceMax
NCCL_MIN: int = lib.hfreduceMin
NCCL_AVG: int = lib.hfreduceAvg

NCCL_INT8: int = lib.hfreduceInt8
NCCL_CHAR: int = lib.hfreduceInt8
NCCL_UINT8: int = lib.hfreduceUint8
NCCL_INT32: int = lib.hfreduceInt32
NCCL_INT: int = lib.hfreduceInt32
NCCL_UINT32: int = lib.hfreduceUint32
NCCL_INT64: int = lib.hfreduceInt64
NCCL_UINT64: int = lib.hfreduceUint64
NCCL_FLOAT16: int = lib.hfreduceFloat16
NCCL_HALF: int = lib.hfreduceFloat16
NCCL_FLOAT32: int = lib.hfreduceFloat32
NCCL_FLOAT: int = lib.hfreduceFloat32
NCCL_FLOAT64: int = lib.hfreduceFloat64
NCCL_DOUBLE: int = lib.hfreduceFloat64
NCCL_BFLOAT16: int = lib.hfreduceBfloat16
# the two that CuPy does not have
NCCL_FLOAT8E4M3: int = lib.hfreduceFloat8e4m3
NCCL_FLOAT8E5M2: int = lib.hfreduceFloat8e5m2

# The NCCL whose interface hfreduce stands in for (2.32.3): the same in Python as in C.
_VERSION = 23203

# --- errors ---

_NAMES = {
    lib.hfreduceSuccess: "NCCL_ERROR_SUCCESS",
    lib.hfreduceUnhandledCudaError: "NCCL_ERROR_UNHANDLED_CUDA_ERROR",
    lib.hfreduceSystemError: "NCCL_ERROR_SYSTEM_ERROR",
    lib.hfreduceInternalError: "NCCL_ERROR_INTERNAL_ERROR",
    lib.hfreduceInvalidArgument: "NCCL_ERROR_INVALID_ARGUMENT",
    lib.hfreduceInvalidUsage: "NCCL_ERROR_INVALID_USAGE",
    lib.hfreduceRemoteError: "NCCL_ERROR_REMOTE_ERROR",
    lib.hfreduceInProgress: "NCCL_ERROR_IN_PROGRESS",
    lib.hfreduceTimeout: "NCCL_ERROR_TIMEOUT",
}
# NCCL has no result of its own for these: the nearest one.
_NEAREST = {
    lib.hfreduceMismatch: lib.hfreduceInvalidUsage,
    lib.hfreduceAborted: lib.hfreduceRemoteError,
    lib.hfreduceCorrupt: lib.hfreduceSystemError,
}


class NcclError(RuntimeError):
    """A result other than success. `status` is NCCL's number of it; the message is "NCCL_ERROR_...: text"."""

    def __init__(self, status: int, message: str | None = None) -> None:
        """status: a ncclResult_t. message: what went wrong, where more is known than the name of the result."""
        self.status = operator.index(status)
        self._message = message
        name = _NAMES.get(self.status, f"NCCL_ERROR_{self.status}")
        super().__init__(f"{name}: {text(lib.hfreduceGetErrorString(self.status)) if message is None else message}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.status, self._message)


def check_status(status: int) -> None:
    """Raise NcclError unless status, a ncclResult_t, is success."""
    if status:
        raise NcclError(status)


def _error(error: HfreduceError, handle: Handle | None = None) -> NcclError:
    """The error under NCCL's number: an own abort is a wrong use, another rank's a remote error, as in libnccl (csrc/nccl/error.c).

    handle: of the communicator that the call was on.
    """
    if handle is not None and handle.closed and isinstance(error, InvalidUsageError):
        return _destroyed()
    code = lib.hfreduceInternalError if error.code is None else error.code
    if isinstance(error, AbortedError) and error.peer is not None:
        own = error.peer == (error.rank if handle is None else handle.rank)
        code = lib.hfreduceInvalidUsage if own else code
    return NcclError(_NEAREST.get(code, code), str(error))


def _check(code: int) -> None:
    """Raise unless `code`, just returned by a call on this thread, is success."""
    if code:
        raise _error(last_error(code))


def _check_on(handle: Handle, pointer: Any, code: int) -> None:
    """As `_check`, after a call on a handle's pointer, which was NULL where there was no communicator."""
    if code:
        raise _destroyed() if pointer == NULL else _error(last_error(code, pointer), handle)


def _destroyed() -> NcclError:
    return _invalid("the communicator is destroyed (or was begun in a group that has not ended yet); make a new one")


def _invalid(message: str) -> NcclError:
    return NcclError(lib.hfreduceInvalidArgument, message)


# --- the library ---


def get_version() -> int:
    """The version of NCCL that this module stands in for, as NCCL counts: 10000 * major + 100 * minor + patch."""
    return _VERSION


def get_build_version() -> int:
    """The same as `get_version`: there is no other library that could differ."""
    return _VERSION


def get_unique_id() -> bytes:
    """Make a name for a new communicator: 128 bytes, to be sent to all its ranks over a trusted channel."""
    try:
        return _new_unique_id()
    except HfreduceError as error:
        raise _error(error) from None


# --- groups ---


class _Group(threading.local):
    """This thread's open group: C queues the operations, this the joining of communicators and who must not go meanwhile."""

    def __init__(self) -> None:
        self.depth = 0
        self.joins: list[Callable[..., None]] = []
        self.held: list[Handle] = []


_group = _Group()


def groupStart() -> None:
    """Begin a group: calls of this thread are queued, and launched together by the `groupEnd` of the outermost group."""
    _check(lib.hfreduceGroupStart())
    _group.depth += 1


def groupEnd() -> None:
    """End a group; the outermost one launches what was queued, and on host memory waits for it.

    Communicators made inside the group (NcclCommunicator, commSplit) join first, all at once. NcclError with the first error of
    a call of the group, after which nothing of it is launched; NCCL_ERROR_INVALID_USAGE without `groupStart`.
    """
    if _group.depth != 1:
        _check(lib.hfreduceGroupEnd())
        _group.depth -= 1
        return
    _group.depth = 0
    joins, held = _group.joins, _group.held
    _group.joins, _group.held = [], []
    try:
        try:
            _together(joins)
        except BaseException:
            grouping.cancel()
            raise
        _check(_wait(held, lib.hfreduceGroupEnd))
    finally:
        for handle in held:
            handle.let_go()


def _wait(handles: Sequence[Handle], call: Callable[..., int], *arguments: Any) -> int:
    """The result of a C call that waits; a signal handler's exception aborts the communicators."""
    try:
        return call_or_abort(handles, call, *arguments)
    except HfreduceError as error:
        raise _error(error, handles[0] if len(handles) == 1 else None) from None


def _together(joins: Sequence[Callable[..., None]]) -> None:
    """Call each in a thread of its own, for each waits for the others; raise the first error. A signal handler's ends them."""
    if len(joins) < 2:
        for join in joins:
            join()
        return
    errors: list[BaseException | None] = [None] * len(joins)
    stop = threading.Event()

    def run(i: int) -> None:
        try:
            joins[i](stop=stop)
        except BaseException as error:
            errors[i] = error

    threads = [threading.Thread(target=run, args=(i,), name=f"hfreduce-join-{i}") for i in range(len(joins))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        stop.set()
        for thread in threads:
            thread.join()
        raise
    for error in errors:
        if error is not None:
            raise error


# --- communicators ---


class NcclConfig:
    """Settings of a communicator that is to be made.

    split_share is accepted and without meaning here: communicators share what they can anyway. timeout and name are additions
    (None: as the communicator that is split, else HFREDUCE_TIMEOUT, which is 1800, and no name).
    """

    def __init__(self, split_share: int = 0, *, timeout: float | None = None, name: str | None = None) -> None:
        """timeout: seconds that an operation, and joining, may take at most. name: appears in errors and logs."""
        self._split_share = operator.index(split_share)
        self._settings = 0.0 if timeout is None else float(timeout), name

    @property
    def split_share(self) -> int:
        """As given."""
        return self._split_share


def _address(pointer: Any) -> Any:
    if type(pointer) is not int and (isinstance(pointer, np.ndarray) or not hasattr(type(pointer), "__index__")):
        raise TypeError(
            f"an address is an integer (x.ctypes.data of a NumPy array, x.data_ptr() of a torch tensor, x.data.ptr of a CuPy array), "
            f"not a {type(pointer).__name__}"
        )
    return ffi.cast("void *", operator.index(pointer))


class NcclCommunicator:
    """One rank of a communicator of `ndev` ranks, each a process, a thread, or one of several that one thread drives in groups.

    All counts are in elements of `datatype`, one of NCCL_INT8 ... NCCL_BFLOAT16; `op` is one of NCCL_SUM ... NCCL_AVG; buffers
    are addresses, in place where NCCL allows it. Methods raise NcclError with NCCL's status: NCCL_ERROR_INVALID_ARGUMENT for a
    wrong argument and after `destroy` (nothing was sent); NCCL_ERROR_INVALID_USAGE where ranks called different operations,
    NCCL_ERROR_REMOTE_ERROR where a peer was lost or has aborted, NCCL_ERROR_TIMEOUT where one did not come by the deadline (after
    these the communicator is broken: destroy it).

    An exception of a signal handler (KeyboardInterrupt) ends what waits: what joins gives up, and a communicator whose operation
    ran is aborted.

    One thread at a time uses a communicator; only `abort` and `check_async_error` may be called beside.
    """

    _handle: Handle
    _device: int | None = None

    def __new__(cls, *arguments: Any, **named: Any) -> NcclCommunicator:
        self = super().__new__(cls)
        self._handle = Handle()
        return self

    def __init__(self, ndev: int, commId: Any, rank: int, config: NcclConfig | None = None) -> None:
        """Join as rank `rank` of ndev. Returns when all have joined; inside a group that is when the group has ended.

        commId: the 128 bytes that `get_unique_id` gave on one rank; also a tuple of 128 integers, signed or not, as older
        programs have it.
        """
        unique_id = _unique_id(commId)
        ndev, rank = operator.index(ndev), operator.index(rank)
        if ndev < 1:
            raise _invalid(f"ndev: {ndev} is less than 1")
        if not 0 <= rank < ndev:
            raise _invalid(f"rank: {rank} is not from 0 to {ndev - 1} (ndev is {ndev})")
        self._begin(partial(self._join, ndev, unique_id, rank, config))

    @staticmethod
    def initAll(devices: Any) -> list[NcclCommunicator]:
        """Make the communicators of all ranks in this process, one a device: devices 0 to n - 1, or those of a list.

        Their calls are made in groups, or each in a thread of its own. Devices may be equal, and need not exist: on host memory
        they are only names.
        """
        if isinstance(devices, list):
            listed = [operator.index(device) for device in devices]
        elif isinstance(devices, int):
            listed = list(range(devices))
            if devices < 0:
                raise _invalid(f"devices: {devices} is less than 0")
        else:
            raise ValueError('"devices" should be an int or a list of int.')
        comms = [NcclCommunicator.__new__(NcclCommunicator) for _ in listed]
        NcclCommunicator._initAll(comms, len(listed), listed)
        return comms

    @staticmethod
    def _initAll(comms: list[NcclCommunicator], ndev: int, devlist: list[int] | None = None) -> None:
        """As `initAll`, for objects that have not been initialised, so that a subclass can bring its own."""
        devices = list(range(ndev)) if devlist is None else devlist
        if len(devices) != ndev or len(comms) < ndev:
            raise _invalid(f"ndev: is {ndev}, with {len(devices)} devices and {len(comms)} communicators")
        if any(device < 0 for device in devices):
            raise _invalid(f"devices: {devices} has a negative entry")
        if not ndev:
            return
        unique_id = UniqueId(_local_unique_id())
        for rank, comm in enumerate(comms[:ndev]):
            comm._device = devices[rank]
        joins = [partial(comm._join, ndev, unique_id, rank, None) for rank, comm in enumerate(comms[:ndev])]
        if _group.depth:
            _group.joins += joins
        else:
            _together(joins)

    def commSplit(self, color: int, key: int, config: NcclConfig | None = None) -> NcclCommunicator | None:
        """Make new communicators, one a color, ranks ordered by (key, rank). Collective.

        color -1: take part in the call but in no new communicator; the result is None. Inside a group the new one is there when
        the group has ended. config None: the settings of this one.
        """
        color, key = operator.index(color), operator.index(key)
        new = type(self).__new__(type(self))
        new._device = self._device
        self._begin(partial(self._split, color, key, new, config))
        return None if color == -1 else new

    # --- joining and leaving ---

    def _begin(self, join: Callable[..., None]) -> None:
        if _group.depth:
            _group.joins.append(join)
            self._handle.hold()
            _group.held.append(self._handle)
        else:
            join()

    def _join(
        self, ndev: int, unique_id: UniqueId, rank: int, config: NcclConfig | None, stop: threading.Event | None = None
    ) -> None:
        settings = (NcclConfig() if config is None else config)._settings
        try:
            self._handle.join(ndev, unique_id, rank, *settings, stop)
        except HfreduceError as error:
            raise _error(error) from None

    def _split(
        self, color: int, key: int, new: NcclCommunicator, config: NcclConfig | None, stop: threading.Event | None = None
    ) -> None:
        settings = (NcclConfig() if config is None else config)._settings
        self._handle.hold()
        try:
            self._handle.split(color, key, new._handle, *settings, stop)
        except HfreduceError as error:
            raise _error(error, self._handle) from None
        finally:
            self._handle.let_go()

    def destroy(self) -> None:
        """Wait for what was issued, leave, and free. Never fails on a broken communicator; again is legal.

        Not collective, but peers that still wait for this rank get an error.
        """
        self._handle.close()

    def abort(self) -> None:
        """End every wait on this communicator, here and on all ranks, and destroy it. May be called from any thread.

        What waited for it on this rank gets NCCL_ERROR_INVALID_USAGE, on the others NCCL_ERROR_REMOTE_ERROR.
        """
        self._handle.hold()
        try:
            with contextlib.suppress(HfreduceError):
                self._handle.abort()
            self._handle.close()
        finally:
            self._handle.let_go()

    # --- what it is ---

    @property
    def comm(self) -> int:
        """The handle (a hfreduceComm_t) as an integer; 0 after destroy."""
        return int(ffi.cast("uintptr_t", self._handle.pointer))

    def _number(self, function: Any) -> int:
        value = ffi.new("int *")
        pointer = self._handle.hold()
        try:
            _check_on(self._handle, pointer, function(pointer, value))
        finally:
            self._handle.let_go()
        return int(value[0])

    def device_id(self) -> int:
        """The device that `initAll` was told; else the one the communicator uses, -1 for host memory."""
        device = self._number(lib.hfreduceCommCuDevice)
        return device if self._device is None else self._device

    def rank_id(self) -> int:
        """This rank, from 0 to size() - 1."""
        return self._number(lib.hfreduceCommUserRank)

    def size(self) -> int:
        """Number of ranks."""
        return self._number(lib.hfreduceCommCount)

    def check_async_error(self) -> None:
        """Raise the error that broke this communicator, if one did. May be called from any thread."""
        self._handle.hold()
        try:
            error = self._handle.async_error()
        except HfreduceError as refused:
            raise _error(refused, self._handle) from None
        finally:
            self._handle.let_go()
        if error is not None:
            raise _error(error, self._handle)

    # --- operations ---

    def allReduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int) -> None:
        """Reduce `count` elements of all ranks' sendbuf with op into every rank's recvbuf."""
        issue(self, lib.hfreduceAllReduce, _address(sendbuf), _address(recvbuf), count, datatype, op, stream=stream)

    def reduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, root: int, stream: int) -> None:
        """Reduce `count` elements of all ranks' sendbuf with op into root's recvbuf."""
        issue(self, lib.hfreduceReduce, _address(sendbuf), _address(recvbuf), count, datatype, op, root, stream=stream)

    def broadcast(self, sendbuff: int, recvbuff: int, count: int, datatype: int, root: int, stream: int) -> None:
        """Copy `count` elements of root's sendbuff to every rank's recvbuff."""
        issue(self, lib.hfreduceBroadcast, _address(sendbuff), _address(recvbuff), count, datatype, root, stream=stream)

    def bcast(self, buff: int, count: int, datatype: int, root: int, stream: int) -> None:
        """Copy `count` elements of root's buff to every rank's."""
        issue(self, lib.hfreduceBcast, _address(buff), count, datatype, root, stream=stream)

    def reduceScatter(self, sendbuf: int, recvbuf: int, recvcount: int, datatype: int, op: int, stream: int) -> None:
        """Reduce size() * recvcount elements of all ranks' sendbuf with op; part r goes to rank r's recvbuf."""
        issue(self, lib.hfreduceReduceScatter, _address(sendbuf), _address(recvbuf), recvcount, datatype, op, stream=stream)

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
        """Put `count` elements of every rank's sendbuf, in rank order, into every rank's recvbuf, of size() * count."""
        issue(self, lib.hfreduceAllGather, _address(sendbuf), _address(recvbuf), count, datatype, stream=stream)

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        """Send `count` elements to rank peer, which receives as many. It may wait for that."""
        issue(self, lib.hfreduceSend, _address(sendbuf), count, datatype, peer, stream=stream)

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        """Receive the `count` elements that rank peer sends."""
        issue(self, lib.hfreduceRecv, _address(recvbuf), count, datatype, peer, stream=stream)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NcclError(
            lib.hfreduceInvalidUsage,
            "a communicator can be neither pickled nor copied, as its connections are this process's; send what get_unique_id() gives "
            "to the other process, and make a NcclCommunicator of that there (here, commSplit makes another one)",
        )

    def __repr__(self) -> str:
        if self._handle.closed:
            return f"<hfreduce.nccl.{type(self).__name__} destroyed or not made yet>"
        return f"<hfreduce.nccl.{type(self).__name__} rank {self.rank_id()} of {self.size()}>"


def issue(comm: NcclCommunicator, function: Any, *arguments: Any, stream: int) -> None:
    """Call a C function of the communicator with these arguments, its pointer and the stream; a group has it queued."""
    where, handle = _address(stream), comm._handle
    pointer = handle.hold()
    queued = False
    try:
        _check_on(handle, pointer, _wait((handle,), function, *arguments, pointer, where))
        queued = _group.depth > 0
    finally:
        if queued:
            _group.held.append(handle)
        else:
            handle.let_go()


def _local_unique_id() -> bytes:
    try:
        return _new_unique_id(local=True)
    except HfreduceError as error:
        raise _error(error) from None


def _unique_id(value: Any) -> UniqueId:
    if isinstance(value, (tuple, list)):
        try:
            value = bytes(operator.index(byte) & 0xFF if -128 <= byte < 256 else 256 for byte in value)
        except ValueError:
            raise ValueError("commId has an element that is no byte") from None
    elif not isinstance(value, (bytes, bytearray, memoryview)):
        raise TypeError(f"Argument 'commId' has incorrect type (expected bytes, got {type(value).__name__})")
    if len(value) != lib.HFREDUCE_UNIQUE_ID_BYTES:
        raise ValueError(f"commId length {len(value)} != {lib.HFREDUCE_UNIQUE_ID_BYTES}.")
    return UniqueId(value)


def _bytesize(datatype: int) -> int:
    """Bytes of an element of `datatype`."""
    if datatype not in TYPES:
        raise ValueError(f"Unknown datatype {datatype}")
    return TYPES[datatype].size
