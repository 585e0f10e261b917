"""Groups: several calls launched as one."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType
from typing import Any

from hfreduce._ffi import ffi, lib
from hfreduce.errors import HfreduceError, InvalidUsageError, last_error
from hfreduce.work import Work, salvage, settle, take

#: Threads that are inside a group. The communicators' fast path only asks whether it is empty.
open_groups: set[int] = set()

_local = threading.local()
_running: deque[Work] = deque()


def current() -> Group | None:
    """The outermost group that this thread is in."""
    stack: list[Group] | None = getattr(_local, "stack", None)
    return stack[0] if stack else None


def cancel() -> None:
    """End this thread's innermost open group of the C core; nothing of the outermost one is launched."""
    lib.hfreduceGroupCancel(lib.hfreduceInvalidUsage)
    lib.hfreduceGroupEnd()


class Group:
    """Context manager: the calls inside are launched together at the end of the outermost group of this thread.

    Leaving it waits for all of them, which go on if a signal handler raises; with async_op=True `work` is then their common Work. Calls inside take no async_op.
    `results` has what each call of the outermost group gives, in order of issue; it is defined once they have ended.
    Groups nest and may span several communicators. When the body raises, or that of a group inside, nothing is launched.
    """

    def __init__(self, *, async_op: bool = False, running: deque[Work] | None = None) -> None:
        self.work: Work | None = None
        self.results: list[Any] = []
        self._async_op = async_op
        self._running = _running if running is None else running
        self._keep: list[Any] = []
        self._all: list[deque[Work]] = []  # the works of each communicator
        self._given_up: BaseException | None = None  # what the body of a group inside this one raised

    def add(self, keep: Any, result: Any, running: deque[Work]) -> None:
        """Hold a call's buffers until the group has ended. running: the works of its communicator."""
        self._keep.append(keep)
        self.results.append(result)
        if all(running is not known for known in self._all):
            self._all.append(running)

    def __enter__(self) -> Group:
        stack: list[Group] | None = getattr(_local, "stack", None)
        if stack is None:
            stack = _local.stack = []
        if self in stack:
            raise InvalidUsageError("this group is already open; make a new one for each `with`")
        if stack and self._async_op:
            raise InvalidUsageError("only the outermost group can be asynchronous")
        code = lib.hfreduceGroupStart()
        if code:
            raise last_error(code)
        self.work, self.results, self._given_up = None, [], None
        stack.append(self)
        open_groups.add(threading.get_ident())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        stack: list[Group] = _local.stack
        outermost = stack[0] is self
        stack.pop()
        if not stack:
            open_groups.discard(threading.get_ident())
        keep, self._keep = self._keep, []
        communicators, self._all = self._all, []
        if error is not None:
            cancel()
            if not outermost:
                stack[0]._given_up = error
        elif self._given_up is not None:  # only the outermost one's: its body swallowed the exception of a group inside
            lib.hfreduceGroupEnd()
            cause, self._given_up = self._given_up, None
            raise InvalidUsageError(
                f"nothing of this group was launched, because the body of a group inside it raised {cause!r}; let that exception "
                f"pass, or make the inner group's calls in a group of their own"
            ) from cause
        elif outermost and self._async_op:
            handle = ffi.new("hfreduceWork_t *")
            code = lib.hfreduceGroupEndAsync(handle)
            if code:
                raise last_error(code)
            self.work = Work(handle[0], keep, self.results, self._running)
        else:
            self._launch_and_wait(keep, communicators)

    def _launch_and_wait(self, keep: Any, communicators: list[deque[Work]]) -> None:
        work: Work | None = None
        try:
            code = lib.hfreduceGroupEnd()
            if code == lib.hfreduceInProgress:
                work = take(keep, self.results, self._running)
                self.results = work.wait()
        except HfreduceError:
            raise
        except BaseException:
            work = work or salvage(keep, self.results, self._running)
            for running in communicators:  # each is told when it is closed
                if work is not None and running is not self._running:
                    running.append(work)
            raise
        if code not in (lib.hfreduceSuccess, lib.hfreduceInProgress):
            raise last_error(code)
        if work is None:
            settle(self.results)


def group(*, async_op: bool = False) -> Group:
    """Launch the calls made inside `with hfreduce.group():` together; they may be on several communicators."""
    return Group(async_op=async_op)
