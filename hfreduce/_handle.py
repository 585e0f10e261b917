"""Handle: what every Python face has of a communicator. Under Communicator, hfreduce.nccl, hfreduce.torch and the gradient buckets.

A face checks arguments and gives errors its own names; a handle joins, issues, waits, fails and leaves.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hfreduce import grouping
from hfreduce._ffi import ffi, lib
from hfreduce.errors import HfreduceError, InvalidUsageError, check, from_info, last_error
from hfreduce.waiting import PATIENCE, join, leave
from hfreduce.work import Sender, Work, reap, salvage, take

NULL: Any = ffi.NULL

_SUCCESS: int = lib.hfreduceSuccess
_INVALID_ARGUMENT: int = lib.hfreduceInvalidArgument
_IN_PROGRESS: int = lib.hfreduceInProgress
_WORK: Any = ffi.typeof("hfreduceWork_t *")
_open_groups = grouping.open_groups
_group_start, _group_end = lib.hfreduceGroupStart, lib.hfreduceGroupEndAsync


#: A call of the C core without its last two arguments, pointer and stream: the function, and the arguments before.
Call = tuple[Any, tuple[Any, ...]]


def together(calls: Sequence[Call]) -> Callable[[Any, Any], int]:
    """These calls as one function for `Handle.issue`: a group of the core's that is launched as a whole, or not at all."""

    def function(pointer: Any, stream: Any) -> int:
        code: int = lib.hfreduceGroupStart()
        if code:
            return code
        try:
            for each, arguments in calls:
                code = each(*arguments, pointer, stream)
                if code:
                    break
        except BaseException:
            grouping.cancel()
            raise
        end: int = lib.hfreduceGroupEnd()
        return code or end

    return function


def _config(timeout: float, name: str | None) -> tuple[Any, Any]:
    """A hfreduceConfig_t, and what must live beside it. timeout: seconds; 0: the core's preset."""
    config = ffi.new("hfreduceConfig_t *")
    lib.hfreduceConfigInit(config)
    config.timeout = timeout
    keep = NULL if name is None else ffi.new("char[]", name.encode())
    config.name = keep
    return config, keep


def _destroy(pointer: Any, running: deque[Work], pid: int) -> None:
    """Leave and free. Runs at close, when a handle is dropped, or at exit; a forked child leaves its parent's alone."""
    if os.getpid() != pid:
        return
    # The program died of an exception, or a signal handler's ended the wait: nobody will wait for it again.
    died = getattr(sys, "last_value", None) is not None
    if running and any((died or work.interrupted) and not work.done() for work in tuple(running)):
        lib.hfreduceCommAbort(pointer)
    try:
        leave(pointer)
    finally:
        running.clear()


class Handle:
    """One rank's end of a communicator: the C pointer, and the works that run on it.

    A new handle is closed until `join`, or `split` or `shrink` of another one, has made a communicator for it.
    """

    __slots__ = ("__weakref__", "_finalizer", "_holds", "pointer", "rank", "running")

    def __init__(self) -> None:
        self.pointer: Any = NULL  #: the hfreduceComm_t; NULL while the handle is closed
        self.rank = -1  #: this rank, once a communicator was made; it stays when the handle is closed
        self.running: deque[Work] = deque()  #: works of it that have not ended, or were not seen to end, in the order of issue
        self._holds: list[None] = []  # one for each call that runs or is queued and forbids that the pointer is freed
        self._finalizer: Any = None

    # --- making ---

    def join(
        self, nranks: int, unique_id: bytes, rank: int, timeout: float, name: str | None, stop: threading.Event | None = None
    ) -> None:
        """Join as `rank` of nranks; return when all have. timeout: seconds, 0: the core's preset. stop: ends the call when set."""
        raw = ffi.new("hfreduceUniqueId *")
        ffi.memmove(raw, unique_id, ffi.sizeof("hfreduceUniqueId"))
        config, keep = _config(timeout, name)
        made = ffi.new("hfreduceComm_t *")
        check(join(config, made, lambda: lib.hfreduceCommInitRankConfig(made, nranks, raw[0], rank, config), stop))
        del keep
        self._adopt(made[0])

    def split(
        self, color: int, key: int, new: Handle, timeout: float, name: str | None, stop: threading.Event | None = None
    ) -> None:
        """Make `new` this rank's handle among the ranks of its color, ordered by (key, rank); with color -1 it stays closed."""
        pointer = self.open()
        config, keep = _config(timeout, name)
        made = ffi.new("hfreduceComm_t *")
        code = join(config, made, lambda: lib.hfreduceCommSplit(pointer, color, key, made, config), stop)
        if code:
            raise self.failure(code)
        del keep
        if made[0] != NULL:
            new._adopt(made[0])

    def shrink(self, exclude: Sequence[int], abort: bool, new: Handle, timeout: float, name: str | None) -> None:
        """Make `new` this rank's handle among the ranks without `exclude`. abort: first end what runs on this one."""
        pointer, left_out = self.open(), ffi.new("int[]", exclude)
        config, keep = _config(timeout, name)
        made = ffi.new("hfreduceComm_t *")
        flags = lib.hfreduceShrinkAbort if abort else lib.hfreduceShrinkDefault
        check(join(config, made, lambda: lib.hfreduceCommShrink(pointer, left_out, len(exclude), made, config, flags)))
        del keep
        new._adopt(made[0])

    def _adopt(self, pointer: Any) -> None:
        check(lib.hfreduceCommSetPatience(pointer, PATIENCE), pointer)
        rank = ffi.new("int *")
        check(lib.hfreduceCommUserRank(pointer, rank), pointer)
        self.rank = int(rank[0])
        self._finalizer = weakref.finalize(self, _destroy, pointer, self.running, os.getpid())
        self.pointer = pointer

    # --- what it is ---

    @property
    def closed(self) -> bool:
        """Whether there is no communicator: none was made yet, or it was closed."""
        return bool(self.pointer == NULL)

    def open(self) -> Any:
        """The pointer; InvalidUsageError if the handle is closed."""
        pointer = self.pointer
        if pointer == NULL:
            raise InvalidUsageError("the communicator is closed")
        return pointer

    def info(self) -> Any:
        """The hfreduceCommInfo_t of an open handle."""
        pointer, info = self.open(), ffi.new("hfreduceCommInfo_t *")
        check(lib.hfreduceCommGetInfo(pointer, info), pointer)
        return info

    def set_timeout(self, seconds: float) -> None:
        """Seconds that an operation which is issued from now on may take."""
        pointer = self.open()
        check(lib.hfreduceCommSetTimeout(pointer, seconds), pointer)

    # --- errors ---

    def failure(self, code: int, stream: Any = None) -> HfreduceError:
        """The exception for a call that returned `code`, on `stream` where there was one."""
        if self.pointer == NULL and code == _INVALID_ARGUMENT:  # for C it is no communicator any more
            return InvalidUsageError("the communicator is closed")
        error = last_error(code, self.pointer)
        if stream is not None and code == _INVALID_ARGUMENT:  # a caller with an array on a device need not know of a stream
            number = int(ffi.cast("uintptr_t", stream))
            error.args = (f"{error} (on stream {number:#x}, as calls on device memory are)",)
        return error

    def async_error(self) -> HfreduceError | None:
        """The error that broke the communicator, or None. May be called from any thread."""
        pointer, error = self.open(), ffi.new("hfreduceResult_t *")
        code = lib.hfreduceCommGetAsyncError(pointer, error)
        if code:
            raise self.failure(code)
        if not error[0]:
            return None
        info = ffi.new("hfreduceErrorInfo_t *")  # the communicator's; this thread's last error may be that of another one
        lib.hfreduceGetErrorInfo(pointer, info)
        return from_info(int(error[0]), info)

    # --- calls ---

    def issue(self, function: Any, arguments: tuple[Any, ...], keep: Any, result: Any, async_op: bool, stream: Any) -> Any:
        """Call `function` with the arguments, the pointer and `stream`, which is cdata, or None for host memory without one.

        Inside a group the call is queued. Else the result is `result` when the call has ended, or with async_op its Work.
        keep: what must live until then.
        """
        pointer = self.open()
        where = NULL if stream is None else stream
        outer = grouping.current() if _open_groups else None
        if outer is not None:
            if async_op:
                raise InvalidUsageError("async_op is not for calls inside a group: use group(async_op=True) and its `work`")
            code = function(*arguments, pointer, where)
            if code:
                raise self.failure(code, stream)
            outer.add(keep, result, self.running)
            return result
        if async_op:
            ordered = stream is not None and type(result) is not Sender
            return Work(self.launch(((function, arguments),), stream), (keep,), result, self.running, ordered=ordered)
        try:
            code = function(*arguments, pointer, where)
        except BaseException:
            self.salvage(keep, result)
            raise
        if self.running:
            reap(self.running)
        return result if not code else self.not_at_once(code, keep, result, stream)

    def launch(self, calls: Iterable[tuple[Any, tuple[Any, ...]]], stream: Any = None) -> Any:
        """Start calls, (function, arguments) each, together; the hfreduceWork_t of them all. Not inside a group."""
        pointer = self.pointer
        where = NULL if stream is None else stream
        code = _group_start()
        if code:
            raise self.failure(code)
        try:
            for function, arguments in calls:
                code = function(*arguments, pointer, where)
                if code:
                    break
            error = self.failure(code, stream) if code else None
            work = ffi.new(_WORK)
        except BaseException:
            grouping.cancel()
            raise
        code = _group_end(work)
        if error is not None or code:
            raise error if error is not None else self.failure(code)
        return work[0]

    def not_at_once(self, code: int, keep: Any, result: Any, stream: Any = None) -> Any:
        """The result of a blocking call that returned `code`, which is not success: it came back before its end, or failed."""
        if code == _IN_PROGRESS:
            return self.wait_out(keep, result)
        raise self.failure(code, stream)

    def wait_out(self, keep: Any, result: Any) -> Any:
        """Wait for what the C call began and has not ended; an exception from a signal handler leaves it running, as async work."""
        return take(keep, result, self.running).wait()

    def salvage(self, keep: Any, result: Any) -> None:
        """A signal handler raised as a blocking call came back: what it left running goes on as async work, and keeps its arrays."""
        salvage(keep, result, self.running)

    def is_grouped(self) -> bool:
        """Whether this thread is inside a group, which queues its calls."""
        return bool(_open_groups) and grouping.current() is not None

    # --- the end ---

    def abort(self) -> None:
        """End every wait on the communicator, here and on all ranks. May be called from any thread; closed: nothing waits."""
        pointer = self.pointer
        code = _INVALID_ARGUMENT if pointer == NULL else lib.hfreduceCommAbort(pointer)
        if code and code != _INVALID_ARGUMENT:
            raise self.failure(code)

    def close(self) -> None:
        """Wait for what was issued, leave and free, once nobody holds the pointer. Closing twice is legal."""
        self.pointer = NULL
        self._free_unless_held()

    # A pointer must not be freed under a call whose face cannot tell the caller so: one that runs in another thread while this one
    # aborts, or that a group has queued. A call is noted before it reads the pointer, and the pointer goes before the notes are read:
    # one of the two sees the other. Lists grow and shrink atomically, which a counter does not.

    def hold(self) -> Any:
        """The pointer, NULL when closed; `close` does not free it before the `let_go` that belongs to this call."""
        self._holds.append(None)
        return self.pointer

    def let_go(self) -> None:
        """The call that held the pointer has ended."""
        self._holds.pop()
        self._free_unless_held()

    def _free_unless_held(self) -> None:
        if self.pointer == NULL and not self._holds and self._finalizer is not None:
            self._finalizer()  # the first thread that comes runs it, once


def call_or_abort(handles: Sequence[Handle], function: Callable[..., int], *arguments: Any) -> int:
    """The result of a C call that waits. If a signal handler's exception leaves it running, the communicators are aborted.

    For faces that know the caller's buffers as addresses only: the buffers may go with the exception.
    """
    work = None
    try:
        code = function(*arguments)
        if code == _IN_PROGRESS:
            work = take(handles, None, deque())
            work.wait()
            return _SUCCESS
        return code
    except HfreduceError:
        raise
    except BaseException:
        if work is not None or salvage(handles, None, deque()) is not None:
            for handle in handles:
                if not handle.closed:
                    lib.hfreduceCommAbort(handle.pointer)
        raise
