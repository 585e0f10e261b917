"""Who completes futures: threads of our own that wait in the core, never the thread that moves data.

A future's callbacks run in the thread that completes it, and may be slow or wait for other futures. So there is always a thread
left that waits: whoever takes a completion first sees to that, and those that have nothing to do for a while leave.
"""

from __future__ import annotations

import atexit
import itertools
import os
import threading
from typing import Any

from hfreduce._ffi import ffi, lib
from hfreduce.errors import check

# A thread beyond the first leaves after waiting so long in vain.
_LINGER = 5.0


class Completer:
    """Calls `complete()` of works that have ended."""

    def __init__(self) -> None:
        queue = ffi.new("hfreduceCompletionQueue_t *")
        check(lib.hfreduceCompletionQueueCreate(queue))
        self._queue = queue[0]
        self._tokens = itertools.count()
        self._works: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._closed = False

    def add(self, handle: Any, work: Any) -> None:
        """Have work.complete() called, in a thread of ours, once the core's work `handle` has ended."""
        token = next(self._tokens)
        self._works[token] = work
        self._ensure_waiting()
        check(lib.hfreduceWorkNotify(handle, self._queue, token))

    def _ensure_waiting(self) -> None:
        with self._lock:
            if self._idle == 0 and not self._closed:
                thread = threading.Thread(target=self._run, name="hfreduce-completion", daemon=True)
                self._threads.add(thread)
                self._idle += 1
                thread.start()

    def _run(self) -> None:
        token = ffi.new("uint64_t *")
        try:
            while True:
                code = lib.hfreduceCompletionQueuePop(self._queue, _LINGER, token)
                with self._lock:
                    if code == lib.hfreduceInProgress:
                        if self._idle > 1:
                            self._idle -= 1
                            return
                        continue
                    self._idle -= 1
                    if code:
                        return
                work = self._works.pop(int(token[0]))
                self._ensure_waiting()
                work.complete()
                del work  # its tensors go now, not at the next completion
                with self._lock:
                    self._idle += 1
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())

    def close(self) -> None:
        """End the threads; those in a callback have 5 s."""
        with self._lock:
            self._closed = True
            threads = list(self._threads)
        lib.hfreduceCompletionQueueClose(self._queue)
        for thread in threads:
            thread.join(5.0)


_completer: Completer | None = None
_making = threading.Lock()


def completer() -> Completer:
    """The one of this process, made at first use."""
    global _completer
    if _completer is None:
        with _making:
            if _completer is None:
                _completer = Completer()
    return _completer


def _at_exit() -> None:
    # before the interpreter is taken down: a thread that asks for the GIL later aborts the process
    if _completer is not None:
        _completer.close()


def _after_fork() -> None:
    global _completer, _making
    _completer, _making = None, threading.Lock()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_after_fork)
