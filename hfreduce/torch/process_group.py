"""The process group: every operation of torch.distributed on a hfreduce.Communicator, for CPU tensors.

One mixin holds the logic, under torch's names of the operations; what it is mixed into depends on what the installed torch
offers (base.py). A call checks its tensors, says which addresses the core shall use, and returns a Work. Tensors that the core
cannot use as they lie (not contiguous, lists of parts) go through a contiguous copy, and the Work's `finish` brings the result
to its place.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hfreduce._ffi import ffi, lib
from hfreduce.communicator import Communicator
from hfreduce.errors import (
    DeadlineError,
    HfreduceError,
    InvalidArgumentError,
    InvalidUsageError,
    MismatchError,
    check,
)
from hfreduce.torch.dtypes import CORE_OPS, NATIVE, Reduction, moved, op_name, reduction
from hfreduce.torch.errors import as_torch
from hfreduce.torch.recorder import FlightRecorder
from hfreduce.torch.work import CoalescedWork, Work
from hfreduce.unique_id import UniqueId, get_unique_id
from hfreduce.work import Work as CoreWork

_tensor_all_reduce = lib.hfr_tensor_all_reduce
_all_reduce = lib.hfreduceAllReduce
_profiling: Callable[[], bool] = getattr(torch.autograd, "_profiler_enabled", lambda: False)
_strided = torch.strided
_CPU = torch.device("cpu")
_SUM = dist.ReduceOp.SUM

# A group that is shut down with operations running waits this long for them before it aborts.
_SHUTDOWN_GRACE = 10.0

Call = tuple[Any, tuple[Any, ...]]


def _address(tensor: Any) -> Any:
    return ffi.cast("void *", tensor.data_ptr())


def _is_dense(tensor: Any) -> bool:
    """Whether the core can use its memory as it lies."""
    return bool(tensor.is_contiguous()) and not tensor.is_conj() and not tensor.is_neg()


def _dense(tensor: Any) -> Any:
    """The tensor, or a contiguous copy of it."""
    return tensor if _is_dense(tensor) else tensor.contiguous().resolve_conj().resolve_neg()


def _adjacent(tensors: Sequence[Any]) -> bool:
    """Whether dense tensors of one dtype lie one after the other, as the chunks of one do."""
    place = tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != place or not _is_dense(tensor):
            return False
        place += tensor.numel() * tensor.element_size()
    return True


def _scatter_back(parts: Sequence[Any], flat: Any) -> Callable[[], None]:
    """A finish that copies consecutive parts of `flat` to the tensors."""

    def finish() -> None:
        place = 0
        for part in parts:
            count = part.numel()
            part.copy_(flat[place : place + count].view(part.shape))
            place += count

    return finish


def _one(x: Any, name: str) -> Any:
    """torch passes a single tensor as a list of one."""
    if isinstance(x, torch.Tensor):
        return x
    if len(x) != 1:
        raise InvalidArgumentError(f"{name}: {len(x)} tensors; a call takes one (one device a rank)")
    return x[0]


class Options:
    """Backend options as torch's code expects to find them on a backend; plain, so that they can be copied."""

    def __init__(self, timeout: timedelta, group_name: str = "", global_ranks: Sequence[int] = ()) -> None:
        self.backend = "hfreduce"
        self._timeout = timeout
        self.group_name = group_name
        self.global_ranks_in_group = list(global_ranks)
        self.is_high_priority_stream = False


def _operation(method: Any) -> Any:
    """Name the operation in torch.profiler, and raise errors that are torch's too."""
    label = "hfreduce:" + method.__name__.strip("_")

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            if _profiling():
                with torch.autograd.profiler.record_function(self._label(label)):
                    return method(self, *args, **kwargs)
            return method(self, *args, **kwargs)
        except HfreduceError as error:
            raise self._as_torch(error) from None

    return call


#: c10d's method -> the name of the operation that torch.profiler shows for the other backends.
_LABELS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "allgather_base": "_all_gather_base",
    "allgather_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_base": "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "recv_anysource": "recvAnySource",
}


class ProcessGroupMixin:
    """The operations. `_setup` takes the place of a constructor: torch's bases have their own."""

    _comm: Communicator
    _native: Any = None  # the shim, where the group is built on it

    def _setup(
        self,
        comm: Communicator,
        store: Any,
        timeout: timedelta,
        name: str = "",
        global_ranks: Sequence[int] = (),
    ) -> None:
        self._comm = comm
        self._store = store
        self._rank, self._size = comm.rank, comm.nranks
        self._default_seconds = self._seconds = comm.timeout
        self._name, self._desc = name, "undefined"
        self._options = Options(timeout, name, global_ranks)
        self._coalescing: list[Any] | None = None
        self._barriers = itertools.count()
        self._splits = itertools.count()
        self._told = False
        self._seq_base = 0
        self.recorder = FlightRecorder(name, self._rank, self._size)
        self._record = self.recorder.add
        self._detail = os.environ.get("TORCH_DISTRIBUTED_DEBUG", "").upper() == "DETAIL" and self._size > 1
        # sync all_reduce of what the core takes as it is goes the short way unless something must be looked at
        self._plain = not self._detail

    # --- what it is ---

    @property
    def communicator(self) -> Communicator:
        """The communicator under this group; its users and the group's must issue in one order on all ranks."""
        return self._comm

    def getBackendName(self) -> str:
        return "hfreduce"

    _get_backend_name = name = getBackendName

    def getRank(self) -> int:
        return self._rank

    rank = getRank

    def getSize(self) -> int:
        return self._size

    size = getSize

    def get_group_store(self) -> Any:
        return self._store

    def setGroupName(self, name: str) -> None:
        self._name = self.recorder.name = self._options.group_name = name

    def getGroupName(self) -> str:
        return self._name

    def setGroupDesc(self, desc: str) -> None:
        self._desc = desc

    def getGroupDesc(self) -> str:
        return self._desc

    @property
    def options(self) -> Options:
        """A copy is given to the groups that are split off."""
        return self._options

    @property
    def supports_splitting(self) -> bool:
        return False

    @property
    def supports_coalescing(self) -> bool:
        return True

    @property
    def supports_time_estimate(self) -> bool:
        return False

    def supports_tensor_alloc(self, device: Any) -> bool:
        return False

    @property
    def _device_types(self) -> list[Any]:
        return [_CPU]

    def _get_backend(self, device: Any) -> Any:
        kind = torch.device(device).type
        if kind != "cpu":
            raise RuntimeError(f'No backend type associated with device type {kind}: "hfreduce" handles CPU tensors')
        return self

    def _has_hooks(self) -> bool:
        return False

    def _wait_for_pending_works(self) -> None:
        for work in list(self._comm._running):
            work.exception()

    def _set_sequence_number_for_group(self) -> None:
        self._seq_base = self.recorder.seq

    def _get_sequence_number_for_group(self) -> int:
        return self.recorder.seq - self._seq_base

    def set_timeout(self, timeout: timedelta) -> None:
        """The deadline of operations from now on."""
        self._default_seconds = self._comm.timeout = timeout.total_seconds()
        self._seconds = self._default_seconds
        self._options._timeout = timeout

    _set_default_timeout = setTimeout = set_timeout

    def flight_record(self) -> list[dict[str, Any]]:
        """The last operations: see FlightRecorder.entries."""
        return self.recorder.entries()

    # --- the end ---

    def abort(self) -> None:
        """End every wait on this group, here and on all ranks. Again is no fault."""
        self._comm.abort()

    def shutdown(self) -> None:
        """Leave. Operations that run have a while to end, then they are aborted."""
        comm = self._comm
        if comm.closed:
            return
        end = time.monotonic() + min(_SHUTDOWN_GRACE, self._default_seconds)
        while not all(work.done() for work in comm._running):
            if time.monotonic() > end:
                comm.abort()
                break
            time.sleep(0.001)
        comm.close()

    # --- errors ---

    def _as_torch(self, error: HfreduceError) -> HfreduceError:
        """The error as torch's users catch it; with the flight record where it says more."""
        if isinstance(error, RuntimeError) and type(error).__module__.startswith("hfreduce.torch"):
            return error
        extra = ""
        if isinstance(error, InvalidUsageError) and self._comm.closed:
            return as_torch(
                InvalidUsageError("the process group was destroyed; make a new one with init_process_group or new_group")
            )
        if isinstance(error, MismatchError):
            extra = self._both_sides(error)
        if isinstance(error, DeadlineError):
            extra = " (the timeout of the process group or of the call)"  # the word that torch's users look for
            if not self._told:
                self._told = True
                self.recorder.dump(str(error))
        return as_torch(error, extra)

    def _both_sides(self, error: MismatchError) -> str:
        """What this rank and the other called, with shapes: the core knows counts only. Through the store, if that answers soon."""
        mine = self.recorder.last()
        text = f"\nrank {self._rank} of this group called {mine}"
        other = error.rank if error.peer == self._rank else error.peer  # who noticed it may be the other
        try:
            key = "hfreduce/mismatch/"
            self._store.set(f"{key}{self._rank}", mine)
            if other is None or other == self._rank:
                return text
            self._store.wait([f"{key}{other}"], timedelta(seconds=1))
            return f"{text}; rank {other} called {self._store.get(f'{key}{other}').decode()}"
        except Exception:  # the store is a convenience: its failure must not hide the mismatch
            return text

    def _label(self, label: str) -> str:
        prefix, _, name = label.partition(":")
        return f"{prefix}:{_LABELS.get(name, name)}"

    # --- running the core ---

    def _deadline(self, opts: Any) -> None:
        """Set the communicator's deadline for the next operation: the options', else the group's."""
        timeout = None if opts is None else opts.timeout
        seconds = self._default_seconds
        if timeout is not None and timeout.days >= 0:
            seconds = timeout.total_seconds() or seconds
        if seconds != self._seconds:
            self._comm.timeout = self._seconds = seconds

    def _run(
        self,
        name: str,
        calls: Sequence[Call],
        keep: Any,
        outputs: Sequence[Any],
        opts: Any = None,
        finish: Callable[[], None] | None = None,
        source: Callable[[], int] | None = None,
    ) -> Work:
        """Issue calls of the core as one operation. keep: what must live until it has ended."""
        shown = outputs if outputs else keep
        shapes = tuple([t.shape for t in shown if isinstance(t, torch.Tensor)]) if isinstance(shown, (list, tuple)) else ()
        dtype = shown[0].dtype if shapes else ""
        if self._detail:
            self._compare(name, shapes, dtype)
        comm = self._comm
        if self._coalescing is None and opts is not None and not getattr(opts, "asyncOp", True):
            self._deadline(None)
            self._record(name, shapes, dtype, None)
            if len(calls) == 1:
                function, arguments = calls[0]
                comm._issue(function, arguments, keep, None, False, None)
            elif calls:
                self._group(calls, keep).wait()
            if finish is not None:
                finish()
            return Work(self, None, outputs, None, source)
        self._deadline(opts)
        core: CoreWork | None
        if len(calls) == 1:
            function, arguments = calls[0]
            core = comm._issue(function, arguments, keep, None, True, None)
        else:
            core = self._group(calls, keep)
        self._record(name, shapes, dtype, core)
        work = Work(self, core, outputs, finish, source)
        if self._coalescing is not None:
            self._coalescing.append(work)
        return work

    def _group(self, calls: Sequence[Call], keep: Any) -> CoreWork:
        comm = self._comm
        with comm.group(async_op=True) as group:
            for function, arguments in calls:
                comm._issue(function, arguments, keep, None, False, None)
        assert group.work is not None
        return group.work

    def _compare(self, name: str, shapes: Any, dtype: Any) -> None:
        """TORCH_DISTRIBUTED_DEBUG=DETAIL: compare what the ranks are about to call, shapes included, before any data moves."""
        if name in ("send", "recv", "recv_anysource", "barrier"):
            return
        mine = f"#{self.recorder.seq + 1} {name} {[list(s) for s in shapes]} {str(dtype).replace('torch.', '')}"
        mine_bytes = torch.zeros(512, dtype=torch.uint8)
        raw = mine.encode()[:511]
        mine_bytes[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        everybody = torch.empty(512 * self._size, dtype=torch.uint8)
        self._comm._issue(
            lib.hfreduceAllGather,
            (_address(mine_bytes), _address(everybody), 512, lib.hfreduceUint8),
            (mine_bytes, everybody),
            None,
            False,
            None,
        )
        texts = [bytes(row.tolist()).rstrip(b"\0").decode() for row in everybody.view(self._size, 512)]
        uneven = name in ("allgather", "alltoall", "alltoall_base", "reduce_scatter", "gather", "scatter")
        heads = [text.split(" [")[0] if uneven else text for text in texts]
        for rank, head in enumerate(heads):
            if head != heads[0]:
                raise MismatchError(
                    f"Detected mismatch between collectives on ranks. Rank 0 is running collective: {texts[0]}, but Rank {rank} is "
                    f"running collective: {texts[rank]}.",
                    rank=self._rank,
                    peer=rank,
                )

    # --- checking tensors ---

    def _checked(self, tensor: Any, name: str = "tensor") -> Any:
        if not isinstance(tensor, torch.Tensor):
            raise InvalidArgumentError(f"{name}: {type(tensor).__name__} is not a tensor")
        if not tensor.is_cpu:
            raise InvalidArgumentError(
                f"{name}: it is on device {tensor.device}, and this backend handles CPU tensors; use {name}.cpu() and copy the result back"
            )
        if tensor.layout is not _strided:
            raise InvalidArgumentError(
                f"{name}: its layout is {tensor.layout}; only all_reduce takes sparse tensors, use to_dense()"
            )
        return tensor

    def _checked_all(self, tensors: Sequence[Any], name: str, dtype: Any = None) -> list[Any]:
        found = [self._checked(tensor, f"{name}[{i}]") for i, tensor in enumerate(tensors)]
        for i, tensor in enumerate(found):
            if tensor.dtype != (dtype or found[0].dtype):
                raise InvalidArgumentError(f"{name}[{i}]: dtype {tensor.dtype} differs from {dtype or found[0].dtype}")
        return found

    def _root(self, root: int) -> int:
        if not 0 <= root < self._size:
            raise InvalidArgumentError(f"root: {root} is not a rank of this group of {self._size}")
        return root

    def _count(self, have: int, want: int, name: str, of: str) -> None:
        if have != want:
            raise InvalidArgumentError(f"{name}: has {have} elements; {of} it must have {want}")

    # --- reductions ---

    def _reduction(self, tensor: Any, op: Any, opts: Any) -> tuple[Any, Reduction, int, list[Callable[[], None]]]:
        """(buffer to reduce in, how, core op number, what to call once it is issued)."""
        how = reduction(tensor.dtype, op)
        buffer = tensor.to(how.wider) if how.wider is not None else _dense(tensor)
        if how.factor is None:
            return buffer, how, how.op, []
        scalar_type = (
            torch.float32 if buffer.dtype.itemsize == 1 and buffer.dtype.is_floating_point else _part_dtype(buffer.dtype)
        )
        scalar = torch.tensor([how.factor], dtype=scalar_type)
        number = ffi.new("hfreduceRedOp_t *")
        handle = self._comm._open()
        made = lib.hfreduceRedOpCreatePreMulSum(number, _address(scalar), how.code, lib.hfreduceScalarHostImmediate, handle)
        check(made, handle)
        op_number = int(number[0])  # the call takes its factor along: the op can go once it is issued
        return buffer, how, op_number, [lambda: check(lib.hfreduceRedOpDestroy(op_number, handle), handle)]

    def _all_gathered(self, tensor: Any) -> Any:
        """Every rank's tensor, as the rows of one. Waits."""
        source = _dense(tensor)
        rows = source.new_empty((self._size, *source.shape))
        code, count = moved(source)
        self._comm._issue(
            lib.hfreduceAllGather, (_address(source), _address(rows), count, code), (source, rows), None, False, None
        )
        return rows

    def _fold(self, tensor: Any, how: Reduction, target: Any, name: str, opts: Any) -> Work:
        """Reduce with an op that the core lacks: gather, and let torch fold the rows in rank order, the same on every rank."""
        source = _dense(tensor)
        rows = source.new_empty((self._size, *source.shape))
        code, count = moved(source)

        def finish() -> None:
            if target is not None:
                target.copy_(functools.reduce(how.local, rows.unbind(0)))

        call = (lib.hfreduceAllGather, (_address(source), _address(rows), count, code))
        return self._run(name, [call], (tensor, source, rows), [tensor], opts, finish)

    def allreduce(self, tensors: Any, opts: Any = None, op: Any = None, timeout: Any = None) -> Any:
        try:
            tensor = tensors[0] if type(tensors) is list else tensors
            if self._plain and opts is not None and not _profiling():
                code = NATIVE.get(tensor.dtype)
                number = CORE_OPS.get(hash(opts.reduceOp))
                if (
                    code is not None
                    and number is not None
                    and self._coalescing is None
                    and tensor.is_cpu
                    and tensor.layout is _strided
                    and tensor.is_contiguous()
                    and not tensor.is_neg()
                    and len(tensors) == 1
                ):
                    comm = self._comm
                    if opts.asyncOp:
                        self._deadline(opts)
                        place = ffi.cast("void *", tensor.data_ptr())
                        core = comm._issue(_all_reduce, (place, place, tensor.numel(), code, number), tensor, None, True, None)
                        self._record("all_reduce", tensor.shape, tensor.dtype, core)
                        return Work(self, core, [tensor])
                    if self._seconds != self._default_seconds:
                        self._deadline(None)
                    self._record("all_reduce", tensor.shape, tensor.dtype, None)
                    result = _tensor_all_reduce(tensor.data_ptr(), tensor.numel(), code, number, comm._handle)
                    if result == 0:
                        return _DONE
                    if result == lib.hfreduceInProgress:
                        comm._wait_out(tensor, None)
                        return _DONE
                    raise comm._failure(result)
        except HfreduceError as error:
            raise self._as_torch(error) from None
        except (AttributeError, IndexError, TypeError):
            pass  # other spellings of the arguments: below
        return self._allreduce(tensors, opts, op, timeout)

    @_operation
    def _allreduce(self, tensors: Any, opts: Any, op: Any, timeout: Any) -> Any:
        opts = _with(dist.AllreduceOptions, opts, op, timeout)
        tensor = _one(tensors, "tensors")
        if isinstance(tensor, torch.Tensor) and tensor.is_cpu and tensor.layout is torch.sparse_coo:
            return self._sparse_allreduce(tensor, opts)
        return self._allreduce_all([self._checked(tensor)], opts, "all_reduce")

    def _allreduce_all(self, tensors: list[Any], opts: Any, name: str) -> Work:
        calls: list[Call] = []
        keep: list[Any] = []
        after: list[Callable[[], None]] = []
        finishes: list[Callable[[], None]] = []
        op = opts.reduceOp
        hows = [reduction(tensor.dtype, op) for tensor in tensors]
        if any(how.local is not None for how in hows):
            works = [self._fold(tensor, how, tensor, name, opts) for tensor, how in zip(tensors, hows)]
            return works[0] if len(works) == 1 else CoalescedWork(works)
        for tensor in tensors:
            buffer, how, number, then = self._reduction(tensor, op, opts)
            count = buffer.numel() * how.parts
            calls.append((lib.hfreduceAllReduce, (_address(buffer), _address(buffer), count, how.code, number)))
            keep += [tensor, buffer]
            after += then
            if buffer is not tensor:
                finishes.append(functools.partial(tensor.copy_, buffer))
        work = self._run(name, calls, keep, tensors, opts, _all(finishes))
        for release in after:
            release()
        return work

    @_operation
    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:
        opts = opts if opts is not None else dist.AllreduceCoalescedOptions()
        if not tensors:
            return _DONE
        return self._allreduce_all(self._checked_all(tensors, "tensors"), opts, "all_reduce_coalesced")

    def _sparse_allreduce(self, tensor: Any, opts: Any) -> Work:
        """Sum of sparse COO tensors: gathers every rank's indices and values. Waits, as the sizes must be known first."""
        if hash(opts.reduceOp) != hash(dist.ReduceOp(_SUM)):
            raise InvalidArgumentError(f"op: {op_name(opts.reduceOp)} of sparse tensors is not defined; use SUM")
        if self._detail:
            self._compare("all_reduce_sparse", (tensor.shape,), tensor.dtype)
        self._record("all_reduce_sparse", tensor.shape, tensor.dtype, None)
        mine = tensor.coalesce()
        indices, values = mine.indices().contiguous(), mine.values().contiguous()
        head = torch.zeros(1 + 2 + 16, dtype=torch.int64)
        facts = [mine._nnz(), mine.sparse_dim(), mine.dense_dim(), *mine.shape]
        if len(facts) > len(head):
            raise InvalidArgumentError(f"tensor: {mine.dim()} dimensions; sparse all_reduce takes at most 16")
        head[: len(facts)] = torch.tensor(facts, dtype=torch.int64)
        heads = self._all_gathered(head)
        for rank, row in enumerate(heads.tolist()):
            if row[1:] != head.tolist()[1:]:
                raise MismatchError(
                    f"ranks disagree: rank {self._rank} has a sparse tensor of shape {list(mine.shape)} ({mine.sparse_dim()} sparse "
                    f"dimensions), rank {rank} of {row[3 : 3 + row[1] + row[2]]} ({row[1]})",
                    rank=self._rank,
                    peer=rank,
                )
        counts = [int(n) for n in heads[:, 0]]
        all_indices = self._gather_uneven(indices.t().contiguous(), [n * indices.shape[0] for n in counts])
        all_values = self._gather_uneven(
            values, [n * (values[0].numel() if len(values) else _prod(values.shape[1:])) for n in counts]
        )
        total = sum(counts)
        summed = torch.sparse_coo_tensor(
            all_indices.view(total, indices.shape[0]).t(), all_values.view(total, *values.shape[1:]), mine.shape
        ).coalesce()
        tensor.copy_(summed)
        return Work(self, None, [tensor])

    def _gather_uneven(self, mine: Any, counts: Sequence[int]) -> Any:
        """All ranks' flat tensors one after the other; rank r has counts[r] elements. Waits."""
        out = mine.new_empty(sum(counts))
        call = self._gatherv(mine, out, counts)
        self._comm._issue(call[0], call[1], (mine, out), None, False, None)
        return out

    def _gatherv(self, mine: Any, out: Any, counts: Sequence[int]) -> Call:
        """all_gather of uneven parts: an uneven all_to_all in which every rank sends the same to all."""
        code, parts = _move_code(mine)
        n = mine.numel() * parts
        send = [n] * self._size
        recv = [count * parts for count in counts]
        return lib.hfreduceAlltoAllv, (
            _address(mine),
            ffi.new("size_t[]", send),
            ffi.new("size_t[]", self._size),
            _address(out),
            ffi.new("size_t[]", recv),
            ffi.new("size_t[]", _displacements(recv)),
            code,
        )

    @_operation
    def reduce(self, tensors: Any, opts: Any = None, op: Any = None, timeout: Any = None, *, root: Any = None) -> Any:
        if isinstance(opts, int):
            root, opts = opts, None
        opts = _with(dist.ReduceOptions, opts, op, timeout)
        if root is not None:
            opts.rootRank = root
        tensor = self._checked(_one(tensors, "tensors"))
        root = self._root(opts.rootRank)
        how = reduction(tensor.dtype, opts.reduceOp)
        if how.local is not None:
            return self._fold(tensor, how, tensor if root == self._rank else None, "reduce", opts)
        buffer, how, number, after = self._reduction(tensor, opts.reduceOp, opts)
        count = buffer.numel() * how.parts
        target = _address(buffer) if root == self._rank else ffi.NULL
        finish = functools.partial(tensor.copy_, buffer) if root == self._rank and buffer is not tensor else None
        call = (lib.hfreduceReduce, (_address(buffer), target, count, how.code, number, root))
        work = self._run("reduce", [call], (tensor, buffer), [tensor], opts, finish)
        for release in after:
            release()
        return work

    # --- moving ---

    @_operation
    def broadcast(self, tensors: Any, opts: Any = None, timeout: Any = None, *, root: Any = None) -> Any:
        if isinstance(opts, int):
            root, opts = opts, None
        opts = _with(dist.BroadcastOptions, opts, None, timeout)
        if root is not None:
            opts.rootRank = root
        tensor = self._checked(_one(tensors, "tensors"))
        root = self._root(opts.rootRank)
        buffer = _dense(tensor)
        code, count = moved(buffer)
        finish = functools.partial(tensor.copy_, buffer) if buffer is not tensor and root != self._rank else None
        call = (lib.hfreduceBroadcast, (_address(buffer), _address(buffer), count, code, root))
        return self._run("broadcast", [call], (tensor, buffer), [tensor], opts, finish)

    @_operation
    def _allgather_base(self, output: Any, input: Any, opts: Any = None, timeout: Any = None) -> Any:
        opts = _with(dist.AllgatherOptions if hasattr(dist, "AllgatherOptions") else _AllgatherOptions, opts, None, timeout)
        call, keep, finish = self._all_gather_call(output, input)
        return self._run("all_gather_into_tensor", [call], keep, [output], opts, finish)

    def _all_gather_call(self, output: Any, input: Any) -> tuple[Call, tuple[Any, ...], Callable[[], None] | None]:
        self._checked(output, "output")
        self._checked(input, "input")
        if output.dtype != input.dtype:
            raise InvalidArgumentError(f"output: dtype {output.dtype} differs from the input's {input.dtype}")
        self._count(
            output.numel(),
            self._size * input.numel(),
            "output",
            f"with {input.numel()} in the input of each of {self._size} ranks",
        )
        source, target = (
            _dense(input),
            output if _is_dense(output) else torch.empty_like(output, memory_format=torch.contiguous_format),
        )
        code, count = moved(source)
        finish = None if target is output else functools.partial(output.copy_, target)
        return (lib.hfreduceAllGather, (_address(source), _address(target), count, code)), (output, input, source, target), finish

    @_operation
    def allgather_into_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = opts if opts is not None else _AllgatherOptions()
        self._count(len(outputs), len(inputs), "outputs", "as there are inputs,")
        made = [self._all_gather_call(output, input) for output, input in zip(outputs, inputs)]
        if not made:
            return _DONE
        finish = _all([finish for _, _, finish in made if finish is not None])
        return self._run(
            "all_gather_coalesced", [call for call, _, _ in made], [keep for _, keep, _ in made], list(outputs), opts, finish
        )

    @_operation
    def allgather(self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None) -> Any:
        opts = _with(_AllgatherOptions, opts, None, timeout)
        input = self._checked(_one(inputs, "inputs"), "input")
        if isinstance(outputs[0], torch.Tensor):
            outputs = [outputs]
        parts = self._checked_all(_one_list(outputs, "outputs"), "outputs", input.dtype)
        return self._gather_lists([(parts, input)], opts, "all_gather")

    @_operation
    def allgather_coalesced(self, output_lists: Any, inputs: Any, opts: Any = None) -> Any:
        opts = opts if opts is not None else _AllgatherOptions()
        # [rank][i]: the i-th tensor of every rank
        pairs = []
        for i, input in enumerate(self._each(inputs, "inputs")):
            pairs.append((self._checked_all([ranks[i] for ranks in output_lists], "outputs", input.dtype), input))
        return self._gather_lists(pairs, opts, "all_gather_coalesced") if pairs else _DONE

    def _each(self, tensors: Sequence[Any], name: str) -> list[Any]:
        return [self._checked(tensor, f"{name}[{i}]") for i, tensor in enumerate(tensors)]

    def _gather_lists(self, pairs: Sequence[tuple[list[Any], Any]], opts: Any, name: str) -> Work:
        calls: list[Call] = []
        keep: list[Any] = []
        finishes: list[Callable[[], None]] = []
        outputs: list[Any] = []
        for parts, input in pairs:
            self._count(len(parts), self._size, "outputs", "as a list (its tensors counted),")
            self._count(parts[self._rank].numel(), input.numel(), f"outputs[{self._rank}]", "as the input of this rank")
            source, counts = _dense(input), [part.numel() for part in parts]
            direct = _adjacent(parts)
            flat = parts[0] if direct else source.new_empty(sum(counts))
            if len(set(counts)) == 1 and not self._may_be_uneven(parts):
                code, count = moved(source)
                calls.append((lib.hfreduceAllGather, (_address(source), _address(flat), count, code)))
            else:
                calls.append(self._gatherv(source, flat, counts))
            if not direct:
                finishes.append(_scatter_back(parts, flat))
            keep.append((parts, input, source, flat, calls[-1]))
            outputs += parts
        return self._run(name, calls, keep, outputs, opts, _all(finishes))

    def _may_be_uneven(self, parts: Sequence[Any]) -> bool:
        """Every rank knows all the counts, so all choose alike."""
        return False

    @_operation
    def gather(self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None, *, root: Any = None) -> Any:
        if isinstance(opts, int):
            root, opts = opts, None
        opts = _with(dist.GatherOptions, opts, None, timeout)
        if root is not None:
            opts.rootRank = root
        root = self._root(opts.rootRank)
        input = self._checked(_one(inputs, "inputs"), "input")
        source = _dense(input)
        code, count = moved(source)
        if root != self._rank:
            if outputs and any(len(part) for part in outputs if not isinstance(part, torch.Tensor)):
                raise InvalidArgumentError(
                    f"outputs: rank {self._rank} is not the root ({root}) and gathers nothing; pass an empty list"
                )
            call = (lib.hfreduceGather, (_address(source), ffi.NULL, count, code, root))
            return self._run("gather", [call], (input, source), [], opts)
        if not outputs:
            raise InvalidArgumentError(f"outputs: the root (rank {root}) needs a list of {self._size} tensors")
        if isinstance(outputs[0], torch.Tensor):
            outputs = [outputs]
        parts = self._checked_all(_one_list(outputs, "outputs"), "outputs", input.dtype)
        self._count(len(parts), self._size, "outputs", "as a list (its tensors counted),")
        for i, part in enumerate(parts):
            self._count(part.numel(), input.numel(), f"outputs[{i}]", "as the input")
        direct = _adjacent(parts)
        flat = parts[0] if direct else source.new_empty(self._size * source.numel())
        call = (lib.hfreduceGather, (_address(source), _address(flat), count, code, root))
        return self._run(
            "gather", [call], (parts, input, source, flat), parts, opts, None if direct else _scatter_back(parts, flat)
        )

    @_operation
    def scatter(self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None, *, root: Any = None) -> Any:
        if isinstance(opts, int):
            root, opts = opts, None
        opts = _with(dist.ScatterOptions, opts, None, timeout)
        if root is not None:
            opts.rootRank = root
        root = self._root(opts.rootRank)
        output = self._checked(_one(outputs, "outputs"), "output")
        target = output if _is_dense(output) else torch.empty_like(output, memory_format=torch.contiguous_format)
        code, count = moved(target)
        finish = None if target is output else functools.partial(output.copy_, target)
        source = ffi.NULL
        flat: Any = None
        if root == self._rank:
            if not inputs:
                raise InvalidArgumentError(f"inputs: the root (rank {root}) needs a list of {self._size} tensors")
            if isinstance(inputs[0], torch.Tensor):
                inputs = [inputs]
            parts = self._checked_all(_one_list(inputs, "inputs"), "inputs", output.dtype)
            self._count(len(parts), self._size, "inputs", "as a list (its tensors counted),")
            for i, part in enumerate(parts):
                self._count(part.numel(), output.numel(), f"inputs[{i}]", "as the output")
            flat = _flat(parts)
            source = _address(flat)
        elif inputs and any(len(part) for part in inputs if not isinstance(part, torch.Tensor)):
            raise InvalidArgumentError(
                f"inputs: rank {self._rank} is not the root ({root}) and scatters nothing; pass an empty list"
            )
        call = (lib.hfreduceScatter, (source, _address(target), count, code, root))
        return self._run("scatter", [call], (output, target, flat), [output], opts, finish)

    @_operation
    def _reduce_scatter_base(self, output: Any, input: Any, opts: Any = None, op: Any = None, timeout: Any = None) -> Any:
        opts = _with(dist.ReduceScatterOptions, opts, op, timeout)
        return self._reduce_scatter_all([(output, input)], opts, "reduce_scatter_tensor")

    @_operation
    def reduce_scatter_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = opts if opts is not None else dist.ReduceScatterOptions()
        self._count(len(outputs), len(inputs), "outputs", "as there are inputs,")
        return self._reduce_scatter_all(list(zip(outputs, inputs)), opts, "reduce_scatter_coalesced") if len(outputs) else _DONE

    def _reduce_scatter_all(self, pairs: Sequence[tuple[Any, Any]], opts: Any, name: str) -> Any:
        calls: list[Call] = []
        keep: list[Any] = []
        after: list[Callable[[], None]] = []
        finishes: list[Callable[[], None]] = []
        for output, input in pairs:
            self._checked(output, "output")
            self._checked(input, "input")
            if output.dtype != input.dtype:
                raise InvalidArgumentError(f"output: dtype {output.dtype} differs from the input's {input.dtype}")
            self._count(
                input.numel(),
                self._size * output.numel(),
                "input",
                f"with {output.numel()} in the output of each of {self._size} ranks",
            )
            if reduction(input.dtype, opts.reduceOp).local is not None:
                calls, rows, finish = self._fold_part(output, input, reduction(input.dtype, opts.reduceOp), calls)
                keep += [output, input, rows]
                finishes.append(finish)
                continue
            buffer, how, number, then = self._reduction(input, opts.reduceOp, opts)
            target = output
            if how.wider is not None or not _is_dense(output):
                target = torch.empty(output.shape, dtype=how.wider or output.dtype)
                finishes.append(functools.partial(output.copy_, target))
            calls.append(
                (lib.hfreduceReduceScatter, (_address(buffer), _address(target), target.numel() * how.parts, how.code, number))
            )
            keep += [output, input, buffer, target]
            after += then
        work = self._run(name, calls, keep, [output for output, _ in pairs], opts, _all(finishes))
        for release in after:
            release()
        return work

    def _fold_part(
        self, output: Any, input: Any, how: Reduction, calls: list[Call]
    ) -> tuple[list[Call], Any, Callable[[], None]]:
        """reduce_scatter with an op that the core lacks: every rank gets its part of everybody's, and folds."""
        source = _dense(input)
        rows = source.new_empty((self._size, output.numel()))
        code, count = moved(rows)
        call = (lib.hfreduceAlltoAll, (_address(source), _address(rows), count // self._size, code))

        def finish() -> None:
            output.copy_(functools.reduce(how.local, rows.unbind(0)).view(output.shape))

        return [*calls, call], (source, rows), finish

    @_operation
    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None, op: Any = None, timeout: Any = None) -> Any:
        opts = _with(dist.ReduceScatterOptions, opts, op, timeout)
        output = self._checked(_one(outputs, "outputs"), "output")
        if isinstance(inputs[0], torch.Tensor):
            inputs = [inputs]
        parts = self._checked_all(_one_list(inputs, "inputs"), "inputs", output.dtype)
        self._count(len(parts), self._size, "inputs", "as a list (its tensors counted),")
        self._count(parts[self._rank].numel(), output.numel(), f"inputs[{self._rank}]", "as the output of this rank")
        if len({part.numel() for part in parts}) == 1:
            flat = _flat(parts)
            return self._reduce_scatter_all([(output, flat)], opts, "reduce_scatter")
        how = reduction(output.dtype, opts.reduceOp)
        if how.local is not None:
            flat = _flat(parts)
            mine = sum(part.numel() for part in parts[: self._rank])
            summed = torch.empty_like(flat)
            work = self._fold(flat, how, summed, "reduce_scatter", opts)
            return _after(self, work, [output], lambda: output.copy_(summed[mine : mine + output.numel()].view(output.shape)))
        calls: list[Call] = []
        keep: list[Any] = [output]
        after: list[Callable[[], None]] = []
        finish = None
        for root, part in enumerate(parts):  # uneven: a reduce to each rank, as one
            buffer, how, number, then = self._reduction(part, opts.reduceOp, opts)
            target: Any = ffi.NULL
            if root == self._rank:
                place = output
                if how.wider is not None or not _is_dense(output):
                    place = torch.empty(output.shape, dtype=how.wider or output.dtype)
                    finish = functools.partial(output.copy_, place)
                keep.append(place)
                target = _address(place)
            calls.append((lib.hfreduceReduce, (_address(buffer), target, buffer.numel() * how.parts, how.code, number, root)))
            keep += [part, buffer]
            after += then
        work = self._run("reduce_scatter", calls, keep, [output], opts, finish)
        for release in after:
            release()
        return work

    @_operation
    def alltoall_base(
        self, output: Any, input: Any, output_splits: Any = None, input_splits: Any = None, opts: Any = None, timeout: Any = None
    ) -> Any:
        opts = _with(dist.AllToAllOptions, opts, None, timeout)
        self._checked(output, "output")
        self._checked(input, "input")
        if output.dtype != input.dtype:
            raise InvalidArgumentError(f"output: dtype {output.dtype} differs from the input's {input.dtype}")
        send = self._splits_of(input, input_splits, "input")
        recv = self._splits_of(output, output_splits, "output")
        source = _dense(input)
        target = output if _is_dense(output) else torch.empty_like(output, memory_format=torch.contiguous_format)
        if source.numel() and source.data_ptr() == target.data_ptr():
            source = source.clone()
        finish = None if target is output else functools.partial(output.copy_, target)
        return self._run(
            "all_to_all_single",
            [self._alltoallv(source, send, target, recv)],
            (output, input, source, target),
            [output],
            opts,
            finish,
        )

    def _splits_of(self, tensor: Any, splits: Any, name: str) -> list[int]:
        """Elements for or from each rank; torch gives rows, or nothing for equal parts."""
        rows = tensor.shape[0] if tensor.dim() else 1
        if not splits:
            if rows % self._size:
                raise InvalidArgumentError(
                    f"{name}: its first dimension, {rows}, is not divisible by the number of ranks, {self._size}; give {name}_split_sizes"
                )
            return [tensor.numel() // self._size] * self._size
        if len(splits) != self._size:
            raise InvalidArgumentError(f"{name}_split_sizes: has {len(splits)} entries; the group has {self._size} ranks")
        if any(split < 0 for split in splits) or sum(splits) != rows:
            raise InvalidArgumentError(
                f"{name}_split_sizes: {list(splits)} must sum to the first dimension of the {name}, {rows}"
            )
        row = tensor.numel() // rows if rows else 0
        return [split * row for split in splits]

    def _alltoallv(self, source: Any, send: Sequence[int], target: Any, recv: Sequence[int]) -> Call:
        code, parts = _move_code(target)
        send, recv = [n * parts for n in send], [n * parts for n in recv]
        return lib.hfreduceAlltoAllv, (
            _address(source),
            ffi.new("size_t[]", send),
            ffi.new("size_t[]", _displacements(send)),
            _address(target),
            ffi.new("size_t[]", recv),
            ffi.new("size_t[]", _displacements(recv)),
            code,
        )

    @_operation
    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None) -> Any:
        opts = _with(dist.AllToAllOptions, opts, None, timeout)
        self._count(len(outputs), self._size, "outputs", "as a list (its tensors counted),")
        self._count(len(inputs), self._size, "inputs", "as a list (its tensors counted),")
        parts = self._checked_all(inputs, "inputs")
        targets = self._checked_all(outputs, "outputs", parts[0].dtype)
        source = _flat(parts)
        direct = _adjacent(targets) and targets[0].data_ptr() != source.data_ptr()
        flat = targets[0] if direct else source.new_empty(sum(target.numel() for target in targets))
        call = self._alltoallv(source, [part.numel() for part in parts], flat, [target.numel() for target in targets])
        finish = None if direct else _scatter_back(targets, flat)
        return self._run("all_to_all", [call], (parts, targets, source, flat), targets, opts, finish)

    # --- messages ---

    def _peer(self, peer: int, name: str) -> int:
        if not 0 <= peer < self._size:
            raise InvalidArgumentError(f"{name}: {peer} is not a rank of this group of {self._size}")
        return peer

    @_operation
    def send(self, tensors: Any, dst: int, tag: int = 0) -> Any:
        tensor = self._checked(_one(tensors, "tensors"))
        buffer = _dense(tensor)
        code, count = moved(buffer)
        call = (lib.hfreduceSendTag, (_address(buffer), count, code, self._peer(dst, "dst"), tag))
        return self._run("send", [call], (tensor, buffer), [tensor])

    @_operation
    def recv(self, tensors: Any, src: int, tag: int = 0) -> Any:
        tensor, buffer, finish = self._landing(tensors)
        code, count = moved(buffer)
        call = (lib.hfreduceRecvTag, (_address(buffer), count, code, self._peer(src, "src"), tag))
        return self._run("recv", [call], (tensor, buffer), [tensor], None, finish, lambda: src)

    @_operation
    def recv_anysource(self, tensors: Any, tag: int = 0) -> Any:
        tensor, buffer, finish = self._landing(tensors)
        code, count = moved(buffer)
        source = ffi.new("int *", -1)
        call = (lib.hfreduceRecvAny, (_address(buffer), count, code, tag, source))
        return self._run("recv_anysource", [call], (tensor, buffer, source), [tensor], None, finish, lambda: int(source[0]))

    recvAnysource = recv_anysource

    def _landing(self, tensors: Any) -> tuple[Any, Any, Callable[[], None] | None]:
        tensor = self._checked(_one(tensors, "tensors"))
        if _is_dense(tensor):
            return tensor, tensor, None
        buffer = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        return tensor, buffer, functools.partial(tensor.copy_, buffer)

    # --- barriers ---

    @_operation
    def barrier(self, opts: Any = None, timeout: Any = None) -> Any:
        opts = _with(dist.BarrierOptions, opts, None, timeout)
        return self._run("barrier", [(lib.hfreduceBarrier, ())], (), [], opts)

    def monitored_barrier(self, timeout: Any = None, wait_all_ranks: bool = False) -> None:
        """Wait until all ranks have come here; RuntimeError that names those that have not within `timeout` (a timedelta).

        Through the store, so that it says who is missing also when the communicator is of no use any more.
        """
        if isinstance(getattr(timeout, "timeout", None), timedelta):  # BarrierOptions
            timeout = timeout.timeout
        seconds = timeout.total_seconds() if timeout is not None and timeout.days >= 0 else self._default_seconds
        self._record("monitored_barrier", (), "", None)
        key = f"hfreduce/monitored_barrier/{next(self._barriers)}"
        self._store.set(f"{key}/{self._rank}", b"1")
        end = time.monotonic() + seconds
        if self._rank:
            try:
                self._store.wait([f"{key}/verdict"], timedelta(seconds=seconds + 5))
                verdict = self._store.get(f"{key}/verdict").decode()
            except RuntimeError:
                verdict = f"Rank {self._rank} has waited {seconds} s in monitoredBarrier; rank 0 did not come, or died"
            if verdict:
                raise as_torch(DeadlineError(f"[Rank {self._rank}]: {verdict}", rank=self._rank, op="monitored_barrier"))
            return
        missing = []
        for rank in range(1, self._size):
            left = max(end - time.monotonic(), 0.001)
            try:
                self._store.wait([f"{key}/{rank}"], timedelta(seconds=left))
            except RuntimeError:
                missing.append(rank)
                if not wait_all_ranks:
                    break
        verdict = ""
        if missing:
            who = f"Rank{'s' if wait_all_ranks else ''} {', '.join(map(str, missing))}"
            verdict = f"{who} failed to pass monitoredBarrier in {int(seconds * 1000)} ms (Rank 0 timed out in monitoredBarrier)"
        self._store.set(f"{key}/verdict", verdict)
        if verdict:
            raise as_torch(DeadlineError(f"[Rank 0]: {verdict}", rank=0, peer=missing[0], op="monitored_barrier"))

    # --- coalescing, splitting ---

    def start_coalescing(self, device: Any = None) -> None:
        if self._coalescing is not None:
            raise as_torch(InvalidUsageError("coalescing has been started already"))
        self._coalescing = []

    def end_coalescing(self, device: Any = None) -> Any:
        works, self._coalescing = self._coalescing, None
        if works is None:
            raise as_torch(InvalidUsageError("coalescing was not started"))
        return CoalescedWork(works)

    _start_coalescing = startCoalescing = start_coalescing
    _end_coalescing = endCoalescing = end_coalescing

    def split_group(
        self,
        ranks: Sequence[int],
        timeout: Any = None,
        opts: Any = None,
        group_name: str | None = None,
        group_desc: str | None = None,
        device_types: Any = None,
    ) -> Any:
        """A group of some of this group's ranks; collective over all of it, each rank passing the ranks of its own new group.

        None on a rank that is in none.
        """
        ranks = sorted(ranks)
        for rank in ranks:
            self._peer(rank, "ranks")
        mine = self._rank in ranks
        chosen = timeout if timeout is not None else self._options._timeout
        try:
            comm = self._comm.split(
                ranks[0] if mine else None, ranks.index(self._rank) if mine else 0, timeout=chosen.total_seconds()
            )
        except HfreduceError as error:
            raise self._as_torch(error) from None
        number = next(self._splits)
        if comm is None:
            return None
        name = group_name or f"{self._name}:split:{number}:{ranks[0]}"
        store = dist.PrefixStore(f"{name}/", self._store)
        known = self._options.global_ranks_in_group or list(range(self._size))
        group = make(comm, store, chosen, name, [known[rank] for rank in ranks])
        group.setGroupDesc(group_desc or f"{self._desc}:split:{number}")
        return group

    splitGroup = split_group

    # --- other names of the same: torch has renamed them more than once ---

    all_gather_single = allgather_into_tensor = _allgather_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single = reduce_scatter_tensor = _reduce_scatter_base
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced
    all_to_all_single = alltoall_base


class _AllgatherOptions:
    """torch binds no constructor for these in some versions."""

    def __init__(self) -> None:
        self.timeout = timedelta(milliseconds=-1)
        self.asyncOp = True


def _with(kind: Any, opts: Any, op: Any, timeout: Any) -> Any:
    """The options of a call, from whichever of its spellings was used: an options object, or op and timeout in its place."""
    if isinstance(opts, (dist.ReduceOp, dist.ReduceOp.RedOpType)):
        opts, op, timeout = None, opts, op if isinstance(op, timedelta) else timeout
    elif isinstance(opts, timedelta):
        opts, timeout = None, opts
    if opts is None:
        opts = kind()
        if op is not None:
            opts.reduceOp = op if isinstance(op, dist.ReduceOp) else dist.ReduceOp(op)
        if timeout is not None:
            opts.timeout = timeout
    return opts


def _all(finishes: Sequence[Callable[[], Any]]) -> Callable[[], None] | None:
    if not finishes:
        return None

    def finish() -> None:
        for each in finishes:
            each()

    return finish


def _after(group: Any, work: Any, outputs: Sequence[Any], then: Callable[[], Any]) -> Any:
    """The work with one more thing to do at its end."""
    before = work._finish
    if work._core is None:
        then()
    else:
        work._finish = _all([each for each in (before, then) if each is not None])
    work._outputs = list(outputs)
    return work


def _one_list(lists: Any, name: str) -> Any:
    if len(lists) != 1:
        raise InvalidArgumentError(f"{name}: {len(lists)} lists; a call takes one (one device a rank)")
    return lists[0]


def _flat(parts: Sequence[Any]) -> Any:
    """The parts one after the other, as one tensor: themselves if they lie so."""
    if _adjacent(parts):
        total = sum(part.numel() for part in parts)
        return parts[0].as_strided((total,), (1,))
    return torch.cat([part.reshape(-1) for part in parts])


def _part_dtype(dtype: Any) -> Any:
    return {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(
        dtype, torch.float16 if dtype is torch.complex32 else dtype
    )


def _move_code(tensor: Any) -> tuple[int, int]:
    """(hfreduceDataType_t, its elements in one of the tensor's) to move it in parts."""
    code = NATIVE.get(tensor.dtype)
    if code is not None:
        return code, 1
    code, count = moved(torch.empty(1, dtype=tensor.dtype))
    return code, count


def _displacements(counts: Sequence[int]) -> list[int]:
    return list(itertools.accumulate(counts, initial=0))[:-1]


def _prod(shape: Sequence[int]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)


# --- making groups ---


class ProcessGroup(ProcessGroupMixin, dist.ProcessGroup):  # type: ignore[misc, no-redef, unused-ignore]
    """The group as a Python subclass of torch's ProcessGroup: what torch up to 2.13 offers without a compiler."""

    def __init__(
        self, comm: Communicator, store: Any, timeout: timedelta, name: str = "", global_ranks: Sequence[int] = ()
    ) -> None:
        dist.ProcessGroup.__init__(self, comm.rank, comm.nranks)
        self._setup(comm, store, timeout, name, global_ranks)


def make(comm: Communicator, store: Any, timeout: timedelta, name: str = "", global_ranks: Sequence[int] = ()) -> Any:
    """A process group on a communicator, or a backend for torch's own: see base.py."""
    from hfreduce.torch.base import group_class

    return group_class()(comm, store, timeout, name, global_ranks)


def create(store: Any, rank: int, size: int, timeout: timedelta, *, name: str = "", global_ranks: Sequence[int] = ()) -> Any:
    """Make the group of a store's ranks. Collective: returns when all have come, or fails by `timeout`."""
    seconds = timeout.total_seconds()
    try:
        if size == 1:
            comm = Communicator(0, 1, timeout=seconds, name=name or None)
        else:
            key = "hfreduce/unique_id"
            if rank == 0:
                store.set(key, get_unique_id().hex())
            unique_id = UniqueId(bytes.fromhex(store.get(key).decode()))
            comm = Communicator(rank, size, unique_id, timeout=seconds, name=name or None)
            # torchrun's store outlives a restart: ranks of the next attempt must find neither this id nor what we say later.
            if rank == 0:
                with contextlib.suppress(RuntimeError, NotImplementedError):
                    store.delete_key(key)
            store = dist.PrefixStore(hashlib.sha256(unique_id).hexdigest()[:16], store)
    except HfreduceError as error:
        raise as_torch(error) from None
    return make(comm, store, timeout, name, global_ranks)


_DONE: Any = Work(None, None, [])
