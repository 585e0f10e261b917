"""What every operation of a process group stands on: the communicator, running its calls, errors, the group's end."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch

from hfreduce._ffi import lib
from hfreduce._handle import Handle
from hfreduce.communicator import Communicator, core_of
from hfreduce.errors import (
    DeadlineError,
    HfreduceError,
    InvalidArgumentError,
    InvalidUsageError,
    MismatchError,
)
from hfreduce.torch.calls import Options
from hfreduce.torch.errors import as_torch
from hfreduce.torch.recorder import FlightRecorder
from hfreduce.torch.streams import DEVICE_TYPES, Streams, device_of, handle_of, without_tensors
from hfreduce.torch.tensors import (
    address,
    in_turn,
)
from hfreduce.torch.tracing import untraced
from hfreduce.torch.work import DeviceWork, Work
from hfreduce.work import Work as CoreWork

_strided = torch.strided
_HANDLED = " and ".join(kind.upper() for kind in DEVICE_TYPES)

# A group that is shut down with operations running waits this long for them before it aborts.
_SHUTDOWN_GRACE = 10.0

Call = tuple[Any, tuple[Any, ...]]


@untraced
class Group:
    """The operations. `_setup` takes the place of a constructor: torch's bases have their own."""

    _comm: Communicator
    _handle: Handle
    _native: Any = None  # the shim, where the group is built on it

    def _setup(
        self,
        comm: Communicator,
        store: Any,
        timeout: timedelta,
        name: str = "",
        global_ranks: Sequence[int] = (),
    ) -> None:
        self._comm, self._handle = comm, core_of(comm)
        self._store = store
        self._rank, self._size = comm.rank, comm.nranks
        self._default_seconds = self._seconds = comm.timeout
        self._name, self._desc = name, "undefined"
        self._options = Options(timeout, name, global_ranks)
        self._global_ranks = list(global_ranks)
        self._coalescing: list[Any] | None = None
        self._barriers = itertools.count()
        self._splits = itertools.count()
        self._streams = Streams()
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
        self._name = self.recorder.name = name
        if hasattr(self._options, "group_name"):  # torch's own options have none up to 2.6
            self._options.group_name = name

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
        return [torch.device(kind) for kind in DEVICE_TYPES]

    def _get_backend(self, device: Any) -> Any:
        kind = torch.device(device).type
        if kind not in DEVICE_TYPES:
            raise RuntimeError(f'No backend type associated with device type {kind}: "hfreduce" handles {_HANDLED} tensors here')
        return self

    def _has_hooks(self) -> bool:
        return False

    def _wait_for_pending_works(self) -> None:
        for work in list(self._handle.running):
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
        while not all(work.done() for work in self._handle.running):
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
        if shapes and (len(DEVICE_TYPES) > 1 or not shown[0].is_cpu):
            device = device_of((keep, outputs))
            if device is not None:
                return self._run_in_order(device, name, calls, (keep, outputs), outputs, opts, finish, source)
        if self._coalescing is None and opts is not None and not getattr(opts, "asyncOp", True):
            self._deadline(None)
            self._record(name, shapes, dtype, None)
            if len(calls) == 1:
                function, arguments = calls[0]
                self._handle.issue(function, arguments, keep, None, False, None)
            elif calls:
                self._group(calls, keep).wait()
            if finish is not None:
                finish()
            return Work(self, None, outputs, None, source)
        self._deadline(opts)
        core: CoreWork | None
        if len(calls) == 1:
            function, arguments = calls[0]
            core = self._handle.issue(function, arguments, keep, None, True, None)
        else:
            core = self._group(calls, keep)
        self._record(name, shapes, dtype, core)
        work = Work(self, core, outputs, finish, source)
        if self._coalescing is not None:
            self._coalescing.append(work)
        return work

    def _run_in_order(
        self,
        device: Any,
        name: str,
        calls: Sequence[Call],
        keep: Any,
        outputs: Sequence[Any],
        opts: Any,
        finish: Callable[[], None] | None,
        source: Callable[[], int] | None,
    ) -> Work:
        """Issue calls on tensors of a CUDA device: the streams make the order, and nothing waits here."""
        waits = self._coalescing is None and opts is not None and not getattr(opts, "asyncOp", True)
        self._deadline(None if waits else opts)
        stream = self._streams.of(device, name, waits)
        core = self._group(
            calls, without_tensors(keep), handle_of(stream)
        )  # streams order their memory, as for all work on a device
        self._record(name, tuple([t.shape for t in outputs]), outputs[0].dtype if outputs else "", core)
        work = DeviceWork(self, core, outputs, device, stream, finish, source)
        if not waits:
            work.hold(keep)
        if self._coalescing is not None:
            self._coalescing.append(work)
        return work

    def _group(self, calls: Sequence[Call], keep: Any, stream: Any = None) -> CoreWork:
        with self._comm.group(async_op=True) as group:
            for function, arguments in calls:
                self._handle.issue(function, arguments, keep, None, False, stream)
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
        self._handle.issue(
            lib.hfreduceAllGather,
            (address(mine_bytes), address(everybody), 512, lib.hfreduceUint8),
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
        if not tensor.is_cpu and not tensor.is_cuda:
            raise InvalidArgumentError(
                f"{name}: it is on device {tensor.device}, and this backend handles CPU and CUDA tensors; use {name}.cpu() and copy "
                "the result back"
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


def followed(group: Any, work: Any, outputs: Sequence[Any], then: Callable[[], Any]) -> Any:
    """The work with one more thing to do at its end."""
    if isinstance(work, DeviceWork):
        work.then(then)
        work._outputs = list(outputs)
        return work
    before = work._finish
    if work._core is None:
        then()
    else:
        work._finish = in_turn([each for each in (before, then) if each is not None])
    work._outputs = list(outputs)
    return work


#: What a blocking call returns: it has ended.
DONE: Any = Work(None, None, [])
