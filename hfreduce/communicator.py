"""Communicator: the ranks that communicate, and the collectives over them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from hfreduce import grouping as _group
from hfreduce import uneven
from hfreduce._ffi import ffi, lib
from hfreduce._handle import NULL, Handle
from hfreduce.arguments import alike, counts_of, equal_parts, integer, places, rank_of, same_dtype, seconds, sums_to, tag_of
from hfreduce.buffer import Buffer, resolve
from hfreduce.connection import Connection, connections
from hfreduce.device import common_stream
from hfreduce.errors import HfreduceError, InvalidArgumentError, InvalidUsageError, text
from hfreduce.objects import ObjectCollectives
from hfreduce.params import default_timeout
from hfreduce.premul import PreMulSum
from hfreduce.types import OPS, op_code
from hfreduce.unique_id import UniqueId, get_unique_id
from hfreduce.work import Sender, Work

# Bound once: the fast paths make no attribute chain.
_ndarray = np.ndarray
_fast, _fast_launch = lib.hfr_ndarray_call, lib.hfr_ndarray_launch
_BROADCAST, _ALL_GATHER, _ALL_TO_ALL = lib.HFR_NDARRAY_BROADCAST, lib.HFR_NDARRAY_ALL_GATHER, lib.HFR_NDARRAY_ALL_TO_ALL
_ALL_REDUCE, _REDUCE, _REDUCE_SCATTER = (
    {op: which | code << 8 for op, code in OPS.items()}
    for which in (lib.HFR_NDARRAY_ALL_REDUCE, lib.HFR_NDARRAY_REDUCE, lib.HFR_NDARRAY_REDUCE_SCATTER)
)
_barrier = lib.hfreduceBarrier
_INVALID_ARGUMENT = lib.hfreduceInvalidArgument
_SIZES = ffi.typeof("size_t[]")
_open_groups = _group.open_groups


def _known_layout() -> bool:
    """Whether NumPy's array objects lie in memory as the C fast path reads them (csrc/python/ndarray.h)."""
    if sys.implementation.name != "cpython" or not getattr(sys, "_is_gil_enabled", lambda: True)():
        return False
    x = np.zeros((3, 5), np.float32)
    return bool(lib.hfr_ndarray_known(id(x), x.__array_interface__["data"][0], 2, 3, id(x.dtype), x.dtype.num))


class _Nothing:
    """No argument is of this type."""


# The type that takes the fast path.
_fast_type: Any = _ndarray if _known_layout() else _Nothing
_NO_BUFFER = Buffer(NULL, 0, 0, None)


class Communicator(ObjectCollectives):
    """nranks processes (or threads) that call the same operations in the same order.

    Arrays are numpy arrays, torch CPU tensors, or objects with the buffer protocol, __array_interface__ or DLPack on the
    host; on CUDA devices torch tensors, or objects with __cuda_array_interface__ or DLPack (CuPy, JAX, Numba). C-contiguous, of
    one of the dtypes of `hfreduce.DTYPE_NAMES`. Counts and dtypes are the same on all ranks. A call on the host returns when
    its result is there; with async_op=True it returns a Work at once. The result is the array that was written.

    op is "sum", "prod", "max", "min", "avg", an op number, or an op made by `pre_mul_sum`. fp16, bf16 and fp8
    accumulate in float32 and round once a node; min and max propagate NaN; avg of integers truncates toward zero. All ranks get identical bits.

    A call on device memory, or with stream=, is put on a stream and returns at once: it begins when what is on the stream has
    ended, and what is put there later sees its result. As for a kernel, the arrays must live until then, and the host looks at the
    result after it has synchronized with the stream. stream is an integer (a CUstream) or an object with __cuda_stream__,
    .cuda_stream (torch), .ptr (CuPy) or .handle (Numba). None: no stream for host memory; for device memory the current
    stream of PyTorch or CuPy, the one that __cuda_array_interface__ names, or the legacy default stream. Given a stream, see
    to it that arrays which other streams write are ready on it (arrays known by DLPack alone are asked for that).

    Errors of every call: InvalidArgumentError (a wrong argument; nothing was sent), InvalidUsageError (closed
    communicator), MismatchError, DeadlineError, PeerLostError, AbortedError, CorruptDataError. After one of the last five
    the communicator is broken: close it.

    Names and rules are NCCL's. Collectives on one communicator must not overlap: when two threads call at once, the later call is
    refused with InvalidUsageError, and the other goes on. A collective lasts until it returns; with async_op=True it only launches,
    and waiting for its Work is no call on the communicator: one thread may launch and another wait. Sends, receives and everything
    else may be called beside it. `close` ends the calls in which other threads wait with AbortedError, here and on all ranks, and
    what they call later with InvalidUsageError.
    """

    __slots__ = (
        "__weakref__",
        "_handle",
        "_host",
        "_local_nranks",
        "_local_rank",
        "_node",
        "_nodes",
        "_nranks",
        "_rank",
        "_timeout",
        "_transports",
    )

    def __init__(
        self, rank: int, nranks: int, unique_id: Any = None, *, timeout: float | None = None, name: str | None = None
    ) -> None:
        """Join; returns when all nranks ranks have joined. Collective.

        unique_id: the 128 bytes from `get_unique_id` of one rank, sent to all (may be None if nranks is 1). timeout:
        seconds that an operation may take (None: HFREDUCE_TIMEOUT, else 1800); joining may take HFREDUCE_JOIN_TIMEOUT seconds
        (300), and no more than timeout. name: appears in errors and logs. An exception of a signal handler (KeyboardInterrupt) ends
        the call; those who have joined then get AbortedError.
        """
        self._handle = Handle()
        rank, nranks = integer(rank, "rank"), integer(nranks, "nranks")
        if nranks < 1:
            raise InvalidArgumentError(f"nranks: {nranks} is less than 1")
        rank_of(rank, nranks, "rank")
        limit = default_timeout() if timeout is None else seconds(timeout)
        if unique_id is None and nranks > 1:
            raise InvalidArgumentError("unique_id: None is for a single rank; send get_unique_id() of one rank to all of them")
        self._handle.join(nranks, get_unique_id(local=True) if unique_id is None else UniqueId(unique_id), rank, limit, name)
        self._look(limit)

    @classmethod
    def _of(cls, handle: Handle, timeout: float) -> Communicator:
        """The communicator of a handle that a split or shrink has made."""
        comm = Communicator.__new__(Communicator)
        comm._handle = handle
        comm._look(timeout)
        return comm

    def _look(self, timeout: float) -> None:
        info = self._handle.info()
        self._rank, self._nranks = int(info.rank), int(info.nranks)
        self._local_rank, self._local_nranks = int(info.local_rank), int(info.local_nranks)
        self._node, self._nodes = int(info.node), int(info.nnodes)
        self._host, self._transports = text(info.host), text(info.transports)
        self._timeout = timeout

    # --- what it is ---

    @property
    def rank(self) -> int:
        """This rank, from 0 to nranks - 1."""
        return self._rank

    @property
    def nranks(self) -> int:
        """Number of ranks."""
        return self._nranks

    @property
    def local_rank(self) -> int:
        """This rank among those of its node."""
        return self._local_rank

    @property
    def local_nranks(self) -> int:
        """Number of ranks on this node."""
        return self._local_nranks

    @property
    def node(self) -> int:
        """This rank's node; nodes are numbered in the order of their lowest rank."""
        return self._node

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self._nodes

    @property
    def host(self) -> str:
        """Name of this rank's host."""
        return self._host

    @property
    def transports(self) -> tuple[str, ...]:
        """The transports in use, e.g. ("shm", "tcp")."""
        return tuple(part for part in self._transports.split(",") if part)

    def connections(self) -> tuple[Connection, ...]:
        """What has gone between this rank and each peer that it has exchanged something with, by peer.

        A look, not a synchronization: of a running operation it shows what has gone so far. May be called from any thread.
        """
        try:
            return connections(self._handle.open())
        except InvalidArgumentError:
            self._handle.open()  # it was closed meanwhile
            raise

    @property
    def timeout(self) -> float:
        """Seconds that an operation may take; settable, for those issued from then on. Split and shrink take no longer."""
        return self._timeout

    @timeout.setter
    def timeout(self, limit: float) -> None:
        value = seconds(limit)
        self._handle.set_timeout(value)
        self._timeout = value

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._handle.closed

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InvalidUsageError(
            "a communicator can be neither pickled nor copied, as its connections are this process's; in another process call "
            "hfreduce.init(), or make a Communicator of its own rank and of the unique id that this process sends it "
            "(here, duplicate() makes another one of the same ranks)"
        )

    def __repr__(self) -> str:
        if self._handle.closed:
            return "<hfreduce.Communicator closed>"
        return (
            f"<hfreduce.Communicator rank {self._rank} of {self._nranks}, node {self._node} of {self._nodes} ({self._host}), "
            f"{self._transports or 'no transport'}>"
        )

    # --- collectives ---

    def all_reduce(self, x: Any, out: Any = None, op: Any = "sum", *, async_op: bool = False, stream: Any = None) -> Any:
        """Reduce x over all ranks with op into out on every rank; in place when out is None. out has x's count and dtype."""
        core = self._handle
        # Most calls are of this kind, and small ones take less than a microsecond in all: each look-up here shows. What is wrong
        # (a negative code), or special, the general path finds out and says. So in the other collectives.
        if out is None and type(x) is _fast_type and not (async_op or _open_groups or core.running or stream is not None):
            try:
                code = _fast(_ALL_REDUCE.get(op, -1) if type(op) is str else -1, id(x), 0, 0, core.pointer)
            except BaseException:
                core.salvage(x, x)
                raise
            if code == 0:
                return x
            if code > 0 and code != _INVALID_ARGUMENT:
                return core.not_at_once(code, x, x)
        elif (
            type(x) is _fast_type
            and type(out) is _fast_type
            and not (async_op or _open_groups or core.running or stream is not None)
        ):
            try:
                code = _fast(_ALL_REDUCE.get(op, -1) if type(op) is str else -1, id(x), id(out), 0, core.pointer)
            except BaseException:
                core.salvage((x, out), out)
                raise
            if code == 0:
                return out
            if code > 0 and code != _INVALID_ARGUMENT:
                return core.not_at_once(code, (x, out), out)
        elif (
            async_op
            and type(x) is _fast_type
            and (out is None or type(out) is _fast_type)
            and stream is None
            and not _open_groups
        ):
            call = _ALL_REDUCE.get(op, -1) if type(op) is str else -1
            work = _fast_launch(call, id(x), 0 if out is None else id(out), 0, core.pointer)
            if work:
                return Work(work, (x, out), x if out is None else out, core.running)
            code = lib.hfr_ndarray_why()
            if code > 0 and code != _INVALID_ARGUMENT:
                raise core.failure(code)
        source, target, result = self._in_place_or_out(x, out, stream)
        return core.issue(
            lib.hfreduceAllReduce,
            (source.pointer, target.pointer, source.elements, source.dtype, self._op(op)),
            (source.keep, target.keep, op),
            result,
            async_op,
            common_stream(stream, source.stream, target.stream),
        )

    def reduce(
        self, x: Any, out: Any = None, op: Any = "sum", root: int = 0, *, async_op: bool = False, stream: Any = None
    ) -> Any:
        """Reduce x over all ranks with op into out on rank root; in place when out is None.

        Elsewhere out is ignored and x is only read. out has x's count and dtype. Returns the array written on root, x elsewhere.
        """
        core = self._handle
        if (
            type(x) is _fast_type
            and type(root) is int
            and 0 <= root < self._nranks
            and (out is None or root != self._rank or type(out) is _fast_type)
            and type(op) is str
            and not (async_op or _open_groups or core.running or stream is not None)
        ):
            result = x if out is None or root != self._rank else out
            try:
                code = _fast(_REDUCE.get(op, -1), id(x), 0 if result is x else id(result), root, core.pointer)
            except BaseException:
                core.salvage((x, result), result)
                raise
            if code == 0:
                return result
            if code > 0 and code != _INVALID_ARGUMENT:
                return core.not_at_once(code, (x, result), result)
        root = rank_of(root, self._nranks, "root")
        if root == self._rank:
            source, target, result = self._in_place_or_out(x, out, stream)
        else:
            source, target, result = resolve(x, "x", writable=False, stream=stream), _NO_BUFFER, x
        return core.issue(
            lib.hfreduceReduce,
            (source.pointer, target.pointer, source.elements, source.dtype, self._op(op), root),
            (source.keep, target.keep, op),
            result,
            async_op,
            common_stream(stream, source.stream, target.stream),
        )

    def broadcast(self, x: Any, root: int = 0, *, out: Any = None, async_op: bool = False, stream: Any = None) -> Any:
        """Copy root's x to x on all ranks; or to out, of x's count and dtype, where out is given.

        With out, x is only read, and only on root.
        """
        core = self._handle
        if (
            type(x) is _fast_type
            and type(root) is int
            and 0 <= root < self._nranks
            and (out is None or type(out) is _fast_type)
            and not (async_op or _open_groups or core.running or stream is not None)
        ):
            result = x if out is None else out
            try:
                code = _fast(_BROADCAST, id(x), 0 if result is x else id(out), root, core.pointer)
            except BaseException:
                core.salvage((x, result), result)
                raise
            if code == 0:
                return result
            if code > 0 and code != _INVALID_ARGUMENT:
                return core.not_at_once(code, (x, result), result)
        root = rank_of(root, self._nranks, "root")
        if out is None:
            source = target = resolve(x, "x", writable=root != self._rank, stream=stream)
            result = x
        else:
            target, result = resolve(out, "out", writable=True, stream=stream), out
            source = alike(resolve(x, "x", writable=False, stream=stream), target) if root == self._rank else target
        return core.issue(
            lib.hfreduceBroadcast,
            (source.pointer, target.pointer, target.elements, target.dtype, root),
            (source.keep, target.keep),
            result,
            async_op,
            common_stream(stream, source.stream, target.stream),
        )

    def all_gather(
        self, x: Any, out: Any, *, counts: Sequence[int] | None = None, async_op: bool = False, stream: Any = None
    ) -> Any:
        """Gather x of all ranks, in rank order, into out on every rank; out has nranks times x's count. In place: x is out's own part.

        counts: x may differ in size from rank to rank. counts[r] is the number of elements of rank r's x, 0 allowed, and out has
        sum(counts); the same list on all ranks, else MismatchError.

            parts = comm.all_gather(np.full(comm.rank, comm.rank), np.empty(3, int), counts=[0, 1, 2])  # 1 2 2, on three ranks
        """
        core = self._handle
        if (
            type(x) is _fast_type
            and type(out) is _fast_type
            and counts is None
            and not (async_op or _open_groups or core.running or stream is not None)
        ):
            try:
                code = _fast(_ALL_GATHER, id(x), id(out), 0, core.pointer)
            except BaseException:
                core.salvage((x, out), out)
                raise
            if code == 0:
                return out
            if code > 0 and code != _INVALID_ARGUMENT:
                return core.not_at_once(code, (x, out), out)
        if counts is not None:
            return uneven.all_gather(core, self._nranks, x, out, counts, async_op, stream)
        source, target = resolve(x, "x", writable=False, stream=stream), resolve(out, "out", writable=True, stream=stream)
        equal_parts(source, "x", target, "out", self._nranks)
        return core.issue(
            lib.hfreduceAllGather,
            (source.pointer, target.pointer, source.elements, source.dtype),
            (source.keep, target.keep),
            out,
            async_op,
            common_stream(stream, source.stream, target.stream),
        )

    def reduce_scatter(self, x: Any, out: Any, op: Any = "sum", *, async_op: bool = False, stream: Any = None) -> Any:
        """Reduce x over all ranks with op, part r of the result to out on rank r.

        x has nranks times out's count. In place: out is x's own part.
        """
        core = self._handle
        if (
            type(x) is _fast_type
            and type(out) is _fast_type
            and not (async_op or _open_groups or core.running or stream is not None)
        ):
            try:
                code = _fast(_REDUCE_SCATTER.get(op, -1) if type(op) is str else -1, id(x), id(out), 0, core.pointer)
            except BaseException:
                core.salvage((x, out), out)
                raise
            if code == 0:
                return out
            if code > 0 and code != _INVALID_ARGUMENT:
                return core.not_at_once(code, (x, out), out)
        source, target = resolve(x, "x", writable=False, stream=stream), resolve(out, "out", writable=True, stream=stream)
        equal_parts(target, "out", source, "x", self._nranks)
        return core.issue(
            lib.hfreduceReduceScatter,
            (source.pointer, target.pointer, target.elements, target.dtype, self._op(op)),
            (source.keep, target.keep, op),
            out,
            async_op,
            common_stream(stream, source.stream, target.stream),
        )

    def all_to_all(
        self,
        x: Any,
        out: Any,
        send_counts: Sequence[int] | None = None,
        recv_counts: Sequence[int] | None = None,
        *,
        async_op: bool = False,
        stream: Any = None,
    ) -> Any:
        """Send part p of x to rank p, and put what rank p sent to part p of out.

        Without counts the nranks parts are equal, and out may be x. With both, send_counts[p] and recv_counts[p] are the
        elements for and from rank p, the parts lie one after the other, and x and out must not overlap.
        """
        core = self._handle
        if (
            type(x) is _fast_type
            and type(out) is _fast_type
            and send_counts is None
            and recv_counts is None
            and not (async_op or _open_groups or core.running or stream is not None)
        ):
            try:
                code = _fast(_ALL_TO_ALL, id(x), id(out), 0, core.pointer)
            except BaseException:
                core.salvage((x, out), out)
                raise
            if code == 0:
                return out
            if code > 0 and code != _INVALID_ARGUMENT:
                return core.not_at_once(code, (x, out), out)
        source, target = resolve(x, "x", writable=False, stream=stream), resolve(out, "out", writable=True, stream=stream)
        same_dtype(source, target)
        if send_counts is None and recv_counts is None:
            if source.elements != target.elements:
                raise InvalidArgumentError(
                    f"out: has {target.elements} elements, x has {source.elements}; they must be equal (or give counts)"
                )
            if source.elements % self._nranks:
                raise InvalidArgumentError(
                    f"x: {source.elements} elements are not divisible by nranks {self._nranks}; pad it, or give "
                    f"send_counts and recv_counts"
                )
            return core.issue(
                lib.hfreduceAlltoAll,
                (source.pointer, target.pointer, source.elements // self._nranks, source.dtype),
                (source.keep, target.keep),
                out,
                async_op,
                common_stream(stream, source.stream, target.stream),
            )
        if send_counts is None or recv_counts is None:
            missing = "send_counts" if send_counts is None else "recv_counts"
            raise InvalidArgumentError(f"{missing}: give both send_counts and recv_counts, or neither")
        sends, recvs = counts_of(send_counts, "send_counts", self._nranks), counts_of(recv_counts, "recv_counts", self._nranks)
        sums_to(sends, "send_counts", source.elements, "x")
        sums_to(recvs, "recv_counts", target.elements, "out")
        send, send_displs, recv, recv_displs = (ffi.new(_SIZES, n) for n in (sends, places(sends), recvs, places(recvs)))
        return core.issue(
            lib.hfreduceAlltoAllv,
            (source.pointer, send, send_displs, target.pointer, recv, recv_displs, source.dtype),
            (source.keep, target.keep, send, send_displs, recv, recv_displs),
            out,
            async_op,
            common_stream(stream, source.stream, target.stream),
        )

    def gather(
        self,
        x: Any,
        out: Any = None,
        root: int = 0,
        *,
        counts: Sequence[int] | None = None,
        async_op: bool = False,
        stream: Any = None,
    ) -> Any:
        """Gather x of all ranks, in rank order, into out on rank root, where out has nranks times x's count.

        Elsewhere out is ignored. In place: the root's x is out's own part. Returns out on root, None elsewhere. counts: as in
        `all_gather`, the same list on all ranks, also where out is ignored (on a stream only the own entry and the root's are
        compared).
        """
        root = rank_of(root, self._nranks, "root")
        if counts is not None:
            return uneven.gather(self._handle, self._nranks, x, out, counts, root, async_op, stream)
        source, target = resolve(x, "x", writable=False, stream=stream), _NO_BUFFER
        if root == self._rank:
            if out is None:
                raise InvalidArgumentError(
                    f"out: the root needs an array of nranks * {source.elements} = {self._nranks * source.elements} elements"
                )
            target = resolve(out, "out", writable=True, stream=stream)
            equal_parts(source, "x", target, "out", self._nranks)
        return self._handle.issue(
            lib.hfreduceGather,
            (source.pointer, target.pointer, source.elements, source.dtype, root),
            (source.keep, target.keep),
            out if root == self._rank else None,
            async_op,
            common_stream(stream, source.stream, target.stream),
        )

    def scatter(self, x: Any, out: Any, root: int = 0, *, async_op: bool = False, stream: Any = None) -> Any:
        """Put part r of root's x, which has nranks times out's count, to out on rank r.

        Elsewhere x is ignored and may be None. In place: the root's out is x's own part.
        """
        root = rank_of(root, self._nranks, "root")
        source, target = _NO_BUFFER, resolve(out, "out", writable=True, stream=stream)
        if root == self._rank:
            if x is None:
                raise InvalidArgumentError(
                    f"x: the root needs an array of nranks * {target.elements} = {self._nranks * target.elements} elements"
                )
            source = resolve(x, "x", writable=False, stream=stream)
            equal_parts(target, "out", source, "x", self._nranks)
        return self._handle.issue(
            lib.hfreduceScatter,
            (source.pointer, target.pointer, target.elements, target.dtype, root),
            (source.keep, target.keep),
            out,
            async_op,
            common_stream(stream, source.stream, target.stream),
        )

    def send(self, x: Any, peer: int, *, tag: int = 0, async_op: bool = False, stream: Any = None) -> Any:
        """Send x to rank peer, which receives the same count and dtype with the same tag.

        It may wait for the receive. Returns x.
        """
        peer = rank_of(peer, self._nranks, "peer")
        source = resolve(x, "x", writable=False, stream=stream)
        return self._handle.issue(
            lib.hfreduceSendTag,
            (source.pointer, source.elements, source.dtype, peer, tag_of(tag)),
            source.keep,
            x,
            async_op,
            common_stream(stream, source.stream, None),
        )

    def recv(self, x: Any, peer: int, *, tag: int = 0, async_op: bool = False, stream: Any = None) -> Any:
        """Receive into x what rank peer sends with this tag, in the order sent. Returns x.

        As in MPI, messages with other tags do not stand in its way; a message that fits several receives goes to the one
        posted first.
        """
        peer = rank_of(peer, self._nranks, "peer")
        target = resolve(x, "x", writable=True, stream=stream)
        return self._handle.issue(
            lib.hfreduceRecvTag,
            (target.pointer, target.elements, target.dtype, peer, tag_of(tag)),
            target.keep,
            x,
            async_op,
            common_stream(stream, target.stream, None),
        )

    def recv_any(self, x: Any, *, tag: int = 0, async_op: bool = False, stream: Any = None) -> Any:
        """Receive into x what any rank (this one too) sends with this tag. Returns the sender's rank.

        With async_op the Work's `wait` returns the rank. In a group the call returns None, and the rank stands in the group's
        `results`. Unlike others it waits on the host on a stream too: the rank is told to the host.
        """
        target, sender = resolve(x, "x", writable=True, stream=stream), Sender()
        where = common_stream(stream, target.stream, None)
        waits = where is not None and not async_op and not (_open_groups and _group.current() is not None)
        result = self._handle.issue(
            lib.hfreduceRecvAny,
            (target.pointer, target.elements, target.dtype, tag_of(tag), sender.cell),
            (target.keep, sender),
            sender,
            async_op or waits,
            where,
        )
        if waits:
            return result.wait()
        if result is not sender:
            return result
        return None if _open_groups and _group.current() is not None else sender.rank()

    def barrier(self, *, async_op: bool = False, stream: Any = None) -> Any:
        """Wait until all ranks have come here."""
        core = self._handle
        if not (async_op or _open_groups or core.running or stream is not None):
            try:
                code = _barrier(core.pointer, NULL)
            except BaseException:
                core.salvage((), None)
                raise
            return None if code == 0 else core.not_at_once(code, (), None)
        return core.issue(lib.hfreduceBarrier, (), (), None, async_op, common_stream(stream, None, None))

    def group(self, *, async_op: bool = False) -> _group.Group:
        """Launch the calls made inside `with comm.group():` together: needed for a send and a receive that depend on each other.

        async_op=True: leaving it does not wait; `work` of the group is then their common Work.
        """
        self._handle.open()
        return _group.Group(async_op=async_op, running=self._handle.running)

    def pre_mul_sum(self, factor: Any, dtype: Any) -> PreMulSum:
        """Make an op for arrays of `dtype` that multiplies this rank's input by factor before summing.

        Local; ranks may differ in factor.
        """
        return PreMulSum(self._handle, factor, dtype)

    # --- other communicators, and the end ---

    def split(
        self, color: int | None, key: int = 0, *, timeout: float | None = None, name: str | None = None
    ) -> Communicator | None:
        """Make new communicators, one a color, their ranks ordered by (key, rank). Collective.

        color None or -1: take part in the call but in no new communicator; the result is then None. timeout None: this one's. An
        exception of a signal handler ends the call, and aborts this communicator unless all ranks' colors were known.
        """
        color, key = -1 if color is None else integer(color, "color"), integer(key, "key")
        limit = self._timeout if timeout is None else seconds(timeout)
        new = Handle()
        self._handle.split(color, key, new, limit, name)
        return None if new.closed else Communicator._of(new, limit)

    def duplicate(self) -> Communicator:
        """Make a communicator of the same ranks, whose operations are independent of this one's. Collective."""
        comm = self.split(0, self._rank)
        assert comm is not None
        return comm

    def shrink(
        self, exclude: Iterable[int], *, abort: bool = False, timeout: float | None = None, name: str | None = None
    ) -> Communicator:
        """Make a communicator of these ranks without those in `exclude`; they keep their order. Collective over those that stay.

        All who stay give the same ranks; the others do not call. It needs nothing of this communicator but who its ranks are, so it
        works after a rank has died. abort: first end what runs on this one, as `abort` does. timeout None: this one's. This
        one stays; close it.
        """
        ranks = [integer(rank, "exclude") for rank in exclude]
        limit = self._timeout if timeout is None else seconds(timeout)
        new = Handle()
        self._handle.shrink(ranks, abort, new, limit, name)
        return Communicator._of(new, limit)

    def async_error(self) -> HfreduceError | None:
        """The error that broke this communicator, or None. May be called from any thread."""
        return self._handle.async_error()

    def abort(self) -> None:
        """End every wait on this communicator, here and on all ranks, with AbortedError. May be called from any thread."""
        self._handle.abort()

    def close(self) -> None:
        """Wait for what was issued, 30 s at most, leave, and free. Never fails on a broken communicator; closing twice is legal.

        Not collective, but peers that still wait for this rank get an error. An exception of a signal handler (KeyboardInterrupt)
        ends the wait as `abort` does.
        """
        self._handle.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and not all(work.done() for work in tuple(self._handle.running)):
            self.abort()  # what still runs will never be waited for
        self.close()

    # --- parts of the calls above ---

    def _op(self, op: Any) -> int:
        return op.resolve(self._handle) if isinstance(op, PreMulSum) else op_code(op)

    def _in_place_or_out(self, x: Any, out: Any, stream: Any) -> tuple[Buffer, Buffer, Any]:
        if out is None:
            buffer = resolve(x, "x", writable=True, stream=stream)
            return buffer, buffer, x
        target = resolve(out, "out", writable=True, stream=stream)
        return alike(resolve(x, "x", writable=False, stream=stream), target), target, out


def core_of(comm: Communicator) -> Handle:
    """The handle under a communicator, for the faces that issue calls of their own on it."""
    return comm._handle
