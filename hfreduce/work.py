"""Work: the handle of an operation that runs while the caller goes on."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from hfreduce._ffi import ffi, lib
from hfreduce.errors import HfreduceError, InProgressError, InvalidArgumentError, check, from_info

# A wait is cut into slices of so many seconds, between which Python runs signal handlers: Ctrl-C ends a wait.
_SLICE = 0.25


def reap(running: deque[Work]) -> None:
    """Let go of what has ended; operations of a communicator end in the order of issue. Several threads may do so at once."""
    while running:
        try:
            work = running.popleft()
        except IndexError:
            return
        if not work.done():
            running.appendleft(work)
            return


class Later:
    """A result that is made when its operation has ended."""

    __slots__ = ("shown",)

    shown: Any  #: what stands for it until then

    def settle(self) -> Any:
        """The result of the operation, which has ended; HfreduceError where it shows to be wrong."""
        raise NotImplementedError


class Sender(Later):
    """The result of a receive from any source: C writes the rank when the message has come."""

    __slots__ = ("cell",)

    def __init__(self) -> None:
        self.shown = None
        self.cell: Any = ffi.new("int *", -1)

    def rank(self) -> int:
        """Rank of the sender, once the receive has ended."""
        return int(self.cell[0])

    settle = rank


def settle(result: Any) -> Any:
    """The result of an operation that has ended, or the list of a group's, with what each Later has come to."""
    if isinstance(result, Later):
        return result.settle()
    if type(result) is list:
        for i, one in enumerate(result):
            if isinstance(one, Later):
                result[i] = one.settle()
    return result


class Work:
    """An operation started with async_op=True, or a group of them.

    Holds its buffers until the operation has ended, also when the handle itself is dropped (the communicator then keeps it
    until then). Its methods may be called from any thread.

    An operation on a stream is in its place there from the call on: what is put on the stream later sees the result. `wait()` has
    nothing to add to that and returns at once, or raises the error if there is one already; `done()`, and `wait` with a timeout,
    tell of the host's side.
    """

    __slots__ = ("__weakref__", "_error", "_handle", "_keep", "_ordered", "_result", "interrupted")

    def __init__(self, handle: Any, keep: Any, result: Any, running: deque[Work], *, ordered: bool = False) -> None:
        """ordered: it runs on a stream."""
        self._handle: Any = ffi.gc(handle, lib.hfreduceWorkDestroy)  # an operation that still runs goes on
        self._keep = keep  # None once it has ended
        self._result = result
        self._ordered = ordered
        self._error: HfreduceError | None = None
        self.interrupted = False  # a signal handler's exception ended the last wait for it
        reap(running)
        running.append(self)

    @property
    def result(self) -> Any:
        """The array (or list of results, for a group) that the call writes; its content is defined after `wait`.

        Of `recv_any`: the sender's rank; None until it has ended.
        """
        return self._result.shown if isinstance(self._result, Later) else self._result

    def wait(self, timeout: float | None = None) -> Any:
        """Wait until the operation has ended and return its result.

        timeout: seconds; when they pass, InProgressError (a TimeoutError) is raised and the operation goes on. None: until
        the operation's own deadline, after which it fails with DeadlineError. An operation that failed raises its error,
        again at each call. An exception of a signal handler ends the wait, and the operation goes on; but closing the communicator
        then aborts it, unless it is waited for again.
        """
        if timeout is not None and not timeout >= 0:
            raise InvalidArgumentError(f"timeout: {timeout!r} is not a number of seconds from 0 on")
        if self._ordered and timeout is None:
            self.done()
        elif self._keep is not None:
            self.interrupted = False
            try:
                self._wait(timeout)
            except InProgressError:
                raise
            except BaseException:
                self.interrupted = True
                raise
        if self._error is not None:
            raise self._error
        return self._result

    def _wait(self, timeout: float | None) -> None:
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _SLICE if end is None else min(_SLICE, max(0.0, end - time.monotonic()))
            code = lib.hfreduceWorkWait(self._handle, left)
            if code != lib.hfreduceInProgress:
                self._end(code)
                return
            if end is not None and time.monotonic() >= end:
                raise InProgressError(f"the operation had not ended after {timeout} s; it goes on (its own deadline is longer)")

    def done(self) -> bool:
        """Whether the operation has ended, well or badly. Does not wait."""
        if self._keep is None:
            return True
        flag = ffi.new("int *")
        code = lib.hfreduceWorkTest(self._handle, flag)
        if flag[0]:
            self._end(code)
        return bool(flag[0])

    def exception(self) -> HfreduceError | None:
        """The error of an operation that failed; None if it ended well or still runs. Does not wait."""
        self.done()
        return self._error

    def _end(self, code: int) -> None:
        if code and self._error is None:
            info = ffi.new("hfreduceErrorInfo_t *")
            lib.hfreduceWorkErrorInfo(self._handle, info)
            self._error = from_info(code, info)
        elif not code:
            try:
                self._result = settle(self._result)
            except HfreduceError as error:
                self._error = error
        self._keep = None

    def __repr__(self) -> str:
        state = "running" if not self.done() else "done" if self._error is None else f"failed: {self._error}"
        return f"<hfreduce.Work {state}>"


def take(keep: Any, result: Any, running: deque[Work]) -> Work:
    """The work of this thread's blocking call that came back before its end."""
    handle = ffi.new("hfreduceWork_t *")
    check(lib.hfreduceTakeWork(handle))
    return Work(handle[0], keep, result, running)


def salvage(keep: Any, result: Any, running: deque[Work]) -> Work | None:
    """A signal handler raised as a blocking call came back: what it left running goes on as async work, and keeps its arrays."""
    handle = ffi.new("hfreduceWork_t *")
    if lib.hfreduceTakeWork(handle):
        return None
    work = Work(handle[0], keep, result, running)
    work.interrupted = True
    return work
